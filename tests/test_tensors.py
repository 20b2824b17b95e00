"StridedTensor and broadcast_shapes against torch (and NumPy) on hundreds of random shapes, refusals included."

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniai.tensors import (
    StridedTensor,
    broadcast_shapes,
    contiguous,
    contiguous_strides,
    elementwise,
    expand,
    flatten,
    permute,
    reshape,
    set_seed,
    shape_of,
    tensor,
    to_cpu,
    to_device,
    view,
)

many = settings(max_examples=400, deadline=None, derandomize=True)
sizes = st.integers(0, 4)
shapes = st.lists(sizes, max_size=4).map(tuple)


def either(f):
    "What `f` returns, or the kind of refusal."
    try:
        return f()
    except (ValueError, IndexError, RuntimeError):
        return 'refused'


def pair(shape):
    "The same counted-up tensor as ours and torch's."
    data = list(range(prod(shape)))
    return StridedTensor(data, shape), torch.tensor(data, dtype=torch.int64).reshape(shape)


def check_same(ours, theirs):
    "Elements and shape; where an axis is stepped along, its stride too, and the offset."
    assert ours.shape == tuple(theirs.shape) and ours.tolist() == theirs.tolist()
    if theirs.numel():
        assert ours.offset == theirs.storage_offset()
        assert [s for n, s in zip(ours.shape, ours.strides) if n > 1] == [
            s for n, s in zip(theirs.shape, theirs.stride()) if n > 1
        ]


@given(st.lists(shapes, max_size=4))
@many
def test_broadcast_shapes_any(shapes):
    ours = either(lambda: broadcast_shapes(*shapes))
    assert ours == either(lambda: np.broadcast_shapes(*shapes))
    if shapes:
        assert ours == either(
            lambda: tuple(torch.broadcast_tensors(*(torch.empty(s) for s in shapes))[0].shape)
        )


@given(shapes, st.data())
@many
def test_broadcast_shapes_that_fit(shape, data):
    "Random shapes rarely fit, so make some that do: drop leading axes, turn others into 1."
    parts = []
    for _ in range(data.draw(st.integers(1, 4))):
        keep = shape[data.draw(st.integers(0, len(shape))) :]
        parts.append(tuple(data.draw(st.sampled_from([n, 1])) for n in keep))
    assert broadcast_shapes(shape, *parts) == shape == tuple(torch.broadcast_shapes(shape, *parts))
    assert broadcast_shapes(*parts) == tuple(torch.broadcast_shapes(*parts))


def test_broadcast_error_names_shapes_and_axis():
    with pytest.raises(ValueError, match=r"\(5, 3, 2\) and \(4, 1\).*axis -2.*3.*4"):
        broadcast_shapes((5, 3, 2), (4, 1), (1,))
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(3, 4\).*axis -2"):
        broadcast_shapes((1, 4), (2, 4), (4,), (3, 4))
    with pytest.raises(ValueError, match='negative'):
        broadcast_shapes((2, -1))
    for bad in ((2.5, 1), 'ab', None):  # torch refuses these too, in other words
        with pytest.raises(TypeError, match='whole numbers'):
            broadcast_shapes(bad)
    assert broadcast_shapes() == () and broadcast_shapes(3, (2, 1)) == (2, 3)


indices = st.one_of(
    st.integers(-5, 4),
    st.none(),
    st.just(...),
    st.builds(slice, *[st.none() | st.integers(-5, 5)] * 2, st.none() | st.integers(1, 3)),
)
moves = st.one_of(
    st.tuples(
        st.just('index'),
        st.lists(indices, max_size=4).filter(lambda i: i.count(...) < 2).map(tuple),
    ),  # torch lets a second ... pass, NumPy doesn't
    st.tuples(st.just('permute'), st.randoms(use_true_random=False)),
    st.tuples(st.just('expand'), st.lists(sizes, max_size=2).map(tuple)),
    st.tuples(st.just('view'), st.randoms(use_true_random=False)),
)


def factors(n, rng):
    "A random shape that holds n elements, now and then one that doesn't."
    if rng.random() < 0.1:
        return [rng.randint(0, 5), n]
    shape = []
    while n > 1 and rng.random() < 0.8:
        k = rng.choice([d for d in range(1, n + 1) if n % d == 0])
        shape.append(k)
        n //= k
    return shape + [n]


@given(shapes, st.lists(moves, max_size=5))
@many
def test_a_walk_of_views(shape, moves):
    "Any sequence of views: the same elements, strides and offset as torch's, or both refuse."
    a, b = pair(shape)
    for kind, arg in moves:
        if kind == 'index':
            f, g = lambda: a[arg], lambda: b[arg]
        elif kind == 'permute':
            axes = list(range(a.ndim))
            arg.shuffle(axes)
            f, g = lambda: permute(a, *axes), lambda: b.permute(axes)
        elif kind == 'expand':
            to = arg + tuple(n if n != 1 else 3 for n in a.shape)
            f, g = lambda: expand(a, to), lambda: b.expand(to)
        else:
            to = factors(prod(a.shape), arg)
            f, g = lambda: view(a, *to), lambda: b.view(to)
            if (flat := either(lambda: reshape(a, *to))) != 'refused':
                assert flat.tolist() == b.reshape(to).tolist()
        x, y = either(f), either(g)
        assert (x == 'refused') == (isinstance(y, str)), (kind, a.shape, a.strides)
        if x == 'refused':
            continue
        check_same(x, y)
        assert x.storage is a.storage
        a, b = x, y
    assert contiguous(a).tolist() == b.tolist()


@given(st.lists(st.integers(0, 12), max_size=12), shapes, st.data())
@many
def test_strided_views_stay_inside(storage, shape, data):
    "torch.as_strided and the constructor accept and refuse the same; what they accept holds the same numbers."
    strides = tuple(data.draw(st.integers(0, 5)) for _ in shape)
    offset = data.draw(st.integers(0, 6))
    ours = either(lambda: StridedTensor(storage, shape, strides, offset))
    if 0 in shape:
        assert ours.tolist() == torch.empty(shape).tolist()
        return
    theirs = either(
        lambda: torch.tensor(storage, dtype=torch.int64).as_strided(shape, strides, offset)
    )
    assert (ours == 'refused') == isinstance(theirs, str)
    if ours != 'refused':
        assert ours.tolist() == theirs.tolist()


@given(shapes)
@many
def test_strides_shape_and_lists(shape):
    x = torch.arange(prod(shape)).reshape(shape)
    assert contiguous_strides(shape) == torch.empty(shape).stride()
    if 0 not in shape:
        nested = x.tolist()
        assert (
            shape_of(nested) == shape
            and flatten(nested) == x.flatten().tolist()
            and tensor(nested).tolist() == nested
        )


@given(shapes, shapes)
@many
def test_elementwise(s, t):
    (a, b), (c, d) = pair(s), pair(t)
    x, y = either(lambda: elementwise(lambda p, q: 10 * p - q, a, c)), either(lambda: 10 * b - d)
    assert (x == 'refused') == isinstance(y, str)
    if x != 'refused':
        assert x.shape == tuple(y.shape) and x.tolist() == y.tolist()


def test_bad_input():
    t = tensor([[1, 2], [3, 4]])
    for idx, error in (
        (2, IndexError),
        (-3, IndexError),
        ((0, 0, 0), IndexError),
        ((..., ...), IndexError),
        (True, TypeError),
        ('a', TypeError),
        (1.0, TypeError),
        (slice(None, None, -1), ValueError),
    ):
        with pytest.raises(error):
            t[idx]
    for axes in ((0,), (0, 0), (0, 2), (0, 1, 2)):
        with pytest.raises(ValueError, match='once'):
            permute(t, *axes)
    for shape in ((3,), (-1, -1), (3, -1), (-4,)):
        with pytest.raises(ValueError, match='4 elements'):
            view(t, *shape)
    with pytest.raises(ValueError, match='without a copy'):
        view(permute(t, 1, 0), 4)
    with pytest.raises(ValueError, match='ragged'):
        tensor([[1], [2, 3]])
    for args in (((2, 2), (1,)), ((-1,), (1,)), ((4,), (2,)), ((2,), (-1,))):
        with pytest.raises(ValueError):
            StridedTensor([1, 2, 3, 4], *args)
    assert StridedTensor([1, 2, 3], (3,), (-1,), 2).tolist() == [
        3,
        2,
        1,
    ]  # a negative stride is fine while it stays inside


def test_seed_and_devices():
    set_seed(3)
    a = torch.rand(4), np.random.rand(4)
    set_seed(3)
    b = torch.rand(4), np.random.rand(4)
    assert torch.equal(a[0], b[0]) and (a[1] == b[1]).all()
    nested = {'a': [torch.ones(2, dtype=torch.float16), (torch.ones(1), 'text')]}
    moved = to_cpu(to_device(nested, 'cpu'))
    assert (
        moved['a'][0].dtype == torch.float32
        and moved['a'][1][1] == 'text'
        and isinstance(moved['a'][1], tuple)
    )
