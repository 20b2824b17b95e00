"""Captioned digits, and the judge that reads them: against what was drawn, and what they refuse."""

import hashlib
import os

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F

from miniai.captions import (
    ATTRIBUTES,
    BORDERS,
    COLOURS,
    PALETTE,
    SLANT,
    CaptionJudge,
    captioned_digits,
    digit_caption,
    ink_map,
    is_held_out,
    measure_colours,
    middle_lines,
    place,
    slant_of,
    stroke_width,
    thin,
    train_judge,
    with_pen,
)
from miniai.data import DataLoaders, images_to_tensor, load_digits, load_images

needs_mnist = pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get('MINIAI_DATA', ''), 'mnist')),
    reason='no local copy of MNIST in MINIAI_DATA',
)


# mean ink of 300 pictures, from 0 to 255, and a hash of their captions and attributes
FINGERPRINTS = dict(
    train=(37.40, '1078a2905d555fea'),
    test=(37.31, 'c59f57b538e5d8b4'),
    unseen=(39.89, 'd146427eaac2753a'),
)


@pytest.fixture(scope='module')
def captioned():
    return captioned_digits(n_train=1500, n_test=400)


@pytest.fixture(scope='module')
def written():
    "The 360 test digits at 32x32: how much ink there is."
    return (images_to_tensor(load_digits(32)['test']['image'])[:, 0] + 1) / 2


# drawing


def test_thinning_keeps_the_parts_and_the_holes(written):
    b = (place(written, torch.zeros(360)) > 0.45).numpy()
    lines, eight = thin(b), np.ones((3, 3))

    def count(o, s=None):
        return np.array([ndimage.label(q, s)[1] for q in o])

    assert (lines <= b).all() and lines.sum() < 0.3 * b.sum()
    assert (count(lines, eight) == count(b, eight)).all()
    assert (count(1 - lines) == count(~b)).mean() > 0.99  # holes: the papers around and inside
    blocks = ndimage.convolve(lines, np.ones((1, 2, 2)), mode='constant')
    assert (blocks < 4).mean() > 0.999  # no block of four pixels is left
    assert (thin(lines) == lines).all()


@pytest.mark.parametrize('slant', SLANT.values())
def test_slants_are_set_as_they_are_measured(written, slant):
    assert (slant_of(place(written, torch.full((360,), slant))) - slant).abs().max() < 0.06
    lines = middle_lines(written[:100], torch.full((100,), slant))
    drawn = with_pen(lines, torch.full((100,), 3.5)) / 255
    assert (slant_of(drawn) - slant).abs().median() < 0.08


def test_a_thick_pen_leaves_the_holes_of_digits_open(written):
    "Holes of nine pixels and more under a thin pen are still there under a thick one."
    lines = middle_lines(written, torch.zeros(360))
    thin_pen, thick_pen = (with_pen(lines, torch.full((360,), w)) for w in (2.0, 5.5))

    def holes(o, least):
        papers, n = ndimage.label(o.numpy() < 128)
        around = papers[0, 0]
        return sum((papers == k).sum() >= least for k in range(1, n + 1) if k != around)

    before = np.array([holes(o, 9) for o in thin_pen])
    after = np.array([holes(o, 1) for o in thick_pen])
    assert before.sum() > 150 and (after >= before).mean() > 0.9


def test_a_picture_depends_on_its_index_and_seed_alone(captioned):
    again = captioned_digits(n_train=40, n_test=30)
    other = captioned_digits(n_train=40, n_test=30, seed=1)
    for k in captioned:
        n = len(again[k])
        assert torch.equal(again[k].x[:], captioned[k].x[:n])
        assert again[k].captions.tolist() == captioned[k].captions[:n].tolist()
        assert not torch.equal(other[k].attributes, again[k].attributes)


# the table


def test_rows_columns_and_batches_agree(captioned):
    ds, rows = captioned['train'], torch.tensor([5, 2, 700])
    assert ds.x.shape == (1500, 3, 32, 32) and ds.x[rows].shape == (3, 3, 32, 32)
    assert torch.equal(ds.x[rows][1], ds.x[2]) and torch.equal(ds.x[-1], ds.x[:][-1])
    row = ds[2]
    assert list(row) == ds.column_names
    assert row['caption'] == ds['caption'][2] == ds.captions[rows][1]
    bytes_ = ((ds.x[2] + 1) * 127.5).round().byte().numpy()
    assert np.array_equal(np.asarray(row['image']).transpose(2, 0, 1), bytes_)
    numbers = [ATTRIBUTES[k].index(row[k]) for k in list(ATTRIBUTES)[1:]]
    assert numbers == ds.attributes[2, 1:].tolist() and row['label'] == ds.attributes[2, 0]
    assert len(list(ds)) == 1500
    with pytest.raises(IndexError):
        ds[1500]
    with pytest.raises(KeyError, match='hue'):
        ds['hue']


@pytest.mark.parametrize('kind', ['mask', 'numbers', 'slice'])
def test_pictures_captions_and_attributes_are_indexed_alike(captioned, kind):
    ds = captioned['test']
    mask = ds.attributes[:, 0] == 7
    mask[100:] = False
    i = dict(mask=mask, numbers=mask.nonzero()[:, 0], slice=slice(3, 9))[kind]
    names = [[ATTRIBUTES['label'][d], list(COLOURS)[c]] for d, c in ds.attributes[i, :2].tolist()]
    assert len(ds.x[i]) == len(ds.captions[i]) == len(names) > 2
    assert all(d in c and ink in c for (d, ink), c in zip(names, ds.captions[i]))


def test_selected_rows_are_a_table_again(captioned):
    ds = captioned['train'].select([7, 3])
    assert len(ds) == 2 and ds[1] == captioned['train'][3]
    assert torch.equal(ds.x[:], captioned['train'].x[torch.tensor([7, 3])])


def test_held_out_pairs_are_in_unseen_only(captioned):
    names = list(COLOURS)
    colours = {(c, names[(i + 3) % 8]) for i, c in enumerate(names)}
    inks = {(d, names[(3 * d + 1) % 8]) for d in range(10)}

    def bad(ds):
        rows = zip(ds['label'], ds['ink'], ds['paper'])
        never = [((i, p) in colours) or ((d, i) in inks) for d, i, p in rows]
        assert is_held_out(ds.attributes).tolist() == never
        return never

    assert not any(bad(captioned['train'])) and not any(bad(captioned['test']))
    assert all(bad(captioned['unseen']))
    free = captioned_digits(n_train=300, n_test=1, held_out=False)
    assert set(free) == {'train', 'test'} and 0.15 < np.mean(bad(free['train'])) < 0.35


@pytest.mark.parametrize('split,known', FINGERPRINTS.items())
def test_pictures_and_captions_are_those_that_shipped_weights_learned_from(captioned, split, known):
    "To within rounding: the ink of 300 pictures, their captions and attributes word for word."
    ds = captioned[split]
    ink = ds.x.shapes[ds.x.which[:300]].float().mean().item()
    words = '\n'.join(ds.captions[:300]) + str(ds.attributes[:300].tolist())
    assert ink == pytest.approx(known[0], abs=0.05)
    assert hashlib.sha256(words.encode()).hexdigest()[:16] == known[1]


def test_combinations_are_all_there_and_about_equally_often(captioned):
    ink, paper, thickness, slant = captioned['train'].attributes[:, 1:].T
    pairs = torch.bincount(ink * 8 + paper, minlength=64).view(8, 8)
    assert (pairs > 0).sum() == 48 and (pairs.diagonal() == 0).all()
    assert all((k.bincount() - 500).abs().max() < 80 for k in (thickness, slant))


def test_train_and_test_come_from_other_digits(captioned):
    shapes = [{o.numpy().tobytes() for o in captioned[k].x.shapes} for k in ('train', 'test')]
    assert not shapes[0] & shapes[1]


def test_dark_ink_on_light_paper_is_understood():
    small = {k: ds.select(range(30)) for k, ds in load_digits().items()}

    def turn(row):
        return {'image': Image.fromarray(255 - np.asarray(row['image']))}

    turned = {k: ds.map(turn) for k, ds in small.items()}
    a, b = (captioned_digits(d, n_train=60, n_test=20) for d in (small, turned))
    assert (a['train'].x[:] - b['train'].x[:]).abs().mean() < 0.02


def test_a_set_of_threes_and_sevens_keeps_their_names(tmp_path):
    from datasets import load_dataset

    dd = load_digits()
    for k, ds in dd.items():
        for i, row in enumerate(r for r in ds.select(range(60)) if r['label'] in (3, 7)):
            folder = tmp_path / k / str(row['label'])
            folder.mkdir(parents=True, exist_ok=True)
            row['image'].save(folder / f'{i}.png')
    names = load_dataset(str(tmp_path))['train'].features['label'].names
    assert names == ['3', '7']
    ds = captioned_digits(tmp_path, n_train=40, n_test=10)['train']
    assert set(ds['label']) == {3, 7} and all('three' in c or 'seven' in c for c in ds.captions)


def test_captions_go_through_a_learner(captioned):
    from miniai.learner import Callback, DeviceCB, Learner

    got = []

    class Read(Callback):
        def before_batch(self, learn):
            x, captions = learn.batch
            got.extend(captions)
            learn.batch = x, torch.tensor([float('red' in c) for c in captions])

    dls = DataLoaders.from_dataset(captioned, batch_size=500, target='caption', device='cpu')
    linear = torch.nn.Linear(3072, 1)
    model = torch.nn.Sequential(torch.nn.Flatten(), linear, torch.nn.Flatten(0))
    cbs = [DeviceCB('cpu'), Read()]
    Learner(model, dls, torch.nn.MSELoss(), 1e-4, cbs).fit(1)
    assert sorted(got) == sorted(captioned['train'].captions)  # train and valid


@needs_mnist
def test_captioned_mnist():
    ds = captioned_digits('ylecun/mnist', n_train=200, n_test=100)['train']
    assert ds.x[:].shape == (200, 3, 32, 32) and len(set(ds['ink'])) == 8


def relabelled(values):
    return {
        k: ds.remove_columns('label').add_column('label', [values] * len(ds))
        for k, ds in load_digits().items()
    }


@pytest.mark.parametrize(
    'call,match',
    [
        (lambda: captioned_digits(size=8), 'size is 8'),
        (lambda: captioned_digits(n_train=1, n_test=360 * 504 + 1), 'whole number from 1 to'),
        (lambda: captioned_digits(n_train=0), 'whole number from 1 to'),
        (lambda: digit_caption(7, 'red', 'teal'), "paper is 'teal'.*cyan"),
        (lambda: digit_caption(7, 'red', 'blue', 'fat'), "'thin' or 'normal' or 'thick'"),
        (lambda: digit_caption(11, 'red', 'blue'), 'label is 11.*seven'),
        (lambda: digit_caption(7, 'red', 'blue', slant='over'), "'left' or 'upright' or 'right'"),
        (lambda: captioned_digits({'train': load_digits()['train']}), "'train' and 'test'"),
        (lambda: captioned_digits(load_digits().remove_columns('label')), "'label'"),
        (lambda: captioned_digits(relabelled(42)), '42'),
    ],
)
def test_bad_arguments_for_captions(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    'kw,match',
    [
        (dict(size=28), 'size=28'),
        (dict(channels=1), 'channels=1'),
        (dict(target='hue'), "no column 'hue'"),
    ],
)
def test_bad_arguments_for_loaders_of_captions(captioned, kw, match):
    with pytest.raises(ValueError, match=match):
        DataLoaders.from_dataset(captioned, device='cpu', **kw)


# the judge


def measured(ds):
    x, judge = ds.x[:], CaptionJudge().eval()
    right = (judge(x) == ds.attributes).float().mean(0)
    return dict(zip(list(ATTRIBUTES)[1:], right[1:].tolist()))


def good(got):
    goals = dict(ink=0.98, paper=0.98, thickness=0.95, slant=0.95)
    return all(got[k] >= v for k, v in goals.items())


@pytest.mark.parametrize('split', ['test', 'unseen'])
def test_measurements_on_real_digits_and_the_shipped_borders(captioned, split):
    got = measured(captioned[split])
    assert good(got), got


@needs_mnist
def test_measurements_on_mnist():
    dd = load_images('ylecun/mnist')
    few = {'train': dd['train'].select(range(10)), 'test': dd['test'].select(range(500))}
    got = measured(captioned_digits(few, n_train=10, n_test=500)['test'])
    assert good(got), got


@pytest.mark.parametrize('measure,column,room', [(stroke_width, 3, 0.15), (slant_of, 4, 0.02)])
def test_the_borders_are_what_training_pictures_say(captioned, measure, column, room):
    ds = captioned['train']
    v = measure((2 * ink_map(ds.x[:]) - 0.5).clamp(0, 1))
    medians = torch.stack([v[ds.attributes[:, column] == k].median() for k in range(3)])
    borders = (medians[1:] + medians[:-1]) / 2
    assert torch.allclose(borders, torch.tensor(BORDERS[measure]), atol=room), borders


@pytest.mark.parametrize('w,h', [(2, 20), (3, 24), (5, 10), (8, 8)])
def test_width_of_a_bar_is_twice_area_over_outline(w, h):
    m = torch.zeros(1, 32, 32)
    m[0, 4 : 4 + h, 6 : 6 + w] = 1
    exact = 2 * w * h / (2 * (w + h))
    assert abs(stroke_width(m).item() / exact - 1) < 0.03
    big = F.interpolate(m[None], scale_factor=2)[0]
    assert abs(stroke_width(big).item() / exact - 1) < 0.03  # in pixels of 32, whatever the size


@pytest.mark.parametrize('s', [-0.5, -0.2, 0.0, 0.3])
def test_slant_of_a_sheared_bar(s):
    y, x = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(64.0) - 31.5, indexing='ij')
    measured = slant_of(((x + s * y).abs() < 4).float()[None]).item()
    assert abs(measured - s) < 0.08 * abs(s) + 1e-4


def test_every_pair_of_colours_is_named():
    m = torch.zeros(32, 32)
    m[8:24, 12:18] = 1
    for ink, paper in ((a, b) for a in range(8) for b in range(8) if a != b):
        c, p = PALETTE[ink][:, None, None], PALETTE[paper][:, None, None]
        found = measure_colours((p + m * (c - p))[None])
        assert [torch.cdist(o, PALETTE).argmin().item() for o in found] == [ink, paper]


def test_larger_pictures_are_judged_alike():
    large = captioned_digits(n_train=1, n_test=60, size=64, held_out=False)['test']
    small = captioned_digits(n_train=1, n_test=60, held_out=False)['test']
    assert torch.equal(small.attributes, large.attributes)
    assert good(measured(large)), measured(large)


def test_an_empty_tile_has_no_digit():
    seen = CaptionJudge().eval()(PALETTE[2][:, None, None].expand(2, 3, 32, 32))
    assert seen[:, 2].tolist() == [2, 2] and (seen[:, [0, 3, 4]] == -1).all()


def test_score_counts_what_is_asked(captioned):
    judge, ds = CaptionJudge().eval(), captioned['test']
    x, a = ds.x[:100], ds.attributes[:100].clone()
    a[:50, 1] = (a[:50, 1] + 1) % 8
    assert judge.score(x, a)['ink'] == 0.5
    a[:50, 1] = -1
    whole, seen = judge.score(x, a), judge(x)
    assert whole['ink'] == 1.0
    ok = (seen == a) | (a == -1)
    assert whole['all'] == pytest.approx(ok.all(1).float().mean().item())
    assert whole['colours'] == pytest.approx(ok[:, :3].all(1).float().mean().item())
    a[:, [0, 3, 4]] = -1
    alone = judge.score(x, a)
    assert np.isnan([alone[k] for k in ('label', 'thickness', 'slant')]).all()
    assert alone['all'] == (seen[:, 2] == a[:, 2]).float().mean().item()


def test_a_judge_reads_in_parts_and_can_be_kept(captioned, tmp_path):
    judge, x = CaptionJudge().eval(), captioned['test'].x[:50]
    judge.save_pretrained(tmp_path)
    again = CaptionJudge.from_pretrained(tmp_path)
    assert not again.training and torch.equal(again(x, batch_size=7), judge(x))


def test_a_short_training_beats_luck_by_far(captioned):
    judge = train_judge(n_pictures=1200)
    ds = captioned['test']
    assert judge.score(ds.x[:], ds.attributes)['label'] > 0.3


@pytest.mark.parametrize(
    'call,match',
    [
        (lambda j: j(torch.zeros(2, 1, 32, 32)), 'n, 3, h, w'),
        (lambda j: j(torch.zeros(2, 3, 4, 4)), '8x8'),
        (lambda j: j(torch.full((1, 3, 32, 32), torch.nan)), 'in ..1, 1'),
        (lambda j: j.score(torch.zeros(2, 3, 32, 32), torch.zeros(2, 4)), r'\(2, 5\) of'),
        (lambda j: j.score(torch.zeros(2, 3, 32, 32), torch.zeros(3, 5)), r'\(2, 5\) of'),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call(CaptionJudge().eval())


def test_a_judge_in_training_mode_says_so():
    with pytest.raises(RuntimeError, match='eval'):
        CaptionJudge()(torch.zeros(1, 3, 32, 32))
