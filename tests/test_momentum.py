"""Momentum and Adam as samplers, against their formulas and torch's optimiser; times by a power."""

import numpy as np
import pytest
import torch

from miniai.momentum import AdamScheduler, MomentumScheduler, power_times
from miniai.samplers import EulerScheduler


def model(x, t):
    return 0.5 * torch.sin(x + t / 50)


def path(s, n=20):
    s.set_timesteps(n)
    gen = torch.Generator().manual_seed(0)
    x, states = torch.randn(2, 1, 4, 4, generator=gen) * s.init_noise_sigma, []
    for t in s.timesteps:
        x = s.step(model(s.scale_model_input(x, t), t), t, x).prev_sample
        states.append(x)
    return torch.stack(states)


def test_momentum_without_memory_is_euler():
    kw = dict(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction')
    plain = path(EulerScheduler(**kw))
    assert torch.equal(path(MomentumScheduler(**kw, momentum=0.0)), plain)
    assert not torch.allclose(path(MomentumScheduler(**kw, momentum=0.5)), plain, atol=0.1)


def test_momentum_against_its_formula():
    s = MomentumScheduler(momentum=-0.4)
    s.set_timesteps(6)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    x = x_ref = x * s.init_noise_sigma
    mean, sig = None, s.sigmas.double()
    for i, t in enumerate(s.timesteps):
        d = model(x_ref / (sig[i] ** 2 + 1).sqrt(), t)  # epsilon is the slope
        mean = d if mean is None else -0.4 * mean + 1.4 * d
        x_ref = x_ref + (sig[i + 1] - sig[i]) * mean
        x = s.step(model(s.scale_model_input(x, t), t), t, x).prev_sample
    assert torch.allclose(x, x_ref, atol=1e-3)


def test_adam_per_pixel_against_torch_optim():
    "The directions of torch's Adam, given slopes as gradients and the fall of sigma as the rate."
    s = AdamScheduler(betas=(0.7, 0.9), per_pixel=True)
    s.set_timesteps(8)
    noise = torch.randn(9, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(noise[-1] * 2)
    x = p.detach().clone()
    opt = torch.optim.Adam([p], lr=1.0, betas=(0.7, 0.9), eps=1e-8)
    for i, t in enumerate(s.timesteps):
        x = s.step(noise[i], t, x).prev_sample
        opt.param_groups[0]['lr'] = (s.sigmas[i] - s.sigmas[i + 1]).item()
        p.grad = noise[i]
        opt.step()
        assert torch.allclose(x, p, atol=1e-3)


def test_adams_settings_survive_being_saved(tmp_path):
    s = AdamScheduler(betas=(-0.5, 0.7), per_pixel=True, eps=1e-6)
    s.save_pretrained(tmp_path)
    again = AdamScheduler.from_pretrained(tmp_path)
    assert again.config == s.config and torch.equal(path(again), path(s))


@pytest.mark.parametrize('power', [0.5, 1.0, 1.5])
def test_power_times_fall(power):
    for n in (1, 2, 6, 17):
        ts = power_times(n, power)
        assert len(ts) == n and (np.diff(ts) < 0).all() and ts[0] == 999
    assert power_times(4, 1.0) == [999, 749, 499, 249]


NAN = float('nan')
BAD = [
    *((lambda b=b: AdamScheduler(betas=b), 'betas') for b in ((NAN, 0.9), (0., NAN))),
    *((lambda m=m: MomentumScheduler(momentum=m), 'momentum')
      for m in (-1, 1, 2.0, NAN, 'a', None)),
    *((lambda e=e: AdamScheduler(eps=e), 'eps') for e in (0, -1e-8, NAN, None)),
    *((lambda p=p: power_times(5, p), 'power is') for p in (0, -1, NAN, float('inf'), 'a')),
    *((lambda n=n: power_times(n), 'n is') for n in (0, -1, 2.5, True, 1001)),
    *((lambda b=b: AdamScheduler(betas=b), 'betas') for b in ((1.0, 0.9), (0.0, 1.0), (0.5,))),
    (lambda: power_times(900, 3.0), 'fall together'),
]


@pytest.mark.parametrize('call, words', BAD)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
