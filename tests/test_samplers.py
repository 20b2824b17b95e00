"""The samplers against their namesakes in diffusers, for every combination of what ours offer.

Also: lists of times, pipelines, saving, bad input.
"""

import copy
import pickle
from itertools import product

import diffusers
import numpy as np
import pytest
import torch

from miniai.diffusion import sample
from miniai.momentum import AdamScheduler, MomentumScheduler
from miniai.samplers import (
    DDIMScheduler,
    DPMSolverScheduler,
    EulerAncestralScheduler,
    EulerScheduler,
    HeunScheduler,
    karras_sigmas,
)
from miniai.schedulers import DDPMScheduler

pytestmark = pytest.mark.filterwarnings('ignore:__array__')  # from diffusers

BETAS = 'linear', 'scaled_linear', 'squaredcos_cap_v2'
KINDS = 'epsilon', 'sample', 'v_prediction'
SPACINGS = 'leading', 'trailing', 'linspace'
COSINE_V = dict(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction')
TWINS = {
    DDIMScheduler: diffusers.DDIMScheduler,
    EulerScheduler: diffusers.EulerDiscreteScheduler,
    EulerAncestralScheduler: diffusers.EulerAncestralDiscreteScheduler,
    HeunScheduler: diffusers.HeunDiscreteScheduler,
    DPMSolverScheduler: diffusers.DPMSolverMultistepScheduler,
}
OURS = [*TWINS, MomentumScheduler, AdamScheduler]
# Relative to the largest number in a state. Theirs round the coefficients of these three to single
# precision along the way: up to 7e-5 was seen.
ROUNDING = dict.fromkeys((DDIMScheduler, EulerAncestralScheduler, HeunScheduler), 1e-3)


def combinations(**choices):
    "Every combination of the values in `choices`."
    return [dict(zip(choices, values)) for values in product(*choices.values())]


def model(x, t):
    "A gentle one: a wild one would magnify rounding from step to step."
    return 0.5 * torch.sin(x + t / 50)


def trajectory(s, n=20, times=None, **step):
    "Every picture on the way of `n` steps, in double precision, and every guess if there are any."
    s.set_timesteps(n) if times is None else s.set_timesteps(timesteps=times)
    if hasattr(s, 'set_begin_index'):
        s.set_begin_index(0)  # diffusers loses its place where two steps round to the same time
    gen = torch.Generator().manual_seed(0)
    if not isinstance(s, diffusers.HeunDiscreteScheduler):
        step = dict(step, generator=gen)
    x = torch.randn(2, 1, 4, 4, generator=gen).double() * s.init_noise_sigma
    states, guesses = [], []
    for t in s.timesteps:
        out = s.step(model(s.scale_model_input(x, t), t), t, x, **step)
        x = out.prev_sample
        states.append(x)
        guesses.append(getattr(out, 'pred_original_sample', None))
    return torch.stack(states), guesses


def assert_close(a, b, tol=1e-4):
    "Within `tol` of the largest number in each state: with the cosine they begin at 50,000."
    scale = b.flatten(1).abs().amax(1).clamp(min=1).view(-1, *[1] * (b.ndim - 1))
    off = ((a - b).abs() / scale).max()
    assert b.isfinite().all() and off <= tol, off


def compare(cls, kw, n=20, times=None, **step):
    ours, theirs = cls(**kw), TWINS[cls](**kw)
    sigma = float(theirs.init_noise_sigma)  # pipelines ask before set_timesteps
    assert abs(float(ours.init_noise_sigma) - sigma) < 1e-4 * sigma
    (a, ga), (b, gb) = (trajectory(s, n, times, **step) for s in (ours, theirs))
    assert torch.allclose(ours.timesteps.float(), theirs.timesteps.float(), atol=1e-3)
    assert len(a) == len(b)
    assert_close(a, b, ROUNDING.get(cls, 1e-4))
    if gb[0] is not None:
        assert_close(torch.stack(ga), torch.stack(gb), ROUNDING.get(cls, 1e-4))
    if hasattr(theirs, 'sigmas'):
        assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-5)


NOISE = dict(beta_schedule=BETAS, prediction_type=KINDS)
KARRAS = dict(timestep_spacing=SPACINGS, use_karras_sigmas=(True, False))
ENDS = dict(final_sigmas_type=('zero', 'sigma_min'))
TWO = ('leading', 'trailing')
SETTINGS = {
    DDIMScheduler: combinations(
        timestep_spacing=TWO, clip_sample=(True, False), set_alpha_to_one=(True, False), **NOISE
    ),
    EulerScheduler: combinations(**NOISE, **KARRAS, **ENDS),
    EulerAncestralScheduler: combinations(
        beta_schedule=BETAS, prediction_type=('epsilon', 'v_prediction'), timestep_spacing=SPACINGS
    ),
    HeunScheduler: combinations(**NOISE, **KARRAS, clip_sample=(True, False)),
    DPMSolverScheduler: combinations(
        **NOISE, **KARRAS, **ENDS, lower_order_final=(True, False), solver_order=(1, 2, 3)
    )
    + combinations(
        thresholding=(True,),
        sample_max_value=(1.0, 1.5, 4.0),
        dynamic_thresholding_ratio=(0.9, 0.995),
        beta_schedule=('linear', 'squaredcos_cap_v2'),
        prediction_type=('epsilon', 'v_prediction'),
    ),
}
OTHERS = [
    dict(),
    dict(num_train_timesteps=100),
    dict(beta_start=0.001, beta_end=0.015, beta_schedule='scaled_linear'),
    dict(steps_offset=1, timestep_spacing='leading'),
]


@pytest.mark.parametrize('cls', TWINS)
def test_every_combination_of_settings_equals_diffusers(cls):
    for kw in SETTINGS[cls] + OTHERS:
        # theirs divides 0 by 0 in a step of no length, where Karras' last level is the end
        last = kw.get('final_sigmas_type') == 'sigma_min'
        if last and kw.get('solver_order') == 3 and kw['use_karras_sigmas']:
            continue
        compare(cls, kw)


def test_ddim_with_fresh_noise_equals_diffusers():
    for kw in SETTINGS[DDIMScheduler]:
        for eta, clipped in product((0.0, 0.4, 1.0), (True, False)):
            compare(DDIMScheduler, kw, eta=eta, use_clipped_model_output=clipped)


@pytest.mark.parametrize('cls', TWINS)
def test_other_step_counts_equal_diffusers(cls):
    for n in (1, 2, 5, 14, 15, 50):
        # with 'trailing' their DDIM leaves its own times unless n divides 1000
        leading = cls is DDIMScheduler and 1000 % n
        compare(cls, dict(COSINE_V, timestep_spacing='leading' if leading else 'trailing'), n)


@pytest.mark.parametrize('cls', [EulerScheduler, HeunScheduler, DPMSolverScheduler])
def test_lists_of_times_equal_diffusers(cls):
    compare(cls, COSINE_V, times=[999, 895, 783, 659, 516, 340])


def test_ddpm_takes_lists_of_times():
    times = [990, 600, 321, 45, 7]
    theirs = trajectory(diffusers.DDPMScheduler(), times=times)[0]
    assert_close(trajectory(DDPMScheduler(), times=times)[0], theirs, 1e-3)


@pytest.mark.parametrize('cls', OURS)
def test_a_list_may_stand_for_the_number(cls):
    a, b = cls(), cls()
    a.set_timesteps([900, 500, 100])
    b.set_timesteps(timesteps=torch.tensor([900, 500, 100]))
    assert torch.equal(a.timesteps, b.timesteps) and a.num_inference_steps == 3


def test_ddim_with_eta_1_is_ancestral_sampling():
    kw = dict(beta_schedule='squaredcos_cap_v2', timestep_spacing='trailing', clip_sample=False)
    for kind in KINDS:
        a = DDIMScheduler(**kw, prediction_type=kind, eta=1.0)
        b = DDPMScheduler(**kw, prediction_type=kind)
        assert_close(trajectory(a)[0], trajectory(b)[0], 2e-3)


def test_order_1_is_ddim_and_euler_in_another_scale():
    kw = dict(beta_schedule='linear', prediction_type='epsilon', timestep_spacing='trailing')
    ddim = trajectory(DDIMScheduler(**kw, clip_sample=False))[0]
    assert_close(trajectory(DPMSolverScheduler(**kw, solver_order=1))[0], ddim, 1e-3)
    # Euler starts from sigma times the noise, the others from the noise: equal but for that
    assert (trajectory(EulerScheduler(**kw))[0][-1] - ddim[-1]).abs().max() < 0.05


def gaussian_model(s, mean, cov):
    "The perfect guess at x_0 for Gaussian data: prediction type 'sample', known to the path's end."
    levels = ((1 - s.alphas_cumprod)/s.alphas_cumprod).sqrt().double().numpy()

    def model(x, t):
        sigma = np.interp(t[0].item(), np.arange(len(levels)), levels)  # of fractions too
        off = x*(1 + sigma**2)**0.5 - mean.to(x)
        C = cov.to(x)
        return mean.to(x) + off @ torch.linalg.solve(C + sigma**2*torch.eye(len(mean)).to(x), C)

    return model


class EulerAncestralX0(EulerAncestralScheduler):
    "With prediction type 'sample', which diffusers has not for this one, nor have we."

    def _guess(self, pair, model_output, sample):
        return model_output


EXACT = dict(beta_schedule='linear', prediction_type='sample')


@pytest.mark.parametrize(
    's, n, most',
    [
        (DDPMScheduler(**EXACT, clip_sample=False), 1000, 0.03),
        (DDIMScheduler(**EXACT, clip_sample=False, eta=1.0), 1000, 0.03),
        (EulerAncestralX0(), 1000, 0.03),
        (DDIMScheduler(**EXACT, clip_sample=False), 200, 0.015),
        (EulerScheduler(**EXACT), 200, 0.015),
        (HeunScheduler(**EXACT), 200, 0.015),
        (DPMSolverScheduler(**EXACT), 200, 0.015),
        (DPMSolverScheduler(**EXACT, use_karras_sigmas=True), 200, 0.015),
        (DPMSolverScheduler(**EXACT, solver_order=3), 200, 0.015),
    ],
    ids='DDPM,eta 1,ancestral,DDIM,Euler,Heun,2M,2M Karras,3M'.split(','),
)
def test_a_gaussian_comes_back(s, n, most):
    mean, cov = torch.tensor([0.3, -0.2]), torch.tensor([[0.30, 0.18], [0.18, 0.25]])
    z = torch.randn(8000, 2, generator=torch.Generator().manual_seed(0))
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T  # covariance I
    s.set_timesteps(n)
    gen = torch.Generator().manual_seed(1)
    x = sample(gaussian_model(s, mean, cov), s, z*s.init_noise_sigma, n, gen)
    assert (x.mean(0) - mean).abs().max() < most and (x.T.cov() - cov).abs().max() < most


def error_of(s, n):
    "Mean error after `n` steps, where the exact path is at the noise of time 0."
    mean, cov = torch.tensor([0.3]).double(), torch.tensor([[0.25]]).double()
    s.set_timesteps(n)
    seen, x = [], torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None]*s.init_noise_sigma
    sample(gaussian_model(s, mean, cov), s, x, n, callback=lambda i, t, x, x0: seen.append(x))
    # Heun's last step goes on to the clean picture
    end = seen[-2] if isinstance(s, HeunScheduler) else seen[-1]
    first, last = (((1 - a)/a)**0.5 for a in s.alphas_cumprod[[-1, 0]].double())
    if isinstance(s, DPMSolverScheduler):  # holds them scaled to variance 1
        x, end = x*(1 + first**2)**0.5, end*(1 + last**2)**0.5
    known = mean + (x - mean)*((0.25 + last**2)/(0.25 + first**2))**0.5
    return (end - known).abs().mean().item()


ENDS = dict(EXACT, final_sigmas_type='sigma_min')


@pytest.mark.parametrize(
    's, order',
    [
        (EulerScheduler(**ENDS), 1),
        (HeunScheduler(**EXACT, beta_start=1e-4, beta_end=0.02), 2),
        (DPMSolverScheduler(**ENDS, lower_order_final=False), 2),
        (DPMSolverScheduler(**ENDS, lower_order_final=False, solver_order=3), 3),
    ],
    ids=['Euler', 'Heun', '2M', '3M'],
)
def test_errors_fall_by_the_promised_order(s, order):
    ns = np.array([80, 160, 320])
    slope = np.polyfit(np.log(ns), np.log([error_of(s, int(n)) for n in ns]), 1)[0]
    assert abs(-slope - order) < 0.25


@pytest.mark.parametrize('cls', OURS)
def test_a_second_run_and_copies_start_afresh(cls):
    s = cls(**COSINE_V)
    first, _ = trajectory(s)
    assert torch.equal(trajectory(s)[0], first)
    zeros = torch.zeros(2, 1, 4, 4)
    s.step(zeros, s.timesteps[0], zeros)  # a run that was broken off
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 4, 4, generator=gen).double() * s.init_noise_sigma
    for t in s.timesteps:
        x = s.step(model(s.scale_model_input(x, t), t), t, x, generator=gen).prev_sample
    assert torch.equal(x, first[-1])
    for other in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert torch.equal(trajectory(other)[0], first)


@pytest.mark.parametrize('cls', OURS)
def test_it_can_start_in_the_middle(cls):
    "As image to image does: the later times only, from a picture with the first's noise added."
    s = cls()
    s.set_timesteps(20)
    later = s.timesteps[9 * s.order - (s.order - 1) :]
    x0, noise = torch.zeros(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    x = s.add_noise(x0, noise, later[:1].repeat(3))
    for t in later:  # epsilon 0: nothing to take away
        x = s.step(s.scale_model_input(x, t) * 0, t, x).prev_sample
    assert x.isfinite().all()


@pytest.mark.parametrize('cls', [EulerScheduler, HeunScheduler, EulerAncestralScheduler])
def test_sigma_samplers_add_noise_as_diffusers(cls):
    kw = {} if cls is EulerAncestralScheduler else dict(use_karras_sigmas=True)
    a, b = cls(**kw), TWINS[cls](**kw)
    x0, noise = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for s in (a, b):
        s.set_timesteps(10)
    for t in a.timesteps[1::2]:
        ours, theirs = (s.add_noise(x0, noise, t.repeat(4)) for s in (a, b))
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('s', [DDIMScheduler(eta=1.0), EulerAncestralScheduler()])
def test_generators_one_for_each_picture(s):
    "With a generator of its own, a picture doesn't depend on those beside it."

    def draw(seeds):
        gens = [torch.Generator().manual_seed(k) for k in seeds]
        x = torch.cat([torch.randn(1, 1, 4, 4, generator=g) for g in gens]) * s.init_noise_sigma
        s.set_timesteps(10)
        for t in s.timesteps:
            x = s.step(0.1 * s.scale_model_input(x, t), t, x, generator=gens).prev_sample
        return x

    assert torch.allclose(draw((5, 6, 7))[1], draw((6,))[0], atol=1e-4)
    assert not torch.allclose(draw((6,)), draw((7,)), atol=0.1)


# --- inside each other's pipelines and loops


@pytest.fixture(scope='module')
def nets():
    from conftest import import_torchvision

    import_torchvision()
    torch.manual_seed(0)
    both = dict(in_channels=1, out_channels=1, norm_num_groups=4, layers_per_block=1)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=('DownBlock2D',) * 2,
        up_block_types=('UpBlock2D',) * 2,
        **both,
    ).eval()
    vae = diffusers.VQModel(
        latent_channels=1,
        block_out_channels=(8,),
        num_vq_embeddings=64,
        down_block_types=('DownEncoderBlock2D',),
        up_block_types=('UpDecoderBlock2D',),
        **both,
    ).eval()
    return unet, vae


def run(pipe, **kw):
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # their latent pipeline hands no generator to the scheduler
    gen = torch.Generator().manual_seed(1)
    return pipe(2, gen, num_inference_steps=8, output_type='np', **kw).images


@pytest.mark.parametrize('cls', [DDIMScheduler, DPMSolverScheduler])
def test_inside_the_ddpm_pipeline(nets, cls):
    kw = dict(COSINE_V, timestep_spacing='trailing')
    a, b = (run(diffusers.DDPMPipeline(nets[0], s)) for s in (cls(**kw), TWINS[cls](**kw)))
    assert a.std() > 0.05 and np.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_inside_the_ddim_pipeline(nets, eta):
    pipe = diffusers.DDIMPipeline(nets[0], DDIMScheduler(**COSINE_V))
    # it has made one of its own from our settings
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    assert pipe.scheduler.config.prediction_type == 'v_prediction'
    theirs = run(pipe, eta=eta)
    pipe.scheduler = DDIMScheduler(**COSINE_V)
    assert np.allclose(run(pipe, eta=eta), theirs, atol=1e-3)


@pytest.mark.parametrize('cls', TWINS)
def test_inside_the_latent_pipeline(nets, cls):
    "It scales the start by init_noise_sigma and the model's input: what the sigma samplers need."
    pair = (s(prediction_type='v_prediction') for s in (cls, TWINS[cls]))
    a, b = (run(diffusers.LDMPipeline(vqvae=nets[1], unet=nets[0], scheduler=s)) for s in pair)
    # the code book jumps where a value lies between two entries
    assert a.std() > 0.01 and (np.abs(a - b) < 2e-3).mean() > 0.95


@pytest.mark.parametrize('cls', TWINS)
def test_theirs_inside_our_loop(cls):
    def net(x, t):
        return 0.5 * torch.sin(x + t.view(-1, 1, 1, 1) / 50)

    kw = dict(COSINE_V, timestep_spacing='trailing')
    a, b = (
        sample(net, s, (2, 1, 4, 4), 10, torch.Generator().manual_seed(0))
        for s in (cls(**kw), TWINS[cls](**kw))
    )
    # Heun's first step on this schedule magnifies rounding ten thousand times
    tol = 0.05 if cls is HeunScheduler else 2e-3
    assert (a - b).abs().max() <= tol * b.abs().max().clamp(min=1)


# --- settings, saved and handed on


@pytest.mark.parametrize('cls', OURS)
def test_saved_and_read(cls, tmp_path):
    s = cls(beta_schedule='squaredcos_cap_v2')
    s.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert again.config == s.config or cls is AdamScheduler  # JSON has no tuples
    assert torch.equal(trajectory(again)[0], trajectory(s)[0])
    if cls in TWINS:
        assert TWINS[cls].from_pretrained(tmp_path).config.beta_schedule == 'squaredcos_cap_v2'


@pytest.mark.parametrize('cls', TWINS)
def test_names_and_defaults_are_diffusers(cls):
    theirs = TWINS[cls]().config
    ours = {k: v for k, v in cls().config.items() if k not in ('eta', 'clip_sample_range')}
    if cls is not HeunScheduler and cls is not DDIMScheduler:
        assert not ours.pop('clip_sample')  # theirs never do
    if cls is EulerAncestralScheduler:
        assert 'use_karras_sigmas' not in ours
    assert ours == {k: theirs[k] for k in ours}


def test_from_config_takes_what_it_knows_and_refuses_what_changes_the_noise():
    theirs = diffusers.DPMSolverMultistepScheduler(**COSINE_V, use_karras_sigmas=True)
    ours = DPMSolverScheduler.from_config(theirs.config)
    assert_close(trajectory(ours)[0], trajectory(theirs)[0])
    config = DDPMScheduler(prediction_type='sample', variance_type='fixed_large').config
    s = EulerScheduler.from_config(config, timestep_spacing='trailing')
    assert s.config.prediction_type == 'sample' and s.config.timestep_spacing == 'trailing'
    assert not s.config.clip_sample  # DDPM's clips
    with pytest.raises(TypeError):
        EulerScheduler.from_config(DDPMScheduler().config, spacing='trailing')


# what can't mean the same for ours: of diffusers' schedulers, the settings as they are in memory
FOREIGN = [
    'FlowMatchEulerDiscreteScheduler', 'FlowMatchHeunDiscreteScheduler', 'FlowMatchLCMScheduler',
    'EDMEulerScheduler', 'EDMDPMSolverMultistepScheduler', 'LCMScheduler', 'TCDScheduler',
    'CMStochasticIterativeScheduler', 'ScoreSdeVeScheduler', 'SCMScheduler', 'IPNDMScheduler',
    'CogVideoXDDIMScheduler', 'CogVideoXDPMScheduler',
]


@pytest.mark.parametrize('cls', [DDPMScheduler, DDIMScheduler, EulerScheduler, DPMSolverScheduler])
@pytest.mark.parametrize('name', FOREIGN)
def test_settings_of_another_kind_are_refused(cls, name):
    config = dict(getattr(diffusers, name)().config)
    for c in (config, config | {'_class_name': name}):
        with pytest.raises(ValueError, match=rf"{cls.__name__}( has no setting|$)"):
            cls.from_config(c)
    if 'CogVideoX' not in name:              # (named only by their settings)
        with pytest.raises(ValueError, match=f'{name}.*{cls.__name__}$'):
            cls.from_config({'_class_name': name, 'num_train_timesteps': 1000})


ALIKE = [
    *TWINS.values(), diffusers.DDPMScheduler, diffusers.PNDMScheduler,
    diffusers.LMSDiscreteScheduler, diffusers.KDPM2DiscreteScheduler,
    diffusers.KDPM2AncestralDiscreteScheduler,
    diffusers.DPMSolverSinglestepScheduler, diffusers.DEISMultistepScheduler,
    diffusers.UniPCMultistepScheduler, diffusers.DDIMParallelScheduler,
]


@pytest.mark.parametrize('cls', OURS)
def test_settings_of_the_same_kind_are_taken(cls, tmp_path):
    for theirs in ALIKE:
        theirs(beta_end=0.015).save_pretrained(tmp_path)
        kw = dict(timestep_spacing='trailing') if cls is DDIMScheduler else {}
        for config in (theirs(beta_end=0.015).config, theirs.load_config(tmp_path)):
            s = cls.from_config(config, **kw)
            assert s.config.beta_end == 0.015 and s.config.beta_start == config['beta_start']


@pytest.mark.parametrize('kw', [
    dict(trained_betas=[0.1, 0.2]), dict(trained_betas=np.full(1000, 0.01)),
    dict(rescale_betas_zero_snr=True), dict(use_exponential_sigmas=True),
    dict(use_beta_sigmas=True), dict(use_lu_lambdas=True), dict(use_flow_sigmas=True),
    dict(sigma_data=0.5), dict(shift=3.), dict(timestep_type='continuous'), dict(sigma_min=0.1),
    dict(variance_type='learned_range'), dict(interpolation_type='log_linear'),
    dict(unheard_of={'a': 1}),
], ids=lambda kw: next(iter(kw)))
def test_settings_that_none_of_ours_has_are_refused_by_name_unless_they_do_nothing(kw):
    (name, value), = kw.items()
    base = {'_class_name': 'EulerDiscreteScheduler', **EulerScheduler().config}
    for cls in OURS:
        no = ['timestep_spacing'] if cls is DDIMScheduler else []
        start = {k: v for k, v in base.items() if k not in no}
        cls.from_config(start | {name: None})
        with pytest.raises(ValueError, match=f'{cls.__name__} has no setting {name}') as e:
            cls.from_config(start | kw)
        assert len(str(e.value)) < 200


@pytest.mark.parametrize('name, value, has', [
    ('use_karras_sigmas', True, {EulerScheduler, HeunScheduler, DPMSolverScheduler,
                                 MomentumScheduler, AdamScheduler}),
    ('thresholding', True, {DPMSolverScheduler}),
    ('final_sigmas_type', 'sigma_min', {EulerScheduler, DPMSolverScheduler, MomentumScheduler,
                                        AdamScheduler}),
    ('algorithm_type', 'sde-dpmsolver++', set()), ('solver_type', 'heun', set()),
    ('euler_at_final', True, set()),
])
def test_settings_that_some_of_ours_have_are_refused_by_the_others(name, value, has):
    config = DDPMScheduler().config | {name: value}
    for cls in [DDPMScheduler, *OURS]:
        if cls in has:
            assert cls.from_config(config).config[name] == value
        else:
            with pytest.raises(ValueError, match=f'{cls.__name__} has no setting {name}'):
                cls.from_config(config)


# --- from one step to as many as there are, in every precision


@pytest.mark.parametrize('n', [1, 2, 3, 999, 1000])
@pytest.mark.parametrize('cls', [DDPMScheduler, *OURS])
def test_every_step_count_gives_finite_pictures(cls, n):
    for kw in combinations(timestep_spacing=SPACINGS, prediction_type=KINDS,
                           beta_schedule=('linear', 'squaredcos_cap_v2')):
        refused = (
            cls is DDIMScheduler and kw['timestep_spacing'] == 'linspace'
            or cls is EulerAncestralScheduler and kw['prediction_type'] == 'sample'
            or cls is DPMSolverScheduler and kw['timestep_spacing'] == 'leading' and n == 1000
        )
        if n > 900 and kw['beta_schedule'] == 'linear' or refused:       # (for the time it takes)
            continue
        s = cls(**kw)
        x = trajectory(s, n)[0]
        assert len(s.timesteps) == s.order*n - (s.order - 1) and x.isfinite().all(), kw


def test_as_many_steps_as_times_equal_diffusers_where_it_can():
    "With 'linspace' it rounds 1,001 times to 1,000: one step has no length. Theirs divides by it."
    for kw in (dict(solver_order=1), dict(use_karras_sigmas=True),
               dict(use_karras_sigmas=True, timestep_spacing='leading'),
               *(dict(timestep_spacing='trailing', solver_order=k) for k in (2, 3))):
        compare(DPMSolverScheduler, kw, 1000)
    first = trajectory(DPMSolverScheduler(solver_order=1), 1000)[0][-1]
    for order in (2, 3):
        s = DPMSolverScheduler(solver_order=order)
        assert_close(trajectory(s, 1000)[0][-1:], trajectory(s, 999)[0][-1:], 0.01)
        assert_close(trajectory(s, 1000)[0][-1:], first[None], 0.05)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('cls', [DDPMScheduler, *OURS])
def test_a_step_calculates_in_single_precision_at_least(cls, dtype):
    "And returns what it was given: its sole error is that of rounding the result."
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    a, b = cls(), cls()
    for s in (a, b):
        s.set_timesteps(20)
    for t in a.timesteps[:6]:
        answer = model(x.float(), t).to(dtype)
        gens = [torch.Generator().manual_seed(1) for _ in range(2)]
        single = torch.promote_types(dtype, torch.float32)
        got = a.step(answer, t, x, generator=gens[0])
        want = b.step(answer.to(single), t, x.to(single), generator=gens[1])
        for o, w in zip(got, want):
            assert o.dtype == dtype and torch.equal(o, w.to(dtype))


def test_half_precision_in_their_pipelines_as_theirs():
    "Steps of a half: within the rounding of the pictures of diffusers' own."
    for cls in (EulerScheduler, DPMSolverScheduler, DDIMScheduler):
        ends = []
        for s in (cls(), TWINS[cls]()):
            s.set_timesteps(20)
            x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
            x = (x*s.init_noise_sigma).to(torch.bfloat16)
            for t in s.timesteps:
                answer = model(s.scale_model_input(x, t).float(), t).to(torch.bfloat16)
                x = s.step(answer, t, x, return_dict=False)[0]
                assert x.dtype == torch.bfloat16
            ends.append(x.float())
        assert (ends[0] - ends[1]).abs().max() < 0.1*ends[1].abs().max()


def test_karras_sigmas_against_diffusers():
    s = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    s.set_timesteps(13)
    ours = karras_sigmas(13, s.sigmas[-2].item(), s.sigmas[0].item())
    assert np.allclose(ours, s.sigmas[:-1], rtol=1e-5)


# --- bad input

x = torch.zeros(2, 1, 4, 4)


@pytest.mark.parametrize('cls', OURS)
def test_bad_input_is_refused(cls):
    with pytest.raises(ValueError, match='set_timesteps'):
        cls().step(x, 999, x)
    for kw, words in (
        (dict(prediction_type='noise'), "prediction_type is 'noise'"),
        (dict(timestep_spacing='even'), "timestep_spacing is 'even'"),
        (dict(beta_schedule='sine'), "beta_schedule is 'sine'"),
    ):
        with pytest.raises(ValueError, match=words):
            cls(**kw)
    s = cls()
    for n in (0, 1001, 2.5):
        with pytest.raises(ValueError, match='1 to 1,000'):
            s.set_timesteps(n)
    for times in ([], [5, 6], [1000], [-1], [3, 3], 'ab'):
        with pytest.raises(ValueError):
            s.set_timesteps(timesteps=times)
    for args in (dict(), dict(num_inference_steps=3, timesteps=[2, 1])):
        with pytest.raises(ValueError, match='either'):
            s.set_timesteps(**args)
    s.set_timesteps(10)
    with pytest.raises(ValueError, match='shaped like'):
        s.step(x[:, :, :2], s.timesteps[0], x)
    for t in (1000, -1, 12345):
        with pytest.raises(ValueError, match='not among'):
            s.step(x, t, x)
    with pytest.raises(ValueError, match='from 0 to 999'):
        s.add_noise(x, x, torch.tensor([0, 1000]))


OWN = [
    *((lambda eta=eta: DDIMScheduler(eta=eta), 'eta') for eta in (-0.1, 1.1, 'a', None)),
    (lambda: DDIMScheduler(eta=float('nan')), 'eta'),
    (lambda: DDIMScheduler(timestep_spacing='linspace'), 'linspace'),
    (lambda: EulerScheduler(final_sigmas_type='one'), "final_sigmas_type is 'one'"),
    (lambda: DPMSolverScheduler(final_sigmas_type='one'), "final_sigmas_type is 'one'"),
    (lambda: EulerScheduler(use_karras_sigmas=True).set_timesteps([500, 100]), 'karras'),
    (lambda: DPMSolverScheduler(use_karras_sigmas=True).set_timesteps([500, 100]), 'karras'),
    (lambda: EulerAncestralScheduler(prediction_type='sample'), "'sample'"),
    (lambda: DPMSolverScheduler(solver_order=4), 'solver_order'),
    *((lambda v=v: DPMSolverScheduler(solver_order=v), 'solver_order')
      for v in (0, 2.5, True, '2')),
    *((lambda v=v: DPMSolverScheduler(sample_max_value=v), 'sample_max_value')
      for v in (0.5, float('nan'), float('inf'), None)),
    *((lambda v=v: DPMSolverScheduler(dynamic_thresholding_ratio=v), 'dynamic_thresholding_ratio')
      for v in (0, 1.1, -1, float('nan'), None)),
    *((lambda v=v: karras_sigmas(5, 0.1, 10., rho=v), 'rho') for v in (0, -7, float('nan'), 'a')),
    *((lambda v=v: karras_sigmas(5, v, 10.), 'sigma_min') for v in (0, -1, 11., float('nan'))),
    (lambda: DPMSolverScheduler(timestep_spacing='leading').set_timesteps(1000), 'leading'),
]


@pytest.mark.parametrize('call, words', OWN)
def test_settings_of_their_own_are_checked(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_an_eta_for_one_step_is_checked_too():
    s = DDIMScheduler()
    s.set_timesteps(5)
    with pytest.raises(ValueError, match='eta'):
        s.step(x, s.timesteps[0], x, eta=2.0)
