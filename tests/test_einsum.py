"einsum against torch.einsum on hundreds of random specs, refusals included."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniai.einsum import best_order, einsum, parse_spec


def many(n):
    return settings(max_examples=n, deadline=None, derandomize=True)


@st.composite
def problems(draw, sizes=st.integers(0, 4)):
    """A spec and operands that fit it.

    Implicit or explicit, diagonals, `...`, sizes of 1 that broadcast, 1 to 5 operands."""
    size = {c: draw(sizes) for c in 'abcdXY'}
    dots = draw(st.lists(sizes, max_size=2))
    n = draw(st.sampled_from([1, 1, 2, 2, 2, 2, 3, 3, 4, 5]))
    terms, shapes = [], []
    for _ in range(n):
        term = draw(st.lists(st.sampled_from('abcdXY'), max_size=4 if n < 4 else 2))
        thin = {
            c for c in set(term) if draw(st.integers(0, 9)) == 0
        }  # of size 1 here, whatever it is elsewhere
        shape = [1 if c in thin else size[c] for c in term]
        if draw(st.integers(0, 3)) == 0:
            under = [
                draw(st.sampled_from([k, k, 1])) for k in dots[draw(st.integers(0, len(dots))) :]
            ]
            at = draw(st.integers(0, len(term)))
            term, shape = term[:at] + ['...'] + term[at:], shape[:at] + under + shape[at:]
        terms.append(''.join(term))
        shapes.append(shape)
    spec = draw(st.sampled_from([',', ' , '])).join(terms)
    if draw(st.booleans()):
        letters = sorted({c for t in terms for c in t if c.isalpha()})
        out = draw(st.permutations(letters))[: draw(st.integers(0, len(letters)))]
        if '...' in spec and draw(st.integers(0, 4)):
            out.insert(draw(st.integers(0, len(out))), '...')
        spec += '->' + ''.join(out)
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return spec, [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


def same(spec, xs, **kw):
    ours, theirs = einsum(spec, *xs), torch.einsum(spec, *xs)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, **kw)


@given(problems())
@many(800)
def test_random_specs(problem):
    same(*problem)


@given(
    problems(sizes=st.integers(1, 3)),
    st.sampled_from([torch.float32, torch.int64, torch.complex128]),
)
@many(150)
def test_random_dtypes(problem, dtype):
    spec, xs = problem
    same(
        spec,
        [(3 * x).to(dtype) for x in xs],
        **({'rtol': 1e-4, 'atol': 1e-3} if dtype == torch.float32 else {}),
    )


@given(problems(sizes=st.integers(2, 3)), st.sampled_from([torch.int32, torch.bool]))
@many(150)
def test_small_dtypes(problem, dtype):
    """torch widens sums of these to int64 and then may refuse its own product (`a,abb` of int32).

    So the values are compared, where torch has an answer."""
    spec, xs = problem
    xs = [x.to(dtype) for x in xs]
    try:
        theirs = torch.einsum(spec, *xs)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(einsum(spec, *xs), theirs, check_dtype=False)


@given(
    problems(sizes=st.integers(2, 3)),
    st.lists(st.sampled_from([torch.float32, torch.float64, torch.int64]), min_size=5, max_size=5),
)
@many(200)
def test_mixed_dtypes(problem, dtypes):
    """Two operands of different dtypes.

    Both refuse to add up their products, both promote where nothing is added up."""
    spec, xs = problem
    xs = [x.to(d) for x, d in zip(xs[:2], dtypes)]
    if spec.split('->')[0].count(',') > 1:
        return
    try:
        torch.einsum(spec, *xs)
    except RuntimeError:
        with pytest.raises(TypeError, match='one dtype'):
            einsum(spec, *xs)
    else:
        same(spec, xs, rtol=1e-4, atol=1e-4)


@given(problems(sizes=st.integers(1, 3)))
@many(100)
def test_gradients(problem):
    spec, xs = problem
    xs = [x.requires_grad_() for x in xs]
    grads = [torch.autograd.grad((f(spec, *xs) ** 2).sum(), xs) for f in (einsum, torch.einsum)]
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs)


@given(
    st.lists(
        st.lists(
            st.sampled_from(['a', 'b', 'c', '...', '.', '1', '-', '>', '->', ',', ' ', 'é', '\n']),
            max_size=6,
        ).map(''.join),
        min_size=1,
        max_size=3,
    ).map(','.join),
    st.lists(st.lists(st.integers(1, 3), max_size=3), max_size=3),
)
@many(500)
def test_garbled_specs(spec, shapes):
    "Specs of random symbols and operands of random shapes: both refuse, or both give the same."
    xs = [torch.ones(s) for s in shapes]
    try:
        theirs = torch.einsum(spec, *xs)
    except (RuntimeError, ValueError):
        with pytest.raises(ValueError):
            einsum(spec, *xs)
    else:
        torch.testing.assert_close(einsum(spec, *xs), theirs)


@given(problems(sizes=st.integers(2, 3)), st.data())
@many(200)
def test_wrong_sizes(problem, data):
    "Change one size of one operand: both refuse, or (a lone letter) both accept."
    spec, xs = problem
    xs = list(xs)
    k = data.draw(st.integers(0, len(xs) - 1))
    if xs[k].ndim == 0:
        return
    shape = list(xs[k].shape)
    shape[data.draw(st.integers(0, len(shape) - 1))] = data.draw(st.sampled_from([0, 1, 5]))
    xs[k] = torch.ones(shape, dtype=torch.float64)
    try:
        torch.einsum(spec, *xs)
    except RuntimeError:
        with pytest.raises(ValueError):
            einsum(spec, *xs)
    else:
        same(spec, xs)


T = torch.ones


@pytest.mark.parametrize(
    'args, message',
    [
        (('ik,kj->ij', T(2, 3), T(4, 5)), r"'k' has size 3 in operand 0 but 4 in operand 1"),
        (
            ('...i,...i->i', T(2, 7, 3), T(2, 6, 3)),
            r"axis -1 under \.\.\. has size 7 in operand 0 but 6 in operand 1",
        ),
        (('ii->i', T(2, 3)), r"'i' has size 2.* 3"),
        (('ii->i', T(1, 3)), r"'i' repeats.*1 and 3"),
        (('ij->ii', T(2, 3)), r"'i' appears more than once in the output"),
        (('ij->ik', T(2, 3)), r"'k' is in the output but in no operand"),
        (('ij,jk->ik', T(2, 3)), r"names 2 operands, but 1 came"),
        (('ij->ij',), r"names 1 operands, but 0 came"),
        (('ijk->i', T(2, 3)), r"operand 0 has 2 axes.*'ijk' names 3"),
        (('i->i', T(2, 3)), r"names 1; name them all, or add '\.\.\.'"),
        (('i1->i', T(2, 3)), r"'1' can't stand"),
        (('i->i->', T(2)), r"can't stand"),
        (('i.j->ij', T(2, 3)), r"'\.' can't stand"),
        (('...i...->i', T(2, 3)), r"more than one '\.\.\.'"),
    ],
)
def test_messages(args, message):
    with pytest.raises(ValueError, match=message):
        einsum(*args)
    with pytest.raises((RuntimeError, ValueError)):
        torch.einsum(*args)


def test_wrong_types():
    with pytest.raises(TypeError, match="'j' sums products of torch.float32 and torch.float64"):
        einsum('ij,jk->ik', T(2, 3), T(3, 4).double())
    with pytest.raises(TypeError, match='bool'):
        einsum('i,i->', T(3).bool(), T(3).bool())
    x = torch.arange(4, dtype=torch.int32)
    assert einsum('a,abb', x, x.expand(4, 4)[:, :, None].expand(4, 4, 4)).item() == einsum(
        'a,abb', x.long(), x.long().expand(4, 4)[..., None].expand(4, 4, 4)
    )
    with pytest.raises(TypeError, match='operand 1 is a list'):
        einsum('i,i->', T(3), [1, 2, 3])
    with pytest.raises(TypeError, match='spec'):
        einsum(T(3), T(3))
    assert (
        einsum('i,j->ij', T(2), torch.arange(3)).dtype == torch.float32
    )  # nothing is added up: torch's promotion, as in torch.einsum


def test_nan_and_inf_pass_through():
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]])
    torch.testing.assert_close(
        einsum('ij,jk->ik', x, x), torch.einsum('ij,jk->ik', x, x), equal_nan=True
    )


def test_parse_spec():
    assert parse_spec('bA,Ac', 2, 2)[1] == 'bc' and parse_spec('bA', 2)[1] == 'Ab'
    assert parse_spec('i...,j...', 2, 3)[1] == 'βαij'


@given(st.lists(st.sampled_from([1, 2, 10, 100, 1000]), min_size=4, max_size=5))
@many(200)
def test_best_order_of_chains(dims):
    "Of a chain of matrices, against the textbook's dynamic programme (Cormen et al., chapter 15)."
    n = len(dims) - 1
    best = {(i, i): 0 for i in range(n)}
    for length in range(1, n):
        for i in range(n - length):
            best[i, i + length] = min(
                best[i, k] + best[k + 1, i + length] + dims[i] * dims[k + 1] * dims[i + length + 1]
                for k in range(i, i + length)
            )
    letters = 'abcde'[: n + 1]
    cost, order = best_order(
        [set(letters[i : i + 2]) for i in range(n)],
        {letters[0], letters[n]},
        dict(zip(letters, dims)),
    )
    assert (
        cost <= best[0, n - 1] and len(order) == n - 1
    )  # with sizes of 1, pairs that aren't neighbours may be cheaper still
    if min(dims) > 1:
        assert cost == best[0, n - 1]


def test_views_cost_nothing():
    x = T(3, 3)
    for spec in ('ij->ji', 'ii->i', 'ij'):
        assert einsum(spec, x).data_ptr() == x.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    a = torch.randn(2, 3, 5, 8, device='cuda')
    torch.testing.assert_close(
        einsum('bhqd,bhkd->bhqk', a, a), torch.einsum('bhqd,bhkd->bhqk', a, a), rtol=1e-2, atol=1e-2
    )
