"""Muon: what orthogonalize gives, Adam's part against PyTorch's, resuming, bad settings."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniai.muon import Muon, fast_bf16, orthogonalize


@settings(deadline=None, derandomize=True, max_examples=100)
@given(r=st.integers(1, 40), c=st.integers(1, 40), seed=st.integers(0, 99))
def test_orthogonalize_is_near_the_orthogonal_factor(r, c, seed):
    noise = torch.randn(r, c, generator=torch.Generator().manual_seed(seed))
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    out = orthogonalize(u * torch.linspace(0.2, 1, min(r, c)) @ v, steps=6)
    assert out.shape == (r, c) and out.dtype == torch.float32
    got = torch.linalg.svdvals(out)
    assert 0.6 < got.min() and got.max() < 1.3  # where the iteration ends: 0.68 to 1.2
    # the cosine with U V^T
    assert torch.trace(u.T @ out @ v.T) / min(r, c) ** 0.5 / out.norm() > 0.95


def test_orthogonalize_in_half_precision_and_of_nothing():
    g = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    full, half = orthogonalize(g), orthogonalize(g, dtype=torch.bfloat16)
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(full.flatten(), half.flatten(), 0) > 0.95
    assert orthogonalize(torch.zeros(20, 20)).abs().max() == 0


def train(v, opt, n, loss):
    for _ in range(n):
        opt.zero_grad()
        loss(v).backward()
        opt.step()


def test_vectors_go_adams_way():
    torch.manual_seed(0)
    p = torch.randn(7, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    for v, opt in ((p, Muon([p], 0.05)), (q, torch.optim.Adam([q], 0.05, betas=(0.9, 0.99)))):
        train(v, opt, 30, lambda v: (v**4).sum())
    assert torch.allclose(p, q, atol=1e-4)


def test_it_resumes_to_the_last_bit():
    torch.manual_seed(0)
    net = torch.nn.Linear(40, 36)
    opt = Muon(net.parameters())

    def loss(net):
        return (net(torch.ones(4, 40)) - 1).square().sum()

    train(net, opt, 3, loss)
    twin = copy.deepcopy(net)
    again = Muon(twin.parameters())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(net, opt, 3, loss)
    train(twin, again, 3, loss)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))


@pytest.mark.parametrize(
    'shape,matrix',
    [((16, 16), True), ((20, 16, 3, 3), True), ((15, 40), False), ((40, 15), False), ((9,), False)],
)
def test_which_parameters_are_matrices(shape, matrix):
    (group,) = Muon([torch.zeros(shape, requires_grad=True)], lr=0.1, ratio=5).param_groups
    assert group['matrices'] == matrix
    assert math.isclose(group['lr'], 0.5 if matrix else 0.1)


@pytest.mark.parametrize(
    'how',
    [
        *(dict(lr=v) for v in (0, -1, math.nan)),
        *(dict(ratio=v) for v in (0, math.nan)),
        *(dict(eps=v) for v in (0, -1, math.nan)),
        *(dict(momentum=v) for v in (1, -1, math.nan)),
        *(dict(betas=v) for v in ((1, 0.9), (0.9, 1), (-1, 0.9), (math.nan, 0.9))),
    ],
)
def test_settings_that_are_refused(how):
    with pytest.raises(ValueError, match='above 0'):
        Muon([torch.zeros(3, requires_grad=True)], **how)


def test_fast_bf16_answers_for_every_device():
    assert fast_bf16('cpu') in (True, False)
    assert fast_bf16('mps') is False


def test_step_calls_a_closure_as_every_optimiser_does():
    p = torch.ones(3, requires_grad=True)

    def closure():
        p.grad = torch.ones(3)
        return p.sum()

    assert Muon([p]).step(closure) == 3 and p.sum() < 3
