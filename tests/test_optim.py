"The optimizers and data loaders of lesson 07 against PyTorch's, and what they refuse."

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from miniai.nn import Linear, Parameter, ReLU, Sequential, cross_entropy
from miniai.optim import SGD, Adam, DataLoader, Dataset, Optimizer, RMSProp

quick = settings(deadline=None, derandomize=True, max_examples=100)


# ---- data


@quick
@given(st.integers(1, 30), st.integers(1, 12), st.booleans())
def test_batches_equal_torchs(n, batch_size, drop_last):
    x, y = np.arange(n*2.0).reshape(n, 2), np.arange(n)
    pairs = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    theirs = list(torch.utils.data.DataLoader(pairs, batch_size, drop_last=drop_last))
    if not theirs:
        with pytest.raises(ValueError, match='no batch to make'):
            DataLoader(Dataset(x, y), batch_size, drop_last=drop_last)
        return
    loader = DataLoader(Dataset(x, y), batch_size, drop_last=drop_last)
    assert len(loader) == len(theirs)
    for _ in range(2):                   # it can be looped over again
        for (a, b), (c, d) in zip(loader, theirs, strict=True):
            assert np.array_equal(a, c) and np.array_equal(b, d)


@quick
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_shuffling_visits_everyone_once(n, batch_size, seed):
    data = Dataset(np.arange(n), np.arange(n)*10)

    def loader():
        return DataLoader(data, batch_size, shuffle=True, generator=np.random.default_rng(seed))

    one = loader()
    first, second = ([np.concatenate(c) for c in zip(*one)] for _ in range(2))
    for x, y in (first, second):
        assert sorted(x) == list(range(n)) and np.array_equal(y, x*10)   # pairs stay together
    if n > 12:
        assert not np.array_equal(first[0], second[0])
    assert np.array_equal(first[0], np.concatenate([x for x, _ in loader()]))   # the same seed


def test_shuffling_is_even():
    "Each item is as likely in each place: chi-squared of 4,000 orders of 5, 16 degrees of freedom."
    loader = DataLoader(Dataset(np.arange(5)), 5, True, generator=np.random.default_rng(0))
    counts = np.zeros((5, 5))
    for _ in range(4000):
        counts[np.arange(5), next(iter(loader))[0]] += 1
    assert ((counts - 800)**2/800).sum() < 40   # the 99.9th percentile is 39.3


def test_collate_of_tensors_and_mappings_and_own_orders():
    data = [{'image': torch.full((1, 2), float(i)), 'label': i, 'box': (i, np.ones(2)*i)}
            for i in range(4)]
    batch = next(iter(DataLoader(data, 3, sampler=[3, 1, 1])))
    assert isinstance(batch['image'], torch.Tensor) and batch['image'].shape == (3, 1, 2)
    assert batch['label'].tolist() == [3, 1, 1] and batch['box'][1].shape == (3, 2)
    batches = DataLoader(Dataset(np.arange(9)), 2, sampler=[5, 6, 7])
    assert [b[0].tolist() for b in batches] == [[5, 6], [7]] and len(batches) == 2
    assert list(DataLoader([1, 2, 3], 2, collate=sum)) == [3, 3]
    two = np.int64(2)                    # numpy's whole numbers are whole numbers
    assert len(next(iter(DataLoader(Dataset(np.arange(3)), two)))[0]) == 2


# ---- optimizers

PAIRS = {   # ours, PyTorch's, and what both are given after the parameters and the learning rate
    'SGD': (SGD, torch.optim.SGD, ()),
    'momentum': (SGD, torch.optim.SGD, (0.9,)),
    'RMSProp': (RMSProp, torch.optim.RMSprop, ()),
    'RMSProp fast': (RMSProp, torch.optim.RMSprop, (0.8, 1e-3)),
    'Adam': (Adam, torch.optim.Adam, ()),
    'Adam short': (Adam, torch.optim.Adam, ((0.8, 0.9), 1e-4)),
}


@pytest.mark.parametrize('name', PAIRS)
@settings(quick, max_examples=10)
@given(seed=st.integers(0, 2**31), lr=st.floats(1e-4, 0.05))
def test_optimizers_equal_torch_over_50_steps(name, seed, lr):
    "On a random bowl, with a learning rate that changes half-way."
    rng = np.random.default_rng(seed)
    a, start = rng.normal(size=(6, 4)), rng.normal(size=4)
    w, t = Parameter(start), torch.tensor(start, requires_grad=True)
    make, make_theirs, args = PAIRS[name]
    ours, theirs = make([w], lr, *args), make_theirs([t], lr, *args)
    for step in range(50):
        if step == 25:
            ours.lr = theirs.param_groups[0]['lr'] = lr/3
        ours.zero_grad()
        ((w @ a.T)**2).mean().backward()
        ours.step()
        theirs.zero_grad()
        ((torch.tensor(a) @ t)**2).mean().backward()
        theirs.step()
        atol = 1e-5*max(1, abs(w.data).max())
        np.testing.assert_allclose(w.data, t.detach().numpy(), atol=atol)
    assert abs(w.data - start).max() > 1e-5


@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize('dtype, atol', [(np.float64, 1e-9), (np.float32, 1e-4)])
def test_digits_network_equals_torch_over_50_steps(name, dtype, atol):
    x, y = load_digits(return_X_y=True)
    x = (x/8 - 1).astype(dtype)
    rng = np.random.default_rng(0)
    model = Sequential(Linear(64, 32, generator=rng), ReLU(), Linear(32, 10, generator=rng))
    copy = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    for p, q in zip(copy.parameters(), model.parameters()):
        q.data = q.data.astype(dtype)
        p.data = torch.tensor(q.data)
    start = [p.data for p in model.parameters()]
    make, make_theirs, args = PAIRS[name]
    lr = np.float64(0.05 if make is SGD else 1e-3)     # a float64, which must not widen float32
    ours = make(model.parameters(), lr, *args)
    theirs = make_theirs(copy.parameters(), float(lr), *args)
    for i in range(50):
        rows = slice(i*30, i*30 + 64)
        ours.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        ours.step()
        theirs.zero_grad()
        F.cross_entropy(copy(torch.tensor(x[rows])), torch.tensor(y[rows])).backward()
        theirs.step()
    for p, q, s in zip(model.parameters(), copy.parameters(), start):
        np.testing.assert_allclose(p.data, q.detach().numpy(), atol=atol)
        assert p.dtype == dtype and abs(p.data - s).max() > 20*atol


def test_parameters_without_a_gradient_stay_put():
    used, idle = Parameter(np.ones(2)), Parameter(np.ones(2))
    opt = Adam([used, idle], 0.1)
    (used**2).sum().backward()
    opt.step()
    assert (used.data < 1).all() and np.array_equal(idle.data, [1, 1])


# ---- bad input

DATA, W = Dataset(np.zeros((5, 2)), np.zeros(5)), Parameter(np.ones(2))


def step_without_direction():
    w = Parameter(np.ones(2))
    (w**2).sum().backward()
    Optimizer([w], 0.1).step()


REFUSED = {
    'lengths': (ValueError, r'\[5, 4\]', lambda: Dataset(np.zeros(5), np.zeros(4))),
    'no arrays': (ValueError, 'one or more', Dataset),
    'no rows': (ValueError, 'no batch to make of 0', lambda: DataLoader(Dataset(np.zeros((0, 2))))),
    'no items': (ValueError, 'no batch to make of 0', lambda: DataLoader([])),
    'batches of 0': (ValueError, 'batch_size is 0', lambda: DataLoader(DATA, 0)),
    'batches of -3': (ValueError, 'batch_size is -3', lambda: DataLoader(DATA, -3)),
    'half an item': (ValueError, '2.5.*whole number', lambda: DataLoader(DATA, 2.5)),
    'text': (ValueError, 'whole number', lambda: DataLoader(DATA, '8')),
    'none': (ValueError, 'whole number', lambda: DataLoader(DATA, None)),
    'two orders': (ValueError, 'not both', lambda: DataLoader(DATA, shuffle=True, sampler=[0])),
    'empty order': (ValueError, 'no batch to make of 0', lambda: DataLoader(DATA, sampler=[])),
    'all dropped': (ValueError, 'no batch to make', lambda: DataLoader(DATA, 6, drop_last=True)),
    'momentum': (ValueError, 'momentum', lambda: SGD([W], 0.1, 1.5)),
    'alpha': (ValueError, 'alpha', lambda: RMSProp([W], 0.1, 1.0)),
    'beta2': (ValueError, 'beta2', lambda: Adam([W], 0.1, (0.9, 1.0))),
    'no direction': (NotImplementedError, 'direction', step_without_direction),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refuses(name):
    error, match, f = REFUSED[name]
    with pytest.raises(error, match=match):
        f()


@pytest.mark.parametrize('make', [SGD, RMSProp, Adam])
def test_optimizers_refuse(make):
    for error, match, params, lr in [
        (ValueError, 'no parameters', [], 0.1), (TypeError, 'ndarray', [np.ones(2)], 0.1),
        *((ValueError, 'learning rate', [W], lr) for lr in (0, -1, np.nan, np.inf)),
    ]:
        with pytest.raises(error, match=match):
            make(params, lr)
    with pytest.raises(ValueError, match='call loss.backward'):
        make([W], 0.1).step()
