"""DDPMScheduler against the installed diffusers, for every combination of what ours offers."""

from itertools import product

import diffusers
import pytest
import torch

from miniai.schedulers import DDPMScheduler

GRID = list(
    product(
        ('linear', 'scaled_linear', 'squaredcos_cap_v2'),
        ('epsilon', 'sample', 'v_prediction'),
        ('fixed_small', 'fixed_large'),
        ('leading', 'trailing', 'linspace'),
        (True, False),
    )
)


def model(x, t):
    return 0.5 * torch.sin(
        x + t / 50
    )  # gentle: a wild one would magnify rounding from step to step


def trajectory(scheduler, n, seed=0):
    "Every picture on the way of `n` steps with a made-up model."
    scheduler.set_timesteps(n)
    gen = torch.Generator().manual_seed(seed)
    x, states = torch.randn(2, 1, 4, 4, generator=gen), []
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, generator=gen).prev_sample
        states.append(x)
    return torch.stack(states)


def assert_close(a, b, tol=1e-5):
    "Within `tol` of the largest number in each picture batch: without clipping, guesses from epsilon near pure noise reach thousands."
    scale = b.flatten(1).abs().amax(1).clamp(min=1).view(-1, *[1] * (b.ndim - 1))
    assert ((a - b).abs() <= tol * scale).all(), ((a - b) / scale).abs().max()


@pytest.mark.parametrize('betas,prediction,variance,spacing,clip', GRID)
@pytest.mark.parametrize('n', [1, 20, 37])
def test_equals_diffusers(betas, prediction, variance, spacing, clip, n):
    kw = dict(
        beta_schedule=betas,
        prediction_type=prediction,
        variance_type=variance,
        timestep_spacing=spacing,
        clip_sample=clip,
    )
    ours, theirs = DDPMScheduler(**kw), diffusers.DDPMScheduler(**kw)
    a, b = trajectory(ours, n), trajectory(theirs, n)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert_close(a, b)
    for t, x in zip(theirs.timesteps[1:], b):  # and each guess at x_0, from the same picture
        x0 = [
            s.step(
                model(x, t), t, x, generator=torch.Generator().manual_seed(0)
            ).pred_original_sample
            for s in (ours, theirs)
        ]
        assert_close(*x0)


@pytest.mark.parametrize(
    'kw',
    [
        dict(steps_offset=1),
        dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear'),
        dict(num_train_timesteps=100),
        dict(clip_sample_range=2.0),
    ],
)
def test_other_settings_equal_diffusers(kw):
    assert_close(trajectory(DDPMScheduler(**kw), 20), trajectory(diffusers.DDPMScheduler(**kw), 20))


@pytest.mark.parametrize('n', [1000])
def test_whole_chain_equals_diffusers(n):
    kw = dict(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction')
    assert_close(trajectory(DDPMScheduler(**kw), n), trajectory(diffusers.DDPMScheduler(**kw), n))


def test_before_set_timesteps_it_walks_the_whole_chain():
    a, b = DDPMScheduler(), diffusers.DDPMScheduler()
    x = torch.ones(1, 1, 4, 4)
    assert torch.equal(a.timesteps, b.timesteps)
    one = a.step(x, 700, 0.3 * x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert torch.allclose(
        one,
        b.step(x, 700, 0.3 * x, generator=torch.Generator().manual_seed(0)).prev_sample,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    'bad',
    [
        dict(beta_schedule='sine'),
        dict(prediction_type='noise'),
        dict(variance_type='learned'),
        dict(timestep_spacing='even'),
    ],
)
def test_unknown_settings_are_refused(bad):
    with pytest.raises(ValueError, match=repr(*bad.values())):
        DDPMScheduler(**bad)


@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
def test_every_step_count_gives_falling_times_in_range(spacing):
    s = DDPMScheduler(timestep_spacing=spacing)
    for n in range(1, 1001):
        s.set_timesteps(n)
        assert (
            len(s.timesteps) == n
            and 0 <= s.timesteps.min()
            and s.timesteps.max() < 1000
            and (s.timesteps.diff() < 0).all()
        ), n


@pytest.mark.parametrize('n', [0, -1, 1001, 2.5])
def test_step_counts_are_checked(n):
    with pytest.raises(ValueError, match='1 to 1000'):
        DDPMScheduler().set_timesteps(n)


def test_a_time_that_was_not_chosen_is_refused():
    s = DDPMScheduler()
    s.set_timesteps(10)
    with pytest.raises(ValueError, match='not among'):
        s.step(torch.zeros(1, 1, 4, 4), 123, torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize('t', [-1, 1000])
def test_a_guess_at_a_time_outside_the_schedule_is_refused(t):
    with pytest.raises(ValueError, match='from 0 to 999'):
        DDPMScheduler().pred_original_sample(torch.zeros(1, 1, 4, 4), t, torch.zeros(1, 1, 4, 4))
