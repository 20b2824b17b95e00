"Autograd on random graphs, against PyTorch and finite differences; and what it refuses."

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from miniai.autograd import Tensor, derivative, finite_difference, unbroadcast

quick = settings(deadline=None, derandomize=True, max_examples=150)


# ---- random graphs: a program is a list of steps over a growing pool of values.
# The same program runs on our tensors, on torch's and on numpy's arrays.


class NumpyOps:
    relu = staticmethod(lambda x: np.maximum(x, 0))
    exp, log = staticmethod(np.exp), staticmethod(np.log)
    transpose = staticmethod(lambda x: np.swapaxes(x, -1, -2))


class TorchOps:
    relu, exp, log = (staticmethod(f) for f in (torch.relu, torch.exp, torch.log))
    transpose = staticmethod(lambda x: x.transpose(-1, -2))


class OurOps:
    relu, exp, log = (staticmethod(f) for f in (Tensor.relu, Tensor.exp, Tensor.log))
    transpose = staticmethod(lambda x: x.T)


def run(program, leaves, ops):
    "The pool of all values, and the sum over everything that nothing else used."
    pool, used = list(leaves), set()
    for name, i, j, arg in program:
        a, b = pool[i], pool[j]
        used |= {i, j} if name in '+-*/@' else {i}
        new = {
            '+': lambda: a + b,
            '-': lambda: a - b,
            '*': lambda: a * b,
            '/': lambda: a / (b * b + 1.0),
            '@': lambda: a @ b,
            'neg': lambda: -a,
            'pow': lambda: a**arg,
            'rdiv': lambda: 1.0 / (a * a + 0.5),
            'rsub': lambda: 2.0 - a,
            'exp': lambda: ops.exp(-(a * a)),
            'log': lambda: ops.log(a * a + 1.0),
            'relu': lambda: ops.relu(a),
            'T': lambda: ops.transpose(a),
            'reshape': lambda: a.reshape(arg),
            'index': lambda: a[arg],
            'sum': lambda: a.sum(arg[0], keepdims=arg[1]),
            'mean': lambda: a.mean(arg[0], keepdims=arg[1]),
        }[name]()
        pool.append(new)
    ends = [v for i, v in enumerate(pool) if i not in used]
    loss = ends[0].sum()
    for v in ends[1:]:
        loss = loss + v.sum()
    return pool, loss


OPERATIONS = '+ - * / @ neg pow rdiv rsub exp log relu T reshape index sum mean'.split()


@st.composite
def graphs(draw):
    "Random leaves and a random program over them that is legal by numpy's rules."
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = st.sampled_from([1, 2, 3])
    leaves = [
        rng.normal(size=draw(st.lists(sizes, max_size=3))) for _ in range(draw(st.integers(1, 3)))
    ]
    program, shapes = [], [x.shape for x in leaves]
    for _ in range(draw(st.integers(1, 8))):
        name = draw(st.sampled_from(OPERATIONS + ['@', 'relu', 'index']))
        i, j = (draw(st.integers(0, len(shapes) - 1)) for _ in 'ij')
        shape, arg = shapes[i], None
        if name == 'pow':
            arg = draw(st.sampled_from([0, 1, 2, 3]))
        if name == 'T' and len(shape) < 2:
            continue
        if name == 'reshape':
            n = int(np.prod(shape))
            arg = draw(
                st.sampled_from(
                    [(n,), (1, n), (n, 1), (-1,)] + ([(2, n // 2)] if n % 2 == 0 else [])
                )
            )
        if name in ('sum', 'mean'):
            axes = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)) if shape else set()
            axis = (
                draw(st.sampled_from([tuple(axes), tuple(a - len(shape) for a in axes), min(axes)]))
                if axes
                else None
            )
            keep = draw(st.booleans()) if axes else False
            arg = (axis, keep)
        if name == 'index':
            if not shape:
                continue
            picks = st.integers(-shape[0], shape[0] - 1)
            arg = draw(
                st.one_of(
                    picks,
                    st.just(slice(None)),
                    st.just(slice(1, None)),
                    st.lists(picks, min_size=1, max_size=5),
                    st.just((Ellipsis, 0)),
                    st.just((slice(None), None)),
                )
            )
        step = name, i, j, arg
        try:
            pool, _ = run([step], [np.ones(shape) for shape in shapes], NumpyOps)
        except ValueError:
            continue  # this pair doesn't fit together
        if 0 < np.size(pool[-1]) <= 200:
            program.append(step)
            shapes.append(np.shape(pool[-1]))
    assume(program)
    return leaves, program


@settings(quick, max_examples=400)
@given(graphs())
def test_random_graphs_equal_torch(case):
    arrays, program = case
    ours, theirs = (
        [Tensor(a, requires_grad=True) for a in arrays],
        [torch.tensor(a, requires_grad=True) for a in arrays],
    )
    pool, loss = run(program, ours, OurOps)
    pool_t, loss_t = run(program, theirs, TorchOps)
    for a, b in zip(pool, pool_t):
        assert a.shape == tuple(b.shape)
        np.testing.assert_allclose(a.data, b.detach().numpy(), rtol=1e-10, atol=1e-10)
    loss.backward()
    loss_t.backward()
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-8, atol=1e-8)


@quick
@given(graphs())
def test_random_graphs_equal_finite_differences(case):
    arrays, program = case
    pool, _ = run(program, arrays, NumpyOps)
    for name, i, _, _ in program:  # a relu has no slope at its corner, so keep away from it
        if name == 'relu':
            assume(np.abs(pool[i]).min() > 1e-3)
    assume(all(np.abs(v).max() < 100 for v in pool))
    ours = [Tensor(a, requires_grad=True) for a in arrays]
    run(program, ours, OurOps)[1].backward()
    for k, a in enumerate(arrays):
        measured = finite_difference(
            lambda v: run(program, [v if i == k else b for i, b in enumerate(arrays)], NumpyOps)[1],
            a,
        )
        np.testing.assert_allclose(ours[k].grad, measured, rtol=1e-4, atol=1e-5)


def test_random_graphs_reach_every_operation():
    "The two tests above would prove little if their programs left operations out."
    seen = set()

    @settings(quick, database=None)
    @given(graphs())
    def collect(case):
        seen.update(name for name, *_ in case[1])

    collect()
    assert seen == set(OPERATIONS)


# ---- single operations that the random graphs don't reach


@quick
@given(
    st.lists(st.sampled_from([1, 2, 3]), max_size=3),
    st.integers(0, 2),
    st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_unbroadcast_is_the_adjoint_of_broadcasting(shape, extra, ones):
    "<broadcast(x), g> = <x, unbroadcast(g)> for every x and g defines it."
    small = tuple(1 if one else n for n, one in zip(shape, ones))
    big = (2,) * extra + tuple(shape)
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=small), rng.normal(size=big)
    back = unbroadcast(g, small)
    assert back.shape == small
    np.testing.assert_allclose((np.broadcast_to(x, big) * g).sum(), (x * back).sum(), atol=1e-12)


@pytest.mark.parametrize(
    'a,b',
    [
        ((3,), (3,)),
        ((2, 3), (3,)),
        ((3,), (3, 2)),
        ((4, 2, 3), (3, 5)),
        ((2, 3), (4, 3, 5)),
        ((4, 1, 2, 3), (6, 3, 2)),
        ((5, 2, 3), (3,)),
        ((3,), (5, 3, 2)),
    ],
)
def test_matmul_with_vectors_and_batches(a, b):
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=a), rng.normal(size=b)
    x, y = (Tensor(v, requires_grad=True) for v in arrays)
    p, q = (torch.tensor(v, requires_grad=True) for v in arrays)
    ours, theirs = x @ y, p @ q
    assert ours.shape == tuple(theirs.shape)
    (ours * ours).sum().backward()
    (theirs * theirs).sum().backward()
    np.testing.assert_allclose(x.grad, p.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(y.grad, q.grad.numpy(), atol=1e-12)


def test_arrays_and_numbers_on_either_side():
    x = Tensor([1.0, 2.0, 4.0], requires_grad=True)
    a = np.array([3.0, 5.0, 7.0])
    for out, expect in [
        (a + x, [1, 1, 1]),
        (a - x, [-1, -1, -1]),
        (a * x, a),
        (a / x, -a / x.data**2),
        (a @ x, a),
        (2 - x, [-1] * 3),
        (8 / x, -8 / x.data**2),
        (x / 2, [0.5] * 3),
    ]:
        assert isinstance(out, Tensor)
        x.zero_grad()
        out.sum().backward()
        np.testing.assert_allclose(x.grad, expect)


def test_masks_and_repeated_indices():
    a = np.arange(6.0).reshape(2, 3)
    for i in (a > 2, (np.array([0, 1, 1]), np.array([2, 0, 0])), (slice(None), [0, 0, 1])):
        x, t = Tensor(a, requires_grad=True), torch.tensor(a, requires_grad=True)
        (x[i] * x[i]).sum().backward()
        j = (
            torch.tensor(i)
            if isinstance(i, np.ndarray)
            else tuple(torch.tensor(k) if not isinstance(k, slice) else k for k in i)
        )
        (t[j] * t[j]).sum().backward()
        np.testing.assert_array_equal(x.grad, t.grad.numpy())


def test_float32_stays_float32():
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    y = ((x * 2 + 1.5) / 3 - np.float64(1)) ** 2
    assert y.dtype == np.float32 and (y @ np.ones(3)).exp().mean().dtype == np.float32
    # a float64 operand makes a float64 result, but the slope keeps x's own type
    (y * Tensor(np.ones(3))).sum().backward()
    assert x.grad.dtype == np.float32


def test_changing_data_after_the_fact_leaves_the_graph_alone():
    "An optimizer replaces `data`; earlier slopes are those of the earlier numbers."
    x, w = Tensor([2.0], requires_grad=True), Tensor([3.0], requires_grad=True)
    y = (x * w).sum()
    w.data = w.data - 100
    y.backward()
    assert x.grad.tolist() == [3.0]


def test_relu_of_the_infinite():
    x = Tensor([-np.inf, -1.0, 0.0, 2.0, np.inf], requires_grad=True)
    y = x.relu()
    y.backward(np.ones(5))
    assert y.data.tolist() == [0, 0, 0, 2, np.inf] and x.grad.tolist() == [0, 0, 0, 1, 1]


def test_a_chain_longer_than_pythons_stack():
    x = Tensor(1.0, requires_grad=True)
    y = x
    for _ in range(20_000):
        y = y + 1e-4
    y.backward()
    assert x.grad == 1 and abs(y.item() - 3) < 1e-9


def test_doubling_graph_is_walked_once_per_tensor():
    "y = y + y fifty times has 2**50 paths; following each would take for ever."
    x = Tensor(1.0, requires_grad=True)
    y = x
    for _ in range(50):
        y = y + y
    y.backward()
    assert x.grad == 2.0**50 and len(y.graph()) == 51


def test_no_memory_is_kept_where_no_slope_is_wanted():
    x, w = Tensor([1.0, 2.0]), Tensor([3.0, 4.0], requires_grad=True)
    assert (x * x).parents == () and not (x * x).requires_grad
    y = (x * w).sum()
    y.backward()
    assert len(y.graph()) == 3 and not (w.detach() * x).requires_grad
    with pytest.raises(ValueError, match='requires_grad=True'):
        x.grad


def test_gradients_are_never_shared():
    "Two parents of a sum get the same numbers, but not the same memory."
    x, y = Tensor([1.0, 2.0], requires_grad=True), Tensor([1.0, 2.0], requires_grad=True)
    (x + y).sum().backward()
    x.grad[0] = 99
    assert y.grad.tolist() == [1.0, 1.0]


def test_backward_from_a_given_slope():
    a = np.random.default_rng(0).normal(size=(3, 2))
    x, t = Tensor(a, requires_grad=True), torch.tensor(a, requires_grad=True)
    (x * x).backward(a)
    (t * t).backward(torch.tensor(a))
    np.testing.assert_allclose(x.grad, t.grad.numpy())
    y, start = x * 1.0, np.ones((3, 2))
    y.backward(start)
    start[:] = 99
    assert (y.grad == 1).all()  # the caller's array was copied


def test_a_second_backward_adds():
    x = Tensor([1.0, 2.0], requires_grad=True)
    (x * x).sum().backward()
    (x * 3.0).sum().backward()
    assert x.grad.tolist() == [2 + 3, 4 + 3]
    x.zero_grad()
    (x * 3.0).sum().backward()
    assert x.grad.tolist() == [3, 3]


# ---- finite differences


@quick
@given(st.floats(-3, 3), st.floats(-2, 2), st.floats(-2, 2))
def test_derivative_of_polynomials(x, a, b):
    def f(x):
        return a * x**3 + b * x**2 - x

    assert abs(derivative(f, x) - (3 * a * x**2 + 2 * b * x - 1)) < 1e-6


@pytest.mark.parametrize('x', [1e-3, 1.0, 1000.0, 3e4])
@pytest.mark.parametrize(
    'kind,tol',
    [
        (float, 1e-8),
        (np.float64, 1e-8),
        (np.float32, 1e-3),
        (np.float16, 0.2),
        (lambda x: torch.tensor(x, dtype=torch.float64), 1e-8),
        (lambda x: torch.tensor(x, dtype=torch.float32), 1e-3),
        (lambda x: torch.tensor(x, dtype=torch.bfloat16), 0.5),
    ],
)
def test_the_step_suits_the_size_and_the_precision(kind, tol, x):
    "A step of 1e-5 is lost in a float32 at 1000, and the slope would be 0."

    def f(v):
        return v * (v / x)  # no overflow in 16 bits

    assert abs(float(derivative(f, kind(x))) - 2) < tol * max(1, 1 / x)
    if kind in (float, np.float64, np.float32):
        assert abs(finite_difference(f, kind(x)) - 2) < tol * max(1, 1 / x)


@pytest.mark.parametrize('x', [[1, 2, 30], np.array([1, 2, 30]), torch.tensor([1.0, 2.0, 30.0])])
def test_whole_numbers_lists_and_tensors(x):
    assert np.allclose(derivative(lambda x: x**2, x), [2, 4, 60], rtol=1e-3)
    assert np.allclose(finite_difference(lambda x: (x**2).sum(), x), [2, 4, 60], rtol=1e-2)


@pytest.mark.parametrize('kind,tol', [('central', 1e-8), ('forward', 1e-5), ('backward', 1e-5)])
def test_finite_difference_kinds_and_calls(kind, tol):
    calls, factors = [], np.arange(6.0).reshape(2, 3)

    def f(x):
        calls.append(1)
        return (np.sin(x) * factors).sum()

    x = np.random.default_rng(0).normal(size=(2, 3))
    before = x.copy()
    slopes = finite_difference(f, x, kind=kind)
    np.testing.assert_allclose(slopes, np.cos(x) * factors, atol=tol)
    assert len(calls) == (12 if kind == 'central' else 7) and np.array_equal(x, before)
    assert finite_difference(f, np.zeros((0, 2, 3)), kind=kind).shape == (0, 2, 3)


# ---- bad input


def table(**cases):
    return pytest.mark.parametrize('error,match,f', cases.values(), ids=cases.keys())


row, ones = Tensor([[1.0, 2.0, 3.0]], requires_grad=True), np.ones
empty = Tensor(np.zeros((0, 2)), requires_grad=True)


@table(
    backward_of_many=(ValueError, r'one number.*\(1, 3\)', row.backward),
    grad_too_early=(ValueError, 'call backward', lambda: row.grad),
    nothing_wanted=(ValueError, 'requires_grad=True', Tensor(1.0).backward),
    start=(ValueError, r'\(3,\).*\(1, 3\)', lambda: (row * 1.0).backward(ones(3))),
    product=(ValueError, r'multiply.*\(1, 3\).*\(2,\).*equal', lambda: row * ones(2)),
    matrix=(ValueError, r'matmul.*\(1, 3\).*\(2, 3\).*k, m', lambda: row @ ones((2, 3))),
    number=(ValueError, r'matmul.*\(1, 3\).*\(\)', lambda: row @ 2.0),
    reshape=(ValueError, 'cannot reshape', lambda: row.reshape(2, 2)),
    mean=(ValueError, 'no numbers', empty.mean),
    power=(TypeError, 'plain number', lambda: row**row),
    comparison=(TypeError, 'not supported', lambda: row > 0),
    index=(IndexError, 'out of bounds', lambda: row[5]),
    int=(TypeError, 'holds floats', lambda: Tensor(3)),
    ints=(TypeError, 'holds floats', lambda: Tensor([1, 2])),
    bool=(TypeError, 'holds floats', lambda: Tensor([True])),
    complex=(TypeError, 'holds floats', lambda: Tensor(np.array([1 + 2j]))),
    text=(TypeError, 'holds floats', lambda: Tensor(['a'])),
    none=(TypeError, 'holds floats', lambda: Tensor(None)),
    bytes=(TypeError, 'holds floats', lambda: Tensor(np.arange(3, dtype=np.uint8))),
)
def test_tensor_refuses(error, match, f):
    with pytest.raises(error, match=match):
        f()


@pytest.mark.parametrize('f', [derivative, finite_difference])
@pytest.mark.parametrize(
    'error,match,x,h',
    [(ValueError, 'above 0', 1.0, h) for h in (0, -1e-3, np.nan, np.inf)]
    + [
        (ValueError, 'NaN', [1.0, np.nan], None),
        (ValueError, 'infinite', [1.0, -np.inf], None),
        (ValueError, 'larger h', [1.0], 1e-20),
        (TypeError, 'complex', [1j], None),
        (TypeError, 'real numbers', ['a'], None),
    ],
)
def test_no_slope_there(f, error, match, x, h):
    with pytest.raises(error, match=match):
        f(np.sum, x, h)


def test_finite_difference_refuses():
    with pytest.raises(ValueError, match=r'one number.*\(2,\)'):
        finite_difference(np.sin, [1.0, 2.0])
    with pytest.raises(ValueError, match="'sideways'"):
        finite_difference(np.sum, [1.0], kind='sideways')
