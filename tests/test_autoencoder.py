"""The autoencoder: bad input, losses, training, weights, and the script that makes them."""

import copy
import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from miniai import autoencoder as A
from miniai.captions import captioned_digits
from miniai.data import DataLoaders, TensorLoader
from miniai.learner import Callback
from miniai.muon import Muon
from miniai.unet import UNet
from miniai.weights.train_vae import RandomColoursCB

SMALL = dict(widths=(32, 48), n_blocks=(1, 1))


@pytest.fixture(scope='module')
def digits():
    return captioned_digits(n_train=2_000, n_test=300)


@pytest.fixture(scope='module')
def shipped():
    return A.VAE.from_pretrained()


# shapes and bad input


@pytest.mark.parametrize('cls', [A.Autoencoder, A.VAE])
@pytest.mark.parametrize(
    'channels,latent,patch,widths',
    [(3, 4, 4, (16, 32)), (1, 2, 2, (16,)), (3, 1, 1, (8, 8, 8)), (4, 8, 2, (8, 16, 24))],
)
def test_every_size_that_the_levels_divide(cls, channels, latent, patch, widths):
    torch.manual_seed(0)
    model = cls(channels, latent, widths, [1] * len(widths), patch).eval()
    f = patch * 2 ** (len(widths) - 1)
    assert model.factor == f
    for h, w in ((f, f), (2 * f, 3 * f), (32, 64)):
        x = torch.rand(2, channels, h, w) * 2 - 1
        z = model.encode(x)
        assert z.shape == (2, latent, h // f, w // f) and model.decode(z).shape == x.shape
        assert model.decode(100 * z).abs().max() <= 1
    y = model(x)
    assert (y[0] if cls is A.VAE else y).shape == x.shape


def test_forty_eight_times_fewer():
    x = torch.zeros(1, 3, 32, 32)
    assert A.VAE().encode(x).shape == (1, 4, 4, 4) and x.numel() == 48 * 64


@pytest.mark.parametrize(
    'x,words',
    [
        (torch.zeros(1, 3, 32, 30), 'multiples of 8'),
        (torch.zeros(1, 3, 4, 8), 'multiples of 8'),
        (torch.zeros(1, 3, 0, 0), 'multiples of 8'),
        (torch.zeros(1, 1, 32, 32), r'\(1, 1, 32, 32\)'),
        (torch.zeros(3, 32, 32), r'\(n, 3, h, w\)'),
        (torch.zeros(1, 32, 32, 3), 'in_channels'),
        (torch.full((1, 3, 32, 32), 1.1), r'\[-1, 1\]'),
        (torch.full((1, 3, 32, 32), 255, dtype=torch.uint8), 'uint8'),
        (torch.full((1, 3, 32, 32), torch.nan), 'nan'),
    ],
)
def test_pictures_that_are_refused(shipped, x, words):
    for call in (shipped.encode, shipped, shipped.moments, A.Autoencoder(**SMALL)):
        with pytest.raises((ValueError, TypeError), match=words):
            call(x)


@pytest.mark.parametrize(
    'z',
    [torch.zeros(1, 64), torch.zeros(4, 4, 4), torch.zeros(1, 3, 32, 32), torch.zeros(1, 8, 4, 4)],
)
def test_latents_that_are_refused(shipped, z):
    with pytest.raises(ValueError, match=r'latents \(n, 4, h, w\)'):
        shipped.decode(z)


@pytest.mark.parametrize(
    'how',
    [
        dict(widths=()),
        dict(widths=(16,), n_blocks=(1, 1)),
        dict(latent_channels=0),
        dict(patch=0),
        dict(widths=(16, 10**9)),
        dict(patch=2**20),
        dict(n_blocks=(1, 10**6)),
        dict(scaling_factor=0.0),
        dict(scaling_factor=math.nan),
    ],
)
def test_architectures_that_are_refused(how, tmp_path):
    with pytest.raises(ValueError, match='expected'):
        A.VAE(**how)
    config = dict(in_channels=3, widths=[16, 16], n_blocks=[1, 1]) | how
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='expected'):  # before anything large is built
        A.VAE.from_pretrained(tmp_path)


def test_sizes_of_numpy_and_torch_reach_the_config(tmp_path):
    model = A.VAE(np.int64(1), torch.tensor(2), np.array([8, 16]), (np.int32(1), 1), np.int8(2))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config == dict(
        in_channels=1,
        latent_channels=2,
        widths=[8, 16],
        n_blocks=[1, 1],
        patch=2,
        scaling_factor=1.0,
    )
    assert A.VAE.from_pretrained(tmp_path).factor == 4


def test_other_refusals():
    with pytest.raises(ValueError, match='compared'):
        A.psnr(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match='share'):
        RandomColoursCB(1.5)
    with pytest.raises(ValueError, match='pictures'):
        A.RandomBatches(torch.zeros(0, 3), torch.zeros(0))
    with pytest.raises(ValueError, match='targets'):
        A.RandomBatches(torch.zeros(5, 3), torch.zeros(4))


# what the losses are


def test_losses_are_what_they_say():
    torch.manual_seed(0)
    x = torch.rand(6, 3, 8, 8) * 2 - 1
    y = x + 0.1 * torch.randn_like(x)
    assert torch.allclose(A.reconstruction_loss(y, x, l1=0, contrast=0), F.mse_loss(y, x))
    assert torch.allclose(
        A.reconstruction_loss(y, x, l1=1, contrast=0), F.mse_loss(y, x) + F.l1_loss(y, x)
    )
    assert torch.allclose(
        A.reconstruction_loss(y, x),
        sum(
            w * ((b - a) ** 2 + 0.1 * (b - a).abs()).mean()
            for a, b, w in zip(
                x, y, F.normalize((x.var((2, 3)).mean(1) + 0.05) ** -0.5, p=1, dim=0)
            )
        ),
    )
    mean, logvar = torch.randn(2, 6, 4, 2, 2)
    want = (
        torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, (logvar / 2).exp()),
            torch.distributions.Normal(0.0, 1.0),
        )
        .flatten(1)
        .sum(1)
    )
    assert torch.allclose(A.kl_divergence(mean, logvar), want, atol=1e-4)
    assert torch.allclose(
        A.VAELoss(0.5)((y, mean, logvar), x), A.reconstruction_loss(y, x) + 0.5 * want.mean()
    )
    assert A.psnr(y, x) == pytest.approx(
        10 * math.log10(4 / (y - x).square().mean().item()), abs=1e-4
    )


def test_random_colours_stay_in_range_and_keep_the_drawing(digits):
    from types import SimpleNamespace

    torch.manual_seed(0)
    x = digits['train'].x[:400]
    learn = SimpleNamespace(training=True, batch=(x, None))
    RandomColoursCB(0.25).before_batch(learn)
    y = learn.batch[0]
    changed = (y != x).flatten(1).any(1)
    assert 0.15 < changed.float().mean() < 0.35 and y[changed].abs().max() < 0.9999
    a, b = x[changed].flatten(2), y[changed].flatten(2)
    moved = a.std(2) > 0.1  # channels in which there's something to see
    a, b = (v[moved] - v[moved].mean(1, keepdim=True) for v in (a, b))
    assert (F.cosine_similarity(a, b, dim=1).abs() - 1).abs().max() < 1e-4


# training


def test_a_short_training_lowers_the_held_out_error(digits):
    torch.manual_seed(0)
    held = digits['test'].x[:]
    dls = DataLoaders(
        A.RandomBatches(
            digits['train'].x, digits['train'].attributes, 32, 30, torch.Generator().manual_seed(0)
        ),
        TensorLoader(held, held, batch_size=100),
    )
    learn = A.autoencoder_learner(
        A.VAE(**SMALL), dls, A.VAELoss(), lr=5e-3, device='cpu', opt_func=Muon
    ).fit(3)
    losses = [h['valid_loss'] for h in learn.history]
    assert losses[-1] < 0.6 * losses[0] and losses == sorted(losses, reverse=True)
    model = learn.ema.model
    with torch.no_grad():
        back = model.decode(model.encode(held))
    assert (
        A.psnr(back, held) > A.psnr(held.mean((2, 3), keepdim=True).expand_as(held), held) + 1
    )  # better than one flat colour


def test_vae_draws_in_training_and_only_then():
    torch.manual_seed(0)
    vae, x = A.VAE(**SMALL), torch.rand(2, 3, 32, 32)
    assert not torch.equal(vae(x)[0], vae(x)[0])
    vae.eval()
    assert torch.equal(vae(x)[0], vae(x)[0]) and torch.equal(vae(x)[0], vae.decode(vae.encode(x)))


def test_calibrated_latents_have_unit_standard_deviation(digits, tmp_path):
    vae, x = A.VAE(**SMALL).eval(), digits['train'].x[:300]
    vae.calibrate(x).save_pretrained(tmp_path)
    again = A.VAE.from_pretrained(tmp_path)
    assert (again.encode(x) * again.scaling_factor).std().item() == pytest.approx(1, abs=1e-4)
    assert (
        json.loads((tmp_path / 'config.json').read_text())['scaling_factor'] == vae.scaling_factor
    )
    assert torch.equal(
        A.encode_all(again, x, 7), torch.cat([again.encode(o) for o in x.split(7)]).detach()
    )


# the shipped weights


def test_shipped_weights(shipped, digits, root):
    folder = root / 'miniai' / 'weights' / 'vae'
    assert sorted(p.name for p in folder.iterdir()) == [
        'README.md',
        'config.json',
        'model.safetensors',
    ]
    assert (folder / 'model.safetensors').stat().st_size <= 4_000_000
    assert {v.dtype for v in load_file(folder / 'model.safetensors').values()} == {torch.float16}
    assert all(p.dtype == torch.float32 for p in shipped.parameters()) and not shipped.training
    card = (folder / 'README.md').read_text()
    for word in ('miniai train ', '--seed', 'seconds', 'dB', 'captioned_digits', 'never shown'):
        assert word in card
    for name, least in (('test', 24), ('unseen', 22)):
        x = digits[name].x[:]
        with torch.no_grad():
            assert A.psnr(shipped.decode(shipped.encode(x)), x) > least
    z = A.encode_all(shipped, digits['test'].x)
    assert (z * shipped.scaling_factor).std().item() == pytest.approx(1, abs=0.15)


def test_shipped_weights_travel_in_the_package():
    "Loaded from another folder, without a network."
    code = (
        "import torch\nfrom miniai.autoencoder import VAE\n"
        "print(tuple(VAE.from_pretrained().encode(torch.zeros(1, 3, 32, 32)).shape))"
    )
    root = Path(A.__file__).parent.parent
    run = subprocess.run(
        [sys.executable, '-c', code],
        cwd='/',
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(root), 'HF_HUB_OFFLINE': '1'},
    )
    assert '(1, 4, 4, 4)' in run.stdout, run.stderr


def test_the_built_package_holds_the_weights(root, tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            'setup.py',
            '-q',
            'build',
            '--build-lib',
            str(tmp_path / 'lib'),
            '--build-base',
            str(tmp_path / 'base'),
            'egg_info',
            '--egg-base',
            str(tmp_path),
        ],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(p.name for p in (tmp_path / 'lib' / 'miniai' / 'weights' / 'vae').iterdir()) == [
        'README.md',
        'config.json',
        'model.safetensors',
    ]


@pytest.mark.parametrize(
    'other',
    [A.VAE(widths=(16, 32)), A.VAE(latent_channels=8, **SMALL), A.Autoencoder(**SMALL), UNet()],
    ids=lambda m: type(m).__name__,
)
def test_weights_of_another_architecture_are_refused(other, tmp_path):
    other.save_pretrained(tmp_path)
    if isinstance(other, A.VAE):  # the right kind of model, but the config says something else
        config = json.loads((tmp_path / 'config.json').read_text())
        config['widths'] = [32, 64]
        (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match="don't fit VAE"):
        A.VAE.from_pretrained(tmp_path)


def test_saved_and_loaded_to_the_last_bit(tmp_path):
    torch.manual_seed(0)
    vae, x = A.VAE(**SMALL).eval(), torch.rand(2, 3, 32, 32)
    vae.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(A.VAE.from_pretrained(tmp_path)(x)[0], vae(x)[0]) and torch.equal(
            copy.deepcopy(vae)(x)[0], vae(x)[0]
        )


# the script that makes the weights


@pytest.fixture
def script(monkeypatch):
    "`train_vae` with few pictures, a small network, and without the half minute of its judge."
    from miniai.captions import CaptionJudge
    from miniai.weights import train_vae as script

    def pictures(source=None):
        return captioned_digits(source, n_train=300, n_test=50)

    def judge(source=None, device=None):
        return CaptionJudge().eval()

    def small():
        return A.VAE(widths=(8, 32), n_blocks=(1, 1))

    for name, small_one in (('captioned_digits', pictures), ('train_judge', judge), ('VAE', small)):
        monkeypatch.setattr(script, name, small_one)
    monkeypatch.setattr(script, 'STEPS_PER_EPOCH', 10)
    monkeypatch.setattr(script, 'BATCH_SIZE', 8)
    return script


def test_train_vae_writes_whole_files(script, tmp_path, capsys):
    figures = script.train_vae(steps=10, out=tmp_path / 'vae', device='cpu')
    kept = {'README.md', 'config.json', 'model.safetensors'}
    assert kept <= set(os.listdir(tmp_path / 'vae')) and figures['steps'] == 10
    vae = A.VAE.from_pretrained(tmp_path / 'vae')
    x = captioned_digits(n_train=300, n_test=50)['test'].x[:]
    with torch.no_grad():
        assert A.psnr(vae.decode(vae.encode(x)), x) == pytest.approx(figures['test_psnr'], abs=1e-2)
    assert f"{figures['test_psnr']:.2f} dB" in (tmp_path / 'vae' / 'README.md').read_text()
    assert 'held out' in capsys.readouterr().out


class Interrupt(Callback):
    order = 2000

    def before_step(self, learn):
        if learn.n_steps == 15:
            raise KeyboardInterrupt


def test_train_vae_interrupted_carries_on_to_the_same_weights(script, tmp_path, monkeypatch):
    whole = script.train_vae(steps=20, out=tmp_path / 'whole', device='cpu')
    learner = script.autoencoder_learner

    def interrupted(*args, cbs=(), **kwargs):
        return learner(*args, cbs=[*cbs, Interrupt()], **kwargs)

    monkeypatch.setattr(script, 'autoencoder_learner', interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.train_vae(steps=20, out=tmp_path / 'halves', device='cpu')
    assert not (tmp_path / 'halves' / 'model.safetensors').exists()
    assert (tmp_path / 'halves' / 'checkpoint-digits-0-20').is_dir()
    monkeypatch.setattr(script, 'autoencoder_learner', learner)
    gc.collect()  # the interrupted call's lock on its folder goes with its frame
    halves = script.train_vae(steps=20, out=tmp_path / 'halves', device='cpu')
    a, b = (load_file(tmp_path / k / 'model.safetensors') for k in ('whole', 'halves'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert halves['test_psnr'] == whole['test_psnr'] and halves['steps'] == 20
    assert not (tmp_path / 'halves' / 'checkpoint-digits-0-20').exists()


@pytest.mark.parametrize(
    'args,words',
    [
        (('--data', 'mnits'), "no data set called 'mnits'"),
        (('--seconds', '0'), 'not more than 0'),
        (('--steps', '-3'), 'not more than 0'),
        (('--seconds', '5', '--steps', '5'), 'not allowed with'),
        (('--device', 'abacus'), 'abacus'),
        (('--out', 'file/below'), "can't"),
    ],
)
def test_train_vae_refuses_in_one_line(args, words, tmp_path, monkeypatch, capsys):
    from miniai.cli import main

    (tmp_path / 'file').write_text('')
    monkeypatch.chdir(tmp_path)
    try:
        code = main(['train', 'vae', *args])
    except SystemExit as e:
        code = e.code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and words in last
