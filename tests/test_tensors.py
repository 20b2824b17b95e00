"""broadcast_shapes against NumPy and torch on hundreds of random shapes; seeds and devices.

(Views, strides and arithmetic are compared with torch's, on random chains, in the lesson.)"""

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniai.tensors import (
    broadcast_shapes,
    default_device,
    set_seed,
    to_cpu,
    to_device,
    whole_number,
)

many = settings(max_examples=400, deadline=None, derandomize=True)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def either(f):
    "What `f` returns, or that it refused."
    try:
        return f()
    except (ValueError, RuntimeError):
        return 'refused'


@given(st.lists(shapes, max_size=4))
@many
def test_broadcast_shapes_any(shapes):
    ours = either(lambda: broadcast_shapes(*shapes))
    assert ours == either(lambda: np.broadcast_shapes(*shapes))
    tensors = [torch.empty(s) for s in shapes]
    if shapes:
        assert ours == either(lambda: tuple(torch.broadcast_tensors(*tensors)[0].shape))


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


@pytest.mark.parametrize('shapes, error, message', [
    (((5, 3, 2), (4, 1), (1,)), ValueError, r'\(5, 3, 2\) and \(4, 1\).*axis -2.*3.*4'),
    (((1, 4), (2, 4), (4,), (3, 4)), ValueError, r'\(2, 4\) and \(3, 4\).*axis -2'),
    (((2, -1),), ValueError, 'negative'),
    (((2.5, 1),), TypeError, 'whole numbers'),
    (('ab',), TypeError, 'whole numbers'),
    ((None,), TypeError, 'whole numbers'),
])
def test_broadcast_errors_name_shapes_and_axis(shapes, error, message):
    with pytest.raises(error, match=message):
        broadcast_shapes(*shapes)


def test_broadcast_shapes_of_few_things():
    assert broadcast_shapes() == () and broadcast_shapes(3, (2, 1)) == (2, 3)
    assert broadcast_shapes(np.int64(3), torch.Size([2, 1])) == (2, 3)


def test_seed():
    set_seed(3)
    a = torch.rand(4), np.random.rand(4)
    set_seed(3)
    b = torch.rand(4), np.random.rand(4)
    assert torch.equal(a[0], b[0]) and (a[1] == b[1]).all()


def test_devices():
    Pair = namedtuple('Pair', 'x y')
    half = torch.ones(2, dtype=torch.float16, requires_grad=True)
    nested = {'a': [half, (torch.ones(1), 'text')], 'b': Pair(torch.zeros(1).double(), None)}
    moved = to_cpu(to_device(nested, 'cpu'))
    assert moved['a'][0].dtype == torch.float32 and not moved['a'][0].requires_grad
    assert isinstance(moved['a'][1], tuple) and moved['a'][1][1] == 'text'
    assert isinstance(moved['b'], Pair) and moved['b'].x.dtype == torch.float64
    assert type(to_device(UserDict(x=half), 'cpu')) is UserDict
    assert to_device(half, 'cpu') is half                   # nothing to do, nothing copied
    assert to_device(half).device.type == default_device().type


@pytest.mark.parametrize('v', [5, np.int64(5), np.uint8(5), np.array(5), torch.tensor(5)], ids=repr)
def test_whole_numbers_of_every_kind(v):
    assert type(whole_number('n', v)) is int and whole_number('n', v) == 5


@pytest.mark.parametrize(
    'value',
    [0, -1, 11, 2.0, True, '5', None, [5], np.nan, np.float32(5), torch.tensor(5.0), torch.ones(9)],
    ids=lambda v: repr(v)[:20],
)
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match='n is .*expected a whole number from 1 to 10') as e:
        whole_number('n', value, high=10)
    assert len(str(e.value)) < 150
