"""Bad luck with data: what is said when pictures can't be had."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from miniai.data import (
    ATTRIBUTES,
    COLOURS,
    SLANT,
    DataLoaders,
    TensorLoader,
    Texts,
    captioned_digits,
    colour,
    digit_caption,
    distance_to,
    held_out_pairs,
    images_to_tensor,
    load_digits,
    load_images,
    middle_lines,
    place,
    slant_of,
    thin,
    with_pen,
)


def test_unknown_name():
    with pytest.raises(FileNotFoundError, match="no data set called 'mnits'"):
        load_images('mnits')


def test_no_network_names_both_remedies(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.delenv('MINIAI_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match='network.*MINIAI_DATA'):
        load_images('nobody-here/no-such-set')


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match='is empty'):
        load_images(tmp_path)


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / 'a.csv').write_text('x,y\n1,2\n')
    with pytest.raises(ValueError, match='no pictures|read as pictures'):
        load_images(tmp_path)


def test_a_folder_of_pictures_without_classes(tmp_path):
    for i in range(20):
        Image.fromarray(np.full((8, 8), i * 10, np.uint8)).save(tmp_path / f'{i}.png')
    dls = DataLoaders.from_dataset(load_images(tmp_path), device='cpu')
    x, y = next(iter(dls.train))
    assert x.shape == (18, 1, 8, 8) and (y == -1).all() and len(dls.valid.tensors[0]) == 2


def test_folder_found_through_the_variable(tiny_pictures, monkeypatch):
    monkeypatch.setenv('MINIAI_DATA', str(tiny_pictures.parent))
    a, b = load_images('pics'), load_images('somebody/pics')
    assert len(a['train']) == len(b['train']) == 54 and a['test']['label'] == b['test']['label']


@pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get('MINIAI_DATA', ''), 'mnist')),
    reason='no local copy of MNIST in MINIAI_DATA',
)
def test_mnist_from_a_local_copy():
    ds = load_images('ylecun/mnist')
    x = images_to_tensor(ds['test'].select(range(100))['image'])
    assert (
        x.shape == (100, 1, 28, 28)
        and x.min() == -1
        and x.max() == 1
        and ds['train'].features['label'].num_classes == 10
    )


def test_unequal_sizes_and_how_to_mend_them():
    ims = [Image.new('L', (8, 8)), Image.new('L', (9, 8))]
    with pytest.raises(ValueError, match='different sizes.*size='):
        images_to_tensor(ims)
    assert images_to_tensor(ims, size=8).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    'call,match',
    [
        (lambda: load_digits(4), '8 or more'),
        (lambda: images_to_tensor([]), 'empty'),
        (lambda: images_to_tensor([Image.new('L', (8, 8))], channels=2), 'channels'),
        (lambda: TensorLoader(torch.zeros(3), torch.zeros(4)), 'equal lengths'),
        (lambda: TensorLoader(torch.zeros(3), batch_size=0), 'at least 1'),
        (lambda: DataLoaders.from_dataset({'train': None}), 'train'),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# captioned digits


@pytest.fixture(scope='module')
def captioned():
    return captioned_digits(n_train=3000, n_test=800)


def test_distances_are_scipys():
    b = torch.from_numpy(np.random.default_rng(0).random((20, 40, 40)) < 0.01).to(torch.uint8)
    b[:, 0, 0] = 1
    got, exact = (
        distance_to(b, 6),
        np.stack([ndimage.distance_transform_edt(1 - o) for o in b.numpy()]),
    )
    near = exact <= 6
    assert (
        near.sum() > 5000
        and np.allclose(got.numpy()[near], exact[near], atol=1e-4)
        and (got.numpy()[~near] > 6).all()
    )


def test_thinning_keeps_the_parts_and_the_holes():
    b = (
        place(
            (images_to_tensor(load_digits(32)['test']['image'])[:, 0] + 1) / 2, torch.zeros(360), 64
        )
        > 0.45
    ).numpy()
    lines, eight = thin(b), np.ones((3, 3))
    count = lambda o, s=None: np.array([ndimage.label(q, s)[1] for q in o])
    assert (lines <= b).all() and lines.sum() < 0.3 * b.sum()
    assert (count(lines, eight) == count(b, eight)).all()
    assert (count(1 - lines) == count(~b)).mean() > 0.99  # holes: the papers around and inside
    assert (
        ndimage.convolve(lines, np.ones((1, 2, 2)), mode='constant') < 4
    ).mean() > 0.999  # no block of four pixels is left
    assert (thin(lines) == lines).all()


@pytest.mark.parametrize('slant', SLANT.values())
def test_slants_are_set_as_they_are_measured(slant):
    g = (images_to_tensor(load_digits(32)['test']['image'])[:, 0] + 1) / 2
    assert (slant_of(place(g, torch.full((360,), slant), 64)) - slant).abs().max() < 0.06
    drawn = (
        with_pen(middle_lines(g[:100], torch.full((100,), slant)), torch.full((100,), 3.5)) / 255
    )
    assert (slant_of(drawn) - slant).abs().median() < 0.08


def test_a_picture_depends_on_its_index_and_seed_alone(captioned):
    again, other = (
        captioned_digits(n_train=40, n_test=30),
        captioned_digits(n_train=40, n_test=30, seed=1),
    )
    for k in captioned:
        n = len(again[k])
        assert (
            torch.equal(again[k].x[:], captioned[k].x[:n])
            and again[k].captions == captioned[k].captions[:n]
        )
        assert not torch.equal(other[k].attributes, again[k].attributes)


def test_rows_columns_and_batches_agree(captioned):
    ds, rows = captioned['train'], torch.tensor([5, 2, 700])
    assert (
        ds.x.shape == (3000, 3, 32, 32)
        and ds.x[rows].shape == (3, 3, 32, 32)
        and torch.equal(ds.x[rows][1], ds.x[2])
        and torch.equal(ds.x[-1], ds.x[:][-1])
    )
    row = ds[2]
    assert (
        list(row)
        == ds.column_names
        == ['image', 'caption', 'label', 'ink', 'paper', 'thickness', 'slant']
        and row['caption'] == ds['caption'][2] == ds.captions[rows][1]
    )
    assert np.array_equal(
        np.asarray(row['image']).transpose(2, 0, 1), ((ds.x[2] + 1) * 127.5).round().byte().numpy()
    )
    assert [ATTRIBUTES[k].index(row[k]) for k in list(ATTRIBUTES)[1:]] == ds.attributes[
        2, 1:
    ].tolist() and row['label'] == ds.attributes[2, 0]
    assert len(list(ds)) == 3000
    with pytest.raises(IndexError):
        ds[3000]
    with pytest.raises(KeyError, match='no column'):
        ds['hue']


def test_held_out_pairs_are_in_unseen_only(captioned):
    colours, inks = map(set, held_out_pairs())
    assert len(colours) == 8 and len(inks) == 10
    bad = lambda ds: [
        ((i, p) in colours) or ((d, i) in inks)
        for d, i, p in zip(ds['label'], ds['ink'], ds['paper'])
    ]
    assert (
        not any(bad(captioned['train']))
        and not any(bad(captioned['test']))
        and all(bad(captioned['unseen']))
    )
    free = captioned_digits(n_train=3000, n_test=10, held_out=False)
    assert set(free) == {'train', 'test'} and 0.15 < np.mean(bad(free['train'])) < 0.35


def test_train_and_test_come_from_other_digits(captioned):
    shapes = [{o.numpy().tobytes() for o in captioned[k].x.shapes} for k in ('train', 'test')]
    assert not shapes[0] & shapes[1]


def test_dark_ink_on_light_paper_is_understood():
    dd = load_digits()
    small = {k: dd[k].select(range(30)) for k in dd}
    turned = {
        k: v.map(lambda r: {'image': Image.fromarray(255 - np.asarray(r['image']))})
        for k, v in small.items()
    }
    a, b = (captioned_digits(d, n_train=60, n_test=20) for d in (small, turned))
    assert (a['train'].x[:] - b['train'].x[:]).abs().mean() < 0.02


def test_captions_go_through_a_learner(captioned):
    from miniai.learner import Callback, DeviceCB, Learner

    got = []

    class Read(Callback):
        def before_batch(self, learn):
            x, captions = learn.batch
            got.extend(captions)
            learn.batch = x, torch.tensor([float('red' in c) for c in captions])

    dls = DataLoaders.from_dataset(captioned, batch_size=500, target='caption', device='cpu')
    Learner(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 1), torch.nn.Flatten(0)),
        dls,
        torch.nn.MSELoss(),
        1e-4,
        [DeviceCB('cpu'), Read()],
    ).fit(1)
    assert sorted(got) == sorted(captioned['train'].captions + captioned['test'].captions)


def test_texts_are_indexed_as_tensors_are():
    t = Texts('abcd')
    assert (
        t[torch.tensor([3, 0])] == ['d', 'a'] and t[torch.tensor(1)] == 'b' and t[1:3] == ['b', 'c']
    )


@pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get('MINIAI_DATA', ''), 'mnist')),
    reason='no local copy of MNIST in MINIAI_DATA',
)
def test_captioned_mnist():
    ds = captioned_digits('ylecun/mnist', n_train=200, n_test=100)['train']
    assert ds.x[:].shape == (200, 3, 32, 32) and len({c for c in ds['ink']}) == 8


@pytest.mark.parametrize(
    'call,match',
    [
        (lambda: captioned_digits(size=8), '16 or more'),
        (lambda: captioned_digits(n_train=1, n_test=360 * 126 + 1), 'at most'),
        (lambda: captioned_digits(n_train=0), 'at most'),
        (lambda: colour('teal'), "unknown colour 'teal'.*magenta"),
        (lambda: digit_caption(7, 'red', 'teal'), "unknown colour 'teal'.*cyan"),
        (lambda: digit_caption(7, 'red', 'blue', 'fat'), 'thin, normal, thick'),
        (lambda: digit_caption(11, 'red', 'blue'), '0 to 9'),
        (lambda: captioned_digits({'train': load_digits()['train']}), "'train' and 'test'"),
        (lambda: captioned_digits(load_digits().remove_columns('label')), "column 'label'"),
        (
            lambda: captioned_digits(
                {
                    k: v.remove_columns('label').add_column('label', [42] * len(v))
                    for k, v in load_digits().items()
                }
            ),
            '42',
        ),
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
