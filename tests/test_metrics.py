"""FID, KID, precision, recall and the report against other formulas, on streams, on bad input."""

import math
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniai.metrics import (
    FeatureStats,
    ImageEval,
    Reservoir,
    fid,
    kid,
    mmd,
    nearest_distance,
    precision_recall,
    with_floor,
)


def features(n, m, d, seed=0, rank=None):
    "Two sets of correlated features; of lower rank than d if asked for."
    gen = torch.Generator().manual_seed(seed)

    def make(k):
        x = torch.randn(k, rank or d, generator=gen, dtype=torch.float64)
        return x @ torch.randn(rank or d, d, generator=gen, dtype=torch.float64)

    return make(n), make(m) + 0.3


def by_scipy(a, b):
    "The field's usual route: SciPy's root of the product, which isn't symmetric."
    ca, cb = a.T.cov().reshape(a.shape[1], -1), b.T.cov().reshape(b.shape[1], -1)
    root = np.real(scipy.linalg.sqrtm((ca @ cb).numpy()))
    return ((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace()).item() - 2 * np.trace(
        root
    )


def without_covariance(a, b):
    "From the centred sets alone: exact also where covariances are singular."
    A, B = a - a.mean(0), b - b.mean(0)
    n, m = len(a) - 1, len(b) - 1
    cross = torch.linalg.svdvals(A @ B.T).sum() / math.sqrt(n * m)
    return (
        (a.mean(0) - b.mean(0)).square().sum()
        + A.square().sum() / n
        + B.square().sum() / m
        - 2 * cross
    ).item()


# --- FID


@pytest.mark.parametrize(
    'n,m,d', [(50, 70, 1), (300, 200, 8), (2000, 1500, 64), (1000, 900, 256), (1200, 1100, 512)]
)
def test_fid_equals_scipys_route(n, m, d):
    a, b = features(n, m, d, seed=d)
    assert fid(a, b) == pytest.approx(by_scipy(a, b), rel=1e-6)


@pytest.mark.parametrize('n,m,d', [(2000, 1500, 64), (1200, 1100, 512), (300, 280, 512)])
def test_fid_equals_pytorch_fid(n, m, d):
    pytest.importorskip('pytorch_fid')  # comes with the benchmarks' libraries
    from conftest import import_torchvision

    import_torchvision()
    from pytorch_fid.fid_score import calculate_frechet_distance

    a, b = features(n, m, d, seed=d)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # theirs warns about SciPy's options
        theirs = calculate_frechet_distance(
            a.mean(0).numpy(), a.T.cov().numpy(), b.mean(0).numpy(), b.T.cov().numpy()
        )
    assert fid(a, b) == pytest.approx(theirs, rel=1e-3)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.integers(2, 40),
    st.integers(2, 40),
    st.integers(1, 60),
    st.integers(0, 10**6),
    st.floats(1e-3, 1e3),
)
def test_fid_of_any_size_and_rank_equals_the_route_without_covariance(n, m, d, seed, scale):
    a, b = features(n, m, d, seed)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ours = fid(a * scale, b * scale)
    size = scale**2 * (a.T.cov().reshape(d, -1).trace() + b.T.cov().reshape(d, -1).trace()).item()
    assert ours == pytest.approx(
        without_covariance(a * scale, b * scale), rel=1e-6, abs=1e-9 * size
    )
    assert 0 <= fid(a * scale, a * scale) < 1e-9 * size


@pytest.mark.parametrize('n,d,rank', [(60, 512, None), (400, 128, 10), (3, 512, None)])
def test_rank_deficient_sets_are_exact_and_silent(n, d, rank):
    a, b = features(n, n + 5, d, rank=rank)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert fid(a, b) == pytest.approx(without_covariance(a, b), rel=1e-6)
    assert fid(a, a) < 1e-9 * a.T.cov().trace()


def test_fid_of_features_that_never_vary():
    a = torch.ones(10, 4)
    assert fid(a, a) == 0 and fid(a, a + 2) == pytest.approx(16)
    b, c = features(50, 50, 4)
    assert fid(a, b) == pytest.approx(without_covariance(a.double(), b), rel=1e-9)


# --- statistics of a stream


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(1, 6),
    st.sampled_from([0.0, 1e3, 1e7]),
    st.integers(0, 10**6),
)
def test_stats_of_batches_equal_those_of_the_whole(sizes, d, offset, seed):
    x = (
        torch.randn(
            sum(sizes), d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        + offset
    )
    parts, stats, merged = x.split(sizes), FeatureStats(), FeatureStats()
    for p in parts:
        stats.update(p)
        merged.merge(FeatureStats(p))
    for s in (stats, merged):
        assert s.n == len(x) and torch.allclose(s.mean, x.mean(0), rtol=1e-14, atol=1e-12)
        if len(x) > 1:
            assert torch.allclose(s.cov, np_cov(x), rtol=1e-6, atol=1e-7)


def np_cov(x):
    return torch.from_numpy(np.cov(x.numpy(), rowvar=False).reshape(x.shape[1], -1))


def test_fid_takes_features_or_stats_and_a_root_is_not_kept_too_long():
    a, b = features(100, 90, 8)
    sa, sb = FeatureStats(a), FeatureStats(b[:50])
    assert fid(sa, sb) == fid(a, b[:50])
    sb.update(b[50:])
    assert fid(sa, sb) == pytest.approx(fid(a, b), rel=1e-9) and fid(sa, b) == fid(a, b)
    before = sa.scatter.clone()
    FeatureStats().merge(sa).update(b)
    assert torch.equal(sa.scatter, before) and sa.n == 100  # merging leaves the other alone


def test_a_reservoir_is_fair_and_keeps_order():
    r = Reservoir(50)
    for part in torch.arange(30).split(7):
        r.update(part)
    assert r.rows.tolist() == list(range(30))
    counts = torch.zeros(200)
    for seed in range(400):
        r = Reservoir(50, seed)
        for part in torch.arange(200).split(33):
            r.update(part)
        assert len(r.rows) == 50 and (r.rows.diff() > 0).all()
        counts[r.rows] += 1
    # each stays with chance 1/4: 100 of 400 times, standard deviation 8.7
    assert (counts - 100).abs().max() < 5 * 8.7 and abs(
        counts[:100].sum() - counts[100:].sum()
    ) < 0.05 * counts.sum()


# --- KID


def mmd_by_loops(x, y):
    def k(u, v):
        return (sum(p * q for p, q in zip(u, v)) / len(u) + 1) ** 3

    def own(z):
        pairs = [k(u, v) for i, u in enumerate(z) for j, v in enumerate(z) if i != j]
        return sum(pairs) / len(pairs)

    return own(x) + own(y) - 2 * sum(k(u, v) for u in x for v in y) / (len(x) * len(y))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 5), st.integers(0, 10**6))
def test_mmd_equals_the_double_loop(n, m, d, seed):
    x, y = features(n, m, d, seed)
    ours, theirs = mmd(x, y), mmd_by_loops(x.tolist(), y.tolist())
    assert ours == pytest.approx(
        theirs, rel=1e-9, abs=1e-9 * (1 + max(x.abs().max(), y.abs().max()).item() ** 6)
    )


@pytest.mark.parametrize('n,m,block', [(40, 40, 200), (40, 173, 200), (200, 64, 8)])
def test_kid_is_unbiased_and_its_error_is_the_scatter(n, m, block):
    gen = torch.Generator().manual_seed(0)
    vals, errs = torch.tensor(
        [
            kid(torch.randn(n, 8, generator=gen), torch.randn(m, 8, generator=gen), block)
            for _ in range(250)
        ],
        dtype=torch.float64,
    ).T
    assert abs(vals.mean()) < 4 * vals.std() / 250**0.5  # 0 for equal sets, at any n
    assert errs.square().mean().sqrt() == pytest.approx(vals.std(), rel=0.25)


def test_kid_of_different_sets_is_the_kernels_true_distance():
    # single numbers, N(0, 1) against N(1, 1): E (xy + 1)^3 from the moments of a Gaussian
    def e(p, q):
        return sum(math.comb(3, i) * p[i] * q[i] for i in range(4))

    m0, m1 = [1, 0, 1, 0], [1, 1, 2, 4]
    exact = e(m0, m0) + e(m1, m1) - 2 * e(m0, m1)
    gen = torch.Generator().manual_seed(0)
    value, err = kid(
        torch.randn(40000, 1, generator=gen), torch.randn(40000, 1, generator=gen) + 1, 400
    )
    assert abs(value - exact) < 4 * err < 0.2 * exact


# --- precision and recall


def shares_by_loops(real, new, k):
    "As the paper has it (eqs. 1 and 2), one point at a time."

    def covered(points, centres):
        radii = [sorted(math.dist(c, o) for o in centres)[k] for c in centres]
        hits = [any(math.dist(p, c) <= r for c, r in zip(centres, radii)) for p in points]
        return sum(hits) / len(hits)

    return covered(new, real), covered(real, new)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(6, 25), st.integers(6, 25), st.integers(1, 5), st.integers(0, 10**6))
def test_precision_and_recall_equal_the_loops(n, m, d, seed):
    real, new = features(n, m, d, seed)
    new[:2] = real[:2]  # copies: at distance 0 exactly
    for k in (1, 3, 5):
        assert precision_recall(real, new, k) == shares_by_loops(real.tolist(), new.tolist(), k)


def test_precision_and_recall_of_more_rows_than_one_chunk():
    gen = torch.Generator().manual_seed(0)
    real, new = torch.randn(1100, 3, generator=gen), torch.randn(2100, 3, generator=gen) * 1.5
    real, new = real.double(), new.double()

    def covered(points, centres):
        balls = torch.cdist(centres, centres).sort(1).values[:, 3]
        return (torch.cdist(points, centres) <= balls).any(1).double().mean().item()

    expected = covered(new, real), covered(real, new)
    assert precision_recall(real, new) == pytest.approx(expected, abs=1e-3)


def test_precision_and_recall_of_known_cases():
    gen = torch.Generator().manual_seed(0)
    real = torch.randn(200, 4, generator=gen)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    assert precision_recall(real, real[:1].repeat(50, 1)) == (1, 1 / 200)  # one picture only
    two = torch.cat([real, real + 100])
    assert precision_recall(two, real) == (1, 0.5)  # half is missing
    assert precision_recall(real, two) == (0.5, 1)  # half isn't real


# --- the floor


def test_the_floor_is_disjoint_of_equal_n_and_has_the_same_reference():
    real, new, seen = torch.arange(50), torch.arange(100, 130), []
    found = with_floor(lambda ref, rows: seen.append((ref, rows)) or len(seen), new, real, 12, 5)
    for (ref, drawn), (same, floor) in zip(seen[::2], seen[1::2]):
        assert torch.equal(ref, same) and len(drawn) == len(floor) == 12
        assert sorted([*ref.tolist(), *floor.tolist()]) == real.tolist()  # nothing twice
        assert len(drawn.unique()) == 12 and drawn.min() >= 100
    assert len({tuple(ref.tolist()) for ref, _ in seen}) == 5
    assert [v.tolist() for v in found] == [[1, 3, 5, 7, 9], [2, 4, 6, 8, 10]]


def test_samples_as_good_as_real_ones_are_on_the_floor():
    # stand-ins for pictures, so that new real ones can be drawn; sure to a few standard errors
    gen = torch.Generator().manual_seed(0)
    differences = []
    for _ in range(20):
        new, real = torch.randn(2, 400, 6, generator=gen, dtype=torch.float64)
        figures = [
            [v.mean(0) for v in with_floor(metric, new, real, n, 10, gen)]
            for metric, n in ((fid, 80), (precision_recall, 200))
        ]
        differences.append(torch.cat([(a - b).reshape(-1) for a, b in figures]))
    differences = torch.stack(differences)
    assert (differences.mean(0).abs() < 4 * differences.std(0) / 20**0.5).all()


def test_several_figures_and_the_same_generator():
    a, b = features(60, 90, 3)
    new, floor = with_floor(precision_recall, a, b, 40, 7)
    assert new.shape == floor.shape == (7, 2) and new.dtype == torch.float64
    again = with_floor(precision_recall, a, b, 40, 7, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], new) and torch.equal(again[1], floor)


# --- the copy check


def test_nearest_distance_equals_the_loop_and_finds_exact_copies():
    gen = torch.Generator().manual_seed(0)
    x, train = torch.randn(40, 2, 5, 5, generator=gen), torch.randn(60, 2, 5, 5, generator=gen)
    loop = torch.stack(
        [torch.stack([(o - t).square().sum().sqrt() for t in train]).min() for o in x]
    )
    assert torch.allclose(nearest_distance(x, train), loop, rtol=1e-5)
    assert (nearest_distance(train[:7], train) == 0).all()


@pytest.mark.parametrize('copied,low,high', [(0, 0, 0.09), (0.1, 0.1, 0.2), (0.25, 0.25, 0.35)])
def test_partial_copying_shows(copied, low, high):
    ev = ImageEval(None, pictures(500), pictures(300, 1))
    new = pictures(300, 2)
    new[: round(300 * copied)] = ev.train[: round(300 * copied)]
    m = ev.measure(new)
    assert low <= m['copy'] <= high and m['real_copy'] == pytest.approx(0.05)
    assert m['copy_std'] == pytest.approx((0.05 * 0.95 * 2 / 300) ** 0.5)
    assert (m['copy'] > 0.05 + 2.5 * m['copy_std']) == (copied > 0)


# --- the report


def pictures(n, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def ev():
    w = torch.randn(64, 6, generator=torch.Generator().manual_seed(9)) / 8
    return ImageEval(
        lambda x: x.flatten(1) @ w, pictures(300), pictures(100, 1), 'six numbers', keep=150
    )


def same(a, b):
    "Whether two measurements agree but for rounding."
    return a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-5) for k in a)


def test_a_stream_gives_the_figures_of_the_whole(ev):
    x = pictures(250, 2)
    whole = ev.measure(x)
    for cut in (1, 33, 100, 249):
        assert same(ev.measure(x.split(cut)), whole)
    assert same(ev.measure(iter(x.split(50))), whole)
    f = ev.features(x)
    assert whole['n'] == 250 and whole['kept'] == 150 and whole['group'] == 100
    assert whole['fid_train'] == pytest.approx(fid(f, ev.f_train), rel=1e-9)
    assert whole['fid_held_out'] == pytest.approx(fid(f, ev.f_held), rel=1e-9)


def test_figures_are_those_of_the_functions(ev):
    for n in (90, 140):
        x = pictures(n, 3)
        m, f, real = ev.measure(x), ev.features(x).double(), torch.cat([ev.f_train, ev.f_held])
        assert m['kept'] == n and m['group'] == min(n, 100)
        for side, v in zip(('', 'real_'), with_floor(fid, f, real, min(n, 100))):
            assert m[f'{side}fid'] == pytest.approx(v.mean().item())
            assert m[f'{side}fid_std'] == pytest.approx(v.std().item())
        for side, v in zip(('', 'real_'), with_floor(precision_recall, f, ev.f_held, 50)):
            assert [m[f'{side}precision'], m[f'{side}recall']] == pytest.approx(v.mean(0).tolist())
            assert m[f'{side}recall_std'] == pytest.approx(v[:, 1].std().item())
        assert m['kid'] == kid(f, ev.f_train)
        assert m['real_split'] == fid(ev.f_held, ev.f_train)
        assert ev.real['fid'] == pytest.approx(ev.measure(pictures(100, 5))['real_fid'], rel=0.3)


def test_the_report_prints_its_figures(ev, capsys):
    m = ev.report(pictures(250, 2).split(100))
    short = capsys.readouterr().out
    ev.report(pictures(250, 2), verbose=True)
    out = capsys.readouterr().out
    for words in (
        '250 new pictures; real: 300 train, 100 held out; seen through six numbers',
        '150 of the new pictures',
    ):
        assert words in short and words in out
    assert len(short.splitlines()) == 7 and len(out.splitlines()) == 10
    for key in ('fid', 'real_fid', 'precision', 'real_recall', 'copy'):
        assert f'{m[key]:.2f}' in short
    for key in ('fid_train', 'fid_held_out', 'real_split'):
        assert f'{m[key]:.2f}' in out
    assert len({len(line) for line in out.splitlines()[1:-1]}) == 1  # the columns line up


def test_eight_wide_pictures_are_enough():
    m = ImageEval(None, pictures(8), pictures(8, 1)).measure(pictures(8, 2))
    assert all(math.isfinite(v) for k, v in m.items() if 'kid' not in k)
    assert m['group'] == 8 and m['precision'] <= 1


MEMORY = textwrap.dedent("""
    import os, torch
    from miniai.metrics import ImageEval
    torch.set_num_threads(1)
    page, most = os.sysconf('SC_PAGE_SIZE')/2**20, 0.
    def pictures(n, seed):
        return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    def stream(n):
        global most
        for i in range(n//500):
            yield pictures(500, i)
            # MB in use now, not the peak of the imports
            most = max(most, int(open('/proc/self/statm').read().split()[1])*page)
    w = torch.randn(64, 64)/8
    ev = ImageEval(lambda x: x.flatten(1) @ w, pictures(400, 0), pictures(300, 1))
    for n in (2000, 2000, 50_000):                                  # the first run warms up
        assert ev.measure(stream(n))['n'] == n
        print(most)
    kept = [ev.features(x).double() for x in stream(50_000)]
    print(most)
""")


@pytest.mark.skipif(
    not Path('/proc/self/statm').exists(), reason='reads the memory in use from Linux'
)
def test_fifty_thousand_samples_need_no_more_memory_than_two_thousand():
    run = subprocess.run([sys.executable, '-c', MEMORY], capture_output=True, text=True, check=True)
    _, few, many, kept = [float(line) for line in run.stdout.splitlines()]
    assert kept - many > 12  # 50,000 rows of 64 doubles are 24 MB: the measure would notice
    assert many - few < 6, f'{many - few:.1f} MB more for 50,000 samples than for 2,000'


# --- bad input

F8 = torch.randn(40, 8, generator=torch.Generator().manual_seed(5))
BAD = [
    (lambda: fid(F8[:1], F8), 'the first features are of 1 pictures: at least 2'),
    (lambda: fid(F8, F8[:0]), 'the second features are of 0'),
    (lambda: fid(F8 * math.nan, F8), 'NaN'),
    (lambda: fid(F8, F8 / 0), 'NaN or infinite'),
    (lambda: fid(F8, F8[:, :3]), '8 and of 3 numbers'),
    (lambda: fid(F8[0], F8), r'must be \(n, d\), not \(8,\)'),
    (lambda: fid(FeatureStats(F8[:1]), F8), 'at least 2'),
    (lambda: fid(FeatureStats(), F8), '0 pictures have no covariance'),
    (lambda: FeatureStats(F8).update(F8[:, :2]), '8 and of 2'),
    (lambda: FeatureStats(F8).merge(FeatureStats(F8[:, :2])), '8 and of 2'),
    (lambda: FeatureStats(F8 * math.inf), 'NaN or infinite'),
    (lambda: kid(F8[:7], F8), 'of 7 pictures: at least 8'),
    (lambda: kid(F8, F8[:, :3]), '8 and of 3'),
    (lambda: kid(F8, F8, block=1), 'block is 1'),
    (lambda: kid(F8, F8 * math.nan), 'the second features hold NaN'),
    (lambda: mmd(F8[:1], F8), 'at least 2'),
    (lambda: mmd(F8, F8[:, :2]), '8 and of 2'),
    (lambda: precision_recall(F8[:3], F8), 'first features are of 3 pictures: at least 4'),
    (lambda: precision_recall(F8, F8[:5], k=5), 'second features are of 5 pictures: at least 6'),
    (lambda: precision_recall(F8, F8[:, :3]), '8 and of 3'),
    (lambda: precision_recall(F8, F8 * math.nan), 'NaN'),
    (lambda: with_floor(fid, F8, F8[:20], 20), "can't draw 20 of 40 new rows and of 20 real ones"),
    (lambda: with_floor(fid, F8[:5], F8, 6), "can't draw 6 of 5 new rows"),
    (lambda: with_floor(fid, F8, F8, 0), 'of at least 1'),
    (lambda: nearest_distance(pictures(3), pictures(3)[:, :, :4]), 'not alike'),
]


@pytest.mark.parametrize('call,message', BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types_are_named():
    with pytest.raises(TypeError, match='must be a tensor of features .* not a list'):
        fid([[1.0, 2.0]], F8)
    with pytest.raises(TypeError, match='not a ndarray'):
        FeatureStats(F8.numpy())


def test_bad_samples_are_named(ev):
    for samples, message in [
        (
            pictures(9).repeat(1, 1, 2, 2),
            r'pictures .*1, 16, 16.*training pictures .*1, 8, 8',
        ),
        (pictures(5), 'there are 5 samples: at least 8'),
        (iter(()), 'there are 0 samples'),
        ([pictures(20), pictures(20)[:, :, :4]], 'not alike'),
        (pictures(20) * math.nan, 'features of the samples hold NaN'),
    ]:
        with pytest.raises(ValueError, match=message):
            ev.measure(samples)
    with pytest.raises(TypeError, match='tensors of floats.*tuple'):
        ev.measure([(pictures(20), torch.zeros(20))])
    with pytest.raises(
        ValueError, match='features of the held-out pictures are of 5 pictures: at least 8'
    ):
        ImageEval(None, pictures(20), pictures(5))
    nan = pictures(20)
    nan[3] = math.nan
    with pytest.raises(ValueError, match='features of the training pictures hold NaN'):
        ImageEval(None, nan, pictures(20))
