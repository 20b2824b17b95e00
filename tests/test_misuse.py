"""What people get wrong, in tables: one clear line for it, or the right result; no file is lost.

`REFUSED`: area, what is tried, the exception, what its text says, the call. The text has 300
characters at most (a folder's name aside), comes within seconds, and nothing is written. `RIGHT`:
area, what is tried, a call that returns whether the result is right, by the oracle it names. Every
case runs in a folder full of somebody's files, and each of them is afterwards as it was.

More of the kind, where the rest of the subject is tested: signals, a full disk and two processes
in `test_cli.py` (the command) and `test_checkpoint.py` (a fit, killed fifty times), crashes
between two renames in `test_results.py`.
"""

import copy
import gc
import hashlib
import io
import itertools
import json
import math
import re
import shlex
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from miniai import activations, autograd, cli, conv, demo, matmul, optim, plot, score
from miniai import nn as mini
from miniai.autoencoder import (
    VAE,
    Autoencoder,
    RandomBatches,
    VAELoss,
    autoencoder_learner,
    encode_all,
    psnr,
)
from miniai.callbacks import (
    EMACB,
    MetricsCB,
    NaNStopCB,
    ProgressCB,
    RecorderCB,
    ScheduleCB,
    SchedulerCB,
    accuracy,
    lr_find,
    warmup_cosine,
)
from miniai.captions import CaptionJudge, captioned_digits, digit_caption
from miniai.checkpoint import CheckpointCB, checkpoints, load_state, save_state
from miniai.classifier import (
    AugmentCB,
    Classifier,
    EarlyStopCB,
    RandomAffines,
    affine,
    train_classifier,
)
from miniai.clip import CLIP
from miniai.data import DataLoaders, TensorLoader, images_to_tensor, load_digits, load_images
from miniai.diffusion import DiffusionCB, diffusion_learner, sample, sample_batches
from miniai.einsum import einsum
from miniai.guidance import AutoGuidance, Guidance, GuideModelCB
from miniai.learner import Callback, DeviceCB, Learner
from miniai.meanshift import MeanShift, estimate_bandwidth, gaussian_kernel, meanshift_step
from miniai.metrics import (
    FeatureStats,
    ImageEval,
    Reservoir,
    fid,
    nearest_distance,
    with_floor,
)
from miniai.momentum import MomentumScheduler
from miniai.muon import Muon, orthogonalize
from miniai.pipeline import Inpaint
from miniai.plot import animate, image_grid, show_images, to_pil
from miniai.results import Results
from miniai.samplers import (
    DDIMScheduler,
    DPMSolverScheduler,
    EulerAncestralScheduler,
    EulerScheduler,
    HeunScheduler,
    karras_sigmas,
)
from miniai.scaling import AccelerateCB, AccumulateCB, MixedPrecisionCB
from miniai.schedulers import DDPMScheduler, randn
from miniai.tensors import broadcast_shapes, set_seed, to_device
from miniai.threads import Chooser
from miniai.unet import UNet, timestep_embedding
from miniai.weights.train_vae import RandomColoursCB

INPUT = ValueError, TypeError       # either will do: it's the text that helps
SCHEDULERS = (DDPMScheduler, DDIMScheduler, EulerScheduler, EulerAncestralScheduler, HeunScheduler,
              DPMSolverScheduler)  # fmt: skip

# ---- what the cases share


def tiny(**kw):
    set_seed(0)
    return UNet(**dict(widths=(8,), head_dim=8, emb_dim=8) | kw)


def awake(model):
    "A fresh network answers 0 to everything: this one has changed a little."
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model.eval()


def toys(n=24, bs=8, shift=0.0):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 8, 8, generator=g).clamp(-1, 1) + shift, torch.arange(n) % 3
    return DataLoaders(TensorLoader(x, y, batch_size=bs), TensorLoader(x[:8], y[:8], batch_size=bs))


def linear(seed=0):
    set_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def learner(*cbs, model=None, dls=None, seed=0, **kw):
    settings = dict(loss_func=F.cross_entropy, lr=0.1, opt_func=torch.optim.SGD) | kw
    return Learner(model or linear(seed), dls or toys(), cbs=[DeviceCB('cpu'), *cbs], **settings)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def drawn(model, scheduler=None, n=5, shape=(2, 1, 8, 8)):
    return sample(model, scheduler or DDIMScheduler(), shape, n, seeded())


GREY = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)


def put(folder, **files):
    "Writes pictures and texts into `folder`, named by the keywords (`a__b_png`: a/b.png)."
    for name, what in files.items():
        path = folder/name.replace('__', '/').replace('_', '.')
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, Image.Image):
            what.save(path)
        else:
            path.write_bytes(what if isinstance(what, bytes) else what.encode())
    return folder


def twelve(folder, suffix='png', im=None):
    im = im or Image.fromarray(GREY)
    return put(folder, **{f'{i}_{suffix}': im for i in range(12)})


def loaded(folder, **kw):
    "The training pictures of a folder as numbers."
    kw = dict(device='cpu', valid_size=0) | kw
    return DataLoaders.from_dataset(load_images(folder), **kw).train.tensors


def as_numbers(x):
    "A picture's numbers, as they should arrive: one channel or three, in [-1, 1]."
    return torch.as_tensor(np.asarray(x)).float()/127.5 - 1


def arrives(s, im, suffix, wanted=GREY, room=0.0):
    "Saved in a folder and loaded, each picture is `wanted`, to within `room`."
    x = loaded(twelve(s.tmp/'in', suffix, im))[0]
    w = as_numbers(wanted)
    w = w[None] if w.ndim == 2 else w.permute(2, 0, 1)
    return x.shape[1:] == w.shape and (x - w).abs().max().item() <= room


def edited(s, name, **changes):
    "A copy of the saved model in which a JSON file is changed."
    folder = s.tmp/'edited'
    shutil.copytree(s.model, folder)
    text = json.dumps(json.loads((folder/name).read_text()) | changes)
    (folder/name).write_text(text[:len(text)//2] if 'half' in changes else text)
    return folder


def with_weights(s, change):
    "A copy of the saved model whose weights file is what `change` makes of its bytes."
    folder = s.tmp/'weights'
    shutil.copytree(s.model, folder)
    path = folder/'model.safetensors'
    path.write_bytes(change(path.read_bytes()))
    return folder


def command(words):
    "The exit code of the command."
    try:
        return cli.main(shlex.split(words))
    except SystemExit as e:
        return e.code


# ---- refused: one clear error

NAN, INF = math.nan, math.inf
X = torch.zeros(2, 1, 8, 8)
LINEAR = dict(beta_schedule='linear')
FOREIGN = 'trained_betas', 'rescale_betas_zero_snr', 'use_flow_sigmas', 'use_exponential_sigmas'


def fresh(scheduler, n=5):
    scheduler.set_timesteps(n)
    return scheduler


def foreign():
    import diffusers

    return diffusers.DDPMScheduler()


REFUSED = dict(
    pictures=[
        ('four channels', ValueError, r'\(4, 8, 8\)', lambda s: to_pil(torch.zeros(4, 8, 8))),
        ('complex numbers', INPUT, 'complex', lambda s: to_pil(np.ones((8, 8), complex))),
        ('a file name', INPUT, 'str|Image.open', lambda s: to_pil('cat.png')),
        ('nothing', INPUT, 'NoneType', lambda s: to_pil(None)),
        ('rows of two lengths', INPUT, 'row|shape|length', lambda s: to_pil([[0, 1], [2]])),
        ('texts', INPUT, 'numbers|dtype', lambda s: to_pil(np.array([['a', 'b']]))),
        ('a range of nothing', ValueError, 'value_range', lambda s: to_pil(X[0], None, (0, 0))),
        ('a range of NaN', ValueError, 'value_range', lambda s: to_pil(X[0], None, (NAN, 1))),
        ('0 pixels', ValueError, 'size', lambda s: to_pil(X[0], 0)),
        ('-5 pixels', ValueError, 'size', lambda s: to_pil(X[0], -5)),
        ('one picture, not a batch', ValueError, 'shape', lambda s: image_grid(torch.zeros(5))),
        ('-1 columns', ValueError, 'ncols', lambda s: image_grid(X, ncols=-1)),
        ('0 frames a second', ValueError, 'fps', lambda s: animate(X, fps=0)),
        ('a thousand frames a second', ValueError, '50', lambda s: animate(X, fps=1000)),
        ('a negative rest', ValueError, 'hold', lambda s: animate(X, hold=-1)),
        ('frames of two sizes', ValueError, 'size',
         lambda s: animate([torch.zeros(1, 8, 8), torch.zeros(1, 8, 16)])),
        ('60 frames a second', ValueError, 'at most 50', lambda s: animate(X, fps=60)),
        ('a film', ValueError, 'end its name in .gif',
         lambda s: animate(X).save(s.tmp/'film.mp4')),
        ('as far below 0 as above, from a file', ValueError, 'tif.*scale it',
         lambda s: arrives(s, Image.fromarray(np.float32(GREY) - 128), 'tif')),
        ('a path, resized', ValueError, 'Image.open', lambda s: images_to_tensor(['a.png'], 16)),
        ('a batch as one', ValueError, 'show_images', lambda s: plot.show_image(X)),
        ('file names', ValueError, 'number 0', lambda s: images_to_tensor(['a.png'])),
        ('0 pixels a side', ValueError, 'size', lambda s: images_to_tensor([s.im], size=0)),
        ('-8 pixels a side', ValueError, 'size', lambda s: images_to_tensor([s.im], size=-8)),
        ('four channels of each', ValueError, 'channels is 4',
         lambda s: images_to_tensor([s.im], channels=4)),
        ('a float picture with NaN, from a file', ValueError, 'tif.*nan',
         lambda s: arrives(s, Image.fromarray(np.full((8, 8), np.nan, np.float32)), 'tif')),
        ('heat as a picture', ValueError, 'scale it',
         lambda s: images_to_tensor([Image.fromarray(np.float32(GREY)*1e6)])),
        ('floats from 0 to 255', ValueError, 'floats up to 2.*scale',
         lambda s: images_to_tensor(torch.from_numpy(GREY[None, None]).float())),
    ],
    folders=[
        ('no name', INPUT, "''|name", lambda s: load_images('')),
        ('None', (*INPUT, OSError), 'None', lambda s: load_images(None)),
        ('a number', (*INPUT, OSError), '7', lambda s: load_images(7)),
        ('a picture, not its folder', (ValueError, OSError), 'folder',
         lambda s: load_images('pictures/a.png')),
        ('a text file', (ValueError, OSError), 'folder', lambda s: load_images('notes.txt')),
        ('a picture for its folder', FileNotFoundError, 'a.png.*nor a folder',
         lambda s: load_images('pictures/a.png')),
        ('classes of classes', ValueError, 'side by side',
         lambda s: [load_images(twelve(s.tmp/'x'/a/b).parent.parent)
                    for a, b in (('cat', '2020'), ('dog', '2021'))]),
        ('only a text', ValueError, 'pictures', lambda s: load_images(put(s.tmp/'x', a_txt='x'))),
        ('a class called train', ValueError, 'bus.*car',
         lambda s: load_images(twelve(twelve(twelve(s.tmp/'x'/'bus').parent/'car').parent/'train')
                               .parent)),
        ('a mistyped path', FileNotFoundError, 'photos/mnist',
         lambda s: elsewhere(s, './photos/mnist')),
        ('a path of three parts', FileNotFoundError, 'a/b/mnist',
         lambda s: elsewhere(s, 'a/b/mnist')),
        ('a saved model', ValueError, 'pictures|read', lambda s: load_images('hub')),
        ('a table without a header', ValueError, 'file_name',
         lambda s: loaded(put(twelve(s.tmp/'x'), metadata_csv='0.png,1\n1.png,2\n'))),
        *((f'metadata: {name}', ValueError, f'metadata.{kind}.*expected UTF-8.*{{"file_name"',
           lambda s, kind=kind, what=what: load_images(put(
               twelve(s.tmp/'x'), **{f'metadata_{kind}': what})))
          for name, kind, what in (
              ('nothing', 'jsonl', ''), ('one list', 'jsonl', '[{"file_name": "0.png"}]'),
              ('commas behind', 'jsonl', '{"file_name": "0.png"},\n{"file_name": "1.png"}'),
              ('UTF-16', 'jsonl', '{"file_name": "0.png", "text": "a"}'.encode('utf-16')),
              ('no file_name', 'jsonl', '{"file": "0.png"}'),
              ('a number for a name', 'jsonl', '{"file_name": 7}'),
              ('semicolons', 'csv', 'file_name;text\n0.png;a'),
              ('commas without quotes', 'csv', 'file_name,text\n0.png,a, b\n1.png,c, d'),
              ('one comma too many', 'csv', 'file_name,text\n0.png,a\n1.png,c, d'))),
        ('all held out', ValueError, 'test_size', lambda s: load_images('pictures', 1.0)),
        ('none held out', ValueError, 'test_size', lambda s: load_images('pictures', 0)),
        ('less than none', ValueError, 'test_size', lambda s: load_images('pictures', -0.5)),
        ('a test_size in words', INPUT, 'test_size', lambda s: load_images('pictures', 'half')),
        ('two sizes', ValueError, 'size=',
         lambda s: loaded(put(twelve(s.tmp/'x'), b_png=Image.new('L', (9, 8))))),
        ('a split without pictures of training', ValueError, "'train'",
         lambda s: load_images(twelve(s.tmp/'x'/'valid').parent)),
        ('no pictures of training', ValueError, "'train'",
         lambda s: DataLoaders.from_dataset({'test': s.digits['test']})),
    ],
    captions=[
        ('a digit in figures', ValueError, "'7'", lambda s: digit_caption('7', 'red', 'blue')),
        ('seven and a half', ValueError, 'label is 7.5',
         lambda s: digit_caption(7.5, 'red', 'blue')),
        ('template 99', ValueError, 'template is 99',
         lambda s: digit_caption(7, 'red', 'blue', template=99)),
        ('a colour in capitals', ValueError, "'Red'", lambda s: digit_caption(7, 'Red', 'blue')),
        ('half a picture', INPUT, 'n_train|2.5', lambda s: captioned_digits(n_train=2.5)),
        ('one split alone', (ValueError, OSError), 'no data set called .Dataset',
         lambda s: captioned_digits(s.digits['train'], n_train=2, n_test=2)),
        ('a column mistyped', KeyError, 'Caption', lambda s: s.captioned['train']['Caption']),
        ('wishes as a list', TypeError, 'attributes.*list',
         lambda s: s.judge.score(X.repeat(1, 3, 4, 4), [[1, 2, 3, 0, 0]]*2)),
        ('wishes in words', TypeError, 'attributes.*list',
         lambda s: s.judge.score(X[:1].repeat(1, 3, 4, 4), ['a red seven'])),
        *((f'wishes of {k}', ValueError, 'ATTRIBUTES',
           lambda s, k=k: s.judge.score(X.repeat(1, 3, 4, 4), torch.full((2, 5), k)))
          for k in (12, 3, -2, NAN)),
        ('a row past the end', IndexError, 'range|bounds', lambda s: s.captioned['train'][99]),
        ('a mask that is too short', IndexError, 'mask|shape|dimension|match',
         lambda s: s.captioned['train'].x[torch.ones(3, dtype=torch.bool)]),
        ('bytes for the judge', ValueError, r'\[-1, 1\]',
         lambda s: s.judge(s.captioned['train'].x[:]*127.5 + 127.5)),
        ('grey pictures for the judge', ValueError, r'n, 3, h, w', lambda s: s.judge(X)),
    ],
    loaders=[
        ('no tensors', ValueError, 'tensors', lambda s: TensorLoader()),
        ('a device that is none', (*INPUT, RuntimeError), 'abacus',
         lambda s: DataLoaders.from_dataset(s.digits, device='abacus')),
        ('one picture, no list of them', INPUT, 'Image', lambda s: images_to_tensor(s.im)),
        ('two sides for a size', INPUT, 'size', lambda s: images_to_tensor([s.im], size=(8, 8))),
        ('-1 pictures to show', ValueError, 'n is', lambda s: s.loaders.show_batch(-1)),
        ('a name for a dict', ValueError, 'dict.*str',
         lambda s: DataLoaders.from_dataset('digits')),
        ('a share of NaN', ValueError, 'valid_size',
         lambda s: DataLoaders.from_dataset(s.digits, valid_size=NAN)),
        ('lists as splits', AttributeError, 'list.*column_names',
         lambda s: DataLoaders.from_dataset({'train': [1, 2], 'test': [3]})),
        ('a splits without pictures', ValueError, "'image'|no column|pictures",
         lambda s: DataLoaders.from_dataset({k: ds.remove_columns('image')
                                             for k, ds in s.digits.items()})),
        ('nothing to draw from', ValueError, 'at least one', lambda s: RandomBatches(X[:0], X[:0])),
        ('texts to draw from', TypeError, 'tensor.*list', lambda s: RandomBatches(X, ['a', 'b'])),
    ],
    learner=[
        ('-1 epochs', INPUT, 'n_epochs', lambda s: learner().fit(-1)),
        ('half an epoch', INPUT, 'n_epochs', lambda s: learner().fit(1.5)),
        ('epochs in words', INPUT, 'n_epochs', lambda s: learner().fit('3')),
        ('a rate below 0', ValueError, 'learning rate|lr', lambda s: learner(lr=-1).fit(1)),
        ('a rate of NaN', ValueError, 'learning rate|lr', lambda s: learner(lr=NAN).fit(1)),
        ('a model that is none', INPUT, 'model', lambda s: learner(model='resnet').fit(1)),
        ('the class of a model', INPUT, 'model', lambda s: learner(model=Classifier).fit(1)),
        ('the class of a loss', INPUT, 'loss_func|one number',
         lambda s: learner(loss_func=nn.CrossEntropyLoss).fit(1)),
        ('no loss', INPUT, 'loss', lambda s: learner(loss_func=None).fit(1)),
        ('a loss without a slope', (ValueError, RuntimeError), 'grad',
         lambda s: learner(loss_func=accuracy).fit(1)),
        ('labels as fractions', RuntimeError, 'Long', lambda s: learner(dls=DataLoaders(
            TensorLoader(X, torch.tensor([0.0, 1.0])))).fit(1)),
        ('a column against a row', UserWarning, r'2\].*size.*2, 1\]',      # torch's, as an error
         lambda s: learner(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 1)),
                           loss_func=F.mse_loss,
                           dls=DataLoaders(TensorLoader(X, torch.rand(2)))).fit(1)),
        ('a method that forgets the learner', TypeError, 'before_batch',
         lambda s: learner(type('Mine', (Callback,), dict(before_batch=lambda self: 0))()).fit(1)),
        ('a made optimiser', TypeError, 'opt_func.*SGD',
         lambda s: learner(opt_func=torch.optim.SGD(linear().parameters(), 0.1)).fit(1)),
        ('one callback, not a list', TypeError, 'MetricsCB.*not iterable',
         lambda s: Learner(linear(), toys(), cbs=MetricsCB())),
        ('no loader to train', INPUT, 'train', lambda s: learner(dls=DataLoaders(None)).fit(1)),
        ('loaders that are a loader', TypeError, 'DataLoaders.*TensorLoader',
         lambda s: learner(dls=toys().train).fit(1)),
        ('a fit in a fit', RuntimeError, r'trial\(\)',
         lambda s: learner(Within(lambda learn: learn.fit(1))).fit(1)),
        ('one score a row', ValueError, 'scores in a row is 1',
         lambda s: learner(MetricsCB(accuracy), model=nn.Sequential(nn.Flatten(), nn.Linear(64, 1)),
                           loss_func=lambda p, y: p.mean()).fit(1)),
        ('predictions without data', INPUT, 'valid|dl',
         lambda s: learner(dls=DataLoaders(toys().train)).get_preds()),
        ('a frozen model', (ValueError, RuntimeError), 'grad',
         lambda s: learner(model=linear().requires_grad_(False)).fit(1)),
        ('a model without weights', ValueError, 'parameter',
         lambda s: learner(model=nn.Flatten()).fit(1)),
        ('labels out of range', IndexError, 'Target 7',
         lambda s: learner(dls=DataLoaders(TensorLoader(X, torch.tensor([0, 7])))).fit(1)),
    ],
    callbacks=[
        ('to look every 0 steps', ValueError, 'every', lambda s: learner(NaNStopCB(0)).fit(1)),
        ('a model for a learner', TypeError, 'Learner', lambda s: lr_find(linear())),
        ('every -1 epochs', ValueError, 'every', lambda s: CheckpointCB('ck', every=-1)),
        ('a schedule that is a number', TypeError, '(?s)float.*not callable.*ScheduleCB',
         lambda s: learner(ScheduleCB(0.5)).fit(1)),
        ('a schedule of NaN', ValueError, 'sched|nan|learning rate',
         lambda s: learner(ScheduleCB(lambda pct: NAN)).fit(1)),
        ('a schedule below 0', ValueError, 'sched|-1|learning rate',
         lambda s: learner(ScheduleCB(lambda pct: -1.0)).fit(1)),
        ('a decay of NaN', ValueError, 'decay is nan', lambda s: EMACB(NAN)),
        *((f'a metric called {name}', ValueError, name,
           lambda s, name=name: learner(MetricsCB(**{name: accuracy})).fit(1))
          for name in ('loss', 'epoch', 'valid_loss')),
        ('an average taken twice', ValueError, 'EMACB|twice',
         lambda s: (lambda ema: learner(ema, ema).fit(1))(EMACB(0.9))),
        ('a metric of nothing', INPUT, 'none',
         lambda s: learner(MetricsCB(none=lambda p, y: None)).fit(1)),
        ('a scheduler that is made', TypeError, '(?s)StepLR.*not callable.*SchedulerCB',
         lambda s: learner(SchedulerCB(torch.optim.lr_scheduler.StepLR(
             torch.optim.SGD(P(torch), 0.1), 1))).fit(1)),
        ('two metrics of one name', ValueError, '<lambda>',
         lambda s: MetricsCB(lambda p, y: p.mean(), lambda p, y: p.std())),
        ('a search in one step', ValueError, 'n_steps', lambda s: lr_find(learner(), n_steps=1)),
        ('patience of 0', ValueError, 'patience', lambda s: EarlyStopCB(0)),
        ('patience without validation', ValueError, 'validation|valid',
         lambda s: learner(MetricsCB(), EarlyStopCB(1), dls=DataLoaders(toys().train)).fit(1)),
        ('a guide of an average that nobody takes', ValueError, 'EMACB',
         lambda s: learner(GuideModelCB(EMACB())).fit(1)),
        ('statistics every 0 steps', ValueError, 'every',
         lambda s: activations.ActivationStats(every=0)),
        *((f'another library\'s event {name}', TypeError, f'{name}.*did you mean {ours}',
           lambda s, name=name: type('Mine', (Callback,), {name: lambda self, learn: None}))
          for name, ours in dict(on_epoch_end='after_epoch', begin_fit='before_fit',
                                 end_batch='after_batch', on_batch_begin='before_batch').items()),
        ('a model for a summary', TypeError, r'summary\(learn\)',
         lambda s: activations.summary(linear())),
        ('classes as rows of 0s and 1s', ValueError, r'shape of labels is \(2, 3\)',
         lambda s: accuracy(torch.rand(2, 3), torch.eye(3)[:2])),
        ('the class of a metric', TypeError, "metric 'Tally'", lambda s: MetricsCB(
            type('Tally', (), dict(update=None, compute=None, reset=None)))),
    ],
    classifier=[
        ('labels that are none', ValueError, '-1',
         lambda s: train_classifier(DataLoaders(TensorLoader(X, torch.tensor([-1, -1]))))),
        ('labels that are texts', INPUT, 'labels',
         lambda s: train_classifier(DataLoaders(TensorLoader(X, ['a', 'b'])))),
        ('no classes', ValueError, 'num_classes', lambda s: Classifier(num_classes=0)),
        ('one width', ValueError, 'expected 2, got 1', lambda s: Classifier(widths=(32,))),
        ('no channels', ValueError, 'in_channels', lambda s: Classifier(in_channels=0)),
        ('bytes', (*INPUT, RuntimeError), 'uint8|float|Byte',
         lambda s: Classifier().eval()(X.byte())),
        ('-1 epochs', INPUT, 'n_epochs', lambda s: train_classifier(toys(), 3, n_epochs=-1)),
        ('pictures turned inside out', ValueError, 'scale', lambda s: RandomAffines(scale=2.0)),
        ('pictures moved by pixels', ValueError, 'shift is 2', lambda s: RandomAffines(shift=2)),
        ('bytes as floats', ValueError, r'\[-1, 1\].*127.5',
         lambda s: Classifier().features(s.x*127.5 + 127.5)),
        ('one of PIL', TypeError, 'Image', lambda s: Classifier()(s.im)),
        ('labels in a list', TypeError, 'labels.*list',
         lambda s: train_classifier(DataLoaders(TensorLoader(X, [0, 1])))),
        *((f'a transform that gives nothing, {batched=}', TypeError, 'NoneType',
           lambda s, batched=batched: learner(AugmentCB(lambda x: None, batched)).fit(1))
          for batched in (False, True)),
        ('a transform in words', TypeError, '(?s)str.*not callable.*AugmentCB',
         lambda s: learner(AugmentCB('flip')).fit(1)),
    ],
    checkpoints=[
        ('a file for a folder', OSError, 'notes.txt',
         lambda s: learner(CheckpointCB('notes.txt')).fit(1)),
        ('nowhere to write', OSError, '/proc', lambda s: learner(CheckpointCB('/proc/no')).fit(1)),
        ('half an epoch', INPUT, 'every', lambda s: CheckpointCB('ck', every=0.5)),
        ("somebody's checkpoint, to resume", ValueError, 'epoch-000001.ckpt.*no checkpoint',
         lambda s: learner(CheckpointCB('theirs', resume=True)).fit(1)),
        ("somebody's checkpoint, not to resume", ValueError, 'theirs.*resume=True',
         lambda s: learner(CheckpointCB('theirs')).fit(1)),
        ('another loss, to resume', ValueError, 'loss',
         lambda s: interrupted(s, dict(loss_func=F.multi_margin_loss))),
        ('a loss with another setting, to resume', ValueError, 'loss',
         lambda s: interrupted(s, dict(loss_func=partial(F.cross_entropy, label_smoothing=0.5)))),
        ('a made loss with another setting, to resume', ValueError, 'label_smoothing: 0.0',
         lambda s: [learner(CheckpointCB(s.tmp/'x', resume=True), loss_func=nn.CrossEntropyLoss(
             label_smoothing=v)).fit(2) for v in (0.0, 0.5)]),
        ('other validation data, to resume', ValueError, 'validation data',
         lambda s: interrupted(s, dict(dls=DataLoaders(toys().train, toys(shift=1.0).valid)))),
        ('no validation data, to resume', ValueError, 'validation data',
         lambda s: interrupted(s, dict(dls=DataLoaders(toys().train)))),
        ('another schedule, to resume', ValueError, 'ScheduleCB',
         lambda s: interrupted(s, {}, ScheduleCB())),
        ('labels in another order, to resume', ValueError, 'data',
         lambda s: interrupted(s, dict(dls=DataLoaders(TensorLoader(
             *(o if o.ndim > 1 else o.flip(0) for o in toys().train.tensors), batch_size=8))))),
        ("another learner's checkpoints, by one callback", ValueError, 'earlier fit|another',
         lambda s: (lambda cb: [learner(cb, seed=k).fit(2) for k in (0, 1)])(
             CheckpointCB(s.tmp/'x'))),
        ('two fits at once in one folder', ValueError, 'another', lambda s: side_by_side(s)),
        ('more epochs than before, to resume', ValueError, 'epochs: 2 there, 4 here',
         lambda s: [learner(CheckpointCB(s.tmp/'x', resume=True)).fit(n) for n in (2, 4)]),
        ('a picture as a state', ValueError, 'a.png.*no checkpoint',
         lambda s: load_state('pictures/a.png')),
        ('a folder as a state', OSError, 'hub', lambda s: load_state('hub')),
        ('a state into a folder', OSError, 'p.png is a folder', lambda s: save_state('p.png', {})),
        ('a model in a state', TypeError, 'tensors, numbers',
         lambda s: save_state('new.ckpt', {'model': linear()})),
        ('a number of NumPy in the state of a callback, before the first epoch', TypeError,
         "'best' in the state of Keeps", lambda s: learner(
             Keeps(), CheckpointCB(s.tmp/'x', every=9), Within(lambda learn: 1/0)).fit(9)),
        ('a state that takes no learner', TypeError, 'Alone.state_dict', lambda s: learner(
            Alone(), CheckpointCB(s.tmp/'x', every=9), Within(lambda learn: 1/0)).fit(9)),
    ],
    scaling=[
        ('1.5 batches', INPUT, 'n is 1.5', lambda s: AccumulateCB(1.5)),
        ('float16', ValueError, "'bf16' or 'fp16'", lambda s: MixedPrecisionCB('float16')),
        ("torch's own name", ValueError, "'bf16' or 'fp16'",
         lambda s: MixedPrecisionCB(torch.bfloat16)),
        ('two ways to train', ValueError, 'trains',
         lambda s: learner(MixedPrecisionCB(), AccelerateCB(SimpleNamespace()))),
        ('the class of an accelerator', TypeError, 'Accelerator that is made',
         lambda s: AccelerateCB(SimpleNamespace)),
    ],
    schedulers=[
        *((f'{cls.__name__} with {kw}', INPUT, next(iter(kw)), lambda s, cls=cls, kw=kw: cls(**kw))
          for cls, kw in zip(itertools.cycle(SCHEDULERS), (
              dict(beta_start=-0.1), dict(beta_end=1.5), dict(beta_start=NAN), dict(beta_end=NAN),
              dict(beta_end=0), dict(num_train_timesteps=0), dict(num_train_timesteps=-5),
              dict(num_train_timesteps=10.5), dict(num_train_timesteps='1000'),
              dict(steps_offset=-1), dict(steps_offset=NAN), dict(steps_offset=0.5),
              dict(prediction_type=None), dict(beta_schedule=None), dict(timestep_spacing=3)))),
        *((f'a clip at {r}', INPUT, 'clip_sample_range',
           lambda s, r=r: DDPMScheduler(clip_sample_range=r)) for r in (-1, 0, NAN, '1')),
        ('a quantile over 1', ValueError, 'dynamic_thresholding_ratio',
         lambda s: DPMSolverScheduler(thresholding=True, dynamic_thresholding_ratio=2)),
        ('a sigma of 0', ValueError, 'sigma_min', lambda s: karras_sigmas(5, 0.0, 10.0)),
        ('a setting changed afterwards', AttributeError, 'from_config.*beta_start',
         lambda s: setattr(DDPMScheduler().config, 'beta_start', 0.1)),
        ('a momentum of NaN', ValueError, 'momentum', lambda s: MomentumScheduler(momentum=NAN)),
        ('steps in words', ValueError, '1 to 1,000', lambda s: fresh(EulerScheduler(), '20')),
        ('a list of true and false', ValueError, 'timesteps',
         lambda s: fresh(DDIMScheduler(), [True, False])),
        ('times of NaN', ValueError, 'timesteps', lambda s: fresh(EulerScheduler(), [NAN, 3])),
        ('times that are fractions', (*INPUT, IndexError), 'whole|int|long',
         lambda s: DDPMScheduler().add_noise(X, X, torch.tensor([0.5, 2.5]))),
        *((f'pictures in bytes for {cls.__name__}', TypeError, 'uint8', lambda s, cls=cls:
           fresh(cls()).add_noise(X.byte(), X, torch.tensor([1, 2]))) for cls in SCHEDULERS),
        ('a step with nothing', (*INPUT, AttributeError), 'NoneType',
         lambda s: fresh(DDIMScheduler()).step(None, 800, X)),
        *((f'the settings of {name}', ValueError, words,
           lambda s, name=name: DDIMScheduler.from_config({'_class_name': name} | extra(name)))
          for name, words in (('FlowMatchEulerDiscreteScheduler', 'Flow'), ('LCMScheduler', 'LCM'),
                              ('EDMEulerScheduler', 'EDM'),
                              ('CMStochasticIterativeScheduler', 'CM'))),
        *((f'settings with {k}', ValueError, k,
           lambda s, k=k: EulerScheduler.from_config(LINEAR | {k: [0.1]})) for k in FOREIGN),
        ('a setting mistyped', TypeError, 'beta_stat',
         lambda s: DDPMScheduler.from_config(LINEAR, beta_stat=0.1)),
        ('settings from nothing', ValueError, r'\[\] mean nothing',
         lambda s: DDPMScheduler.from_config({})),
        ("diffusers' own settings without betas", ValueError, 'sigma_min.*mean nothing',
         lambda s: EulerScheduler.from_config({
             k: v for k, v in extra('EDMEulerScheduler').items() if k[0] != '_'})),
        *((f'{cls.__name__} with {name} in words', ValueError, name,
           lambda s, cls=cls, name=name: cls(**{name: 'False'}))
          for cls, name in ((DDPMScheduler, 'clip_sample'), (DDIMScheduler, 'set_alpha_to_one'),
                            (EulerScheduler, 'use_karras_sigmas'), (HeunScheduler, 'clip_sample'),
                            (DPMSolverScheduler, 'thresholding'))),
        *((f'a step of {name}', TypeError, words,
           lambda s, x=x: fresh(DDIMScheduler()).step(x, 800, x))
          for name, words, x in (('bytes', 'uint8', X.byte()), ('arrays', 'ndarray', X.numpy()))),
        ('a step at two times', ValueError, 'not among',
         lambda s: fresh(DDIMScheduler()).step(X, torch.tensor([800, 800]), X)),
        ('a step at a list of times', ValueError, 'not among',
         lambda s: fresh(DDIMScheduler()).step(X, [800], X)),
        ('settings of a folder', INPUT, "'hub'",
         lambda s: DDPMScheduler.from_config('hub')),
        ('a folder that is not there', FileNotFoundError, 'scheduler_config.json',
         lambda s: DDPMScheduler.from_pretrained('nowhere')),
        ('settings that are a half', ValueError, 'scheduler_config.json.*line 1',
         lambda s: DDPMScheduler.from_pretrained(edited(s, 'scheduler_config.json', half=True))),
    ],
    sample=[
        ('the number alone', INPUT, 'n, c, h, w', lambda s: sample(s.net, DDIMScheduler(), 4, 5)),
        ('a shape without n', ValueError, r'\(n, .*h, w\)',
         lambda s: sample(s.net, DDIMScheduler(), (1, 8, 8), 5)),
        ('a shape in words', INPUT, 'n, c, h, w',
         lambda s: sample(s.net, DDIMScheduler(), '2188', 5)),
        ('the class of a scheduler', INPUT, 'scheduler|instance',
         lambda s: sample(s.net, DDIMScheduler, (2, 1, 8, 8), 5)),
        ('no scheduler', INPUT, 'scheduler', lambda s: sample(s.net, None, (2, 1, 8, 8), 5)),
        ('the two exchanged', INPUT, 'scheduler|model',
         lambda s: sample(DDIMScheduler(), s.net, (2, 1, 8, 8), 5)),
        ('a model with two answers', INPUT, 'tuple',
         lambda s: sample(lambda x, t: (x, t), DDIMScheduler(), (2, 1, 8, 8), 5)),
        ('a classifier', INPUT, r'\(x, t\)|forward',
         lambda s: sample(Classifier(), DDIMScheduler(), (2, 1, 8, 8), 5)),
        ('an autoencoder', ValueError, r'\(x, t\).*VAE',
         lambda s: sample(s.vae, DDIMScheduler(), (2, 1, 8, 8), 5)),
        ('a shape without n and channels', ValueError, r'\(n, 1, h, w\).*convert',
         lambda s: sample(s.net, DDIMScheduler(), (8, 8), 5)),
        ('a model that answers NaN', ValueError, 'pictures hold NaN',
         lambda s: sample(lambda x, t: x*NAN, DPMSolverScheduler(), (2, 1, 8, 8), 5)),
        ('weights of NaN', ValueError, 'pictures hold NaN.*weights',
         lambda s: drawn(filled(tiny(), NAN))),
        ('a scale beyond all numbers', ValueError, 'pictures hold NaN.*scale',
         lambda s: drawn(AutoGuidance(s.net, s.other, 1e38), EulerScheduler())),
        ('other noise than the saved model was trained by', ValueError, "'epsilon' at 1000 times",
         lambda s: drawn(reloaded(s, trained_by(DDPMScheduler())),
                         DDIMScheduler(prediction_type='v_prediction'))),
        ('the command, with a scheduler edited', ValueError, 'trained to answer',
         lambda s: demo.sample_cmd(other_noise(s), out=s.tmp/'n.png')),
        ('times turned round', AttributeError, 'timesteps', lambda s: turned_round()),
        ('the class of a model', TypeError, r'model \(x, t\).*UNet',
         lambda s: sample(UNet, DDIMScheduler(), (2, 1, 8, 8), 5)),
        *((f'trained by other noise: {kw}', ValueError, 'from_config',
           lambda s, kw=kw: drawn(trained_by(DDPMScheduler()), DDIMScheduler(**kw)))
          for kw in (dict(num_train_timesteps=100), dict(prediction_type='v_prediction'),
                     dict(beta_schedule='cosine'), dict(beta_end=0.012))),
        ('trained by other noise, guided', ValueError, '1000 times.* 100',
         lambda s: drawn(AutoGuidance(*[trained_by(DDPMScheduler())]*2),
                         DDIMScheduler(num_train_timesteps=100))),
        ('steps in words', INPUT, '1 to 1,000',
         lambda s: sample(s.net, DDIMScheduler(), (2, 1, 8, 8), 'ten')),
        ('no steps', ValueError, 'num_inference_steps|steps',
         lambda s: sample(s.net, DDIMScheduler(), (2, 1, 8, 8), None)),
        ('-3 steps', ValueError, '1 to 1,000',
         lambda s: sample(s.net, DDIMScheduler(), (2, 1, 8, 8), -3)),
        ('a callback that is none', INPUT, 'callback|callable',
         lambda s: sample(s.net, DDIMScheduler(), (2, 1, 8, 8), 5, callback=3)),
        ('bytes to start from', INPUT, 'uint8|float',
         lambda s: sample(s.net, DDIMScheduler(), X.byte(), 5)),
        ('classes of a model without', ValueError, 'context|classes',
         lambda s: sample(partial(s.net, context=torch.tensor([0, 1])), DDIMScheduler(), X, 5)),
        ("two pictures' noise for three", ValueError, '3 pictures',
         lambda s: randn((3, 1, 8, 8), [seeded(), seeded()])),
        ('one time for two', ValueError, 'one time for each', lambda s: s.net(X, 5)),
        ('a list of pictures', TypeError, 'list', lambda s: s.net([s.im, s.im], TIMES)),
        ('known pixels of other noise', ValueError, 'from_config', lambda s: drawn(
            Inpaint(s.net, DDPMScheduler(beta_schedule='cosine'), X, X[:1] + 1))),
        *((f'a mask of {tuple(mask.shape)}', ValueError, 'shape of mask', lambda s, mask=mask:
           Inpaint(s.net, DDPMScheduler(), X, mask))
          for mask in (X[0, 0], X[:, 0], X[..., 1:], X.repeat(2, 1, 1, 1), X.repeat(1, 3, 1, 1))),
    ],
    guidance=[
        ('an interval of NaN', ValueError, 'interval',
         lambda s: Guidance(s.cnet, 1, interval=(NAN, 5))),
        ('a number as interval', INPUT, 'interval', lambda s: AutoGuidance(s.net, s.net, 2., 500)),
        ('no class', INPUT, 'cond', lambda s: Guidance(s.cnet, None)),
        ('a guided model once more', ValueError, 'context',
         lambda s: Guidance(Guidance(s.cnet, 1), 2)),
        ('a share of NaN', ValueError, 'cond_drop', lambda s: DiffusionCB(DDPMScheduler(), NAN)),
        ('a share of 0', ValueError, 'cond_drop', lambda s: DiffusionCB(DDPMScheduler(), 0)),
        ('classes that are never told', ValueError, 'cond_drop=0.1', lambda s: diffusion_learner(
            tiny(num_classes=3), toys(), DDPMScheduler(), device='cpu').fit(1)),
        ('an interval of shares', ValueError, 'whole time',
         lambda s: Guidance(s.cnet, 1, interval=(0.2, 0.8))),
        ('batches of -5', ValueError, 'batch_size is -5', lambda s: [*sample_batches(
            s.net, DDPMScheduler(), (4, 1, 8, 8), 2, batch_size=-5)]),
        ('noise twice', ValueError, 'DiffusionCB.*clash.*adds noise', lambda s: diffusion_learner(
            tiny(), toys(), DDPMScheduler(), cbs=[DiffusionCB(DDPMScheduler())]).fit(1)),
        ('bytes as floats, to train', ValueError, r'\[-1, 1\]', lambda s: diffusion_learner(
            tiny(), toys(shift=200.0), DDPMScheduler(), device='cpu').fit(1)),
        ('a decay in percent', ValueError, 'decay is 99.9', lambda s: diffusion_learner(
            tiny(), toys(), DDPMScheduler(), ema_decay=99.9)),
        ('words for a class', TypeError, 'cond', lambda s: Guidance(s.cnet, 'four')),
        *((f'{name} for the noise', TypeError, 'scheduler',
           lambda s, make=make: DiffusionCB(make()))
          for name, make in dict(nothing=lambda: None, a_class=lambda: DDPMScheduler,
                                 a_foreign_one=foreign).items()),
        ('bytes, to train', TypeError, 'uint8', lambda s: diffusion_learner(
            tiny(), DataLoaders(TensorLoader(X.byte(), CLASSES)), DDPMScheduler()).fit(1)),
        ('digits from 0 to 16, to train', ValueError, r'\[-1, 1\]', lambda s: diffusion_learner(
            tiny(), DataLoaders(TensorLoader(s.x*8 + 8, s.x)), DDPMScheduler()).fit(1)),
        ('a row of 0s and 1s for a label', ValueError, r'labels.*\(n,\).*int64 \(2, 3\)',
         lambda s: diffusion_learner(tiny(num_classes=3), DataLoaders(TensorLoader(
             X, torch.eye(3).long()[:2])), DDPMScheduler(), cond_drop=0.1, device='cpu').fit(1)),
        ('coloured pictures for a grey model', ValueError, 'in_channels',
         lambda s: diffusion_learner(tiny(), DataLoaders(TensorLoader(X.repeat(1, 3, 1, 1), X)),
                                     DDPMScheduler(), device='cpu').fit(1)),
    ],
    metrics=[
        ('pictures for features', ValueError, r'\(n, d\)', lambda s: fid(X, X)),
        ('one row', ValueError, 'at least 2', lambda s: fid(torch.zeros(1, 3), torch.zeros(9, 3))),
        ('NaN among the samples', ValueError, 'NaN',
         lambda s: s.eval.measure(torch.full((9, 1, 8, 8), NAN))),
        ('bytes among the samples', INPUT, 'uint8|float',
         lambda s: s.eval.measure(torch.zeros(9, 1, 8, 8, dtype=torch.uint8))),
        ('no samples', ValueError, '0 samples', lambda s: s.eval.measure(iter([]))),
        ('a floor of more than there are', ValueError, "can't draw 41 of 40",
         lambda s: with_floor(fid, s.features, s.features, 41)),
        ('nothing kept', ValueError, 'size|keep', lambda s: Reservoir(0)),
        ('less than nothing kept', ValueError, 'size|keep', lambda s: Reservoir(-3)),
        ('no training pictures', ValueError, 'training pictures|no pictures|at least',
         lambda s: nearest_distance(X, X[:0])),
        ('bytes against floats', INPUT, 'uint8', lambda s: nearest_distance(X.byte(), X)),
        ('training pictures held out', ValueError, 'held-out', lambda s: ImageEval(None, s.x, s.x)),
        ('half of them held out', ValueError, 'held-out',
         lambda s: ImageEval(None, s.x[:20], s.x[10:30])),
        ('a network in training', RuntimeError, 'eval', lambda s: ImageEval(
            Classifier().train().features, s.x[:20], s.x[20:])),
        ('a network that gives pictures', ValueError, r'\(n, d\)',
         lambda s: ImageEval(lambda x: x, s.x, s.x)),
        ('a network in words', INPUT, 'features|callable',
         lambda s: ImageEval('inception', s.x, s.x)),
        ('features last', TypeError, 'features.*Tensor', lambda s: ImageEval(s.x, s.x, None)),
        ('the metric third', TypeError, 'metric.*Tensor',
         lambda s: with_floor(s.features, s.features, fid, 10)),
        ('features for their statistics', TypeError, 'FeatureStats.*Tensor',
         lambda s: FeatureStats(s.features).merge(s.features)),
    ],
    models=[
        ('widths as a number', INPUT, 'widths', lambda s: UNet(widths=16)),
        ('a width of 0', INPUT, 'widths', lambda s: UNet(widths=(0,))),
        ('a width below 0', INPUT, 'widths', lambda s: UNet(widths=(-16,))),
        ('a width of ten million', ValueError, 'widths', lambda s: UNet(widths=(10**7,))),
        ('an odd time vector', ValueError, 'emb_dim|dim is', lambda s: UNet(emb_dim=7)),
        ('no channels', INPUT, 'in_channels', lambda s: UNet(in_channels=0)),
        ('heads of 0', INPUT, 'head', lambda s: UNet(head_dim=0)),
        ('heads that do not fit', ValueError, 'width 8.*heads of 16', lambda s: UNet(widths=(8,))),
        ('a million blocks', ValueError, 'n_blocks', lambda s: UNet(n_blocks=10**6)),
        ('a picture in bytes', (*INPUT, RuntimeError), 'uint8|float|Byte',
         lambda s: s.net(X.byte(), torch.zeros(2))),
        ('an odd embedding', ValueError, 'even', lambda s: timestep_embedding(torch.zeros(2), 7)),
        ('widths and no blocks', ValueError, 'n_blocks',
         lambda s: VAE(widths=(8, 16), n_blocks=(1,))),
        ('a latent of 0', ValueError, 'latent_channels', lambda s: VAE(latent_channels=0)),
        ('a latent of a million', ValueError, 'latent_channels',
         lambda s: VAE(latent_channels=10**6)),
        ('latents as pictures', ValueError, r'pictures \(n, 1',
         lambda s: s.vae.encode(torch.zeros(1, 4, 4, 4))),
        ('a picture over 1', ValueError, r'\[-1, 1\]', lambda s: s.vae.encode(X + 2)),
        ('a channel too many to stretch', ValueError, 'share',
         lambda s: RandomColoursCB(share=1.5)),
        ('sizes that differ', ValueError, 'compared', lambda s: psnr(X, X[:1])),
        *((f'{name} to compare', INPUT, words, lambda s, f=f: psnr(f(s.x), f(s.x)))
          for name, words, f in (
              ('bytes', 'uint8', lambda x: x.byte()), ('whole numbers', 'int', lambda x: x.long()),
              ('bytes as floats', '127.5', lambda x: x*127.5 + 127.5),
              ('a NaN', 'run from nan', lambda x: x*NAN))),
        ('bytes as floats for CLIP', ValueError, r'\[-1, 1\]',
         lambda s: CLIP().encode_image(torch.full((1, 3, 32, 32), 255.))),
        ('a picture of PIL for CLIP', TypeError, 'Image', lambda s: CLIP().encode_image(s.im)),
        ('captions, then pictures', TypeError, 'list',
         lambda s: CLIP()(['a red seven'], torch.zeros(1, 3, 32, 32))),
        ('a setting mistyped', TypeError, 'scaling_facter',
         lambda s: VAE(1, 2, (8,), (1,), 4).keep(scaling_facter=2.)),
        ('a setting that made layers', TypeError, 'num_classes',
         lambda s: Classifier().keep(num_classes=5)),
        ('large pictures for small ones', ValueError, r'shape of a picture is \(1, 16, 16\)',
         lambda s: score.Critic(10)(torch.zeros(2, 1, 16, 16))),
        ('a VAE without its loss', ValueError, r'VAELoss\(\)',
         lambda s: autoencoder_learner(VAE(1, 2, (8,), (1,), 4), toys(), device='cpu').fit(1)),
        ("a VAE's loss for an autoencoder", TypeError, 'VAELoss is for a VAE',
         lambda s: autoencoder_learner(Autoencoder(1, 2, (8,), (1,), 4), toys(), VAELoss(),
                                       device='cpu').fit(1)),
        *((f'a weight of {w}', ValueError, 'kl_weight', lambda s, w=w: VAELoss(w))
          for w in (-1, NAN)),
        ('no pictures to calibrate by', ValueError, 'number of pictures is 0',
         lambda s: VAE(1, 2, (8,), (1,), 4).calibrate(X[:0])),
        ('blanks to calibrate by', ValueError, 'standard deviation is 0',
         lambda s: filled(VAE(1, 2, (8,), (1,), 4), 0).calibrate(X)),
        ('0 at a time', ValueError, 'batch_size', lambda s: encode_all(s.vae, X, 0)),
        ('a picture scaled to nothing', ValueError, 'scale',
         lambda s: affine(X, *torch.zeros(5, 2))),
    ],
    loading=[
        ('nowhere', (ValueError, OSError), 'nowhere', lambda s: UNet.from_pretrained('./nowhere')),
        ('a file', (ValueError, OSError), 'notes.txt', lambda s: UNet.from_pretrained('notes.txt')),
        ('an empty folder', (ValueError, OSError), 'config.json|model.safetensors|empty',
         lambda s: UNet.from_pretrained('p.png')),
        ("somebody's model", (ValueError, OSError, RuntimeError), 'hub|fit',
         lambda s: UNet.from_pretrained('hub')),
        ('a VAE as a U-Net', ValueError, 'fit', lambda s: UNet.from_pretrained(s.vae_folder)),
        ('a U-Net as a VAE', ValueError, 'fit', lambda s: VAE.from_pretrained(s.model)),
        ('a U-Net as a classifier', (ValueError, RuntimeError), 'fit',
         lambda s: Classifier.from_pretrained(s.model)),
        *((f'{name} of another size', ValueError, 'fit|widths|size|channels',
           lambda s, kw=kw: UNet.from_pretrained(edited(s, 'config.json', **kw)))
          for name, kw in dict(widths=dict(widths=[16]), widths_of_a_billion=dict(widths=[10**9]),
                               channels=dict(in_channels=3), classes=dict(num_classes=3)).items()),
        ('weights cut short', (ValueError, OSError), 'weights|safetensors',
         lambda s: UNet.from_pretrained(with_weights(s, lambda b: b[:-100]))),
        ('weights of 0 bytes', (ValueError, OSError), 'weights|safetensors',
         lambda s: UNet.from_pretrained(with_weights(s, lambda b: b''))),
        ('weights of NaN', ValueError, 'weights .* hold NaN',
         lambda s: UNet.from_pretrained(reloaded(s, filled(tiny(), NAN), folder=True))),
        *((f'for weights: {name}', ValueError, 'model.safetensors is damaged.*git lfs',
           lambda s, b=b: UNet.from_pretrained(with_weights(s, lambda _: b)))
          for name, b in dict(a_pointer=b'version https://git-lfs.github.com/spec/v1', a_zip=b'PK',
                              nothing=b'').items()),
        ('settings of 0 bytes', ValueError, 'config.json is damaged',
         lambda s: UNet.from_pretrained(put(with_weights(s, lambda b: b), config_json=''))),
        ("saved over somebody's settings", FileExistsError, 'config.json.*move it away',
         lambda s: tiny().save_pretrained('hub')),
        ("saved over diffusers' settings", FileExistsError, 'config.json.*move it away',
         lambda s: tiny().save_pretrained(put(s.tmp/'x', config_json=json.dumps(
             dict(_class_name='UNet2DModel', in_channels=3))))),
        ('noise that is none', ValueError, 'mean nothing',
         lambda s: drawn(UNet.from_pretrained(edited(s, 'config.json', trained_by={'a': 1})))),
        ('a guide that is broken', ValueError, 'guide',
         lambda s: demo.load_model(put(with_weights(s, lambda b: b), guide__config_json='{'))),
        ('a model without a scheduler', FileNotFoundError, 'scheduler_config.json',
         lambda s: demo.load_model('hub')),
        ('a scheduler of another kind', ValueError, 'Flow|scheduler',
         lambda s: demo.load_model(edited(s, 'scheduler_config.json', shift=3.0,
                                          _class_name='FlowMatchEulerDiscreteScheduler'))),
        ('a size of a million', ValueError, 'sample_size|size',
         lambda s: demo.sample_cmd(edited(s, 'config.json', sample_size=[10**6]*2), out='n.png')),
    ],
    results=[
        ("somebody's text", FileExistsError, 'README.md', lambda s: Results('hub', ['README.md'])),
        ("somebody's model", FileExistsError, 'hub2/model/', lambda s: Results('hub2', ['model'])),
        ('a folder named as a file', FileExistsError, 'p.png', lambda s: Results('.', ['p.png'])),
        ('a file named as the folder', OSError, 'notes.txt', lambda s: Results('notes.txt', ['a'])),
        ('more room than there is', OSError, 'room',
         lambda s: Results(s.tmp, ['a']).reserve(10**15)),
        ('a torn list of what is new', ValueError, 'whole.json.*move .miniai-new away',
         lambda s: torn(s, '.miniai-new/whole.json')),
        ('a torn list of what is ours', ValueError, 'move .miniai.json away',
         lambda s: torn(s, '.miniai.json')),
    ],
    einsum=[
        ('an array', TypeError, 'operand 1 is a ndarray',
         lambda s: einsum('i,i->', X[0, 0, 0], np.ones(8))),
        ('a list of operands', INPUT, 'operands|list', lambda s: einsum('ij,jk->ik', [X, X])),
        ('an arrow of one character', ValueError, "'→' can't",
         lambda s: einsum('ij→ji', X[0, 0])),
        ('half an arrow', ValueError, "'-' can't", lambda s: einsum('ij-ji', X[0, 0])),
        ('numbers as letters', ValueError, "'1' can't", lambda s: einsum('12->21', X[0, 0])),
        ('two dots', ValueError, r"'\.' can't", lambda s: einsum('..i->i', X)),
        ('sizes', ValueError, "'j' has size 8 in operand 0 but 3 in operand 1",
         lambda s: einsum('ij,jk->ik', X[0, 0], torch.zeros(3, 4))),
        ('nothing to multiply', ValueError, '0 came', lambda s: einsum('i->i')),
        ('None', TypeError, 'NoneType', lambda s: einsum('i->i', None)),
    ],
    meanshift=[
        ('a bandwidth in words', INPUT, 'bandwidth', lambda s: MeanShift('auto').fit(np.eye(3))),
        ('two bandwidths', INPUT, 'bandwidth', lambda s: MeanShift([1, 2]).fit(np.eye(3))),
        ('a kernel of one number', INPUT, 'bandwidth', lambda s: gaussian_kernel(1.0, None)),
        ('2 for a quantile', ValueError, 'quantile', lambda s: estimate_bandwidth(np.eye(3), 2)),
        ('no samples to look at', ValueError, 'n_samples',
         lambda s: estimate_bandwidth(np.eye(9), n_samples=0)),
        ('steps in words', INPUT, 'max_iter',
         lambda s: MeanShift(1., max_iter='all').fit(np.eye(3))),
        ('rows of two lengths', INPUT, 'shape', lambda s: MeanShift(1.).fit([[1, 2], [3]])),
        ('nobody to attract', INPUT, 'data',
         lambda s: meanshift_step(np.eye(3), 1., np.zeros((0, 3)))),
    ],
    autograd=[
        ('plus nothing', TypeError, 'None', lambda s: autograd.Tensor([1.]) + None),
        ('times a word', INPUT, "'a'|str", lambda s: autograd.Tensor([1.])*'a'),
        ('plus 1j', TypeError, 'complex', lambda s: autograd.Tensor([1.]) + 1j),
        ('f that gives nothing', TypeError, 'NoneType',
         lambda s: autograd.derivative(lambda x: None, 1.0)),
        ('a slope at nothing', TypeError, 'real numbers',
         lambda s: autograd.derivative(np.sin, None)),
        ('layers in a list', TypeError, 'list', lambda s: mini.Sequential([mini.ReLU()])),
        ('the class of a layer', TypeError, 'ReLU', lambda s: mini.Sequential(mini.ReLU)),
        ("torch's layer", TypeError, 'torch.nn',
         lambda s: mini.Sequential(mini.Linear(2, 3), nn.ReLU())),
        ('an array for a weight', TypeError, 'weight is a Parameter.*ndarray',
         lambda s: setattr(mini.Linear(2, 1), 'weight', np.ones((1, 2)))),
        ('words into a layer', TypeError, 'floats', lambda s: mini.Linear(2, 1)(['a', 'b'])),
    ],
    optim=[
        ('a model for its parameters', TypeError, 'model.parameters',
         lambda s: optim.SGD(mini.Linear(2, 1), 0.1)),
        ("torch's parameters", TypeError, 'miniai.nn.*torch.nn',
         lambda s: optim.SGD(linear().parameters(), 0.1)),
        ('one beta', INPUT, 'betas', lambda s: optim.Adam(P(), betas=0.9)),
        ('a lonely beta', INPUT, 'betas', lambda s: optim.Adam(P(), betas=(0.9,))),
        ("Muon's momentum of 1.5", ValueError, 'momentum',
         lambda s: Muon(linear().parameters(), momentum=1.5)),
        ('Muon of a model', TypeError, r'model.parameters\(\)', lambda s: Muon(linear())),
        ('Muon of a layer', TypeError, r'model.parameters\(\)', lambda s: Muon(nn.Linear(2, 1))),
        ('Muon of groups', TypeError, r'model.parameters\(\)',
         lambda s: Muon([dict(params=linear().parameters(), lr=1.0)])),
        ('parameters that are used up', ValueError, 'param',
         lambda s: (lambda p: [Muon(p), Muon(p)])(linear().parameters())),
        ('no steps to orthogonalize by', ValueError, 'steps is 0',
         lambda s: orthogonalize(torch.eye(3), 0)),
        ('a vector to orthogonalize', ValueError, 'axes is 1',
         lambda s: orthogonalize(torch.rand(16))),
        ('no threads to choose from', ValueError, 'most is 0', lambda s: Chooser(0)),
        ('eps below 0', ValueError, 'eps', lambda s: optim.Adam(P(), eps=-1.0)),
        ('eps of NaN', ValueError, 'eps', lambda s: optim.RMSProp(P(), eps=NAN)),
        ('an order without a length', TypeError, 'sampler|len',
         lambda s: optim.DataLoader([1, 2], sampler=iter([0, 1]))),
        ('an order past the end', IndexError, '9|range',
         lambda s: [*optim.DataLoader([1., 2.], sampler=[0, 9])]),
        ('items of two shapes', ValueError, 'shape',
         lambda s: [*optim.DataLoader([np.ones(2), np.ones(3)])]),
    ],
    tensors=[
        ('a seed below 0', ValueError, '2\\*\\*32', lambda s: set_seed(-1)),
        ('a seed in words', TypeError, 'integer', lambda s: set_seed('abc')),
        ('a half seed', TypeError, 'integer', lambda s: set_seed(2.5)),
        ('no seed', TypeError, 'integer', lambda s: set_seed(None)),
        ('a device that is none', (*INPUT, RuntimeError), 'abacus',
         lambda s: to_device(X, 'abacus')),
        ('a shape of halves', TypeError, '2.5', lambda s: broadcast_shapes((2.5,), (1,))),
        ('lists to multiply', TypeError, 'a is a list',
         lambda s: matmul.matmul_row([[1.]], [[1.]])),
        ('noise of 2', ValueError, '0 to 1', lambda s: score.add_noise(X, torch.tensor([2., 0]))),
        ('noise of NaN', ValueError, '0 to 1',
         lambda s: score.add_noise(X, torch.tensor([NAN, 0.]))),
        ('noise as a word', INPUT, 'str', lambda s: score.add_noise(X, 'much')),
        ('one noise for two', ValueError, 'each of 2', lambda s: score.add_noise(X, 0.5)),
        *((f'a step of {h} for a slope', ValueError, 'h is',
           lambda s, h=h: score.numerical_gradient(lambda x: x.sum((1, 2, 3)), X, h))
          for h in (0, -1, NAN)),
        ('-1 steps uphill', ValueError, 'steps is -1',
         lambda s: score.gradient_ascent(lambda x: x.sum((1, 2, 3)), X, -1)),
        ('ten answers for each picture', ValueError, r'one number for each.*\(2, 10\)',
         lambda s: score.gradient_ascent(score.Critic(10), X)),
        ('noise for bytes', INPUT, 'uint8|float', lambda s: score.add_noise(X.byte())),
        ('a kernel of 3x5', ValueError, '3x5|square',
         lambda s: conv.conv2d(X, torch.zeros(1, 1, 3, 5))),
        ('a kernel larger than the picture', ValueError, "doesn't fit",
         lambda s: conv.conv2d(X, torch.zeros(1, 1, 9, 9))),
        ('pictures without n', ValueError, r'\(n, 1, h, w\)',
         lambda s: conv.conv2d(X[0], torch.zeros(1, 1, 3, 3))),
        ('nothing left of a transpose', ValueError, 'padding 5',
         lambda s: conv.conv_transpose2d(X, torch.zeros(1, 1, 3, 3), padding=5)),
        *((f'{f.__name__} with {kw}', ValueError, f'{next(iter(kw))} is .*whole number',
           lambda s, f=f, kw=kw: f(X, torch.zeros(1, 1, 3, 3), **kw))
          for f in (conv.conv2d, conv.conv_transpose2d)
          for kw in (dict(stride=(2, 2)), dict(padding='same'), dict(stride=0))),
        ('a stride for a bias', TypeError, 'int',
         lambda s: conv.conv2d(X, torch.zeros(1, 1, 3, 3), 2)),
        ('a block that takes no vector', ValueError, 'c_emb',
         lambda s: conv.ResBlock(8)(torch.zeros(1, 8, 4, 4), torch.zeros(1, 4))),
        ('a block without its vector', ValueError, 'c_emb',
         lambda s: conv.ResBlock(8, 8, 4)(torch.zeros(1, 8, 4, 4))),
    ],
)  # fmt: skip


def interrupted(s, changes, *cbs):
    "A fit is stopped after an epoch, and one with `changes` carries on."
    class Stop(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner(CheckpointCB(s.tmp/'x')).fit(3, cbs=[Stop()])
    learner(CheckpointCB(s.tmp/'x', resume=True), *cbs, **changes).fit(3)


class Keeps(Callback):
    def state_dict(self, learn): return {'n': 1, 'best': np.float64(0.5)}


class Alone(Callback):
    def state_dict(self): return {}


def side_by_side(s):
    "Another fit begins in the folder of one that has written nothing yet."
    class Meanwhile(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 0 and learn.training:
                learner(CheckpointCB(s.tmp/'x'), seed=5).fit(2)

    learner(CheckpointCB(s.tmp/'x'), Meanwhile()).fit(2)


def P(torchs=None):
    return [nn.Parameter(torch.ones(2)) if torchs else mini.Parameter(np.ones(2))]


def turned_round():
    scheduler = fresh(DDIMScheduler())
    scheduler.timesteps = scheduler.timesteps.flip(0)
    for t in scheduler.timesteps:
        scheduler.step(X, t, X)


def extra(name):
    "What else stands in the settings of diffusers' scheduler of that name."
    import diffusers

    return dict(getattr(diffusers, name)().config)


# ---- right: odd, but it works

T16 = GREY.astype(np.uint16)*257
COLOURS = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
PHOTO = Image.fromarray(COLOURS).resize((64, 64))


def pil(a, mode=None):
    im = Image.fromarray(a)
    return im.convert(mode) if mode else im


def hidden(value):
    "Half a picture with 0 opacity, over colours of `value`; and what should be seen: white."
    a = np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)])
    a[:4] = (*value, 0)
    seen = GREY.copy()
    seen[:4] = 255
    return Image.fromarray(a), seen


def unlabelled(s):
    x, y = loaded(twelve(s.tmp/'x'))
    return (y == -1).all()


def used(folder):
    "How many pictures of a folder are used, and the names of their classes."
    dd = load_images(folder)
    return sum(map(len, dd.values())), getattr(dd['train'].features.get('label'), 'names', None)


def linked(s):
    for name in 'ab':
        twelve(s.tmp/'elsewhere'/name)
    (s.tmp/'x').mkdir()
    for name in 'ab':
        (s.tmp/'x'/name).symlink_to(s.tmp/'elsewhere'/name)
    (s.tmp/'elsewhere'/'a'/'back').symlink_to(s.tmp/'x')
    (s.tmp/'elsewhere'/'b'/'up').symlink_to(s.tmp/'elsewhere'/'b')
    return used(s.tmp/'x') == (24, ['a', 'b'])


def told_of(folder, words):
    with pytest.warns(UserWarning, match=words):
        return used(folder)[0] == 2


def texts_of(s, texts, kind, below='.'):
    "The texts of two pictures whose metadata is written so."
    line = '{{"file_name": "{}/{}.png", "text": {}}}' if kind == 'jsonl' else '{}/{}.png,{}'
    lines = [line.format(below, i, text) for i, text in enumerate(texts)]
    folder = put(s.tmp/'x', **{f'{below}/0_png': s.im, f'{below}/1_png': s.im, f'metadata_{kind}':
                               '\n'.join(['file_name,text']*(kind == 'csv') + lines)})
    return sorted(t for ds in load_images(folder, 0.5).values() for t in ds['text'])


def five_captions(s):
    "No picture is trained on and held out, and the share is of pictures."
    for i in range(10):
        put(s.tmp/'x', **{f'{i}_png': Image.new('L', (8, 8), i)})
    dd = load_images(put(s.tmp/'x', metadata_jsonl='\n'.join(json.dumps(
        dict(file_name=f'{i % 10}.png', text=str(i))) for i in range(50))), 0.2)
    sides = [{im.getpixel((0, 0)) for im in ds['image']} for ds in dd.values()]
    return [*map(len, sides)] == [8, 2] and not sides[0] & sides[1] and len(dd['test']) == 10


def seen_before(s):
    "A folder's name is no data set's: what was read before from a folder of that name isn't meant."
    loaded(twelve(s.tmp/'holidays'))
    with pytest.raises(FileNotFoundError, match='holidays'):
        load_images('holidays')
    return True


def labelled(s, labels, names):
    "Labels of a table, in files' order, come back by their names."
    rows = ''.join(f'{i}.png,{v}\n' for i, v in enumerate(labels))
    dd = load_images(put(twelve(s.tmp/'x'), metadata_csv='file_name,label\n' + rows))
    known = dd['train'].features['label'].names
    return sorted(known[k] for ds in dd.values() for k in ds['label']) == sorted(names)


def fit_twice(s):
    "Plain gradient descent remembers nothing: twice one epoch is two."
    a, b = learner(), learner()
    a.fit(2)
    b.fit(1).fit(1)
    return same(a.model, b.model)


def shared_callbacks(s):
    "What a callback kept of one learner doesn't reach the next."
    shared = MetricsCB(accuracy), RecorderCB(), NaNStopCB(), ScheduleCB()
    learner(*shared, seed=1).fit(2)
    a, b = learner(*shared), learner(MetricsCB(accuracy), RecorderCB(), NaNStopCB(), ScheduleCB())
    return a.fit(2).history == b.fit(2).history and a.cbs[2].losses == b.cbs[2].losses


def shared_average(s):
    "The average of a second learner's weights is of that learner alone."
    own, shared = EMACB(0.9), EMACB(0.9)
    learner(shared, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 5))).fit(2)
    for ema in own, shared:
        learner(ema).fit(2)
    return same(shared.model, own.model)


def forgetful(s):
    "An average with a decay of 0 is the model."
    ema = EMACB(0)
    return same(learner(ema).fit(1).model, ema.model)


def another_model(s):
    "A learner whose model is exchanged trains the new one."
    learn, new = learner(MetricsCB()).fit(1), linear(5)
    learn.model = new
    return same(learn.fit(2).model, learner(model=linear(5)).fit(2).model)


def after_an_error(s):
    "A fit that broke leaves nothing behind: the next one is as the first."
    class Oops(Callback):
        def after_backward(self, learn):
            raise KeyError('oops')

    learn = learner(lr=0.1)
    with pytest.raises(KeyError):
        learn.fit(1, cbs=[Oops()])
    return same(learn.fit(1).model, learner().fit(1).model)


def checkpoints_in_a_dataset(s):
    "Beside a data set that has a `state.json`, checkpoints come and go (the fixture looks)."
    learner(CheckpointCB('dataset', keep=1)).fit(3)
    names = [p.name for p in checkpoints('dataset')]
    again = learner(CheckpointCB('dataset', resume=True)).fit(3)
    return names == ['epoch-000003.ckpt'] and again.n_steps == 9


def resumed(s, **changes):
    "Carried on in the middle, it's the fit that never stopped."
    class Stop(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 2:
                raise KeyboardInterrupt

    folder = s.tmp/'a b ü'
    with pytest.raises(KeyboardInterrupt):
        learner(CheckpointCB(folder), MetricsCB()).fit(4, cbs=[Stop()])
    late = learner(CheckpointCB(folder, resume=True), MetricsCB(), seed=9).fit(4)
    return same(late.model, learner().fit(4).model) and len(late.history) == 4


def elsewhere(s, name):
    "`name` isn't there, but its last part is, among the data sets."
    twelve(s.tmp/'data'/'mnist')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('MINIAI_DATA', str(s.tmp/'data'))
        load_images(name)


def of_that_name(s, name):
    "A folder that's called as the built-in data set."
    twelve(s.tmp/'digits')
    with pytest.MonkeyPatch.context() as m:
        m.chdir(s.tmp)
        return len(load_images(name)['train']) < 12


def nan_at_once(s):
    "A NaN in the very first batch leaves no trace, in the batch statistics either."
    model, dls = nn.Sequential(nn.BatchNorm2d(1), linear()), toys()
    dls.train.tensors[0][0] = NAN
    learner(NaNStopCB(), model=model, dls=dls).fit(1)
    return all(v.isfinite().all() for v in model.state_dict().values())


def a_copy_beside(s):
    "Somebody's copies of checkpoints, under names of their own, stay and aren't resumed from."
    interrupted(s, {})
    folder = s.tmp/'x'
    for name in ('epoch-000002-good.ckpt', 'epoch-best.ckpt'):
        shutil.copy(checkpoints(folder)[0], folder/name)
    checkpoints(folder)[-1].unlink()
    again = learner(CheckpointCB(folder, keep=1, resume=True)).fit(3)
    names = sorted(p.name for p in folder.iterdir())
    return again.n_steps == 9 and names == [
        'epoch-000002-good.ckpt', 'epoch-000003.ckpt', 'epoch-best.ckpt']


def moved_meanwhile(s):
    results = Results(s.tmp/'out', ['a.txt'])
    (s.tmp/'out').rename(s.tmp/'elsewhere')
    with results as new:
        (new/'a.txt').write_text('mine')
    return (s.tmp/'out'/'a.txt').read_text() == 'mine'


def torn(s, name):
    put(s.tmp/'out', a_txt='mine')
    (s.tmp/'out'/name).parent.mkdir(exist_ok=True)
    (s.tmp/'out'/name).write_text('{"a.tx')
    Results(s.tmp/'out', ['a.txt'])


def trained_by(scheduler):
    "A network after a few steps with that scheduler's noise."
    set_seed(1)
    return diffusion_learner(awake(tiny()), toys(), scheduler, device='cpu').fit(1).model


def filled(model, value):
    "Nothing but this number in a model."
    for p in model.parameters():
        nn.init.constant_(p, value)
    return model


def reloaded(s, model, folder=False):
    "A model after it was saved, or the folder where it is."
    model.save_pretrained(s.tmp/'again')
    return s.tmp/'again' if folder else UNet.from_pretrained(s.tmp/'again')


def other_noise(s):
    "A folder with a trained model, and the scheduler of another."
    model = trained_by(DPMSolverScheduler(prediction_type='v_prediction'))
    demo.save_model(s.tmp/'m', model.keep(sample_size=[8, 8]), DPMSolverScheduler())
    return s.tmp/'m'


class Within(Callback):
    "Does something in the second epoch."
    order = -100

    def __init__(self, work): self.work = work

    def before_epoch(self, learn):
        if learn.epoch == 0:
            self.work(learn)


def half_written(s):
    "Killed with its list complete, but a file cut short: nothing is replaced by that."
    with Results(s.tmp/'r', ['a', 'b']) as new:
        (new/'a').write_text('old')
        (new/'b').write_text('old')
    put(s.tmp/'r'/'.miniai-new', a='new', b='half', whole_json=json.dumps(
        {k: hashlib.sha256(b'new').hexdigest() for k in 'ab'}))
    Results(s.tmp/'r', ['a', 'b'])
    return [(s.tmp/'r'/k).read_text() for k in 'ab'] == ['old', 'old']


def settings_kept(s):
    "What was trained by is saved, whatever model copies it."
    learn = diffusion_learner(tiny(), toys(), DDIMScheduler(beta_end=np.float32(0.0125)),
                              device='cpu').fit(1)
    again = reloaded(s, learn.ema.model)
    same_noise = DDIMScheduler.from_config(again.trained_by)
    return drawn(again, same_noise).isfinite().all()


def without_a_folder(s):
    "The folder of checkpoints goes away in the middle: it is made again."
    learner(CheckpointCB(s.tmp/'c'), Within(lambda learn: shutil.rmtree(s.tmp/'c'))).fit(2)
    return len(checkpoints(s.tmp/'c')) == 2


def by_plateau(s):
    "ReduceLROnPlateau is stepped between epochs, and with the held-out loss, in any case."
    make = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1e9)
    learn = learner(MetricsCB(), SchedulerCB(make)).fit(4)
    return learn.opt.param_groups[0]['lr'] < 0.05


def all_in_one_step(s):
    "More batches in a step than there are: one step, of the whole epoch's mean gradient."
    dls = toys()
    a = learner(AccumulateCB(1000), dls=dls).fit(1)
    b = learner(dls=DataLoaders(TensorLoader(*dls.train.tensors, batch_size=24))).fit(1)
    pairs = zip(a.model.parameters(), b.model.parameters())
    return a.n_steps == 1 and all(torch.allclose(p, q, atol=1e-5) for p, q in pairs)


def refused_before(s):
    "Who moves the file away that was named may go on, though the error is still on the screen."
    put(s.tmp, a_txt='mine')
    with pytest.raises(FileExistsError) as shown:
        Results(s.tmp, ['a.txt'])
    (s.tmp/'a.txt').rename(s.tmp/'b.txt')
    with Results(s.tmp, ['a.txt']) as new:
        put(new, a_txt='new')
    return shown and (s.tmp/'a.txt').read_text() == 'new'


def reused_scheduler(s, cls):
    "A scheduler that served another model and other steps gives what a new one gives."
    used = cls()
    drawn(s.other, used, 7)
    return torch.equal(drawn(s.net, used), drawn(s.net, cls()))


def scribbled(s):
    "What a callback writes into the guess at the picture doesn't reach the picture."
    def callback(i, t, x, x0):
        x0.zero_()

    x = sample(s.net, DDIMScheduler(), (2, 1, 8, 8), 5, seeded(), callback)
    return torch.equal(x, drawn(s.net))


def of_dtype(s, dtype):
    "A network of another precision draws about what it draws in single precision."
    with torch.no_grad():
        model = awake(tiny(widths=(8, 8))).to(dtype)
        start = torch.randn(2, 1, 8, 8, generator=seeded())     # doubles are drawn otherwise
        x = sample(model, DDIMScheduler(), start, 4)
    y = drawn(awake(tiny(widths=(8, 8))), n=4, shape=start)
    room = 1e-4 if dtype == torch.float64 else 0.3
    return x.isfinite().all() and (x.float() - y).abs().max() < room


def saved(s, model, *inputs):
    "Saved and loaded, a model is the same function."
    model = awake(model)
    model.save_pretrained(s.tmp/'saved')
    again = type(model).from_pretrained(s.tmp/'saved').eval()
    with torch.no_grad():
        return torch.equal(model(*inputs), again(*inputs))


def shown(s, *args, **kw):
    import matplotlib.pyplot as plt

    show_images(*args, **kw)
    texts = len(plt.gcf().axes[0].texts)
    plt.close('all')
    return texts


def nearly(a, b, room=1e-5):
    return torch.allclose(torch.as_tensor(a).float(), torch.as_tensor(b).float(), atol=room)


def steps_of_all(s, cls):
    "As many steps as in training, with the default settings: finite pictures."
    return drawn(lambda x, t: 0.1*x, cls(), 1000, (1, 1, 2, 2)).isfinite().all()


def slope_in_float32(s):
    "The slope of x^2 is 2x."
    x = torch.tensor([1e-3, 1.0, 1000.0])
    return nearly(autograd.derivative(lambda x: x**2, x)/(2*x), torch.ones(3), 0.02)


CLASSES, TIMES = torch.tensor([0, 1]), torch.tensor([10, 900])
RIGHT = dict(
    pictures=[
        ('black and white', lambda s: arrives(s, pil(GREY > 99), 'png', (GREY > 99)*255)),
        ('16 bits', lambda s: arrives(s, pil(T16), 'png')),
        ('16 bits, the other way round', lambda s: arrives(s, pil(T16.astype('>u2')), 'tif')),
        ('32 bits', lambda s: arrives(s, pil(GREY.astype(np.int32)), 'tif')),
        ('32 bits of 16', lambda s: arrives(s, pil(GREY.astype(np.int32)*257), 'tif')),
        ('floats to 1', lambda s: arrives(s, pil(np.float32(GREY)/255), 'tif')),
        ('floats to 255', lambda s: arrives(s, pil(np.float32(GREY)), 'tif')),
        ('a palette of greys', lambda s: arrives(s, pil(GREY, 'P'), 'png')),
        ('grey with opacity', lambda s: arrives(s, pil(GREY, 'LA'), 'png')),
        ('colours hidden by transparency', lambda s: arrives(
            s, hidden((200, 0, 0))[0], 'png', np.dstack([hidden((0, 0, 0))[1]]*3))),
        ('CMYK', lambda s: arrives(s, pil(COLOURS, 'CMYK'), 'tif', COLOURS, 0.02)),
        ('a palette of colours', lambda s: arrives(
            s, pil(COLOURS).quantize(64), 'gif', pil(COLOURS).quantize(64).convert('RGB'))),
        ('WebP', lambda s: arrives(s, PHOTO, 'webp', PHOTO, 0.5)),
        ('a suffix in capitals', lambda s: arrives(s, pil(GREY), 'PNG')),
        ('arrays for pictures', lambda s: torch.equal(
            images_to_tensor([GREY]), images_to_tensor([s.im]))),
        ('a grey among coloured', lambda s: images_to_tensor([s.im, pil(COLOURS)]).shape[1] == 3),
        ('grey asked for', lambda s: nearly(
            images_to_tensor([pil(COLOURS)], channels=1)[0, 0], as_numbers(pil(COLOURS, 'L')))),
        ('a pixel enlarged',
         lambda s: (images_to_tensor([Image.new('L', (1, 1), 255)], 8) == 1).all()),
        ('a panorama',
         lambda s: images_to_tensor([Image.new('L', (900, 2))], 8).shape == (1, 1, 8, 8)),
        ('one row of a tensor', lambda s: to_pil(torch.zeros(1, 1)).size == (1, 1)),
        ('numbers out of range',
         lambda s: to_pil(torch.full((2, 2), 9.0)).getextrema() == (255, 255)),
        ('more columns than pictures', lambda s: image_grid(X, ncols=99).size == (146, 76)),
        ('titles as numbers', lambda s: shown(s, X, titles=torch.arange(2)) == 2),
        ('one frame', lambda s: Image.open(io.BytesIO(animate(X[:1]).data)).n_frames == 1),
    ],
    folders=[
        ('no classes', unlabelled),
        ("a folder called 'digits'", lambda s: of_that_name(s, Path('digits'))),
        ("a folder './digits'", lambda s: of_that_name(s, './digits')),
        ('a path of 300 characters',
         lambda s: len(load_images(twelve(s.tmp/('a'*120)/('b'*180)))['train']) == 10),
        ('several frames', lambda s: len(loaded(put(
            twelve(s.tmp/'x'), z_gif=animate([X[0], X[0] + 1], size=8).data))[0]) == 11),
        ('copies that a notebook made', lambda s: len(loaded(put(
            twelve(s.tmp/'x'), **{'_ipynb_checkpoints__0_png': s.im}))[0]) == 10),
        ('classes three deep', lambda s: len(loaded(
            twelve(s.tmp/'x'/'a'/'b'/'c').parents[2])[0]) == 10),
        ('a name like one seen before, without a network', seen_before),
        ("a system's own files beside the pictures", lambda s: len(loaded(put(
            twelve(s.tmp/'x'), **{'._DS_Store': b'x', 'Thumbs_db': b'x'}))[0]) == 10),
        ('spaces and umlauts', lambda s: len(loaded(twelve(s.tmp/'Grüße an alle'))[0]) == 10),
        ('classes with such names', lambda s: load_images(
            [twelve(s.tmp/'x'/name) for name in ('Äpfel', 'a b')][0].parent
        )['train'].features['label'].names == ['a b', 'Äpfel']),
        ('a picture of 0 bytes among others', lambda s: sum(len(dl.tensors[0]) for dl in vars(
            DataLoaders.from_dataset(load_images(put(twelve(s.tmp/'x'), **{'3_png': b''})),
                                     device='cpu')).values()) == 11),
        ('an empty class', lambda s: [(s.tmp/'x'/'c').mkdir(parents=True),
                                      twelve(s.tmp/'x'/'a'), twelve(s.tmp/'x'/'b')]
         and len(loaded(s.tmp/'x')[0]) == 21),
        ('one class', lambda s: len(loaded(twelve(s.tmp/'x'/'a').parent)[1].unique()) == 1),
        ('yes and no', lambda s: labelled(s, ['yes', 'no']*6, ['yes', 'no']*6)),
        ('true and false', lambda s: labelled(s, ['True', 'False']*6, ['True', 'False']*6)),
        ('years', lambda s: labelled(s, [1999, 2024]*6, ['1999', '2024']*6)),
        ('a trailing slash', lambda s: len(loaded(f"{twelve(s.tmp/'x')}/")[0]) == 10),
        ('classes called as splits, nearly', lambda s: used(
            [twelve(s.tmp/'x'/c) for c in ('test-tube', 'flask', 'train-station', 'eval')][0].parent
         ) == (48, ['eval', 'flask', 'test-tube', 'train-station'])),
        ('files called as splits', lambda s: used(put(twelve(s.tmp/'x'), **dict.fromkeys(
            ['test_png', 'train 1_png', 'a-val-3_png', 'eval_png'], s.im))) == (16, None)),
        ('training and testing', lambda s: [twelve(s.tmp/'x'/n) for n in ('training', 'testing')]
         and len(load_images(s.tmp/'x')['test']) == 12),
        ('classes to train on, none in the test', lambda s: used([twelve(s.tmp/'x'/n) for n in (
            'train/a', 'train/b', 'test')][2].parent) == (36, ['a', 'b'])),
        ('brackets and stars', lambda s: used(twelve(s.tmp/'a [1] *?')) == (12, None)),
        ('classes that are links, one leads back', linked),
        ('what is left out is told', lambda s: told_of(put(
            twelve(s.tmp/'x'), z_heic='x', metadata_csv='file_name,text\n0.png,a\n1.png,b\n'),
            "not used are 1 .heic, 10 .png")),
        *((f'texts: {name}', lambda s, t=t, kind=kind, found=found: texts_of(s, t, kind) == found)
          for name, kind, t, found in (
              ('numbers', 'jsonl', ['7', '8.5'], ['7', '8.5']),
              ('two in a list', 'jsonl', ['["a", "b"]', '"c"'], ['a', 'b', 'c']),
              ('007 and NA', 'csv', ['007', 'NA'], ['007', 'NA']))),
        ('metadata above the splits', lambda s: texts_of(s, ['"a"', '"b"'], 'jsonl', 'train')
         == ['a', 'b']),
        ('classes and texts', lambda s: used(put([twelve(s.tmp/'x'/c) for c in 'ab'][0].parent,
            metadata_csv='file_name,text\n' + ''.join(f'{c}/{i}.png,x\n' for c in 'ab'
                                                      for i in range(12)))) == (24, ['a', 'b'])),
        ('five captions of a picture, on one side', five_captions),
        ('a file of parquet', lambda s: s.digits['test'].to_parquet(s.tmp/'train.parquet')
         and len(load_images(s.tmp)['train']) == 324),
    ],
    captions=[
        ('rows by a list', lambda s: len(s.captioned['train'][[0, 2]]['label']) == 2),
        ('a mask',
         lambda s: (lambda ds: all('seven' in c for c in ds.captions[ds.attributes[:, 0] == 7]))(
            s.captioned['train'])),
        ('the last row', lambda s: s.captioned['train'][-1] == s.captioned['train'][19]),
        ('one row', lambda s: s.captioned['train'].select([3])[0] == s.captioned['train'][3]),
        ('a last batch of one', lambda s: [len(y) for _, y in TensorLoader(
            s.captioned['train'].x[:5], s.captioned['train'].captions[:5], batch_size=4)]
         == [4, 1]),
        ('no rows', lambda s: s.captioned['train'][:0]['caption'] == []),
        ('a digit in words', lambda s: digit_caption('seven', 'red', 'blue')
         == digit_caption(7.0, 'red', 'blue') == digit_caption(7, 'red', 'blue')),
        ('NumPy numbers', lambda s: digit_caption(np.int64(7), 'red', 'blue')
         == digit_caption(7, 'red', 'blue')),
        ('doubles for the judge', lambda s: torch.equal(
            s.judge(s.captioned['train'].x[:].double())[:, 1],
            s.captioned['train'].attributes[:, 1])),
    ],
    loaders=[
        ('batches larger than all', lambda s: len(TensorLoader(X, batch_size=99)) == 1),
        ('no validation', lambda s: DataLoaders.from_dataset(
            s.digits, valid_size=None, device='cpu').valid is None),
        ('coloured digits', lambda s: (lambda x: x.shape[1] == 3 and torch.equal(x[:, 0], x[:, 2]))(
            DataLoaders.from_dataset(s.digits, channels=3, device='cpu').test.tensors[0])),
        ("torch's loader", lambda s: learner(dls=SimpleNamespace(
            train=torch.utils.data.DataLoader([(x, 1) for x in X]), valid=None))
         .fit(1).n_steps == 2),
        ('texts', lambda s: next(iter(TensorLoader(X, ['a', 'b'])))[1] == ['a', 'b']),
    ],
    learner=[
        ('fitted twice', fit_twice),
        ('0 epochs', lambda s: same(learner().fit(0).model, linear())),
        ('only validated',
         lambda s: same(learner(MetricsCB()).fit(1, train=False).model, linear())),
        ('a rate of 0', lambda s: same(learner(lr=0.).fit(1).model, linear())),
        ('another model between', another_model),
        ('fitted after an error', after_an_error),
        ('predictions for batches in a list',
         lambda s: learner().get_preds([(X, CLASSES)])[0].shape == (2, 3)),
        ('NumPy epochs', lambda s: same(learner().fit(np.int64(2)).model, learner().fit(2).model)),
    ],
    callbacks=[
        ('shared by learners', shared_callbacks),
        ('NaN in the first batch', nan_at_once),
        ('an average shared by learners', shared_average),
        ('0 lines of progress', lambda s: learner(ProgressCB(n_lines=0)).fit(1).n_steps == 3),
        ('all of it warming up', lambda s: warmup_cosine(0.5, 1.0) == 0.5),
        ('no warming up', lambda s: warmup_cosine(0.0, 0.0) == 1),
        ('an average that forgets all', forgetful),
        ('losses before a fit', lambda s: RecorderCB().losses == []),
        ('one of a class in two lists', lambda s: len(learner(MetricsCB()).fit(
            1, cbs=[RecorderCB(), RecorderCB()]).history) == 1),
        ('a broken loss',
         lambda s: same(learner(NaNStopCB(1), dls=toys(shift=NAN)).fit(1).model, linear())),
        ('a scheduler of torch', lambda s: learner(SchedulerCB(partial(
            torch.optim.lr_scheduler.StepLR, step_size=1)), lr=1.0).fit(1).opt.param_groups[0]['lr']
         == pytest.approx(1e-3)),
    ],
    classifier=[
        ('one picture', lambda s: Classifier().eval()(X[:1]).shape == (1, 10)),
        ('no pictures', lambda s: Classifier().eval()(X[:0]).shape == (0, 10)),
        ('no change', lambda s: nearly(RandomAffines(0, 0, 0, 0)(s.x), s.x)),
        ('affines, which are for batches', lambda s: same(*(
            learner(AugmentCB(RandomAffines(), b), seed=k).fit(1).model
            for k, b in ((3, True), (3, False))))),
        ('saved', lambda s: saved(s, Classifier(num_classes=np.int64(3)), X)),
    ],
    checkpoints=[
        ('beside a data set', checkpoints_in_a_dataset),
        ('a folder with a strange name', resumed),
        ('copies under other names beside', a_copy_beside),
        ('resumed where nothing is',
         lambda s: learner(CheckpointCB(s.tmp/'n', resume=True)).fit(1).n_steps == 3),
        ('no folder', lambda s: checkpoints('nowhere') == []),
        ('a folder deep down', lambda s: len(learner(CheckpointCB(s.tmp/'a'/'b')).fit(1).cbs) == 2
         and len(checkpoints(s.tmp/'a'/'b')) == 1),
    ],
    scaling=[('more batches than there are', all_in_one_step)],
    schedulers=[
        *((f'{cls.__name__}, all steps', partial(steps_of_all, cls=cls)) for cls in SCHEDULERS),
        ('NumPy steps', lambda s: len(fresh(DDIMScheduler(), np.int64(7)).timesteps) == 7),
        ('settings of betas alone',
         lambda s: DDPMScheduler.from_config(LINEAR).config == DDPMScheduler().config),
        ('settings that are copied',
         lambda s: copy.deepcopy(DDPMScheduler()).config == DDPMScheduler().config),
        ('one level', lambda s: karras_sigmas(1, 0.1, 10.0).tolist() == pytest.approx([10.0])),
    ],
    sample=[
        *((f'{cls.__name__}, used before', partial(reused_scheduler, cls=cls))
          for cls in SCHEDULERS),
        *((f'in {dtype}', partial(of_dtype, dtype=dtype))
          for dtype in (torch.float16, torch.bfloat16, torch.float64)),
        ('a list as shape', lambda s: torch.equal(drawn(s.net, shape=[2, 1, 8, 8]), drawn(s.net))),
        ("a tensor's shape", lambda s: torch.equal(drawn(s.net, shape=X.shape), drawn(s.net))),
        ('NumPy numbers as shape', lambda s: torch.equal(
            drawn(s.net, shape=np.array([2, 1, 8, 8])), drawn(s.net))),
        ('a start that is kept',
         lambda s: [x := X + 0.5, drawn(s.net, shape=x)] and (x == 0.5).all()),
        ('a model in training', lambda s: torch.equal(
            drawn(awake(tiny()).train()), drawn(awake(tiny())))),
        ('a callback that scribbles', scribbled),
        ('one step', lambda s: drawn(s.net, n=1).isfinite().all()),
    ],
    guidance=[
        ('noise of a sampler that counts in sigma, to train', lambda s: same(
            trained_by(EulerScheduler()), trained_by(DDPMScheduler()))),
        ('trained, then guided', lambda s: drawn(
            AutoGuidance(*[trained_by(DDPMScheduler())]*2), EulerScheduler()).isfinite().all()),
        ('a scale of 1 is the class', lambda s: nearly(
            drawn(Guidance(s.cnet, 1, scale=1)), drawn(partial(s.cnet, context=CLASSES*0 + 1)),
            1e-4)),
        ('NumPy classes', lambda s: nearly(
            drawn(Guidance(s.cnet, np.array([0, 1]))), drawn(Guidance(s.cnet, [0, 1])))),
        ('guided by itself',
         lambda s: nearly(drawn(AutoGuidance(s.net, s.net, 3.)), drawn(s.net), 1e-3)),
        ('pushed away', lambda s: drawn(Guidance(s.cnet, 1, scale=-1.0)).isfinite().all()),
    ],
    metrics=[
        ('the same twice', lambda s: fid(s.features, s.features) == pytest.approx(0, abs=1e-6)),
        ('whole numbers',
         lambda s: fid(torch.arange(12).view(6, 2), torch.arange(12).view(6, 2) + 1)
         == pytest.approx(2, abs=1e-6)),
        ('half precision', lambda s: fid(s.features.half(), s.features) < 0.01),
        ('features that never change', lambda s: fid(torch.ones(9, 2), torch.zeros(9, 2))
         == pytest.approx(2, abs=1e-6)),
        ('doubles', lambda s: s.eval.measure(s.x.double())['fid_train'] == pytest.approx(
            s.eval.measure(s.x)['fid_train'], abs=1e-4)),
        ('copies', lambda s: s.eval.measure(s.x[20:])['copy'] == 1),
        ('batches', lambda s: s.eval.measure(iter(s.x.split(5)))['fid_train'] == pytest.approx(
            s.eval.measure(s.x)['fid_train'], abs=1e-6)),
    ],
    models=[
        ('NumPy classes', lambda s: saved(s, tiny(num_classes=np.int64(3)), X, TIMES, CLASSES)),
        ("torch's numbers",
         lambda s: saved(s, tiny(num_classes=torch.tensor(3)), X, TIMES, CLASSES)),
        ('NumPy widths', lambda s: saved(s, tiny(widths=np.array([8, 16])), X, TIMES)),
        ('NumPy sizes',
         lambda s: saved(s, tiny(sample_size=np.array([8, 8]), patch_size=np.int64(2)), X, TIMES)),
        ('a NumPy autoencoder', lambda s: saved(
            s, Autoencoder(np.int64(1), 2, np.array([8]), np.array([1]), np.int64(4)), X)),
        ('fractions of times', lambda s: s.net(X, torch.tensor([0.5, 2.5])).isfinite().all()),
        ('equal pictures', lambda s: psnr(X, X) == INF),
        ('a little outside', lambda s: psnr(s.x*1.5, s.x) > 0),
        ('nothing to judge', lambda s: s.judge(torch.zeros(0, 3, 16, 16)).shape == (0, 5)),
        ('the noise it was trained by, saved', settings_kept),
        ('a setting changed, saved', lambda s: (lambda vae: VAE.from_pretrained(
            reloaded(s, vae.keep(scaling_factor=0.5), folder=True)).scaling_factor == 0.5)(
                VAE(1, 2, (8,), (1,), 4))),
        ('a guided model, loaded', lambda s: torch.equal(
            drawn(demo.guided(*demo.load_model(s.model)[::2]), DPMSolverScheduler()),
            drawn(demo.guided(s.net, s.net), DPMSolverScheduler()))),
    ],
    results=[('the folder of a refusal, once it is free', refused_before),
             ('half of what a killed process wrote', half_written),
             ('a folder that was moved meanwhile', moved_meanwhile)],
    einsum=[
        ('a lonely number', lambda s: einsum('', torch.tensor(3.0)) == 3),
        ('letters of both sizes',
         lambda s: einsum('aA->Aa', torch.arange(6.).view(2, 3)).shape == (3, 2)),
        ('spaces', lambda s: torch.equal(einsum(' i j -> j i ', X[0, 0] + 1), X[0, 0].T + 1)),
        ('nothing in it',
         lambda s: einsum('ij,jk->ik', torch.zeros(2, 0), torch.zeros(0, 3)).eq(0).all()),
        ('complex numbers', lambda s: einsum('i,i->', *[torch.tensor([1j, 2.0])]*2) == 3),
        ('27 letters',
         lambda s: einsum('abcdefg,g->fedcba', torch.ones([1]*6 + [5]), torch.ones(5)) == 5),
    ],
    meanshift=[
        ('rows as lists',
         lambda s: MeanShift(1.).fit([[0, 0], [0, 1], [9, 9]]).labels_.tolist() in ([0, 0, 1],)),
        ('huge numbers',
         lambda s: len(MeanShift(1e6).fit([[1e9, 0], [1e9, 1], [0., 0]]).cluster_centers_) == 2),
        ('tiny numbers', lambda s: len(MeanShift(1e-9).fit([[1e-6], [0.]]).cluster_centers_) == 2),
        ('NumPy bandwidth',
         lambda s: len(
            MeanShift(np.float32(1)).fit(np.eye(3)*9).cluster_centers_) == 3),
        ('a table of pandas', lambda s: len(MeanShift(1.).fit(__import__('pandas').DataFrame(
            dict(a=[0., 9.], b=[0., 9.]))).cluster_centers_) == 2),
    ],
    autograd=[
        ('a slope in single precision', slope_in_float32),
        ('the slope of a constant',
         lambda s: autograd.derivative(lambda x: x*0 + 1, np.array([1., 2.])).tolist() == [0, 0]),
        ('a slope far out',
         lambda s: autograd.derivative(lambda x: x**2, 1e9) == pytest.approx(2e9, rel=1e-6)),
        ('plus true', lambda s: (autograd.Tensor([1.]) + True).data.tolist() == [2]),
        ('rows one by one', lambda s: [t.item() for t in autograd.Tensor([1., 2.])] == [1, 2]),
        ('power 0', lambda s: (autograd.Tensor([0.])**0).data.tolist() == [1]),
    ],
    optim=[
        ('a parameter twice',
         lambda s: len(mini.Sequential(*[mini.Linear(2, 2)]*2).parameters()) == 2),
        ('NumPy batches', lambda s: len(optim.DataLoader([1., 2., 3.], np.int64(2))) == 2),
        ('a mapping',
         lambda s: next(iter(optim.DataLoader([dict(a=1.), dict(a=2.)])))['a'].tolist() == [1, 2]),
        ('a tall matrix',
         lambda s: orthogonalize(torch.randn(20, 3, generator=seeded())).shape == (20, 3)),
        ('a matrix of 0', lambda s: orthogonalize(torch.zeros(3, 3)).eq(0).all()),
    ],
    tensors=[
        ('a NumPy seed',
         lambda s: [set_seed(np.int64(3)), torch.rand(1)][1] == [set_seed(3), torch.rand(1)][1]),
        ('nothing to move',
         lambda s: to_device(dict(a=[None, 'x', 3]), 'cpu') == dict(a=[None, 'x', 3])),
        ('noise as a list', lambda s: score.add_noise(X, [0.25, 0.5])[1].tolist() == [0.25, 0.5]),
        ('no noise', lambda s: torch.equal(score.add_noise(X + 1, torch.zeros(2))[0], X + 1)),
        ('no steps uphill',
         lambda s: len(score.gradient_ascent(lambda x: x.sum((1, 2, 3)), X, 0)) == 1),
        ('matrices without columns',
         lambda s: matmul.matmul_row(torch.zeros(2, 0), torch.zeros(0, 3)).eq(0).all()),
        ('a picture without n and channels',
         lambda s: conv.conv2d(X, torch.ones(1, 1, 8, 8)).shape == (2, 1, 1, 1)),
    ],
)  # fmt: skip

# ---- the command: words, exit code, what it says

COMMAND = [
    ('', 2, 'required'),
    ('--help', 0, ''),
    ('demo --help', 0, ''),
    ('--version', 2, 'required|unrec'),
    ('demo --colour', 2, 'unrecognized'),
    ('demo --seconds', 2, 'expected one argument'),
    ('demo --seconds ten', 2, "invalid float value: 'ten'"),
    ('demo --seconds -5', 2, 'not more than 0'),
    ('demo --seconds inf', 2, 'not more than 0'),
    ('demo --size 0', 2, 'not more than 0'),
    ('demo --size 8.5', 2, 'invalid int'),
    ('demo --size 5', 2, 'from 8 to 256'),
    ('demo --size 5000', 2, 'from 8 to 256'),
    ('demo --seed abc', 2, 'invalid int'),
    ('demo --seed -1', 2, '2\\*\\*32|seed'),
    ('demo --seed 99999999999', 2, '2\\*\\*32|seed'),
    ('demo --device cuda:99', 2, 'try --device cpu'),
    ('demo --device CPU', 2, 'try --device cpu'),
    ('demo --data README.md', 2, 'README.md'),
    ('demo --data hub', 2, 'hub'),
    ('demo --data dataset', 2, 'dataset'),
    ('demo --data pictures', 2, 'at least 8'),
    ('demo --out README.md', 2, "can't write"),
    ('demo --out notes.txt/x', 2, "can't write"),
    ('demo --out pictures', 2, 'digits.png'),
    ('demo --out hub2', 2, 'hub2/model/'),
    ('demo extra', 2, 'unrecognized'),
    ('demo --class', 2, 'expected one argument'),
    ('sample MODEL --class cat --out TMP/a.png', 2, 'trained without classes'),
    ('demo -seconds 5', 2, 'unrecognized'),
    ('DEMO', 2, 'invalid choice'),
    ('demo --seconds 0x10', 2, 'invalid float'),
    ("sample '' --out TMP/a.png", 2, 'folder: .*is empty'),
    ("demo --data ''", 2, 'data: .*is empty'),
    ("demo --out ' '", 2, 'out: .*is empty'),
    ('sample', 2, 'required'),
    ('sample README.md --out TMP/a.png', 2, 'no saved model'),
    ('sample hub --out TMP/a.png', 2, 'scheduler_config.json missing'),
    ('sample MODEL --n 2.5', 2, 'invalid int'),
    ('sample MODEL --n -1', 2, 'not more than 0'),
    ('sample MODEL --steps ten', 2, 'invalid int'),
    ('sample MODEL --steps -1 --out TMP/a.png', 2, '1 to 1,000'),
    ('sample MODEL --out pictures/a.png', 2, "isn't a picture of miniai's making"),
    ('sample MODEL --out p.png', 2, "isn't a picture of miniai's making"),
    ('sample MODEL --out pictures', 2, 'end it in .png'),
    ('sample MODEL --out notes.txt', 2, 'end it in .png'),
    (f"sample MODEL --out {'a'*300}.png", 2, '304 characters.*too long'),
    ('sample MODEL --out a.jpg', 2, 'end it in .png'),
    ('sample MODEL --out notes.txt/a.png', 2, 'notes.txt'),
    ('sample MODEL --seed 99999999999999999999 --out TMP/a.png', 2, 'seed'),
    ('sample MODEL --n 2 --steps 1 --out TMP/new/a.PNG', 0, '2 new pictures'),
    ('sample MODEL --n 1 --steps 3 --out TMP/a.png --seed 7', 0, '1 new pictures'),
    ('sample MODEL/ --n 1 --steps 3 --out TMP/ä.png --device cpu', 0, '1 new pictures'),
    ('train', 2, 'required'),
    ('train gan', 2, 'invalid choice'),
    ('train vae --steps 5 --seconds 5', 2, 'not allowed with'),
    ('train vae --steps 0', 2, 'not more than 0'),
    ('train vae --out hub', 2, "isn't as miniai wrote it"),
    ('train vae --out README.md', 2, "can't write"),
    ('train vae --data nowhere --out TMP/v', 2, "no data set called 'nowhere'"),
]  # fmt: skip


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    "What the cases take: small pictures, networks that were never trained, a saved model."
    top = tmp_path_factory.mktemp('shop')
    model, scheduler = awake(tiny(sample_size=[8, 8])), DPMSolverScheduler()
    demo.save_model(top/'model', model, scheduler, awake(tiny(sample_size=[8, 8])))
    vae = VAE(1, 2, (8,), (1,), 4).eval()
    vae.save_pretrained(top/'vae')
    digits = load_digits()
    x = images_to_tensor(digits['test']['image'])[:40]
    features, loaders = torch.randn(40, 3, generator=seeded()), toys()
    return SimpleNamespace(
        digits=digits, x=x, im=Image.fromarray(GREY), net=model, other=awake(tiny(widths=(16,))),
        cnet=awake(tiny(num_classes=3)), judge=CaptionJudge().eval(), vae=vae,
        features=features, loaders=loaders,
        captioned=captioned_digits(digits, n_train=20, n_test=10),
        eval=ImageEval(None, x[20:], x[:20]),
        model=top/'model', vae_folder=top/'vae')  # fmt: skip


@pytest.fixture(scope='module')
def decoys(tmp_path_factory):
    "A folder with a file of every sort that somebody may have."
    top = tmp_path_factory.mktemp('decoys')
    datasets.Dataset.from_dict(dict(a=[1, 2, 3])).save_to_disk(top/'dataset')
    for name in ('hub', 'hub2/model'):
        put(top/name, config_json='{"model_type": "bert"}', README_md='# Mine')
        save_file({'weight': torch.zeros(3)}, top/name/'model.safetensors')
    im = Image.fromarray(GREY)
    put(top, README_md='# Mine', notes_txt='precious', samples_png=im, p_png__holiday_txt='sun')
    put(top/'pictures', a_png=im, b_jpg=im, digits_png=im, c_png=im)
    put(top/'theirs', **{'epoch-000001_ckpt': 'another program', 'state_json': '{}'})
    return top


def checksums(top):
    return {str(p): 'a folder' if p.is_dir() else hashlib.sha256(p.read_bytes()).hexdigest()
            for p in top.rglob('*')}


class Slow(BaseException):
    "Nobody catches it by mistake."


@pytest.fixture
def s(shop, decoys, tmp_path, monkeypatch):
    "The shop, within somebody's files; not one of them may have changed afterwards."
    def too_slow(*_):
        raise Slow

    monkeypatch.chdir(decoys)
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', shop.model.parent/'cache')
    before = shop.before = checksums(decoys)
    shop.tmp = tmp_path
    old = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(20)
    yield shop
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)
    after = checksums(decoys)
    assert {k: after.get(k) for k in before} == before, 'a file of somebody else was lost'
    for new in sorted(set(after) - set(before), reverse=True):
        Path(new).rmdir() if after[new] == 'a folder' else Path(new).unlink()


def rows(table):
    "Parameters for each row of a table."
    for area, cases in table.items():
        for name, *case in cases:
            yield pytest.param(*case, id=f'{area}: {name}')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind, words, call', rows(REFUSED))
def test_refused(s, decoys, kind, words, call):
    with pytest.raises(kind, match=words) as e:
        call(s)
    assert len(str(e.value).replace(str(s.tmp), '')) <= 300, str(e.value)
    assert checksums(decoys) == s.before, 'nothing is written'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('call', rows(RIGHT))
def test_right(s, call):
    assert call(s)


def in_0_to_1(s):
    x = s.x/2 + 0.5
    diffusion_learner(tiny(), DataLoaders(TensorLoader(x, x)), DDPMScheduler(),
                      device='cpu').fit(2)


def unscaled(s, scheduler):
    "A loop by hand, whose model sees the pictures as the scheduler keeps them."
    x = randn(X.shape, seeded())*fresh(scheduler, 4).init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(s.net(x, t.expand(2)), t, x).prev_sample


@pytest.mark.parametrize('words, call', rows(dict(warned=[
    ('pictures in [0, 1], to train', 'x\\*2 - 1', in_0_to_1),
    *((f'{cls.__name__} by hand', 'scale_model_input', lambda s, cls=cls: unscaled(s, cls()))
      for cls in (EulerScheduler, EulerAncestralScheduler, HeunScheduler, MomentumScheduler)),
])))
def test_warned_once(s, words, call):
    with pytest.warns(UserWarning, match=words) as said:
        call(s)
    assert len([w for w in said if re.search(words, str(w.message))]) == 1


@pytest.mark.parametrize('words, code, says', rows({'command': [(w, w, *r) for w, *r in COMMAND]}))
def test_command(s, decoys, capsys, words, code, says):
    assert command(words.replace('MODEL', str(s.model)).replace('TMP', str(s.tmp))) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.replace('\r', '\n').splitlines() if line.startswith('miniai')]
    assert len(lines) == bool(code) and 'Traceback' not in err, err
    assert not code or len(lines[0]) <= 330, lines
    assert re.search(says, lines[0] if lines else out), lines
    if Path('demo').exists():
        gc.collect()         # room on the disk is held as long as the traceback, to a process's end
    assert set(checksums(decoys)) <= set(s.before), 'no file and no folder is written'
