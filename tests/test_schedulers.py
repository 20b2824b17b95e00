"DDPMScheduler against the installed diffusers, for every combination of what ours offers."

from itertools import product

import diffusers
import pytest
import torch

from miniai.schedulers import DDPMScheduler

BETAS = 'linear', 'scaled_linear', 'squaredcos_cap_v2'
PREDICTIONS = 'epsilon', 'sample', 'v_prediction'
SPACINGS = 'leading', 'trailing', 'linspace'


def model(x, t):
    "Gentle: a wild one would magnify rounding from step to step."
    return 0.5*torch.sin(x + t/50)


def trajectory(scheduler, n):
    "Every picture on the way of `n` steps with a made-up model, in double precision."
    scheduler.set_timesteps(n)
    gen = torch.Generator().manual_seed(0)
    x, states = torch.randn(2, 1, 4, 4, generator=gen, dtype=torch.float64), []
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, generator=gen).prev_sample
        states.append(x)
    return torch.stack(states)


def guesses(scheduler, states):
    "The guess at x_0 in each step, from given pictures."
    return torch.stack([scheduler.step(model(x, t), t, x).pred_original_sample
                        for t, x in zip(scheduler.timesteps[1:], states)])


def error(a, b):
    "The largest difference, relative to the largest number of each step (at least 1)."
    # without clipping, guesses from epsilon near pure noise reach thousands
    scale = b.flatten(1).abs().amax(1).clamp(min=1).view(-1, *[1]*(b.ndim - 1))
    return ((a - b)/scale).abs().max().item()


def compare(n, **kw):
    ours, theirs = DDPMScheduler(**kw), diffusers.DDPMScheduler(**kw)
    a, b = trajectory(ours, n), trajectory(theirs, n)
    assert torch.equal(ours.timesteps, theirs.timesteps), (n, kw)
    assert error(a, b) < 1e-4, (n, kw)
    if n > 1:
        assert error(guesses(ours, b), guesses(theirs, b)) < 1e-4, (n, kw)


@pytest.mark.parametrize('betas', BETAS)
@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_equals_diffusers(betas, prediction):
    for variance, spacing, clip in product(('fixed_small', 'fixed_large'), SPACINGS, (True, False)):
        for n in (1, 17):
            compare(n, beta_schedule=betas, prediction_type=prediction, variance_type=variance,
                    timestep_spacing=spacing, clip_sample=clip)


def test_other_settings_and_the_whole_chain_equal_diffusers():
    compare(37, steps_offset=1)
    compare(20, beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')
    compare(20, num_train_timesteps=100)
    compare(20, clip_sample_range=2.)
    compare(1000, beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction')


def test_what_training_needs_equals_diffusers():
    gen = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 9, 1, 4, 4, generator=gen)
    t = torch.tensor([0, 1, 10, 100, 300, 500, 700, 900, 999])
    for betas in BETAS:
        ours, theirs = (c(beta_schedule=betas) for c in (DDPMScheduler, diffusers.DDPMScheduler))
        x_t = ours.add_noise(x0, eps, t)
        assert torch.allclose(x_t, theirs.add_noise(x0, eps, t), atol=1e-5)
        v = ours.get_velocity(x0, eps, t)
        assert torch.allclose(v, theirs.get_velocity(x0, eps, t), atol=1e-5)


def test_three_kinds_of_target_say_the_same_guess():
    gen = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 9, 1, 4, 4, generator=gen, dtype=torch.float64)
    t = torch.tensor([0, 1, 10, 100, 300, 500, 700, 900, 990])
    for kind in PREDICTIONS:
        s = DDPMScheduler(beta_schedule='cosine', prediction_type=kind, clip_sample=False)
        x_t, target = s.add_noise(x0, eps, t), s.target(x0, eps, t)
        for i in range(9):
            back = s.pred_original_sample(target[i:i + 1], t[i], x_t[i:i + 1])
            assert torch.allclose(back, x0[i:i + 1], atol=1e-4), (kind, t[i])


def test_before_set_timesteps_it_walks_the_whole_chain():
    a, b = DDPMScheduler(), diffusers.DDPMScheduler()
    assert torch.equal(a.timesteps, b.timesteps)
    x = torch.ones(1, 1, 4, 4)
    steps = [s.step(x, 700, 0.3*x, generator=torch.Generator().manual_seed(0)) for s in (a, b)]
    assert torch.allclose(steps[0].prev_sample, steps[1].prev_sample, atol=1e-5)


def test_saved_settings_are_read_by_both_libraries(tmp_path):
    kw = dict(beta_schedule='squaredcos_cap_v2', variance_type='fixed_large', steps_offset=1)
    a = DDPMScheduler(**kw)
    a.save_pretrained(tmp_path)
    assert DDPMScheduler.from_pretrained(tmp_path).config == a.config
    theirs = diffusers.DDPMScheduler.from_pretrained(tmp_path)
    assert error(trajectory(a, 9), trajectory(theirs, 9)) < 1e-4
    assert DDPMScheduler.from_config(theirs.config, steps_offset=0).config.steps_offset == 0
    with pytest.raises(ValueError, match='rescale_betas_zero_snr'):
        DDPMScheduler.from_config(theirs.config | dict(rescale_betas_zero_snr=True))


@pytest.mark.parametrize('bad', [
    dict(beta_schedule='sine'), dict(prediction_type='noise'),
    dict(variance_type='learned'), dict(timestep_spacing='even'),
])
def test_unknown_settings_are_refused(bad):
    with pytest.raises(ValueError, match=repr(*bad.values())):
        DDPMScheduler(**bad)


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize('bad', [
    *(dict(num_train_timesteps=n) for n in (0, -5, 2.5, 100., True, NAN, '100', None, 10**12)),
    *(dict(beta_start=b) for b in (0, -0.1, 1, NAN, 'a', None, True)),
    *(dict(beta_end=b) for b in (0, -0.1, 1, 1.5, 1e-5, NAN, INF, '0.02')),
    *(dict(clip_sample_range=c) for c in (0, -1, NAN, INF, None, '1')),
    *(dict(steps_offset=o) for o in (-1, 1000, 0.5, NAN, True, '1')),
])
def test_settings_that_can_only_be_mistakes_are_named(bad):
    with pytest.raises(ValueError, match=f'{next(iter(bad))} is .*expected'):
        DDPMScheduler(**bad)


@pytest.mark.parametrize('kw', [dict(beta_end=0.9), dict(beta_start=1e-12), dict(beta_end=0.99),
                                dict(num_train_timesteps=20_000)])
def test_betas_beyond_single_precision_are_refused(kw):
    with pytest.raises(ValueError, match='too small or too large for single precision'):
        DDPMScheduler(**kw)


def test_an_offset_that_leaves_no_room_is_named():
    s = DDPMScheduler(timestep_spacing='leading', steps_offset=1)
    s.set_timesteps(999)
    assert s.timesteps[0] == 999
    with pytest.raises(ValueError, match='the first time is 1000.*steps_offset'):
        s.set_timesteps(1000)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_noise_is_right_in_every_precision(dtype):
    "In half precision 1 - 0.9999 is 0: the first times had no noise."
    gen = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 1, 4, 4, generator=gen).to(dtype)
    t, s = torch.tensor([0, 1, 5, 20, 500, 999]), DDPMScheduler()
    for f in (s.add_noise, s.get_velocity):
        got, want = f(x0, eps, t), f(x0.float(), eps.float(), t)
        assert got.dtype == dtype
        assert (got.float() - want).abs().max() < 10*torch.finfo(dtype).eps + 1e-6
    only_noise = s.add_noise(0*x0, eps, t[:1].repeat(6)).float()
    assert torch.allclose(only_noise, 0.01*eps.float(), rtol=0.05)


@pytest.mark.parametrize('spacing', SPACINGS)
def test_every_step_count_gives_falling_times_in_range(spacing):
    s = DDPMScheduler(timestep_spacing=spacing)
    for n in range(1, 1001):
        s.set_timesteps(n)
        ts = s.timesteps
        assert len(ts) == n and 0 <= ts[-1] and ts[0] < 1000 and (ts.diff() < 0).all(), n


def test_a_list_of_times_is_visited_as_given():
    s = DDPMScheduler()
    for times in ([900, 500, 100], torch.tensor([999, 0]), (7,)):
        s.set_timesteps(times)
        assert s.timesteps.tolist() == list(times)
    s.set_timesteps(timesteps=[3, 2, 1])
    assert s.timesteps.tolist() == [3, 2, 1]


@pytest.mark.parametrize('n, words', [
    (0, '1 to 1,000'), (-1, '1 to 1,000'), (1001, '1 to 1,000'), (2.5, '1 to 1,000'),
    ([100, 500], 'falling'), ([5, 5], 'falling'), ([1000], 'falling'), ([-1], 'falling'),
    ([], 'falling'), ([2.5, 1.], 'whole'), (None, 'either'), (True, '1 to 1,000'),
    (2., '1 to 1,000'), (float('nan'), '1 to 1,000'), ('5', '1 to 1,000'),
    ([float('nan')], 'falling'), ([True], 'falling'),
])
def test_times_that_cannot_be_are_refused(n, words):
    with pytest.raises(ValueError, match=words):
        DDPMScheduler().set_timesteps(n)


X = torch.zeros(1, 1, 4, 4)


@pytest.mark.parametrize('call, words', [
    (lambda s: s.step(X, 123, X), 'not among'),
    (lambda s: s.step(X[..., :2], 500, X), 'shaped like the sample'),
    (lambda s: s.pred_original_sample(X, -1, X), 'from 0 to 999'),
    (lambda s: s.pred_original_sample(X, 1000, X), 'from 0 to 999'),
    (lambda s: s.add_noise(X, X, torch.tensor([1000])), 'from 0 to 999'),
    (lambda s: s.get_velocity(X, X, torch.tensor([-1])), 'from 0 to 999'),
])
def test_steps_that_cannot_be_are_refused(call, words):
    s = DDPMScheduler()
    s.set_timesteps(2)
    with pytest.raises(ValueError, match=words):
        call(s)
