"Lesson 15: the classifier, augmentation, early stopping."

import inspect
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from miniai.autoencoder import VAE, Autoencoder
from miniai.callbacks import MetricsCB, accuracy
from miniai.captions import CaptionJudge
from miniai.checkpoint import CheckpointCB
from miniai.classifier import (
    AugmentCB,
    Classifier,
    EarlyStopCB,
    RandomAffines,
    affine,
    train_classifier,
)
from miniai.data import DataLoaders, TensorLoader, load_digits
from miniai.learner import Callback, Learner
from miniai.tensors import set_seed
from miniai.unet import UNet

quick = settings(deadline=None, derandomize=True, max_examples=50)


@pytest.fixture(scope='module')
def dls():
    return DataLoaders.from_dataset(load_digits(), batch_size=128, device='cpu')


def loaders(n=20):
    x, y = (
        torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        torch.arange(n) % 3,
    )
    return DataLoaders(
        TensorLoader(x, y, batch_size=8, shuffle=True), TensorLoader(x, y, batch_size=8)
    )


# ---- the classifier


@quick
@given(
    st.integers(1, 4),
    st.sampled_from([1, 3]),
    st.integers(8, 33),
    st.integers(8, 33),
    st.integers(2, 12),
)
def test_classifier_takes_any_size_from_8(n, c, h, w, classes):
    net = Classifier(c, classes).eval()
    assert net(torch.zeros(n, c, h, w)).shape == (n, classes) and net.features(
        torch.zeros(n, c, h, w)
    ).shape == (n, 64)


@pytest.mark.parametrize('shape', [(1, 8, 8), (2, 3, 8, 8), (2, 1, 7, 8), (2, 1, 8)])
def test_classifier_refuses_other_pictures(shape):
    with pytest.raises(ValueError, match='takes pictures'):
        Classifier()(torch.zeros(shape))


def test_labels_out_of_range():
    with pytest.raises(ValueError, match='from 0 to 1'):
        train_classifier(loaders(), num_classes=2, n_epochs=1)


def test_a_short_training_reads_most_test_digits_and_changes_no_picture(dls):
    tensors = dls.train.tensors + dls.valid.tensors + dls.test.tensors
    before = [t.clone() for t in tensors]
    set_seed(0)
    learn = train_classifier(dls, n_epochs=4, cbs=[AugmentCB()], device='cpu')
    assert all(torch.equal(a, b) for a, b in zip(before, tensors))
    assert not learn.model.training and len(learn.history) == 4
    assert accuracy(*learn.get_preds(dls.test)) > 0.85
    assert learn.history[-1]['accuracy'] == pytest.approx(accuracy(*learn.get_preds()).item())


# ---- augmentation


def run(transform, seed=0):
    "The batches a fit of one epoch trained on and validated on."
    seen = {True: [], False: []}

    class Keep(Callback):
        def before_predict(self, learn):
            seen[learn.training].append(learn.batch)

    set_seed(seed)
    Learner(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        loaders(),
        F.cross_entropy,
        cbs=[AugmentCB(transform), Keep()],
    ).fit(1)
    return seen


def test_augmentation_is_for_training_only_and_keeps_labels():
    data, seen = loaders(), run(lambda x: -x)
    x, y = data.valid.tensors
    assert torch.equal(torch.cat([b[0] for b in seen[False]]), x)
    bent, labels = (torch.cat(o) for o in zip(*seen[True]))
    rows = [next(i for i in range(len(x)) if torch.equal(-x[i], o)) for o in bent]
    assert sorted(rows) == list(range(len(x))) and torch.equal(y[rows], labels)


def test_each_picture_is_changed_by_itself_and_by_the_seed():
    same = torch.ones(6, 1, 8, 8)
    same[..., :4] = -1
    set_seed(0)
    a = RandomAffines()(same)
    set_seed(0)
    b = RandomAffines()(same)
    assert torch.equal(a, b) and all(not torch.equal(a[0], o) for o in a[1:])
    assert a.shape == same.shape and a.min() >= -1.001 and a.max() <= 1.001
    one, two = run(None, 1), run(None, 1)
    assert all(torch.equal(p[0], q[0]) for p, q in zip(one[True], two[True]))


@quick
@given(
    st.integers(1, 4),
    st.sampled_from([1, 3]),
    st.integers(5, 20),
    st.integers(5, 20),
    st.integers(0, 99),
)
def test_affine_is_torchvisions_picture_by_picture(n, c, h, w, seed):
    from conftest import import_torchvision

    import_torchvision()
    from torchvision.transforms import v2

    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, c, h, w, generator=g) * 2 - 1
    angle, dx, dy, scale, shear = numbers = torch.rand(5, n, generator=g) * torch.tensor(
        [[360.0], [0.4], [0.4], [1.0], [40.0]]
    ) + torch.tensor([[-180.0], [-0.2], [-0.2], [0.5], [-20.0]])
    # on paper that is 0: torchvision mixes a fill of -1 in twice along the edge
    theirs = [
        v2.functional.affine(
            o + 1, a, [dx * w, dy * h], k, [b, 0.0], interpolation=v2.InterpolationMode.BILINEAR
        )
        - 1
        for o, (a, dx, dy, k, b) in zip(x, numbers.T.tolist())
    ]
    assert torch.allclose(affine(x, angle, dx, dy, scale, shear), torch.stack(theirs), atol=1e-4)


def test_random_affines_keep_their_ranges_and_bend_each_by_itself():
    # a dot in the middle shows the shift alone
    x = torch.full((400, 1, 33, 33), -1.0)
    x[:, :, 16, 16] = 1
    set_seed(0)
    ink = (RandomAffines(degrees=40, shift=0.2, scale=0.1, shear=10)(x) + 1)[:, 0]
    ink, grid = ink / ink.sum((1, 2), keepdim=True), torch.arange(33.0) - 16
    for d in (ink.sum(1) @ grid / 33, ink.sum(2) @ grid / 33):
        assert (
            d.abs().max() < 0.2 + 0.5 / 33
            and d.max() > 0.18
            and d.min() < -0.18
            and d.unique().numel() > 390
        )
    assert torch.allclose(RandomAffines(0, 0, 0, 0)(x), x, atol=1e-4)


def test_augment_hands_over_single_pictures_or_whole_batches():
    shapes = []

    def look(o):
        shapes.append(o.shape)
        return o

    for batched in (False, True):
        shapes.clear()
        Learner(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
            loaders(),
            F.cross_entropy,
            cbs=[AugmentCB(look, batched)],
        ).fit(1)
        assert len(shapes) == (3 if batched else 20) and all(
            len(o) == (4 if batched else 3) for o in shapes
        )


# ---- early stopping


class Scripted(Callback):
    "Makes each epoch's validation loss what the script says."

    in_trials = False

    def __init__(self, losses):
        self.losses = losses

    def after_loss(self, learn):
        if not learn.training:
            learn.loss = learn.loss * 0 + self.losses[learn.epoch]


class Weights(Callback):
    "The weights after each epoch's training."

    order = -1

    def before_fit(self, learn):
        self.seen = []

    def after_epoch(self, learn):
        if learn.training:
            self.seen.append(learn.model[1].weight.detach().clone())


def stopped(losses, patience, *cbs, n_epochs=None):
    torch.manual_seed(0)
    weights, model = Weights(), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    cbs = [MetricsCB(), Scripted(losses), EarlyStopCB(patience), weights, *cbs]
    learn = Learner(model, loaders(), F.cross_entropy, 0.1, cbs)
    learn.fit(n_epochs or len(losses))
    return learn, weights.seen


@pytest.mark.parametrize(
    'losses,patience,epochs,best',
    [
        ((3, 2, 1, 2, 3, 4), 2, 5, 2),
        ((3, 2, 1), 2, 3, 2),
        ((1, 1, 1, 1), 2, 3, 0),
        ((3, 2, 2.5, 1, 2, 2, 2, 0), 3, 7, 3),
        ((3, float('nan'), 2, float('nan'), float('nan'), 1), 2, 5, 2),
    ],
)
def test_early_stopping_keeps_the_best(losses, patience, epochs, best):
    learn, seen = stopped(losses, patience)
    assert len(learn.history) == epochs == len(seen)
    assert torch.equal(learn.model[1].weight, seen[best])


def test_early_stopping_needs_a_validation_loss():
    learn = Learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), loaders(), F.cross_entropy)
    with pytest.raises(ValueError, match='MetricsCB'):
        learn.fit(1, cbs=[EarlyStopCB()])


def test_early_stopping_goes_on_where_a_checkpoint_was(tmp_path):
    losses = (3, 2, 1, 2, 3, 4)
    whole, seen = stopped(losses, 2)

    class Interrupt(Callback):
        order = 2000

        def before_epoch(self, learn):
            if learn.epoch == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped(losses, 2, CheckpointCB(tmp_path), Interrupt())
    again, _ = stopped(losses, 2, CheckpointCB(tmp_path, resume=True))
    assert len(again.history) == 5
    assert torch.equal(again.model[1].weight, whole.model[1].weight)


# ---- settings and files, the same for every model

MODELS = UNet, Classifier, CaptionJudge, Autoencoder, VAE


@pytest.mark.parametrize(
    'cls,plain',
    [
        (UNet, dict(in_channels=3, widths=[16, 32], num_classes=5, sample_size=[8, 8])),
        (Classifier, dict(in_channels=3, num_classes=5, widths=[8, 16], n_features=12)),
        (CaptionJudge, dict(size=16)),
        (Autoencoder, dict(in_channels=1, widths=[8, 16], n_blocks=[1, 1], scaling_factor=0.5)),
        (VAE, dict(latent_channels=2, widths=[8, 16], n_blocks=[1, 1], patch=2)),
    ],
)
@pytest.mark.parametrize('kind', [np.array, torch.tensor, lambda v: v])
def test_settings_of_numpy_and_torch_reach_the_config(cls, plain, kind, tmp_path):
    model = cls(**{k: kind(v) for k, v in plain.items()}).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert plain.items() <= config.items()
    again = cls.from_pretrained(tmp_path)
    assert not again.training
    pairs = zip(model.state_dict().items(), again.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(u, v) for (a, u), (b, v) in pairs)
    again.save_pretrained(tmp_path / 'b')
    assert json.loads((tmp_path / 'b' / 'config.json').read_text()) == config
    assert list(inspect.signature(cls).parameters) == list(config) or set(config) == set(
        inspect.signature(cls).parameters
    )


BAD_WIDTHS = ([10**9], [math.nan], [-16], [0], [True], ['16'], [2.5], [16.0], [[16]], [], 16, None,
              'ab')  # fmt: skip
BAD_NUMBERS = 10**9, 10**30, math.nan, -1, 0, True, '1', 2.5, 1.0, [1], None


@pytest.mark.parametrize(
    'cls,name,value',
    [
        *((cls, 'widths', v) for cls in (UNet, Classifier, Autoencoder) for v in BAD_WIDTHS),
        *((cls, 'in_channels', v) for cls in (UNet, Classifier, VAE) for v in BAD_NUMBERS),
        *((UNet, k, 10**9) for k in ('n_blocks', 'emb_dim', 'num_classes', 'patch_size')),
        *((UNet, 'sample_size', v) for v in (8, [8], [8, 8, 8], [0, 8], 'ab')),
        (UNet, 'n_blocks', 1000),
        *((VAE, 'scaling_factor', v) for v in (math.nan, 0, -1, math.inf, 'x', [1], None)),
    ],
)
def test_settings_that_cant_be_meant(cls, name, value, tmp_path):
    with pytest.raises((ValueError, TypeError)) as e:
        cls(**{name: value})
    assert len(str(e.value)) < 300
    (tmp_path / 'config.json').write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match="don't fit") as e:
        cls.from_pretrained(tmp_path)  # before memory is taken, before the weights are looked for
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 300


def damage(folder, how):
    config, weights = folder / 'config.json', folder / 'model.safetensors'
    tensors = load_file(weights)
    last = sorted(k for k in tensors if k.endswith('weight'))[-1]
    if how == 'missing':
        del tensors[last]
    if how == 'foreign':
        tensors['foo'] = torch.zeros(3)
    if how == 'shape':
        tensors[last] = torch.zeros(7, 7)
    if how == 'all foreign':
        tensors = {f'w{i}': torch.zeros(1) for i in range(500)}
    save_file(tensors, weights)
    if how == 'unknown':
        config.write_text(json.dumps({**json.loads(config.read_text()), 'foo': 1}))
    if how in ('{', '[1]', '1'):
        config.write_text(how)
    if how == 'cut':
        weights.write_bytes(weights.read_bytes()[:-9])
    return last


HOW = dict(missing='Missing.*{}', foreign='Unexpected.*foo', shape='{}.*7, 7', unknown='foo',
           cut='header') | {k: "don't fit" for k in ('all foreign', '{', '[1]', '1')}  # fmt: skip


@pytest.mark.parametrize('cls', MODELS)
@pytest.mark.parametrize('how', HOW)
def test_files_that_dont_fit_are_named(cls, how, tmp_path):
    cls().save_pretrained(tmp_path)
    last = damage(tmp_path, how)
    with pytest.raises(ValueError, match=HOW[how].format(last)) as e:
        cls.from_pretrained(tmp_path)
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 400


def test_files_that_arent_there(tmp_path):
    for name in ('model.safetensors', 'config.json'):
        Classifier().save_pretrained(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            Classifier.from_pretrained(tmp_path)
    for name in (tmp_path / 'none', 'none', 'nobody/none'):
        with pytest.raises(FileNotFoundError, match='no folder'):
            Classifier.from_pretrained(name)


def test_a_loaded_model_keeps_its_numbers_when_the_file_changes(tmp_path):
    net = Classifier().eval()
    net.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').write_bytes(b'')
    x = torch.zeros(1, 1, 8, 8)
    assert torch.equal(again(x), net(x)) and all(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize(
    'call',
    [
        lambda: EarlyStopCB(0),
        lambda: EarlyStopCB(2.5),
        lambda: train_classifier(loaders(), 3, n_epochs=-1),
        lambda: train_classifier(loaders(), 3, n_epochs=2.5),
    ],
)
def test_numbers_that_arent_whole(call):
    with pytest.raises(ValueError, match='whole number'):
        call()
