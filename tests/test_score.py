"Noise by amounts, and gradient ascent on pictures: what is promised, and what is refused."

import pytest
import torch
from torch import nn

from miniai.data import DataLoaders, TensorLoader
from miniai.learner import Learner
from miniai.score import (
    Critic,
    NoisyCB,
    add_noise,
    gradient_ascent,
    input_gradient,
    numerical_gradient,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_noise_keeps_its_share_of_the_picture():
    x = torch.full((20_000, 1, 2, 2), 0.5)
    for s in (0., 0.3, 1.):
        noisy, amounts = add_noise(x, torch.full((len(x),), s), seeded())
        assert (amounts == s).all() and (noisy.mean() - 0.5*(1 - s**2)**0.5).abs() < 0.05
        assert abs(noisy.std() - s) < 0.05


def test_amounts_are_drawn_evenly_and_by_the_generator():
    x = torch.zeros(5000, 1, 2, 2)
    (a, s), (b, again) = (add_noise(x, generator=seeded()) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(s, again)
    assert s.min() < 0.01 and s.max() > 0.99 and abs(s.mean() - 0.5) < 0.05


@pytest.mark.parametrize('s', [[0.5, 1.5], [-0.1, 0.5], [0.5], [[0.5, 0.5]]])
def test_amounts_that_are_none_are_refused(s):
    with pytest.raises(ValueError, match='from 0 to 1 for each of 2'):
        add_noise(torch.zeros(2, 1, 4, 4), torch.tensor(s))


def test_both_gradients_agree_and_lead_uphill():
    torch.manual_seed(0)
    net = Critic(1, size=4, widths=(4, 4)).double().eval().requires_grad_(False)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    def f(x): return net(x)[:, 0]
    assert torch.allclose(numerical_gradient(f, x), input_gradient(f, x), atol=1e-5)
    path = gradient_ascent(f, x, steps=20, length=0.1)
    assert len(path) == 21 and (f(path[-1]) > f(x)).all()
    moves = torch.stack([(b - a).flatten(1).norm(dim=1) for a, b in zip(path, path[1:])])
    assert torch.allclose(moves[:, 0], 0.1*(1 - torch.arange(20, dtype=torch.float64)/20))


def test_a_gradient_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match='step 0'):
        gradient_ascent(lambda x: x.flatten(1).sum(1)*torch.nan, torch.zeros(1, 1, 2, 2))


def test_the_callback_asks_for_what_target_says():
    x, y = torch.zeros(8, 1, 4, 4), torch.arange(8)
    seen = []

    def target(clean, labels, noisy, amounts):
        seen.append((clean, labels, noisy, amounts))
        return amounts[:, None]

    torch.manual_seed(0)
    dls = DataLoaders(TensorLoader(x, y, batch_size=8))
    Learner(Critic(1, size=4), dls, nn.MSELoss(), 1e-3, [NoisyCB(target)]).fit(2)
    assert len(seen) == 2 and torch.equal(seen[0][0], x) and torch.equal(seen[0][1], y)
    assert seen[0][2].std() > 0 and not torch.equal(seen[0][3], seen[1][3])
