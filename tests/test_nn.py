"The parts of lesson 06 against PyTorch's, one by one; and what they refuse."

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from miniai.autograd import Tensor
from miniai.nn import (
    SGD,
    Adam,
    BatchSampler,
    DataLoader,
    Dataset,
    Linear,
    Module,
    Optimizer,
    Parameter,
    RandomSampler,
    ReLU,
    RMSProp,
    Sequential,
    SequentialSampler,
    accuracy,
    cross_entropy,
    log_softmax,
    mse_loss,
)
from miniai.tensors import set_seed

quick = settings(deadline=None, derandomize=True, max_examples=100)


# ---- modules


def test_parameters_are_found_by_path_and_once():
    class Block(Module):
        def __init__(self):
            self.a, self.pair, self.scale = (
                Linear(2, 3),
                [ReLU(), (Linear(3, 3, bias=False),)],
                Parameter(np.ones(3)),
            )
            self.again, self.size = (
                self.a,
                3,
            )  # a layer in two places, and something that's no layer

    names = list(Block().named_parameters())
    assert names == ['a.weight', 'a.bias', 'pair.1.0.weight', 'scale']
    assert list(Sequential(Block(), Linear(3, 1)).named_parameters())[-2:] == [
        'layers.1.weight',
        'layers.1.bias',
    ]
    assert ReLU().parameters() == []


def test_tied_weights_get_both_slopes():
    w = Linear(3, 3, bias=False)
    t = torch.tensor(w.weight.data, requires_grad=True)
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    (Sequential(w, ReLU(), w)(x) ** 2).sum().backward()
    (torch.relu(torch.tensor(x) @ t.T) @ t.T).pow(2).sum().backward()
    np.testing.assert_allclose(w.weight.grad, t.grad.numpy(), rtol=1e-4, atol=1e-5)


@quick
@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_linear_equals_torch(batch, n_in, n_out, bias, seed):
    rng = np.random.default_rng(seed)
    layer, theirs = Linear(n_in, n_out, bias, generator=rng), torch.nn.Linear(n_in, n_out, bias)
    theirs.load_state_dict({k: torch.tensor(p.data) for k, p in layer.named_parameters().items()})
    x = rng.normal(size=(*batch, n_in)).astype(np.float32)
    ours, out = layer(x), theirs(torch.tensor(x))
    assert ours.shape == tuple(out.shape) and ours.dtype == np.float32
    np.testing.assert_allclose(ours.data, out.detach().numpy(), atol=1e-5)
    (ours**2).sum().backward()
    out.pow(2).sum().backward()
    for p, q in zip(layer.parameters(), theirs.parameters()):
        np.testing.assert_allclose(p.grad, q.grad.numpy(), rtol=1e-4, atol=1e-4)


def test_linear_init_has_torchs_range_and_is_seeded():
    w = Linear(100, 400, generator=np.random.default_rng(0)).weight.data
    assert abs(w).max() <= 0.1 and abs(w.std() - 0.2 / 12**0.5) < 1e-3 and abs(w.mean()) < 1e-3
    assert np.array_equal(w, Linear(100, 400, generator=np.random.default_rng(0)).weight.data)
    set_seed(3)
    a = Linear(4, 4).weight.data
    set_seed(3)
    assert np.array_equal(a, Linear(4, 4).weight.data) and not np.array_equal(
        a, Linear(4, 4).weight.data
    )


# ---- losses


@quick
@given(
    st.integers(1, 6),
    st.integers(1, 7),
    st.floats(0.1, 1e4),
    st.floats(-1e5, 1e5),
    st.integers(0, 999),
)
def test_cross_entropy_equals_torch(n, classes, scale, shift, seed):
    rng = np.random.default_rng(seed)
    a, y = rng.normal(size=(n, classes)) * scale + shift, rng.integers(0, classes, n)
    z, t = Tensor(a, requires_grad=True), torch.tensor(a, requires_grad=True)
    ours, theirs = cross_entropy(z, y), F.cross_entropy(t, torch.tensor(y))
    ours.backward()
    theirs.backward()
    np.testing.assert_allclose(ours.item(), theirs.item(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(z.grad, t.grad.numpy(), atol=1e-9)
    np.testing.assert_allclose(
        log_softmax(z).data, F.log_softmax(t, -1).detach().numpy(), rtol=1e-9, atol=1e-8
    )
    assert abs(z.grad.sum()) < 1e-9  # probabilities always sum to 1, so what one gains others lose


def test_mse_and_accuracy():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4))
    x, t = Tensor(a, requires_grad=True), torch.tensor(a, requires_grad=True)
    mse_loss(x, b).backward()
    F.mse_loss(t, torch.tensor(b)).backward()
    np.testing.assert_allclose(x.grad, t.grad.numpy())
    assert accuracy(np.eye(4), [0, 1, 2, 0]) == 0.75 and accuracy(Tensor(np.eye(2)), [1, 0]) == 0


# ---- data


@quick
@given(st.integers(1, 30), st.integers(1, 12), st.booleans())
def test_batches_equal_torchs(n, batch_size, drop_last):
    x, y = np.arange(n * 2.0).reshape(n, 2), np.arange(n)
    theirs = list(
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y)),
            batch_size,
            drop_last=drop_last,
        )
    )
    if not theirs:
        with pytest.raises(ValueError, match='no batch to make'):
            DataLoader(Dataset(x, y), batch_size, drop_last=drop_last)
        return
    loader = DataLoader(Dataset(x, y), batch_size, drop_last=drop_last)
    assert len(loader) == len(theirs)
    for _ in range(2):  # it can be looped over again
        for (a, b), (c, d) in zip(loader, theirs, strict=True):
            assert np.array_equal(a, c) and np.array_equal(b, d)


@quick
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_shuffling_visits_everyone_once(n, batch_size, seed):
    data = Dataset(np.arange(n), np.arange(n) * 10)
    loader = DataLoader(data, batch_size, shuffle=True, generator=np.random.default_rng(seed))
    first, second = ([np.concatenate(c) for c in zip(*loader)] for _ in range(2))
    for x, y in (first, second):
        assert sorted(x) == list(range(n)) and np.array_equal(y, x * 10)  # pairs stay together
    if n > 12:
        assert not np.array_equal(first[0], second[0])
    again = DataLoader(data, batch_size, shuffle=True, generator=np.random.default_rng(seed))
    assert np.array_equal(first[0], np.concatenate([x for x, _ in again]))  # same seed, same order


def test_shuffling_is_even():
    "Each item is as likely in each place: chi-squared over 4,000 orders of 5, 16 degrees of freedom."
    sampler = RandomSampler(range(5), np.random.default_rng(0))
    counts = np.zeros((5, 5))
    for _ in range(4000):
        counts[np.arange(5), list(sampler)] += 1
    assert ((counts - 800) ** 2 / 800).sum() < 40  # the 99.9th percentile is 39.3


def test_collate_of_tensors_mappings_and_own_samplers():
    data = [
        {'image': torch.full((1, 2), float(i)), 'label': i, 'box': (i, np.ones(2) * i)}
        for i in range(4)
    ]
    batch = next(iter(DataLoader(data, 3, sampler=[3, 1, 1])))
    assert isinstance(batch['image'], torch.Tensor) and batch['image'].shape == (3, 1, 2)
    assert batch['label'].tolist() == [3, 1, 1] and batch['box'][1].shape == (3, 2)
    assert list(SequentialSampler(range(3))) == [0, 1, 2] and list(BatchSampler([5, 6, 7], 2)) == [
        [5, 6],
        [7],
    ]
    assert (
        len(next(iter(DataLoader(Dataset(np.arange(3)), np.int64(2))))[0]) == 2
    )  # numpy's whole numbers are whole numbers


# ---- optimizers

PAIRS = {
    'SGD': (lambda p, lr: SGD(p, lr), lambda p, lr: torch.optim.SGD(p, lr)),
    'momentum': (lambda p, lr: SGD(p, lr, 0.9), lambda p, lr: torch.optim.SGD(p, lr, 0.9)),
    'RMSProp': (lambda p, lr: RMSProp(p, lr), lambda p, lr: torch.optim.RMSprop(p, lr)),
    'RMSProp fast': (
        lambda p, lr: RMSProp(p, lr, 0.8, 1e-3),
        lambda p, lr: torch.optim.RMSprop(p, lr, 0.8, 1e-3),
    ),
    'Adam': (lambda p, lr: Adam(p, lr), lambda p, lr: torch.optim.Adam(p, lr)),
    'Adam short': (
        lambda p, lr: Adam(p, lr, (0.8, 0.9), 1e-4),
        lambda p, lr: torch.optim.Adam(p, lr, (0.8, 0.9), 1e-4),
    ),
}


@pytest.mark.parametrize('name', PAIRS)
@settings(quick, max_examples=10)
@given(seed=st.integers(0, 2**31), lr=st.floats(1e-4, 0.05))
def test_optimizers_equal_torch_over_50_steps(name, seed, lr):
    "On a random bowl, with a learning rate that changes half-way."
    rng = np.random.default_rng(seed)
    a, start = rng.normal(size=(6, 4)), rng.normal(size=4)
    w, t = Parameter(start), torch.tensor(start, requires_grad=True)
    ours, theirs = PAIRS[name][0]([w], lr), PAIRS[name][1]([t], lr)
    for step in range(50):
        if step == 25:
            ours.lr = theirs.param_groups[0]['lr'] = lr / 3
        ours.zero_grad()
        ((w @ a.T) ** 2).mean().backward()
        ours.step()
        theirs.zero_grad()
        ((torch.tensor(a) @ t) ** 2).mean().backward()
        theirs.step()
        np.testing.assert_allclose(
            w.data, t.detach().numpy(), atol=1e-5 * max(1, abs(w.data).max())
        )
    assert abs(w.data - start).max() > 1e-5


@pytest.mark.parametrize('name', list(PAIRS))
def test_digits_network_equals_torch_over_50_steps_in_float32(name):
    x, y = load_digits(return_X_y=True)
    x = (x / 8 - 1).astype(np.float32)
    model = Sequential(
        Linear(64, 32, generator=np.random.default_rng(0)),
        ReLU(),
        Linear(32, 10, generator=np.random.default_rng(1)),
    )
    copy = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    for p, q in zip(copy.parameters(), model.parameters()):
        p.data = torch.tensor(q.data)
    lr = 0.05 if name in ('SGD', 'momentum') else 1e-3
    ours, theirs = PAIRS[name][0](model.parameters(), lr), PAIRS[name][1](copy.parameters(), lr)
    for i in range(50):
        rows = slice(i * 30, i * 30 + 64)
        ours.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        ours.step()
        theirs.zero_grad()
        F.cross_entropy(copy(torch.tensor(x[rows])), torch.tensor(y[rows])).backward()
        theirs.step()
    for p, q in zip(model.parameters(), copy.parameters()):
        np.testing.assert_allclose(p.data, q.detach().numpy(), atol=1e-5)
    assert all(p.dtype == np.float32 for p in model.parameters())


def test_parameters_without_a_slope_stay_put():
    used, idle = Parameter(np.ones(2)), Parameter(np.ones(2))
    opt = Adam([used, idle], 0.1)
    (used**2).sum().backward()
    opt.step()
    assert (used.data < 1).all() and np.array_equal(idle.data, [1, 1])


# ---- bad input


def refuse(error, match, f, *args, **kw):
    with pytest.raises(error, match=match):
        f(*args, **kw)


def test_layers_refuse():
    layer = Linear(4, 2)
    refuse(ValueError, r'rows of 4.*\(3, 5\)', layer, np.zeros((3, 5)))
    refuse(ValueError, r'rows of 4.*\(\)', layer, 1.0)
    refuse(TypeError, 'floats.*int64', layer, np.zeros((3, 4), np.int64))
    refuse(ValueError, 'at least one', Linear, 0, 2)
    refuse(ValueError, 'at least one', Linear, 2, -1)
    refuse(NotImplementedError, 'Module needs a `forward`', Module(), 1)
    refuse(TypeError, 'floats', Parameter, [1, 2])


def test_losses_refuse():
    z = Tensor(np.zeros((3, 4)), requires_grad=True)
    refuse(ValueError, r'\(3, 4\) and \(2,\)', cross_entropy, z, [0, 1])
    refuse(ValueError, r'\(3, 4\) and \(3, 4\)', cross_entropy, z, np.eye(4)[:3])
    refuse(ValueError, r'\(4,\)', cross_entropy, z[0], [0, 1, 2, 3])
    refuse(TypeError, 'float64', cross_entropy, z, [0.0, 1.0, 2.0])
    refuse(ValueError, '0 to 3', cross_entropy, z, [0, 1, 4])
    refuse(ValueError, '0 to 3', cross_entropy, z, [0, 1, -1])
    refuse(ValueError, 'no rows', cross_entropy, z[:0], np.zeros(0, int))
    refuse(ValueError, r'\(3, 4\).*\(4,\)', mse_loss, z, np.zeros(4))


def test_data_refuses():
    data = Dataset(np.zeros((5, 2)), np.zeros(5))
    refuse(ValueError, r'\[5, 4\]', Dataset, np.zeros(5), np.zeros(4))
    refuse(ValueError, 'one or more', Dataset)
    refuse(ValueError, 'empty', DataLoader, Dataset(np.zeros((0, 2))))
    refuse(ValueError, 'empty', DataLoader, [])
    for n in (0, -3):
        refuse(ValueError, f'at least 1.*{n}', DataLoader, data, n)
    for n in (2.5, '8', None):
        refuse(TypeError, 'whole number', DataLoader, data, n)
    refuse(ValueError, 'not both', DataLoader, data, shuffle=True, sampler=[0])
    refuse(ValueError, 'no batch to make of 0 items', DataLoader, data, sampler=[])
    refuse(ValueError, 'no batch to make', DataLoader, data, 6, drop_last=True)


def test_optimizers_refuse():
    w = Parameter(np.ones(2))
    for make in (SGD, RMSProp, Adam):
        refuse(ValueError, 'no parameters', make, [], 0.1)
        refuse(TypeError, 'takes Parameters.*ndarray', make, [np.ones(2)], 0.1)
        for lr in (0, -1, np.nan, np.inf):
            refuse(ValueError, 'learning rate', make, [w], lr)
        refuse(ValueError, 'call loss.backward', make([w], 0.1).step)
    refuse(ValueError, 'momentum', SGD, [w], 0.1, 1.5)
    refuse(ValueError, 'alpha', RMSProp, [w], 0.1, 1.0)
    refuse(ValueError, 'beta2', Adam, [w], 0.1, (0.9, 1.0))
    (w**2).sum().backward()
    refuse(NotImplementedError, 'direction', Optimizer([w], 0.1).step)
