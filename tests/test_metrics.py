"""FID, KID and the report against independent formulas, on streams, and on bad input."""

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
    fid_interval,
    kid,
    mmd,
    nearest_distance,
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


# --- how sure


def test_interval_holds_the_known_distance_and_the_correction_has_no_bias():
    d, shift, gen = 8, 0.3, torch.Generator().manual_seed(0)
    true, held, values, raw = d * shift**2, [], [], []
    for i in range(60):
        a, b = torch.randn(200, d, generator=gen) + shift, torch.randn(600, d, generator=gen)
        value, low, high = fid_interval(
            a, b, 0.9, n_boot=60, generator=torch.Generator().manual_seed(i)
        )
        assert low < value < high
        held.append(low < true < high)
        values.append(value)
        raw.append(fid(a, b))
    assert 0.78 <= np.mean(held) <= 0.99  # 90%, counted 60 times
    assert abs(np.mean(values) - true) < 4 * np.std(values) / 60**0.5  # no bias to be seen ...
    assert np.mean(raw) - true > 4 * np.std(raw) / 60**0.5  # ... where the plain figure has one


def test_same_input_same_interval():
    a, b = features(80, 90, 4)
    assert fid_interval(a, b, n_boot=20) == fid_interval(a, b, n_boot=20)
    wide, narrow = (fid_interval(a, b, level, n_boot=200) for level in (0.99, 0.5))
    assert wide[1] < narrow[1] < narrow[2] < wide[2]


# --- the copy check


def test_nearest_distance_equals_the_loop_and_finds_exact_copies():
    gen = torch.Generator().manual_seed(0)
    x, train = torch.randn(40, 2, 5, 5, generator=gen), torch.randn(60, 2, 5, 5, generator=gen)
    loop = torch.stack(
        [torch.stack([(o - t).square().sum().sqrt() for t in train]).min() for o in x]
    )
    assert torch.allclose(nearest_distance(x, train), loop, rtol=1e-5)
    assert (nearest_distance(train[:7], train) == 0).all()


# --- the report


def pictures(n, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def ev():
    w = torch.randn(64, 6, generator=torch.Generator().manual_seed(9)) / 8
    return ImageEval(
        lambda x: x.flatten(1) @ w, pictures(300), pictures(100, 1), 'six numbers', keep=150
    )


def test_a_stream_gives_the_figures_of_the_whole(ev):
    x = pictures(250, 2)
    whole = ev.measure(x)
    for cut in (1, 33, 100, 249):
        assert ev.measure(x.split(cut)) == whole
    assert ev.measure(iter(x.split(50))) == whole
    f = ev.features(x)
    assert whole['n'] == 250 and whole['kept'] == 150 and whole['group'] == 100
    assert whole['fid_train'] == pytest.approx(fid(f, ev.f_train), rel=1e-9) and whole[
        'fid_held_out'
    ] == pytest.approx(fid(f, ev.f_held), rel=1e-9)
    groups = [fid(f[:100], ev.f_train), fid(f[100:200], ev.f_train)]
    assert whole['fid'] == pytest.approx(np.mean(groups), rel=1e-6) and whole[
        'fid_std'
    ] == pytest.approx(np.std(groups, ddof=1), rel=1e-5)


def test_figures_of_a_small_sample_are_those_of_the_functions(ev):
    x = pictures(90, 3)
    m = ev.measure(x)
    assert m['kept'] == m['group'] == 90 and math.isnan(m['fid_std'])
    assert m['kid'] == kid(ev.features(x).double(), ev.f_train) and m['copy'] == pytest.approx(
        nearest_distance(x, ev.train).median().item()
    )
    assert m['fid_interval'] == fid_interval(ev.features(x), ev.f_train) and m[
        'fid'
    ] == pytest.approx(m['fid_train'])
    assert m['real_split'] == fid(ev.f_held, ev.f_train) and m['real_fid'] == pytest.approx(
        ev.floors.mean().item()
    )


def test_the_report_prints_its_figures(ev, capsys):
    m = ev.report(pictures(250, 2).split(100))
    out = capsys.readouterr().out
    assert (
        '250 new pictures; real: 300 train rows, 100 held-out rows; seen through six numbers' in out
        and '150 of the new pictures' in out
    )
    for key in ('fid_train', 'fid_held_out', 'copy', 'real_copy', 'real_split'):
        assert f'{m[key]:.2f}' in out
    assert len({len(line) for line in out.splitlines()[1:-1]}) == 1  # the columns line up


def test_wide_features_have_no_interval_but_all_else(capsys):
    few = ImageEval(None, pictures(40), pictures(20, 1))
    m = few.report(pictures(20, 2))
    assert (
        math.isnan(m['fid_interval'][0]) and m['fid'] > 0 and 'too few' in capsys.readouterr().out
    )


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
    (lambda: fid(F8[0], F8), r'must be features \(n, d\), but have shape \(8,\)'),
    (lambda: fid(FeatureStats(F8[:1]), F8), 'at least 2'),
    (lambda: fid(FeatureStats(), F8), 'statistics of 0 pictures'),
    (lambda: FeatureStats(F8).update(F8[:, :2]), '8 and of 2'),
    (lambda: FeatureStats(F8).merge(FeatureStats(F8[:, :2])), '8 and of 2'),
    (lambda: FeatureStats(F8 * math.inf), 'NaN or infinite'),
    (lambda: kid(F8[:7], F8), 'of 7 pictures: at least 8'),
    (lambda: kid(F8, F8[:, :3]), '8 and of 3'),
    (lambda: kid(F8, F8, block=1), 'hold no pairs'),
    (lambda: kid(F8, F8 * math.nan), 'the second features hold NaN'),
    (lambda: mmd(F8[:1], F8), 'at least 2'),
    (lambda: mmd(F8, F8[:, :2]), '8 and of 2'),
    (lambda: fid_interval(F8[:31], F8), 'at least 32 of each'),
    (lambda: fid_interval(F8, F8, level=95), 'between 0 and 1'),
    (lambda: fid_interval(F8, F8, n_boot=1), 'at least 2 resampled'),
    (lambda: nearest_distance(pictures(3), pictures(3)[:, :, :4]), 'must be alike'),
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
            r'samples are \(1, 16, 16\), the real pictures \(1, 8, 8\)',
        ),
        (pictures(5), 'there are 5 samples: at least 8'),
        (iter(()), 'there are 0 samples'),
        ([pictures(20), pictures(20)[:, :, :4]], 'must be alike'),
        (pictures(20) * math.nan, 'features of the samples hold NaN'),
    ]:
        with pytest.raises(ValueError, match=message):
            ev.measure(samples)
    with pytest.raises(TypeError, match='a batch is a tuple'):
        ev.measure([(pictures(20), torch.zeros(20))])
    with pytest.raises(
        ValueError, match='features of the held-out pictures are of 5 pictures: at least 8'
    ):
        ImageEval(None, pictures(20), pictures(5))
    nan = pictures(20)
    nan[3] = math.nan
    with pytest.raises(ValueError, match='features of the training pictures hold NaN'):
        ImageEval(None, nan, pictures(20))
