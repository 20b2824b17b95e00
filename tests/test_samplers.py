"""The samplers against their namesakes in diffusers, for every combination of what ours offer; custom times, pipelines, bad input."""

import copy
import pickle
from itertools import product

import diffusers
import numpy as np
import pytest
import torch

from miniai.data import import_torchvision
from miniai.diffusion import sample
from miniai.momentum import AdamScheduler, MomentumScheduler, power_times
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

BETAS, KINDS, SPACINGS = (
    ('linear', 'scaled_linear', 'squaredcos_cap_v2'),
    ('epsilon', 'sample', 'v_prediction'),
    ('leading', 'trailing', 'linspace'),
)
TWINS = {
    DDIMScheduler: diffusers.DDIMScheduler,
    EulerScheduler: diffusers.EulerDiscreteScheduler,
    EulerAncestralScheduler: diffusers.EulerAncestralDiscreteScheduler,
    HeunScheduler: diffusers.HeunDiscreteScheduler,
    DPMSolverScheduler: diffusers.DPMSolverMultistepScheduler,
}
OURS = [
    DDIMScheduler,
    EulerScheduler,
    EulerAncestralScheduler,
    HeunScheduler,
    DPMSolverScheduler,
]


def settings(**choices):
    "Every combination of the values in `choices`."
    return [dict(zip(choices, values)) for values in product(*choices.values())]


def model(x, t):
    return 0.5 * torch.sin(
        x + t / 50
    )  # gentle: a wild one would magnify rounding from step to step


def trajectory(s, n=20, times=None, **step):
    "Every picture on the way of `n` steps with a made-up model, and every guess where there are any."
    s.set_timesteps(n) if times is None else s.set_timesteps(timesteps=times)
    if hasattr(s, 'set_begin_index'):
        s.set_begin_index(0)  # diffusers loses its place where two steps round to the same time
    gen = torch.Generator().manual_seed(0)
    if not isinstance(s, diffusers.HeunDiscreteScheduler):
        step = dict(step, generator=gen)
    x, states, guesses = torch.randn(2, 1, 4, 4, generator=gen).double() * s.init_noise_sigma, [], []
    for t in s.timesteps:
        out = s.step(model(s.scale_model_input(x, t), t), t, x, **step)
        x = out.prev_sample
        states.append(x)
        guesses.append(getattr(out, 'pred_original_sample', None))
    return torch.stack(states), guesses


def assert_close(a, b, tol=1e-4):
    "Within `tol` of the largest number in each state: in the sigma scale of the cosine schedule they begin at 50,000."
    scale = b.flatten(1).abs().amax(1).clamp(min=1).view(-1, *[1] * (b.ndim - 1))
    assert b.isfinite().all() and ((a - b).abs() <= tol * scale).all(), (
        (a - b).abs() / scale
    ).max()


def compare(cls, kw, n=20, times=None, **step):
    ours, theirs = cls(**kw), TWINS[cls](**kw)
    assert abs(float(ours.init_noise_sigma) - float(theirs.init_noise_sigma)) < 1e-4 * float(
        theirs.init_noise_sigma
    )  # pipelines ask before set_timesteps
    (a, ga), (b, gb) = (trajectory(s, n, times, **step) for s in (ours, theirs))
    assert torch.allclose(ours.timesteps.float(), theirs.timesteps.float(), atol=1e-3) and len(
        a
    ) == len(b)
    assert_close(a, b)
    if gb[0] is not None:
        assert_close(torch.stack(ga), torch.stack(gb))
    if hasattr(theirs, 'sigmas'):
        assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-5)


@pytest.mark.parametrize('betas', BETAS)
@pytest.mark.parametrize('kind', KINDS)
def test_ddim_equals_diffusers(betas, kind):
    for kw in settings(
        timestep_spacing=('leading', 'trailing'),
        clip_sample=(True, False),
        set_alpha_to_one=(True, False),
    ):
        for eta, from_clipped in product((0.0, 0.4, 1.0), (True, False)):
            compare(
                DDIMScheduler,
                dict(kw, beta_schedule=betas, prediction_type=kind),
                eta=eta,
                use_clipped_model_output=from_clipped,
            )


@pytest.mark.parametrize('betas', BETAS)
@pytest.mark.parametrize('kind', KINDS)
def test_euler_equals_diffusers(betas, kind):
    for kw in settings(
        timestep_spacing=SPACINGS,
        use_karras_sigmas=(True, False),
        final_sigmas_type=('zero', 'sigma_min'),
    ):
        compare(EulerScheduler, dict(kw, beta_schedule=betas, prediction_type=kind))


@pytest.mark.parametrize(
    'kw',
    settings(
        beta_schedule=BETAS, prediction_type=('epsilon', 'v_prediction'), timestep_spacing=SPACINGS
    ),
)
def test_euler_ancestral_equals_diffusers(kw):
    compare(EulerAncestralScheduler, kw)


@pytest.mark.parametrize('betas', BETAS)
@pytest.mark.parametrize('kind', KINDS)
def test_heun_equals_diffusers(betas, kind):
    for kw in settings(
        timestep_spacing=SPACINGS, use_karras_sigmas=(True, False), clip_sample=(True, False)
    ):
        compare(HeunScheduler, dict(kw, beta_schedule=betas, prediction_type=kind))


@pytest.mark.parametrize('betas', BETAS)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('order', [1, 2, 3])
def test_dpm_solver_equals_diffusers(betas, kind, order):
    for kw in settings(
        timestep_spacing=SPACINGS,
        use_karras_sigmas=(True, False),
        final_sigmas_type=('zero', 'sigma_min'),
        lower_order_final=(True, False),
    ):
        # theirs divides 0 by 0 in a step of no length, where Karras' last level is the end
        if order == 3 and kw['use_karras_sigmas'] and kw['final_sigmas_type'] == 'sigma_min':
            continue
        compare(
            DPMSolverScheduler,
            dict(kw, solver_order=order, beta_schedule=betas, prediction_type=kind),
        )


@pytest.mark.parametrize(
    'kw',
    settings(
        thresholding=(True,),
        sample_max_value=(1.0, 1.5, 4.0),
        dynamic_thresholding_ratio=(0.9, 0.995),
        beta_schedule=('linear', 'squaredcos_cap_v2'),
        prediction_type=('epsilon', 'v_prediction'),
    ),
)
def test_thresholding_equals_diffusers(kw):
    compare(DPMSolverScheduler, kw)


@pytest.mark.parametrize('cls', TWINS)
@pytest.mark.parametrize(
    'kw',
    [
        dict(),
        dict(num_train_timesteps=100),
        dict(beta_start=0.001, beta_end=0.015, beta_schedule='scaled_linear'),
        dict(steps_offset=1, timestep_spacing='leading'),
    ],
)
def test_other_settings_equal_diffusers(cls, kw):
    compare(cls, kw)


@pytest.mark.parametrize('cls', TWINS)
@pytest.mark.parametrize('n', [1, 2, 5, 14, 15, 50])
def test_other_step_counts_equal_diffusers(cls, n):
    if cls is DDIMScheduler and 1000 % n:
        kw = dict(
            timestep_spacing='leading'
        )  # with 'trailing' theirs leaves its own times unless n divides 1000
    else:
        kw = dict(timestep_spacing='trailing')
    compare(cls, dict(kw, beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction'), n)


@pytest.mark.parametrize('cls', [EulerScheduler, HeunScheduler, DPMSolverScheduler])
def test_lists_of_times_equal_diffusers(cls):
    compare(
        cls,
        dict(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction'),
        times=[999, 895, 783, 659, 516, 340],
    )


def test_ddpm_takes_lists_of_times():
    times = [990, 600, 321, 45, 7]
    assert_close(
        trajectory(DDPMScheduler(), times=times)[0],
        trajectory(diffusers.DDPMScheduler(), times=times)[0],
    )


@pytest.mark.parametrize('cls', OURS)
def test_a_list_may_stand_for_the_number(cls):
    a, b = cls(), cls()
    a.set_timesteps([900, 500, 100])
    b.set_timesteps(timesteps=torch.tensor([900, 500, 100]))
    assert torch.equal(a.timesteps, b.timesteps) and a.num_inference_steps == 3


def test_ddim_with_eta_1_is_ancestral_sampling():
    kw = dict(beta_schedule='squaredcos_cap_v2', timestep_spacing='trailing')
    for kind in KINDS:
        a, b = (
            DDIMScheduler(**kw, prediction_type=kind, eta=1.0, clip_sample=False),
            DDPMScheduler(**kw, prediction_type=kind, clip_sample=False),
        )
        assert_close(trajectory(a)[0], trajectory(b)[0], 1e-3)


def test_order_1_is_ddim_and_euler_in_another_scale():
    kw = dict(beta_schedule='linear', prediction_type='epsilon', timestep_spacing='trailing')
    ddim, dpm, euler = (
        trajectory(s)[0]
        for s in (
            DDIMScheduler(**kw, clip_sample=False),
            DPMSolverScheduler(**kw, solver_order=1),
            EulerScheduler(**kw),
        )
    )
    assert_close(dpm, ddim)
    # Euler starts from sigma times the noise, the others from the noise: equal at the end but for that
    assert (euler[-1] - ddim[-1]).abs().max() < 0.02


def test_momentum_and_adam_without_memory_are_euler():
    kw = dict(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction')
    plain = trajectory(EulerScheduler(**kw))[0]
    assert torch.equal(trajectory(MomentumScheduler(**kw, momentum=0.0))[0], plain)
    assert not torch.allclose(trajectory(MomentumScheduler(**kw, momentum=0.5))[0], plain, atol=0.1)


def test_momentum_against_its_formula():
    s = MomentumScheduler(momentum=-0.4)
    s.set_timesteps(6)
    x = x_ref = torch.randn(3, 1, 4, 4) * s.init_noise_sigma
    mean, sig = None, s.sigmas.double()
    for i, t in enumerate(s.timesteps):
        d = model(x_ref / (sig[i] ** 2 + 1).sqrt(), t)  # epsilon is the slope
        mean = d if mean is None else -0.4 * mean + 1.4 * d
        x_ref = x_ref + (sig[i + 1] - sig[i]) * mean
        x = s.step(model(s.scale_model_input(x, t), t), t, x).prev_sample
    assert torch.allclose(x.double(), x_ref.double(), atol=1e-3)


def test_adam_per_pixel_against_torch_optim():
    "The same directions as torch's Adam takes, given the slopes as gradients and the fall of sigma as learning rate."
    s = AdamScheduler(betas=(0.7, 0.9), per_pixel=True)
    s.set_timesteps(8)
    p = torch.nn.Parameter(torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2)
    x = p.detach().clone()
    opt = torch.optim.Adam([p], lr=1.0, betas=(0.7, 0.9), eps=1e-8)
    for i, t in enumerate(s.timesteps):
        eps = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(i))
        x = s.step(eps, t, x).prev_sample
        opt.param_groups[0]['lr'] = (s.sigmas[i] - s.sigmas[i + 1]).item()
        p.grad = eps
        opt.step()
        assert torch.allclose(x, p, atol=1e-3)


@pytest.mark.parametrize('cls', OURS)
def test_a_second_run_and_copies_start_afresh(cls):
    s = cls(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction')
    first, _ = trajectory(s)
    assert torch.equal(trajectory(s)[0], first)
    s.step(
        torch.zeros(2, 1, 4, 4), s.timesteps[0], torch.zeros(2, 1, 4, 4)
    )  # a run that was broken off
    gen, x = torch.Generator().manual_seed(0), None
    x = torch.randn(2, 1, 4, 4, generator=gen) * s.init_noise_sigma
    for t in s.timesteps:
        x = s.step(model(s.scale_model_input(x, t), t), t, x, generator=gen).prev_sample
    assert torch.equal(x, first[-1])
    for other in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert torch.equal(trajectory(other)[0], first)


@pytest.mark.parametrize('cls', OURS)
def test_it_can_start_in_the_middle(cls):
    "As picture to picture does: the later times only, from a picture with noise added for the first of them."
    s = cls()
    s.set_timesteps(20)
    later = s.timesteps[9 * s.order - (s.order - 1) :]
    x0, noise = torch.zeros(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    x = s.add_noise(x0, noise, later[:1].repeat(3))
    for t in later:
        x = s.step(
            s.scale_model_input(x, t) * 0, t, x
        ).prev_sample  # epsilon 0: nothing to take away
    assert x.isfinite().all()


@pytest.mark.parametrize('cls', [EulerScheduler, HeunScheduler, EulerAncestralScheduler])
def test_sigma_samplers_add_noise_as_diffusers(cls):
    kw = {} if cls is EulerAncestralScheduler else dict(use_karras_sigmas=True)
    a, b = cls(**kw), TWINS[cls](**kw)
    x0, noise = torch.randn(2, 4, 1, 4, 4)
    for s in (a, b):
        s.set_timesteps(10)
    for t in a.timesteps[1::2]:
        assert torch.allclose(
            a.add_noise(x0, noise, t.repeat(4)), b.add_noise(x0, noise, t.repeat(4)), rtol=1e-4
        )


@pytest.mark.parametrize('s', [DDIMScheduler(eta=1.0), EulerAncestralScheduler()])
def test_generators_one_for_each_picture(s):
    "With dice of its own, a picture doesn't depend on those beside it."

    def draw(seeds):
        dice = [torch.Generator().manual_seed(k) for k in seeds]
        x = torch.cat([torch.randn(1, 1, 4, 4, generator=g) for g in dice]) * s.init_noise_sigma
        s.set_timesteps(10)
        for t in s.timesteps:
            x = s.step(0.1 * s.scale_model_input(x, t), t, x, generator=dice).prev_sample
        return x

    assert torch.allclose(draw((5, 6, 7))[1], draw((6,))[0], atol=1e-5) and not torch.allclose(
        draw((6,)), draw((7,)), atol=0.1
    )


@pytest.fixture(scope='module')
def nets():
    import_torchvision()
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=('DownBlock2D',) * 2,
        up_block_types=('UpBlock2D',) * 2,
    ).eval()
    vae = diffusers.VQModel(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        num_vq_embeddings=64,
        layers_per_block=1,
        down_block_types=('DownEncoderBlock2D',),
        up_block_types=('UpDecoderBlock2D',),
    ).eval()
    return unet, vae


def run(pipe, **kw):
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # their latent pipeline hands no dice to the scheduler
    return pipe(
        batch_size=2,
        generator=torch.Generator().manual_seed(1),
        num_inference_steps=8,
        output_type='np',
        **kw,
    ).images


@pytest.mark.parametrize('cls', [DDIMScheduler, DPMSolverScheduler])
def test_inside_the_ddpm_pipeline(nets, cls):
    kw = dict(
        beta_schedule='squaredcos_cap_v2',
        prediction_type='v_prediction',
        timestep_spacing='trailing',
    )
    a, b = (run(diffusers.DDPMPipeline(nets[0], s)) for s in (cls(**kw), TWINS[cls](**kw)))
    assert a.std() > 0.05 and np.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_inside_the_ddim_pipeline(nets, eta):
    kw = dict(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction')
    pipe = diffusers.DDIMPipeline(
        nets[0], DDIMScheduler(**kw)
    )  # it makes one of its own from our settings
    assert (
        isinstance(pipe.scheduler, diffusers.DDIMScheduler)
        and pipe.scheduler.config.prediction_type == 'v_prediction'
    )
    theirs = run(pipe, eta=eta)
    pipe.scheduler = DDIMScheduler(**kw)
    assert np.allclose(run(pipe, eta=eta), theirs, atol=1e-4)


@pytest.mark.parametrize('cls', TWINS)
def test_inside_the_latent_pipeline(nets, cls):
    "It scales the start by init_noise_sigma and the model's input: what the sigma samplers need."
    a, b = (
        run(
            diffusers.LDMPipeline(
                vqvae=nets[1], unet=nets[0], scheduler=s(prediction_type='v_prediction')
            )
        )
        for s in (cls, TWINS[cls])
    )
    assert a.std() > 0.01 and np.allclose(
        a, b, atol=2e-3
    )  # the code book jumps where a value lies between two entries


@pytest.mark.parametrize('cls', TWINS)
def test_theirs_inside_our_loop(cls):
    kw = dict(
        prediction_type='v_prediction',
        beta_schedule='squaredcos_cap_v2',
        timestep_spacing='trailing',
    )
    net = lambda x, t: 0.5 * torch.sin(x + t.view(-1, 1, 1, 1) / 50)
    a, b = (
        sample(net, s, (2, 1, 4, 4), 10, torch.Generator().manual_seed(0))
        for s in (cls(**kw), TWINS[cls](**kw))
    )
    assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('cls', OURS)
def test_saved_and_read(cls, tmp_path):
    s = cls(beta_schedule='squaredcos_cap_v2')
    s.save_pretrained(tmp_path)
    assert torch.equal(trajectory(cls.from_pretrained(tmp_path))[0], trajectory(s)[0])
    if cls in TWINS:
        assert TWINS[cls].from_pretrained(tmp_path).config.beta_schedule == 'squaredcos_cap_v2'


def test_from_config_takes_what_it_knows_and_refuses_what_changes_the_noise():
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction', use_karras_sigmas=True
    )
    assert_close(
        trajectory(DPMSolverScheduler.from_config(theirs.config))[0], trajectory(theirs)[0]
    )
    s = EulerScheduler.from_config(
        DDPMScheduler(prediction_type='sample', variance_type='fixed_large').config,
        timestep_spacing='trailing',
    )
    assert s.config.prediction_type == 'sample' and s.config.timestep_spacing == 'trailing'
    with pytest.raises(TypeError):
        EulerScheduler.from_config(DDPMScheduler().config, spacing='trailing')
    with pytest.raises(ValueError, match='use_beta_sigmas'):
        EulerScheduler.from_config(diffusers.EulerDiscreteScheduler(use_beta_sigmas=True).config)


def test_karras_sigmas_against_diffusers():
    s = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    s.set_timesteps(13)
    assert np.allclose(
        karras_sigmas(13, s.sigmas[-2].item(), s.sigmas[0].item()), s.sigmas[:-1], rtol=1e-5
    )


@pytest.mark.parametrize('power', [0.5, 1.0, 1.5])
def test_power_times_fall(power):
    for n in (1, 2, 6, 17):
        assert (np.diff(power_times(n, power)) < 0).all() and power_times(n, power)[0] == 999
    assert power_times(4, 1.0) == [999, 749, 499, 249]
    with pytest.raises(ValueError, match='fall together'):
        power_times(900, 3.0)


# --- bad input ---
x = torch.zeros(2, 1, 4, 4)


@pytest.mark.parametrize('cls', OURS)
def test_bad_input_is_refused(cls):
    with pytest.raises(ValueError, match='set_timesteps'):
        cls().step(x, 999, x)
    with pytest.raises(ValueError, match="prediction_type 'noise'"):
        cls(prediction_type='noise')
    with pytest.raises(ValueError, match="timestep_spacing 'even'"):
        cls(timestep_spacing='even')
    with pytest.raises(ValueError, match="beta_schedule 'sine'"):
        cls(beta_schedule='sine')
    s = cls()
    for n in (0, 1001, 2.5):
        with pytest.raises(ValueError, match='1 to 1000'):
            s.set_timesteps(n)
    for times in ([], [5, 6], [1000], [-1], [3, 3], 'ab'):
        with pytest.raises(ValueError):
            s.set_timesteps(timesteps=times)
    with pytest.raises(ValueError, match='either'):
        s.set_timesteps()
    with pytest.raises(ValueError, match='either'):
        s.set_timesteps(3, timesteps=[2, 1])
    s.set_timesteps(10)
    with pytest.raises(ValueError, match='shaped like'):
        s.step(x[:, :, :2], s.timesteps[0], x)
    for t in (1000, -1, 12345):
        with pytest.raises(ValueError, match='not among'):
            s.step(x, t, x)
    with pytest.raises(ValueError, match='from 0 to 999'):
        s.add_noise(x, x, torch.tensor([0, 1000]))


def test_settings_of_their_own_are_checked():
    for eta in (-0.1, 1.1, 'a', None, float('nan')):
        with pytest.raises(ValueError, match='eta'):
            DDIMScheduler(eta=eta)
    s = DDIMScheduler()
    s.set_timesteps(5)
    with pytest.raises(ValueError, match='eta'):
        s.step(x, s.timesteps[0], x, eta=2.0)
    with pytest.raises(ValueError, match='linspace'):
        DDIMScheduler(timestep_spacing='linspace')
    for cls in (EulerScheduler, DPMSolverScheduler):
        with pytest.raises(ValueError, match="final_sigmas_type 'one'"):
            cls(final_sigmas_type='one')
        with pytest.raises(ValueError, match='karras'):
            cls(use_karras_sigmas=True).set_timesteps(timesteps=[500, 100])
    with pytest.raises(ValueError, match='solver_order'):
        DPMSolverScheduler(solver_order=4)
    with pytest.raises(ValueError, match='sample_max_value'):
        DPMSolverScheduler(sample_max_value=0.5)
    with pytest.raises(ValueError, match='leading'):
        DPMSolverScheduler(timestep_spacing='leading').set_timesteps(1000)
    for m in (-1, 1, 2.0):
        with pytest.raises(ValueError, match='momentum'):
            MomentumScheduler(momentum=m)
    for b in ((1.0, 0.9), (0.0, 1.0), (0.5,)):
        with pytest.raises(ValueError, match='betas'):
            AdamScheduler(betas=b)
    with pytest.raises(ValueError, match='prediction_type'):
        EulerAncestralScheduler(prediction_type='sample')
