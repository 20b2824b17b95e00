"The layers and losses of lesson 06 against PyTorch's, and what they refuse."

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from miniai.autograd import Tensor
from miniai.nn import (
    Linear,
    Module,
    Parameter,
    ReLU,
    Sequential,
    accuracy,
    cross_entropy,
    log_softmax,
    mse_loss,
)
from miniai.tensors import set_seed

quick = settings(deadline=None, derandomize=True, max_examples=100)


def test_parameters_are_found_by_path_and_once():
    class Block(Module):
        def __init__(self):
            self.a = Linear(2, 3)
            self.pair = [ReLU(), (Linear(3, 3, bias=False),)]
            self.scale = Parameter(np.ones(3))
            self.again = self.a          # a layer in two places
            self.size = 3                # something that's no layer
            self.parent = self           # a circle

    names = list(Block().named_parameters())
    assert names == ['a.weight', 'a.bias', 'pair.1.0.weight', 'scale']
    names = list(Sequential(Block(), Linear(3, 1)).named_parameters())
    assert names[-2:] == ['layers.1.weight', 'layers.1.bias']
    assert ReLU().parameters() == []


def test_tied_weights_get_both_gradients():
    w = Linear(3, 3, bias=False)
    t = torch.tensor(w.weight.data, requires_grad=True)
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    (Sequential(w, ReLU(), w)(x)**2).sum().backward()
    (torch.relu(torch.tensor(x) @ t.T) @ t.T).pow(2).sum().backward()
    np.testing.assert_allclose(w.weight.grad, t.grad.numpy(), rtol=1e-4, atol=1e-5)


@quick
@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 5), st.integers(1, 5),
       st.booleans(), st.integers(0, 99))
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
    def weights(generator=None): return Linear(100, 400, generator=generator).weight.data
    w = weights(np.random.default_rng(0))
    assert abs(w).max() <= 0.1 and abs(w.std() - 0.2/12**0.5) < 2e-3 and abs(w.mean()) < 2e-3
    assert np.array_equal(w, weights(np.random.default_rng(0)))
    set_seed(3)
    a = weights()
    set_seed(3)
    assert np.array_equal(a, weights()) and not np.array_equal(a, weights())


@quick
@given(st.integers(1, 6), st.integers(1, 7), st.floats(0.1, 1e4), st.floats(-1e5, 1e5),
       st.integers(0, 999))
def test_cross_entropy_equals_torch(n, classes, scale, shift, seed):
    rng = np.random.default_rng(seed)
    a, y = rng.normal(size=(n, classes))*scale + shift, rng.integers(0, classes, n)
    z, t = Tensor(a, requires_grad=True), torch.tensor(a, requires_grad=True)
    ours, theirs = cross_entropy(z, y), F.cross_entropy(t, torch.tensor(y))
    ours.backward()
    theirs.backward()
    np.testing.assert_allclose(ours.item(), theirs.item(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(z.grad, t.grad.numpy(), atol=1e-9)
    theirs = F.log_softmax(t, -1).detach().numpy()
    np.testing.assert_allclose(log_softmax(z).data, theirs, rtol=1e-9, atol=1e-8)
    assert abs(z.grad.sum()) < 1e-9      # probabilities sum to 1: what one gains others lose


def test_mse_and_accuracy():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4))
    t = torch.tensor(a, requires_grad=True)
    F.mse_loss(t, torch.tensor(b)).backward()
    for target in (b, b.tolist(), Tensor(b)):
        x = Tensor(a, requires_grad=True)
        mse_loss(x, target).backward()
        np.testing.assert_allclose(x.grad, t.grad.numpy())
    plain = cross_entropy(np.zeros((2, 4)), [0, 3])     # an array that's no Tensor
    assert np.isclose(plain.item(), np.log(4))
    assert accuracy(np.eye(4), [0, 1, 2, 0]) == 0.75 and accuracy(Tensor(np.eye(2)), [1, 0]) == 0


Z = Tensor(np.zeros((3, 4)), requires_grad=True)
REFUSED = {
    'another width': (ValueError, r'rows of 4.*\(3, 5\)', lambda: Linear(4, 2)(np.zeros((3, 5)))),
    'a number': (ValueError, r'rows of 4.*\(\)', lambda: Linear(4, 2)(1.0)),
    'whole numbers': (TypeError, 'floats.*int64', lambda: Linear(4, 2)(np.zeros((3, 4), np.int64))),
    'no inputs': (ValueError, 'at least one', lambda: Linear(0, 2)),
    'no outputs': (ValueError, 'at least one', lambda: Linear(2, -1)),
    'no forward': (NotImplementedError, 'Module needs a `forward`', lambda: Module()(1)),
    'a whole parameter': (TypeError, 'floats', lambda: Parameter([1, 2])),
    'too few labels': (ValueError, r'\(3, 4\) and \(2,\)', lambda: cross_entropy(Z, [0, 1])),
    'one-hot': (ValueError, r'\(3, 4\) and \(3, 4\)', lambda: cross_entropy(Z, np.eye(4)[:3])),
    'one row': (ValueError, r'\(4,\)', lambda: cross_entropy(Z[0], [0, 1, 2, 3])),
    'no rows': (ValueError, r'at least one row', lambda: cross_entropy(Z[:0], np.zeros(0, int))),
    'float labels': (TypeError, 'float64', lambda: cross_entropy(Z, [0.0, 1.0, 2.0])),
    'class 4 of 4': (ValueError, '0 to 3', lambda: cross_entropy(Z, [0, 1, 4])),
    'class -1': (ValueError, '0 to 3', lambda: cross_entropy(Z, [0, 1, -1])),
    'shapes': (ValueError, r'\(3, 4\).*\(4,\)', lambda: mse_loss(Z, np.zeros(4))),
    'a column of labels': (ValueError, r'\(3,\).*\(3, 1\)', lambda: accuracy(Z, np.zeros((3, 1)))),
    'one label for three': (ValueError, r'\(3,\).*\(1,\)', lambda: accuracy(Z, [0])),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refuses(name):
    error, match, f = REFUSED[name]
    with pytest.raises(error, match=match):
        f()
