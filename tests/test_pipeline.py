"""Text to image as a whole: the call's forms, editing, files, bad input; as diffusers computes it.

With small parts that have learned nothing: what's checked here holds for any weights.
"""

import json
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler as TheirDPM
from diffusers import EulerDiscreteScheduler as TheirEuler
from PIL import Image

import miniai.pipeline
from miniai.autoencoder import VAE
from miniai.clip import CLIP
from miniai.pipeline import Inpaint, TextToImagePipeline
from miniai.samplers import DDIMScheduler, DPMSolverScheduler, EulerScheduler, HeunScheduler
from miniai.schedulers import DDPMScheduler
from miniai.text_to_image import TextUNet, default_scheduler

SETTINGS = dict(
    beta_schedule='squaredcos_cap_v2',
    prediction_type='v_prediction',
    timestep_spacing='trailing',
)
RED, BLUE = 'a red seven on yellow paper', 'a blue two'


def small_parts():
    torch.manual_seed(0)
    vae = VAE(widths=(8, 16), n_blocks=(1, 1), scaling_factor=0.7)
    clip = CLIP(width=16, n_layers=1, dim=8, widths=(8, 16))
    unet = TextUNet(width=32, n_blocks=3, context_dim=16, n_heads=2, emb_dim=16)
    with torch.no_grad():
        for p in unet.parameters():  # without noise, some layers would be 0
            p += 0.05 * torch.randn(p.shape)
    return vae, clip, unet


def small_pipe(scheduler=None):
    pipe = TextToImagePipeline(*small_parts(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope='module')
def shared():
    return small_pipe()


@pytest.fixture
def pipe(shared):
    shared.scheduler = default_scheduler()
    return shared


@pytest.fixture(scope='module')
def picture():
    gen = torch.Generator().manual_seed(1)
    return torch.randint(256, (1, 3, 32, 32), generator=gen) / 127.5 - 1  # whole bytes


@pytest.fixture(scope='module')
def mask():
    mask = torch.zeros(32, 32)
    mask[10:22, 16:] = 1
    return mask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipe, prompt=RED, generator_=None, n_steps=4, output_type='pt', **kw):
    generator_ = generator() if generator_ is None else generator_
    kw = dict(guidance_scale=3.0, guidance_rescale=0, guidance_interval=None) | kw
    return pipe(
        prompt, num_inference_steps=n_steps, generator=generator_, output_type=output_type, **kw
    ).images


# --- forms of a call ---
@pytest.mark.parametrize(
    'prompt, n_each, count', [(RED, 1, 1), ([RED], 1, 1), ([RED, BLUE], 1, 2), ((RED, BLUE), 3, 6)]
)
def test_as_many_pictures_as_asked_for(pipe, prompt, n_each, count):
    x = draw(pipe, prompt, num_images_per_prompt=n_each)
    assert x.shape == (count, 3, 32, 32) and x.min() >= 0 and x.max() <= 1


def test_pictures_of_one_prompt_lie_side_by_side(pipe):
    gens = [generator(i) for i in range(4)]
    both = draw(pipe, [RED, BLUE], gens, num_images_per_prompt=2)
    for k, (prompt, i) in enumerate([(RED, 0), (RED, 1), (BLUE, 2), (BLUE, 3)]):
        assert torch.allclose(draw(pipe, prompt, [generator(i)])[0], both[k], atol=1e-4)


def test_the_same_seed_the_same_picture(pipe):
    assert torch.equal(draw(pipe), draw(pipe))
    assert not torch.allclose(draw(pipe), draw(pipe, generator_=generator(1)), atol=1e-3)


def test_fresh_noise_of_a_list_of_generators_is_each_pictures_own():
    pipe = small_pipe(DDPMScheduler(**SETTINGS, clip_sample=False))
    both = draw(pipe, [RED, RED], [generator(3), generator(4)])
    assert torch.allclose(draw(pipe, RED, [generator(4)])[0], both[1], atol=1e-4)


def test_negative_prompts_for_all_or_one_each(pipe):
    def two(negative):
        return draw(pipe, [RED, BLUE], negative_prompt=negative)

    assert torch.equal(two('thick'), two(['thick', 'thick']))
    assert torch.equal(two(None), two('')) and torch.equal(two(None), two(['', '']))
    one_each, thick = two(['thick', 'green']), two('thick')
    assert torch.allclose(one_each[0], thick[0], atol=1e-5)
    assert not torch.allclose(one_each[1], thick[1], atol=1e-5)


def test_guidance_runs_from_the_negative_prompt_to_the_prompt(pipe):
    def at(scale, prompt=RED, negative=BLUE):
        return draw(pipe, prompt, guidance_scale=scale, negative_prompt=negative)

    assert torch.allclose(at(1), at(1, negative=''), atol=1e-5)  # 1: it has no say
    assert torch.allclose(at(0), at(1, BLUE, RED), atol=1e-5)  # 0: it alone
    assert not torch.allclose(at(1), at(5), atol=1e-3)
    rescaled = draw(pipe, guidance_scale=5, guidance_rescale=1, negative_prompt=BLUE)
    assert not torch.allclose(rescaled, at(5), atol=1e-4)


def test_without_guidance_the_network_sees_each_picture_once(pipe, monkeypatch):
    seen, forward = [], pipe.unet.forward
    monkeypatch.setattr(pipe.unet, 'forward', lambda x, *a: seen.append(len(x)) or forward(x, *a))
    for scale in (1, 3):
        draw(pipe, [RED, BLUE], guidance_scale=scale)
    assert seen == [2] * 4 + [4] * 4


def test_output_types(pipe):
    pt, pil, array, z = (draw(pipe, output_type=k) for k in ('pt', 'pil', 'np', 'latent'))
    assert isinstance(pil, list) and pil[0].size == (32, 32) and pil[0].mode == 'RGB'
    assert array.shape == (1, 32, 32, 3) and array.dtype == np.float32
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.abs(np.asarray(pil[0]) / 255 - array[0]).max() < 0.6 / 255
    x = pipe.vae.decode(z / pipe.vae.scaling_factor)
    assert torch.allclose(x / 2 + 0.5, pt, atol=1e-6) and z.shape == (1, 4, 4, 4)


def test_progress_bar(pipe, capsys, picture):
    draw(pipe)
    assert capsys.readouterr().err == ''
    pipe.set_progress_bar_config(disable=False)
    draw(pipe)
    assert '/4' in capsys.readouterr().err
    draw(pipe, image=picture, strength=0)
    assert capsys.readouterr().err == ''
    pipe.set_progress_bar_config(disable=True)


def test_a_callback_looks_on_and_may_change_the_latents(pipe):
    told = []

    def look(p, i, t, kw):
        assert p is pipe and kw['pred_original_sample'].shape == kw['latents'].shape
        told.append((i, int(t), kw['latents'].clone()))
        return kw if i else None

    plain = draw(pipe, callback_on_step_end=look, output_type='latent')
    assert [i for i, *_ in told] == [0, 1, 2, 3] and torch.equal(told[-1][2], plain)
    assert [t for _, t, _ in told] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(plain, draw(pipe, output_type='latent'))

    def begin_anew(p, i, t, kw):
        return {'latents': torch.zeros_like(kw['latents'])} if i == 1 else kw

    a, b = (
        draw(pipe, generator_=generator(k), callback_on_step_end=begin_anew, guidance_scale=1)
        for k in (0, 0)
    )
    assert torch.equal(a, b) and not torch.allclose(a, draw(pipe, guidance_scale=1), atol=1e-4)
    last = draw(
        pipe, output_type='latent', callback_on_step_end=lambda p, i, t, kw: {'latents': 0 * plain}
    )
    assert (last == 0).all()


# --- a picture to start from ---
def test_strength_0_is_the_picture_up_to_the_autoencoder(pipe, picture):
    with torch.no_grad():
        back = pipe.vae.decode(pipe.vae.encode(picture)) / 2 + 0.5
    assert torch.allclose(draw(pipe, image=picture, strength=0), back, atol=1e-5)


def test_strength_1_ignores_it(pipe, picture):
    a, b = (draw(pipe, image=x, strength=1., n_steps=8) for x in (picture, -picture))
    assert (a - b).abs().max() < 5e-3  # (the last time keeps 1/20,000 of it)
    c, d = (draw(pipe, image=x, strength=0.5, n_steps=8) for x in (picture, -picture))
    assert (c - d).abs().max() > 10 * (a - b).abs().max()


@pytest.mark.parametrize('strength, calls', [(0, 0), (0.1, 1), (0.25, 2), (0.8, 6), (1, 8)])
def test_strength_is_the_share_of_the_steps(pipe, picture, strength, calls):
    times = []
    draw(
        pipe,
        image=picture,
        strength=strength,
        n_steps=8,
        callback_on_step_end=lambda p, i, t, kw: times.append(int(t)),
    )
    theirs = TheirDPM.from_config(dict(pipe.scheduler.config))
    theirs.set_timesteps(8)
    # get_timesteps of its StableDiffusionImg2ImgPipeline
    begin = max(8 - min(max(int(8 * strength), strength > 0), 8), 0)  # (but a step at least)
    assert len(times) == calls and times == theirs.timesteps[begin * theirs.order :].tolist()


def test_rounding_takes_no_step_away(pipe, picture):
    x0 = pipe._pictures(picture, None, 1)[0]
    for k in range(101):  # int(100*0.29) is 28
        scheduler, _ = pipe._start(100, x0, k / 100, 1, None)
        assert len(scheduler.timesteps) == k


def test_a_picture_in_0_to_1_is_told(pipe, picture):
    with pytest.warns(UserWarning, match=r'x\*2 - 1'):
        draw(pipe, image=picture / 2 + 0.5, strength=0)


@pytest.mark.parametrize(
    'scheduler',
    [
        HeunScheduler(**SETTINGS),
        EulerScheduler(**SETTINGS),
        DPMSolverScheduler(**SETTINGS, use_karras_sigmas=True),
        DDIMScheduler(**SETTINGS, clip_sample=False),
        TheirDPM(**SETTINGS),
        TheirEuler(**SETTINGS),
    ],
    ids=lambda s: f'{type(s).__module__.split(".")[0]} {type(s).__name__}',
)
def test_other_schedulers_and_late_starts(scheduler, picture):
    pipe = small_pipe(scheduler)
    assert draw(pipe).isfinite().all()
    with torch.no_grad():
        back = pipe.vae.decode(pipe.vae.encode(picture)) / 2 + 0.5
    little, much = (
        (draw(pipe, image=picture, strength=s, n_steps=20) - back).abs().mean() for s in (0.05, 0.9)
    )
    assert 0 < little < much / 2


def test_pictures_to_start_from_one_for_all_or_one_each(pipe, picture):
    pair = torch.cat([picture, -picture])
    x = draw(pipe, [RED, BLUE], image=pair, num_images_per_prompt=2, strength=0)
    assert torch.equal(x[0], x[1]) and torch.equal(x[2], x[3]) and not torch.equal(x[1], x[2])
    one = draw(pipe, [RED, BLUE], image=picture, strength=0)
    assert torch.equal(one[0], one[1])
    as_pil = [Image.fromarray(a) for a in _bytes(pair)]
    assert torch.allclose(draw(pipe, [RED, BLUE], image=as_pil, strength=0), x[::2], atol=1e-5)


def _bytes(x):
    return ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def test_kinds_of_pictures(pipe, picture, tmp_path):
    im = Image.fromarray(_bytes(picture)[0])
    grey = np.asarray(im.convert('L'))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode.startswith('I;16')

    def start(image):
        return draw(pipe, image=image, strength=0)

    plain = start(picture)
    for same in (im, im.convert('RGBA'), picture[0], [im]):
        assert torch.allclose(start(same), plain, atol=1e-5)
    assert torch.allclose(start(deep), start(im.convert('L')), atol=1e-2)
    im.resize((70, 50)).save(tmp_path / 'wide.jpg')
    assert start(Image.open(tmp_path / 'wide.jpg')).shape == (1, 3, 32, 32)
    data = (tmp_path / 'wide.jpg').read_bytes()
    (tmp_path / 'broken.jpg').write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="broken.jpg.* can't be read"):
        start(Image.open(tmp_path / 'broken.jpg'))


# --- a mask ---
KNOWING = {
    'DPM-Solver': default_scheduler(),
    'DPM-Solver, Karras': DPMSolverScheduler(**SETTINGS, use_karras_sigmas=True),
    'DDIM': DDIMScheduler(**SETTINGS, clip_sample=False),
    'DDIM, eta 1': DDIMScheduler(**SETTINGS, clip_sample=False, eta=1.0),
    'DDPM': DDPMScheduler(**SETTINGS, clip_sample=False),
    'Euler': EulerScheduler(**SETTINGS),
    'Heun': HeunScheduler(**SETTINGS),
    'DDPM of noise': DDPMScheduler(clip_sample=False),
    'DDIM of pictures': DDIMScheduler(prediction_type='sample', clip_sample=False),
}


@pytest.mark.parametrize('name', KNOWING)
@pytest.mark.parametrize('strength', [0.5, 1.0])
def test_outside_the_mask_nothing_changes(name, strength, picture, mask):
    pipe = small_pipe(KNOWING[name])
    kw = dict(image=picture, mask_image=mask, strength=strength, n_steps=6)
    x = draw(pipe, **kw)
    outside = (mask == 0).expand(1, 3, 32, 32)
    assert torch.equal(x[outside], (picture / 2 + 0.5)[outside])
    assert (x - picture / 2 - 0.5)[~outside].abs().mean() > 0.02
    with torch.no_grad():
        known = pipe._latents(picture)
    z = draw(pipe, output_type='latent', **kw)
    left_out = torch.ones(4, 4, dtype=torch.bool)
    left_out[1:3, 2:] = False  # the latents of which the mask has a part
    assert (z - known)[..., left_out].abs().max() < 1e-4 * known.abs().max()
    assert (z - known)[..., ~left_out].abs().min(1)[0].min() > 1e-3


def test_a_mask_as_a_picture_and_one_of_another_size_with_its_picture(pipe, picture, mask):
    im = Image.fromarray(_bytes(picture)[0])
    drawn = Image.fromarray((mask * 255).byte().numpy())
    want = draw(pipe, image=picture, mask_image=mask)
    assert torch.equal(draw(pipe, image=im, mask_image=drawn), want)
    assert torch.equal(draw(pipe, image=im, mask_image=drawn.convert('RGB')), want)
    clear = Image.new('RGBA', drawn.size, (255, 255, 255, 0))  # a white shape on nothing
    clear.paste('white', mask=drawn)
    assert torch.equal(draw(pipe, image=im, mask_image=clear), want)
    large = [o.resize((64, 64), Image.Resampling.NEAREST) for o in (im, drawn)]
    x = draw(pipe, image=large[0], mask_image=large[1])
    away = mask == 0
    away[8:24, 14:] = False  # scaling down, the mask's edge may move by a pixel
    start = draw(pipe, image=large[0], mask_image=Image.new('L', (64, 64)))
    assert torch.equal(x[..., away], start[..., away])


def test_a_black_mask_changes_nothing_and_a_white_one_is_none(pipe, picture):
    kw = dict(image=picture, strength=0.5)
    x = draw(pipe, mask_image=torch.zeros(32, 32), **kw)
    assert torch.equal(x, picture / 2 + 0.5)
    assert torch.equal(draw(pipe, mask_image=torch.ones(32, 32), **kw), draw(pipe, **kw))


def test_inpaint_is_any_models_wrapper():
    known, mask = torch.randn(2, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    scheduler = DDPMScheduler()
    model = Inpaint(lambda x, t: 0 * x, scheduler, known, mask)
    noise, t = torch.randn_like(known), torch.tensor([999, 300])
    answer = model(scheduler.add_noise(known, noise, t), t)
    assert torch.allclose(answer[..., :2], noise[..., :2], atol=1e-3)
    assert (answer[..., 2:] == 0).all()
    with pytest.raises(TypeError, match='schedulers'):
        Inpaint(model, TheirDPM(), known, mask)


# --- as diffusers computes it ---
def their_latents(pipe, scheduler, prompts, scale, n_steps, noise, start=None, strength=1.0):
    "A loop over diffusers' scheduler, as in its pipelines."
    words = pipe.clip.states([*prompts, *[''] * len(prompts)])
    scheduler.set_timesteps(n_steps)
    skip = n_steps - int(n_steps * strength)
    times = scheduler.timesteps[skip:]
    scheduler.set_begin_index(skip)
    z = noise * scheduler.init_noise_sigma
    if start is not None:
        z = scheduler.add_noise(start, noise, times[:1].expand(len(start)))
    for t in times:
        x = scheduler.scale_model_input(torch.cat([z, z]), t)
        cond, uncond = pipe.unet(x, t.expand(len(x)), words).chunk(2)
        z = scheduler.step(uncond + scale * (cond - uncond), t, z).prev_sample
    return z


@pytest.mark.parametrize('kind', ['DPMSolver', 'Euler'])
@pytest.mark.parametrize('n_steps, strength', [(16, 1), (5, 1), (16, 0.8), (20, 0.3)])
@torch.no_grad()
def test_latents_are_those_of_diffusers(kind, n_steps, strength, picture):
    ours = dict(DPMSolver=DPMSolverScheduler, Euler=EulerScheduler)[kind](**SETTINGS)
    theirs = dict(DPMSolver=TheirDPM, Euler=TheirEuler)[kind](**SETTINGS)
    pipe, prompts = small_pipe(ours), [RED, BLUE]
    noise = torch.randn((2, 4, 4, 4), generator=generator(7))
    start, kw = None, {}
    if strength < 1:
        start = pipe._latents(picture).expand(2, -1, -1, -1)
        kw = dict(image=picture, strength=strength)
    want = their_latents(pipe, theirs, prompts, 3.0, n_steps, noise, start, strength)
    z = draw(pipe, prompts, generator(7), n_steps, 'latent', guidance_scale=3.0, **kw)
    assert (z - want).abs().max() < 1e-4 * want.abs().max()
    pipe.scheduler = theirs
    z = draw(pipe, prompts, generator(7), n_steps, 'latent', guidance_scale=3.0, **kw)
    assert (z - want).abs().max() < 1e-4 * want.abs().max()


def test_names_are_those_of_diffusers():
    # of its text-to-image, image-to-image and inpainting pipelines
    theirs = """self prompt negative_prompt guidance_scale num_inference_steps generator
        num_images_per_prompt image strength mask_image callback_on_step_end output_type
        guidance_rescale"""
    ours = {*signature(TextToImagePipeline.__call__).parameters}
    assert ours == {*theirs.split(), 'guidance_interval'}


# --- files, devices ---
def test_saved_and_loaded_it_draws_the_same(pipe, tmp_path):
    pipe.scheduler = DPMSolverScheduler(**SETTINGS, solver_order=1)
    pipe.save_pretrained(tmp_path / 'mine')
    again = TextToImagePipeline.from_pretrained(str(tmp_path / 'mine'))
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.config == pipe.scheduler.config
    assert torch.equal(draw(again), draw(pipe))
    assert not any(m.training for m in (again.vae, again.clip, again.unet))


class FakeApi:
    def __init__(self, token=None):
        FakeApi.calls = [('token', token)]

    def create_repo(self, repo_id, **kw):
        self.calls.append(('create', repo_id, kw))
        return f'https://hub/{repo_id}'

    def upload_folder(self, repo_id, folder_path):
        files = {str(p.relative_to(folder_path)) for p in Path(folder_path).rglob('*.*')}
        self.calls.append(('upload', repo_id, files))


def test_push_to_hub(pipe, monkeypatch):
    monkeypatch.setattr(miniai.pipeline, 'HfApi', FakeApi)
    assert pipe.push_to_hub('me/digits', private=True, token='t') == 'https://hub/me/digits'
    token, create, (_, repo, files) = FakeApi.calls
    assert token == ('token', 't') and repo == 'me/digits'
    assert create == ('create', 'me/digits', dict(private=True, exist_ok=True))
    names = 'config.json', 'model.safetensors'
    wanted = {f'{part}/{name}' for part in ('vae', 'clip', 'unet') for name in names}
    assert wanted | {'scheduler/scheduler_config.json'} <= files


def test_from_the_hub(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / 'there')

    def download(repo_id, allow_patterns, **kw):
        assert repo_id == 'me/digits' and kw == {'revision': 'v1'}
        return str(tmp_path / 'there')

    monkeypatch.setattr('miniai.classifier.snapshot_download', download)
    again = TextToImagePipeline.from_pretrained('me/digits', revision='v1')
    assert again.unet.context_dim == pipe.unet.context_dim


@pytest.mark.parametrize('part', ['vae', 'clip', 'unet', 'scheduler'])
def test_a_part_that_is_missing_or_of_another_kind(pipe, part, tmp_path):
    pipe.save_pretrained(tmp_path)
    config = next((tmp_path / part).glob('*config.json'))
    config.rename(tmp_path / 'kept')
    with pytest.raises(FileNotFoundError, match=f'{part}/.* missing'):
        TextToImagePipeline.from_pretrained(tmp_path)
    config.write_text(json.dumps({'strange': 1}))
    with pytest.raises(ValueError, match=part):
        TextToImagePipeline.from_pretrained(tmp_path)


def test_parts_changed_on_disk_are_refused(pipe, tmp_path):
    noise = {k: pipe.scheduler.config[k] for k in ('beta_schedule', 'prediction_type')}
    pipe.unet.keep(trained_by=noise)
    pipe.save_pretrained(tmp_path)
    pipe.unet.keep(trained_by=None)

    def change(name, **settings):
        old = json.loads((tmp_path / name).read_text())
        new = {k: v for k, v in (old | settings).items() if v is not None}
        (tmp_path / name).write_text(json.dumps(new))
        return (tmp_path / name).write_text, json.dumps(old)

    words = json.loads((tmp_path / 'clip/config.json').read_text())['words']
    for name, changes in (
        ('vae', dict(scaling_factor=None)),
        ('vae', dict(scaling_factor=0.5)),
        ('clip', dict(words=words[::-1])),
    ):
        undo, old = change(f'{name}/config.json', **changes)
        with pytest.raises(ValueError, match="isn't what its U-Net was saved with"):
            TextToImagePipeline.from_pretrained(tmp_path)
        undo(old)
    for kind in (None, 'epsilon'):
        undo, old = change('scheduler/scheduler_config.json', prediction_type=kind)
        with pytest.raises(ValueError, match='trained to answer'):
            draw(TextToImagePipeline.from_pretrained(tmp_path))
        undo(old)
    TextToImagePipeline.from_pretrained(tmp_path).vae.calibrate(
        torch.rand(4, 3, 32, 32)).save_pretrained(tmp_path / 'vae')
    with pytest.raises(ValueError, match="isn't what its U-Net was saved with"):
        TextToImagePipeline.from_pretrained(tmp_path)
    change('unet/config.json', made_for=None)
    TextToImagePipeline.from_pretrained(tmp_path)  # of an older folder nothing is known


def test_no_folder():
    with pytest.raises(FileNotFoundError, match="'no/such' is no folder, and can't be had"):
        TextToImagePipeline.from_pretrained('no/such')


def test_parts_that_do_not_fit_each_other():
    vae, clip, unet = small_parts()
    for wrong in (TextUNet(in_channels=8, context_dim=16), TextUNet(context_dim=96)):
        with pytest.raises(ValueError, match='latent channels'):
            TextToImagePipeline(vae, clip, wrong)
    for parts in ((vae, unet, clip), (vae, clip, None), (VAE, clip, unet)):
        with pytest.raises(TypeError, match='expected a VAE, a CLIP, a TextUNet'):
            TextToImagePipeline(*parts)


def test_to_a_device():
    pipe = small_pipe()
    assert pipe.to('meta') is pipe
    parts = (pipe.vae, pipe.clip, pipe.unet)
    assert {p.device.type for m in parts for p in m.parameters()} == {'meta'}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_on_a_gpu_as_on_the_processor(picture, mask):
    pipe = small_pipe()
    kw = dict(image=picture, mask_image=mask, strength=0.9)
    want = draw(pipe), draw(pipe, **kw)
    pipe.to('cuda')
    for a, b in zip(want, (draw(pipe), draw(pipe, **kw))):
        assert b.device.type == 'cuda' and torch.allclose(a, b.cpu(), atol=1e-3)


# --- bad input ---
ZERO = torch.zeros(1, 3, 32, 32)
REFUSED = [
    (dict(prompt='a red severn on yelow'), ValueError, 'unknown words: severn, yelow .nearest: '),
    (dict(negative_prompt='ugly'), ValueError, 'unknown words: ugly'),
    (dict(prompt='red ' * 20), ValueError, 'over 19 words'),
    (dict(prompt=None), ValueError, 'one prompt or more'),
    (dict(prompt=[]), ValueError, 'one prompt or more'),
    (dict(prompt=7), TypeError, 'expected a sentence'),
    (dict(prompt=[RED, None]), TypeError, 'expected a sentence'),
    (dict(prompt=b'a seven'), TypeError, 'expected a sentence'),
    (dict(negative_prompt=['thin', 'thick']), ValueError, '1 and 2'),
    (dict(guidance_scale=-1), ValueError, 'guidance_scale is -1'),
    (dict(guidance_scale=float('nan')), ValueError, 'guidance_scale is nan'),
    (dict(guidance_scale='3'), ValueError, 'guidance_scale'),
    (dict(guidance_rescale=2), ValueError, 'rescale is 2'),
    (dict(strength=1.1, image=ZERO), ValueError, 'strength is 1.1'),
    (dict(strength=True, image=ZERO), ValueError, 'strength'),
    (dict(num_inference_steps=0), ValueError, 'num_inference_steps is 0'),
    (dict(num_inference_steps=2.5, image=ZERO), ValueError, 'num_inference_steps is 2.5'),
    (dict(num_inference_steps=2000), ValueError, 'num_inference_steps is 2000'),
    (dict(num_images_per_prompt=0), ValueError, 'num_images_per_prompt is 0'),
    (dict(generator=42), TypeError, 'torch.Generator'),
    (dict(generator=[torch.Generator()] * 2), ValueError, '2 generators for 1 pictures'),
    (dict(output_type='jpg'), ValueError, "output_type is 'jpg'"),
    (dict(mask_image=torch.ones(32, 32)), ValueError, 'give image too'),
    (dict(strength=0.3), ValueError, 'give image too'),
    (dict(callback_on_step_end=lambda *a: {'latent': 0}), TypeError, "may give.*'latent'"),
    (dict(callback_on_step_end=lambda *a: a[3]['latents']), TypeError, 'may give'),
    (dict(callback_on_step_end=lambda *a: {'latents': a[3]['latents'][:, :1]}), ValueError,
     'shape of latents'),
    (dict(image=ZERO, mask_image=torch.ones(16, 16)), ValueError, 'mask is 16x16.*picture 32x32'),
    (dict(image=Image.new('L', (40, 30)), mask_image=Image.new('L', (30, 40))), ValueError, 'mask'),
    (dict(image=ZERO, mask_image=torch.full((32, 32), 255.0)), ValueError, 'a mask'),
    (dict(image=ZERO, mask_image=ZERO), ValueError, 'a mask'),
    (dict(image=ZERO + 255), ValueError, 'beyond the range'),
    (dict(image=ZERO * np.nan), ValueError, 'beyond the range'),
    (dict(image=ZERO[:, :1]), ValueError, 'expected pictures'),
    (dict(image=ZERO[:0]), ValueError, 'expected pictures'),
    (dict(image=torch.zeros(3, 64, 64)), ValueError, 'expected pictures'),
    (dict(image=torch.cat([ZERO, ZERO])), ValueError, '2 pictures to start from, but 1 to draw'),
    (dict(image='seven.png'), TypeError, 'PIL picture or a tensor'),
    (dict(image=np.zeros((32, 32, 3))), TypeError, 'PIL picture or a tensor'),
    (dict(image=[]), ValueError, 'no pictures'),
]


@pytest.mark.parametrize('call, error, text', REFUSED, ids=lambda v: str(v)[:40])
def test_refused(pipe, call, error, text):
    call = dict(prompt=RED, num_inference_steps=2) | call
    with pytest.raises(error, match=text) as caught:
        pipe(**call)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 600


def test_a_scheduler_that_clips_latents(pipe):
    pipe.scheduler = DDIMScheduler(**SETTINGS)
    with pytest.raises(ValueError, match='clip_sample=False'):
        draw(pipe)
