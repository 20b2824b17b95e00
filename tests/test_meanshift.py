"""Mean shift against scikit-learn, the exact climb and bad input."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.cluster import MeanShift as SklearnMeanShift
from sklearn.cluster import estimate_bandwidth as sklearn_bandwidth
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from miniai.meanshift import MeanShift, estimate_bandwidth, gaussian_kernel, meanshift_step

many = settings(deadline=None, derandomize=True, max_examples=60)
seeds = st.integers(0, 10_000)


def blobs(seed, d=2, k=4, n=60, side=12.0):
    r = np.random.default_rng(seed)
    return np.concatenate([c + r.standard_normal((n, d)) for c in r.uniform(-side, side, (k, d))])


def as_sets(a, b):
    return max(np.linalg.norm(a[:, None] - b[None], axis=2).min(i).max() for i in (0, 1))


@settings(many, max_examples=20)  # scikit-learn takes its time
@given(seeds, st.integers(1, 6), st.floats(0.5, 4))
def test_flat_is_scikit_learn(seed, d, h):
    x = blobs(seed, d)
    ours, theirs = MeanShift(h, kernel='flat').fit(x), SklearnMeanShift(bandwidth=h).fit(x)
    assert ours.cluster_centers_.shape == theirs.cluster_centers_.shape
    assert np.abs(ours.cluster_centers_ - theirs.cluster_centers_).max() < 1e-3
    assert (ours.labels_ == theirs.labels_).all()
    new = x + 0.3
    assert (ours.predict(new) == theirs.predict(new)).all()


@many
@given(seeds, st.integers(1, 3), st.floats(0.5, 4))
def test_approx_finds_the_exact_tops(seed, d, h):
    x = blobs(seed, d, n=120)
    short, exact = MeanShift(h).fit(x), MeanShift(h, approx=False).fit(x)
    assert short.cluster_centers_.shape == exact.cluster_centers_.shape
    assert as_sets(short.cluster_centers_, exact.cluster_centers_) < h / 50


@pytest.mark.parametrize('approx', [True, False])
@many
@given(seeds, st.integers(1, 4), st.floats(0.6, 3))
def test_centres_are_tops(approx, seed, d, h):
    "The gradient is zero there, and the landscape falls in every direction a little way off."
    x = blobs(seed, d)
    c = MeanShift(h, approx=approx).fit(x).cluster_centers_
    assert np.linalg.norm(meanshift_step(c, h, x) - c, axis=1).max() < 1e-4 * h

    def p(q):
        return gaussian_kernel(torch.cdist(torch.tensor(q), torch.tensor(x)), h).sum(1)

    off = np.random.default_rng(seed).standard_normal(c.shape)
    off *= 0.05 * h / np.linalg.norm(off, axis=1, keepdims=True)
    assert (p(c) >= p(c + off) * (1 - 1e-9)).all() and (p(c) >= p(c - off) * (1 - 1e-9)).all()


@many
@given(
    seeds,
    st.integers(1, 20),
    st.integers(1, 50),
    st.integers(1, 5),
    st.floats(0.3, 5),
)
def test_step_is_the_weighted_mean(seed, m, n, d, h):
    r = np.random.default_rng(seed)
    x, y = r.normal(100, 3, (m, d)), r.normal(100, 3, (n, d))
    w = np.exp(-((x[:, None] - y) ** 2).sum(-1) / (2 * h * h))
    if (w.sum(1) < 1e-12).any():
        return
    assert np.allclose(meanshift_step(x, h, y), w @ y / w.sum(1, keepdims=True), atol=1e-7)
    near = ((x[:, None] - y) ** 2).sum(-1) <= h * h
    flat = np.where(near.any(1)[:, None], near @ y / np.maximum(near.sum(1), 1)[:, None], x)
    assert np.allclose(meanshift_step(x, h, y, kernel='flat'), flat)


@many
@given(seeds, st.floats(0.1, 1))
def test_bandwidth_is_scikit_learns(seed, q):
    x = blobs(seed)
    assert np.isclose(estimate_bandwidth(x, quantile=q), sklearn_bandwidth(x, quantile=q))


def test_order_shift_and_scale_change_nothing():
    x = blobs(3, n=300)
    a = MeanShift(1.5).fit(x)
    turn = np.random.default_rng(0).permutation(len(x))
    b, c = MeanShift(1.5).fit(x[turn]), MeanShift(1500).fit(x * 1000 + 1e6)
    assert (a.labels_[turn] == b.labels_).all() and np.allclose(
        a.cluster_centers_, b.cluster_centers_, atol=1e-3
    )
    assert (a.labels_ == c.labels_).all() and np.allclose(
        a.cluster_centers_, (c.cluster_centers_ - 1e6) / 1000, atol=1e-3
    )


def test_strays_cost_little_and_stay_alone():
    x = np.concatenate([blobs(1, n=500), [[1e7, -1e7], [-1e6, 3e8]]])
    m = MeanShift(2.0).fit(x)
    assert len(np.unique(m.labels_[-2:])) == 2 and not np.isin(m.labels_[-2:], m.labels_[:-2]).any()
    assert np.allclose(m.cluster_centers_[m.labels_[-2:]], x[-2:])


def test_kind_of_input_decides_kind_of_output():
    x = blobs(0, n=100)
    ref = MeanShift(1.5).fit(x)
    assert isinstance(ref.cluster_centers_, np.ndarray) and ref.labels_.dtype.kind == 'i'
    for dtype in (torch.float64, torch.float32):
        m = MeanShift(1.5).fit(torch.tensor(x, dtype=dtype, requires_grad=True))
        assert isinstance(m.labels_, torch.Tensor) and not m.cluster_centers_.requires_grad
        assert np.allclose(m.cluster_centers_, ref.cluster_centers_, atol=1e-4)
        assert (m.predict(torch.tensor(x, dtype=dtype)) == m.labels_).all() and (
            m.predict(x) == ref.labels_
        ).all()
    assert (MeanShift(1.5).fit_predict(x.tolist()) == ref.labels_).all()
    assert (
        MeanShift(1.5).fit(x[::-1]).labels_ == ref.labels_[::-1]
    ).all()  # a view with negative strides
    before = x.copy()
    MeanShift(1.5).fit(x)
    assert (x == before).all()


def test_whole_numbers():
    x = np.round(blobs(2, n=100)).astype(np.int64)
    ref = MeanShift(1.5).fit(x.astype(float))
    for y in (x, x.astype(np.int8), torch.tensor(x), torch.tensor(x, dtype=torch.int32)):
        m = MeanShift(1.5).fit(y)
        assert (
            np.allclose(m.cluster_centers_, ref.cluster_centers_)
            and (np.asarray(m.labels_) == ref.labels_).all()
        )
    assert np.allclose(meanshift_step(torch.tensor(x), 1.5), meanshift_step(x.astype(float), 1.5))
    assert meanshift_step(torch.tensor(x), 1.5).dtype == torch.float64


def test_one_point_and_equal_points():
    for kernel in ('gaussian', 'flat'):
        for h in (2.0, None):
            one = MeanShift(h, kernel=kernel).fit([[3.0, 4.0, 5.0, 6.0]])
            assert np.allclose(one.cluster_centers_, [[3, 4, 5, 6]]) and one.labels_.tolist() == [0]
            same = MeanShift(h, kernel=kernel).fit(np.ones((50, 2)))
            assert np.allclose(same.cluster_centers_, [[1, 1]]) and not same.labels_.any()


BAD = [
    (torch.zeros(5), ValueError, r'\(points, dimensions\)'),
    (np.zeros((2, 3, 4)), ValueError, r'\(2, 3, 4\)'),
    (3.0, ValueError, 'shape'),
    (np.zeros((0, 2)), ValueError, r'neither of them 0.*\(0, 2\)'),
    (torch.zeros(4, 0), ValueError, r'\(4, 0\)'),
    ([], ValueError, r'\(0,\)'),
    (np.array([[0, 1], [np.nan, 2]]), ValueError, 'row 1'),
    (torch.tensor([[0.0, torch.inf]]), ValueError, 'infinity'),
    (np.array([['a']]), TypeError, 'dtype'),
    (np.array([[1j]]), TypeError, 'complex'),
    (torch.tensor([[1j]]), TypeError, 'complex'),
    (torch.tensor([[True]]), TypeError, 'bool'),
    ([[None, 1.0]], TypeError, 'object'),
]


@pytest.mark.parametrize('x,error,words', BAD)
def test_bad_points(x, error, words):
    for f in (
        MeanShift(1.0).fit,
        MeanShift().fit,
        lambda x: meanshift_step(x, 1.0),
        estimate_bandwidth,
        MeanShift(1.0).fit(np.eye(2)).predict,
    ):
        with pytest.raises(error, match=words):
            f(x)


@pytest.mark.parametrize('h', [0, -1.0, np.nan, np.inf])
def test_bad_bandwidth(h):
    x = np.eye(3)
    for f in (MeanShift(h).fit, lambda x: meanshift_step(x, h), lambda x: gaussian_kernel(x, h)):
        with pytest.raises(ValueError, match='bandwidth is .* positive'):
            f(x)


def test_other_bad_settings():
    x = np.eye(3)
    for kw in ({'kernel': 'cosine'}, {'max_iter': 0}, {'tol': -1}):
        with pytest.raises(ValueError, match=next(iter(kw))):
            MeanShift(1.0, **kw).fit(x)
    with pytest.raises(ValueError, match='kernel'):
        meanshift_step(x, 1.0, kernel='cosine')
    with pytest.raises(ValueError, match='dimensions'):
        meanshift_step(x, 1.0, np.zeros((4, 2)))
    with pytest.raises(ValueError, match='quantile'):
        estimate_bandwidth(x, quantile=0)
    with pytest.raises(ValueError, match='dimensions'):
        MeanShift(1.0).fit(x).predict(np.zeros((4, 2)))
    with pytest.raises(NotFittedError):
        MeanShift(1.0).predict(x)


def test_scikit_learn_estimator():
    x = blobs(5)
    m = clone(MeanShift(1.5, approx=False)).set_params(bandwidth=2.0)
    assert m.get_params()['bandwidth'] == 2.0 and m.get_params()['approx'] is False
    assert (make_pipeline(StandardScaler(), MeanShift(0.3)).fit_predict(x) >= 0).all()
    m.fit(x)
    assert (pickle.loads(pickle.dumps(m)).predict(x) == m.labels_).all()


@pytest.mark.parametrize('kernel', ['gaussian', 'flat'])
def test_rows_in_chunks_are_the_rows_at_once(kernel):
    x = blobs(6, n=400)  # 1,600 points: three chunks
    parts = [meanshift_step(part, 2.0, x, kernel) for part in np.array_split(x, 7)]
    assert np.allclose(meanshift_step(x, 2.0, kernel=kernel), np.concatenate(parts))


@pytest.mark.parametrize('scale', [1e-9, 1.0, 1e9])
def test_the_estimate_keeps_the_scale_and_is_0_only_for_equal_points(scale):
    few = scale * np.array([[0.0, 0], [0, 1], [30, 0], [30, 1]])
    copies = np.repeat(few, 50, 0)
    for x in (few, copies):  # the first tenth of the neighbours is at distance 0
        m = MeanShift().fit(x)
        assert np.isclose(m.bandwidth_, scale) and np.isclose(estimate_bandwidth(x), scale)
        assert len(m.cluster_centers_) == 2
    same = MeanShift().fit(copies[:50] + 5 * scale)
    assert same.bandwidth_ == 0 and np.allclose(same.cluster_centers_, 5 * scale, atol=0)
