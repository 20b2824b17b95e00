"""Bad luck with data: what is said when pictures can't be had, and what becomes of odd folders."""

import io
import json
import os
import subprocess
import sys
import uuid

import numpy as np
import pytest
import torch
from PIL import Image

from miniai.data import (
    DataLoaders,
    TensorLoader,
    generators_of,
    get_rng,
    held_out_split,
    images_to_tensor,
    load_digits,
    load_images,
    rng_kept,
    set_rng,
)

DIGITS = load_digits()


def save(path, value=None, size=(8, 8)):
    "A grey picture, random or of one value."
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.random.default_rng(0).integers(0, 255, size[::-1], dtype=np.uint8)
    Image.fromarray(a if value is None else np.full_like(a, value)).save(path)


def folder_with_labels(folder, labels):
    for i in range(len(labels)):
        save(folder / f'{i}.png', i)
    rows = ''.join(f'{i}.png,{v}\n' for i, v in enumerate(labels))
    (folder / 'metadata.csv').write_text('file_name,label\n' + rows)
    return folder


def label_of_each_picture(dd):
    "The label of each picture, by the grey value it was saved with."
    rows = [r for ds in dd.values() for r in ds]
    names = dd['train'].features['label'].names
    return {np.asarray(r['image'])[0, 0]: r['label'] if r['label'] == -1 else names[r['label']]
            for r in rows}  # fmt: skip


def test_unknown_name():
    with pytest.raises(FileNotFoundError, match="no data set called 'mnits'"):
        load_images('mnits')


def test_no_network_names_both_remedies(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.delenv('MINIAI_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match='network.*MINIAI_DATA'):
        load_images('nobody-here/no-such-set')


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="can't be read as pictures.*Empty.*one sub-folder"):
        load_images(tmp_path)


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / 'a.csv').write_text('x,y\n1,2\n')
    with pytest.raises(ValueError, match='no pictures|read as pictures'):
        load_images(tmp_path)


def test_a_folder_of_pictures_without_classes(tmp_path):
    for i in range(20):
        save(tmp_path / f'{i}.png', i * 10)
    dls = DataLoaders.from_dataset(load_images(tmp_path), device='cpu')
    x, y = next(iter(dls.train))
    assert x.shape == (16, 1, 8, 8) and (y == -1).all() and len(dls.valid.tensors[0]) == 2


@pytest.mark.parametrize('held', ['test', 'val', 'validation'])
def test_split_folders_without_classes(tmp_path, held):
    "The commonest layout: their names are no classes."
    for i in range(12):
        save(tmp_path / ('train' if i < 9 else held) / f'{i}.png')
    dd = load_images(tmp_path)
    assert {k: len(ds) for k, ds in dd.items()} == dict(train=9, test=3)
    assert dd['train'].column_names == dd['test'].column_names == ['image']
    assert (DataLoaders.from_dataset(dd, device='cpu').train.tensors[1] == -1).all()


def test_split_folders_with_classes(tmp_path):
    for i in range(12):
        save(tmp_path / ('train' if i < 8 else 'test') / 'ab'[i % 2] / f'{i}.png')
    dd = load_images(tmp_path)
    assert dd['train'].features['label'].names == ['a', 'b'] and dd['test']['label'] == [0, 0, 1, 1]


def test_one_picture_alone_and_a_test_folder_alone(tmp_path):
    save(tmp_path / 'one' / '0.png')
    with pytest.raises(ValueError, match='number of rows .* is 1'):
        load_images(tmp_path / 'one')
    save(tmp_path / 'b' / 'test' / '0.png')
    with pytest.raises(ValueError, match="'train' and 'test'.*not"):
        load_images(tmp_path / 'b')
    save(tmp_path / 'one' / '1.png')
    two = load_images(tmp_path / 'one')
    assert len(DataLoaders.from_dataset(two, valid_size=0, device='cpu').train.tensors[0]) == 1
    with pytest.raises(ValueError, match='or else 0'):
        DataLoaders.from_dataset(two, device='cpu')


@pytest.mark.parametrize(
    'labels,names',
    [
        (['cat', 'dog', 'cat', 'eel'], ['cat', 'dog', 'eel']),
        ([7, 2_000_000, 3, 7], ['3', '7', '2000000']),
        ([0.5, 1.5, 0.5, 10], ['0.5', '1.5', '10']),
        ([1, '', 3, 1], ['1', '3']),
        (['a', '', 'b', ''], ['a', 'b']),
    ],
)
def test_labels_of_any_kind_become_classes(tmp_path, labels, names):
    dd = load_images(folder_with_labels(tmp_path / 'x', labels * 3))
    assert dd['train'].features['label'].names == names == dd['test'].features['label'].names
    wanted = {i: -1 if v == '' else f'{v:g}' if isinstance(v, float) else str(v)
              for i, v in enumerate(labels * 3)}  # fmt: skip
    assert label_of_each_picture(dd) == wanted
    dls = DataLoaders.from_dataset(dd, device='cpu')
    assert dls.train.tensors[1].max() < len(names) and dls.train.tensors[1].dtype == torch.int64


def test_a_label_column_without_labels_is_none(tmp_path):
    dd = load_images(folder_with_labels(tmp_path / 'x', [''] * 6))
    assert dd['train'].column_names == ['image']


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
    assert x.shape == (100, 1, 28, 28) and x.min() == -1 and x.max() == 1
    assert ds['train'].features['label'].num_classes == 10


# from pictures to numbers


def test_unequal_sizes_and_how_to_mend_them():
    ims = [Image.new('L', (8, 8)), Image.new('L', (9, 8))]
    with pytest.raises(ValueError, match='different sizes.*size='):
        images_to_tensor(ims)
    assert images_to_tensor(ims, size=8).shape == (2, 1, 8, 8)
    mixed = images_to_tensor([Image.new('RGB', (20, 10)), Image.new('L', (7, 9))], size=8)
    assert mixed.shape == (2, 3, 8, 8)


def test_the_middle_square_is_kept():
    a = np.zeros((10, 30), np.uint8)
    a[:, 10:20] = 255
    assert (images_to_tensor([Image.fromarray(a)], size=10) == 1).all()


def test_test_pictures_have_the_channels_of_the_training_pictures(tmp_path):
    for i in range(12):
        save(tmp_path / ('train' if i < 9 else 'test') / f'{i}.png')
    Image.new('RGB', (8, 8), 'red').save(tmp_path / 'train' / 'red.png')
    dls = DataLoaders.from_dataset(load_images(tmp_path), device='cpu', valid_size=0)
    assert dls.train.tensors[0].shape[1] == dls.test.tensors[0].shape[1] == 3


def test_sixteen_bits_are_not_saturated():
    a = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    x = images_to_tensor([Image.fromarray(a)])
    assert x.min() == -1 and x.max() == 1 and len(x.unique()) == 64


@pytest.mark.parametrize('kind', ['truncated', 'text', 'huge', 'empty'])
def test_a_damaged_picture_among_good_ones_is_left_out_and_named(
    tmp_path, kind, monkeypatch, capsys
):
    for i in range(9):
        save(tmp_path / 'ab'[i % 2] / f'{i}.jpg', 20 * i, size=(64, 64))
    bad = tmp_path / 'a' / '2.jpg'
    if kind == 'truncated':
        bad.write_bytes(bad.read_bytes()[:-400])
    if kind == 'text':
        bad.write_text('no picture')
    if kind == 'huge':
        save(bad, size=(200, 200))
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10_000)
    if kind == 'empty':
        bad.write_bytes(b'')
    dd = load_images(tmp_path)
    dls = DataLoaders.from_dataset(dd, device='cpu', valid_size=0)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and len(said[0]) < 400
    assert 'skipped 1 of' in said[0] and "2.jpg can't be read" in said[0]
    x, y = (torch.cat(o) for o in zip(*(dl.tensors for dl in (dls.train, dls.test))))
    grey = ((x.mean((1, 2, 3)) + 1) * 127.5 / 20).round().long()
    assert sorted(grey.tolist()) == [0, 1, 3, 4, 5, 6, 7, 8]  # each with its own class
    assert y.tolist() == [i % 2 for i in grey.tolist()]
    split = next(ds for ds in dd.values() if any('2.jpg' in p for p in files(ds)))
    with pytest.raises(ValueError, match=r'2\.jpg.* can.t be read') as e:
        images_to_tensor(undecoded(split)['image'])
    assert len(str(e.value)) < 400 and '\n' not in str(e.value)


def undecoded(ds):
    import datasets

    return ds.cast_column('image', datasets.Image(decode=False))


def files(ds): return [row['path'] for row in undecoded(ds)['image']]


def test_where_none_can_be_read_the_first_is_named(tmp_path, capsys):
    for i in range(4):
        (tmp_path / f'{i}.png').write_text('no picture')
    with pytest.raises(ValueError, match=r"\d\.png can't be read"):
        DataLoaders.from_dataset(load_images(tmp_path), device='cpu', valid_size=0)


def test_huge_pictures_take_the_memory_of_one():
    "Each of eight is 48 MB decoded; in a process of its own, whose peak can be measured."
    code = """if True:
        import io, resource
        from PIL import Image
        from miniai.data import images_to_tensor
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
        file = io.BytesIO()
        Image.new('RGB', (4000, 4000), 'red').save(file, 'PNG', compress_level=1)
        before = peak()
        x = images_to_tensor([dict(bytes=file.getvalue(), path=None)]*8, size=64)
        print(x.shape[0], peak() - before)
    """
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    n, megabytes = done.stdout.split()
    assert n == '8' and float(megabytes) < 4 * 48


@pytest.mark.parametrize('lost', ['picture', 'caption'])
def test_captions_and_files_that_do_not_match(tmp_path, lost):
    "A caption whose picture isn't there is refused; a picture without one is left out, and told."
    rows = [dict(file_name=f'{i}.png', text=f'number {i}') for i in range(12)]
    for i, row in enumerate(rows):
        save(tmp_path / row['file_name'], 20 * i)
    if lost == 'picture':
        (tmp_path / '7.png').unlink()
    else:
        del rows[7]
    (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    if lost == 'picture':
        with pytest.raises(ValueError, match="7.png', but there's no such picture"):
            load_images(tmp_path)
        return
    with pytest.warns(UserWarning, match='not used are 1 .png'):
        dd = load_images(tmp_path)
    dls = DataLoaders.from_dataset(dd, target='text', device='cpu', valid_size=0)
    seen = {round((x.item() + 1) * 127.5 / 20): text for dl in (dls.train, dls.test)
            for x, text in zip(dl.tensors[0][:, 0, 0, 0], dl.tensors[1])}  # fmt: skip
    assert seen == {i: f'number {i}' for i in range(12) if i != 7}


def test_photographs_are_decoded_small_and_one_by_one():
    "40 JPEGs of 3 megapixels would be 360 MB at full size."
    buffer = io.BytesIO()
    rows = np.linspace(0, 255, 1500)[:, None, None]
    Image.fromarray(np.broadcast_to(rows, (1500, 2000, 3)).astype(np.uint8)).save(buffer, 'JPEG')
    x = images_to_tensor([dict(bytes=buffer.getvalue(), path=None)] * 40, size=64)
    im = Image.open(io.BytesIO(buffer.getvalue()))
    full = images_to_tensor([im.copy()], size=64)
    assert x.shape == (40, 3, 64, 64) and (x[0] - full[0]).abs().mean() < 0.02
    im = Image.open(io.BytesIO(buffer.getvalue()))
    images_to_tensor([im], size=64)
    assert im.size == (250, 188)  # decoded at an eighth


def test_a_turned_photograph_is_put_upright():
    im = Image.new('L', (8, 16))
    im.paste(255, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    buffer = io.BytesIO()
    im.save(buffer, 'PNG', exif=exif)
    x = images_to_tensor([Image.open(io.BytesIO(buffer.getvalue()))])
    assert x[0, 0, 0, 0] == -1 and x[0, 0, -1, 0] == 1


# loaders


@pytest.mark.parametrize(
    'call,match',
    [
        (lambda: load_digits(4), 'size is 4'),
        (lambda: images_to_tensor([]), 'empty'),
        (lambda: images_to_tensor([Image.new('L', (8, 8))], channels=2), 'channels'),
        (lambda: TensorLoader(torch.zeros(3), torch.zeros(4)), 'equal lengths'),
        (lambda: TensorLoader(torch.zeros(3), batch_size=0), 'batch_size is 0'),
        (lambda: DataLoaders.from_dataset({'train': None}), 'train'),
        (lambda: DataLoaders.from_dataset(torch.zeros(60_000, 8, 8)), 'dict.*Tensor'),
        (lambda: held_out_split({'a': 0, 'b': 1}), "not \\['a', 'b'\\]"),
        (lambda: DataLoaders.from_dataset(DIGITS, target='hue'), "no column 'hue'"),
        *[
            (lambda v=v: DataLoaders.from_dataset(DIGITS, valid_size=v), f'valid_size is {v}.*1437')
            for v in (-0.1, 1, 1.0, 1.5, 200)
        ],
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match) as e:
        call()
    assert len(str(e.value)) < 300


@pytest.mark.parametrize('valid_size', [0.02, 0.1, 0.5])
def test_valid_is_cut_from_train_and_test_is_left_alone(valid_size):
    dd = DIGITS
    dls = DataLoaders.from_dataset(dd, valid_size=valid_size, device='cpu')
    x = images_to_tensor(dd['train']['image']).flatten(1)
    both = torch.cat([dls.train.tensors[0], dls.valid.tensors[0]]).flatten(1)
    assert sorted(both.tolist()) == sorted(x.tolist())
    assert torch.equal(dls.test.tensors[1], torch.tensor(dd['test']['label']))
    counts = dls.valid.tensors[1].bincount(minlength=10)
    assert (counts - valid_size * torch.tensor(dd['train']['label']).bincount()).abs().max() <= 1


def test_a_cut_too_small_for_all_classes_is_made_at_random():
    dls = DataLoaders.from_dataset(DIGITS, valid_size=0.004, device='cpu')
    assert len(dls.valid.tensors[0]) == 6


def test_orders_are_seeded_and_new_in_each_pass():
    def labels(loader):
        return torch.cat([y for _, y in loader]).tolist()

    def loader():
        return TensorLoader(torch.zeros(100, 1), torch.arange(100), batch_size=7, shuffle=True,
                            generator=torch.Generator().manual_seed(0))  # fmt: skip

    a, b = loader(), loader()
    first = labels(a)
    assert len(a) == 15 and first == labels(b) and first != labels(a)
    assert sorted(first) == list(range(100))
    still = TensorLoader(torch.arange(10), batch_size=4)
    assert [x.tolist() for (x,) in still] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_lists_of_texts_are_cut_as_tensors_are():
    loader = TensorLoader(torch.arange(4), list('abcd'), batch_size=3, shuffle=True)
    for x, texts in loader:
        assert texts == ['abcd'[i] for i in x] and len(texts) in (1, 3)


def test_random_generators_are_kept_and_put_back():
    dls = DataLoaders.from_dataset(DIGITS, generator=torch.Generator(), device='cpu')
    assert len(generators_of(dls)) == 1 and generators_of(None) == []

    def draw():
        import random

        y = next(iter(dls.train))[1]
        return [random.random(), np.random.rand(), torch.rand(1).item(), y.sum()]

    state = get_rng(dls)
    first = draw()
    set_rng(state, dls)
    with rng_kept(dls):
        assert draw() == first
    with pytest.raises(KeyError), rng_kept(dls):
        draw()
        raise KeyError
    assert draw() == first


def test_show_batch_draws_pictures_and_changes_nothing():
    import matplotlib.pyplot as plt

    dls = DataLoaders.from_dataset(DIGITS, generator=torch.Generator(), device='cpu')
    before = generators_of(dls)[0].get_state()
    dls.show_batch(4)
    assert torch.equal(before, generators_of(dls)[0].get_state())
    plt.close('all')


def test_test_pictures_without_labels_leave_the_labels_for_training():
    dd = {**DIGITS, 'test': DIGITS['test'].remove_columns('label')}
    dls = DataLoaders.from_dataset(dd, device='cpu')
    assert (dls.test.tensors[1] == -1).all() and dls.train.tensors[1].max() == 9


# files and labels as people have them


def classes(folder, name='{}.png', n=6):
    for i in range(n):
        save(folder / 'ab'[i % 2] / name.format(i), 10 * i)
    return folder


WANTED = {10 * i: 'ab'[i % 2] for i in range(6)}


def clutter(folder):
    for name in ('.DS_Store', 'a/.DS_Store', 'a/Thumbs.db', 'a/._0.png', 'readme.txt', 'x.json'):
        (folder / name).write_bytes(b'\0')
    save(folder / '.ipynb_checkpoints' / '0.png', 200)
    (folder / 'empty').mkdir()


ODD_FOLDERS = dict(
    plain=classes,
    upper_case=lambda f: classes(f, '{}.PNG'),
    jpeg=lambda f: classes(f, '{}.JPG'),
    not_ascii=lambda f: classes(f / 'ü 日本', 'ö {}.png'),
    clutter=lambda f: (classes(f), clutter(f)),
    a_loop=lambda f: (classes(f), (f / 'a' / 'loop').symlink_to(f)),
    to_nowhere=lambda f: (classes(f), (f / 'a' / 'z.png').symlink_to('/nowhere.png')),
    two_words=lambda f: classes(f / 'my pictures'),
)


@pytest.mark.parametrize('how', ODD_FOLDERS)
def test_folders_as_people_have_them(tmp_path, how):
    ODD_FOLDERS[how](tmp_path)
    inner = [p for p in tmp_path.iterdir() if p.name in ('ü 日本', 'my pictures')]
    assert label_of_each_picture(load_images((inner or [tmp_path])[0])) == WANTED


def test_same_names_in_two_classes(tmp_path):
    for i in range(6):
        save(tmp_path / 'ab'[i % 2] / f'{i // 2}.png', 10 * i)
    assert label_of_each_picture(load_images(tmp_path)) == WANTED


ROWS = 'file_name,label\n' + ''.join(f'{i}.png,{"ab"[i % 2]}\n' for i in range(6))
ODD_TABLES = dict(
    plain=ROWS,
    windows=ROWS.replace('\n', '\r\n'),
    byte_order_mark='\ufeff' + ROWS,
    empty_lines=ROWS.replace('\n', '\n\n'),
    spaces=ROWS.replace(',', ', '),
    a_space_behind=ROWS.replace('2.png,a', '2.png,a '),
    upper_case=ROWS.replace('label', 'Label'),
    another_name=ROWS.replace('label', 'class'),
)


@pytest.mark.parametrize('how', ODD_TABLES)
def test_tables_as_people_have_them(tmp_path, how):
    for i in range(6):
        save(tmp_path / f'{i}.png', 10 * i)
    (tmp_path / 'metadata.csv').write_bytes(ODD_TABLES[how].encode())
    assert label_of_each_picture(load_images(tmp_path)) == WANTED


@pytest.mark.parametrize(
    'labels', [[-1, 1], [0.12345678901, 0.12345678902], [2**60, 2**60 + 1]], ids=str
)
def test_labels_that_are_easily_mixed_up(tmp_path, labels):
    dd = load_images(folder_with_labels(tmp_path / 'x', labels * 3))
    assert dd['train'].features['label'].names == [str(v) for v in labels]
    assert label_of_each_picture(dd) == dict(enumerate([str(v) for v in labels] * 3))


CAPTIONS = ['a grey picture', 'a dark one, "so to say"', 'grün', 'a fourth, lighter'] * 2


@pytest.mark.parametrize('kind', ['jsonl', 'csv', 'caption', 'with labels', 'split'])
def test_captions_of_ones_own(tmp_path, kind):
    "The Hub's convention: a table beside the pictures that gives each file name its text."
    rows = [dict(file_name=f'{i}.png', text=text) for i, text in enumerate(CAPTIONS)]
    if kind == 'caption':
        rows = [dict(file_name=r['file_name'], caption=r['text'], width=8) for r in rows]
    if kind == 'with labels':
        rows = [dict(r, label=i % 2) for i, r in enumerate(rows)]
    parts = dict(train=rows[:6], test=rows[6:]) if kind == 'split' else {'': rows}
    for name, part in parts.items():
        for row in part:
            save(tmp_path / name / row['file_name'], 10 * int(row['file_name'][0]))
        text = '\n'.join(map(json.dumps, part))
        if kind == 'csv':
            quoted = ((r['file_name'], r['text'].replace('"', '""')) for r in part)
            text = 'file_name,text\n' + '\n'.join(f'{a},"{b}"' for a, b in quoted)
        end = 'csv' if kind == 'csv' else 'jsonl'
        (tmp_path / name / f'metadata.{end}').write_text(text)
    dd = load_images(tmp_path, test_size=0.25)
    assert {k: len(ds) for k, ds in dd.items()} == dict(train=6, test=2)
    seen = {np.asarray(r['image'])[0, 0] // 10: r['text'] for ds in dd.values() for r in ds}
    assert seen == dict(enumerate(CAPTIONS))
    labels = ['label'] if kind == 'with labels' else []
    assert sorted(dd['train'].column_names) == sorted(['image', 'text'] + labels)
    texts = next(iter(DataLoaders.from_dataset(dd, target='text').test))[1]
    assert set(texts) <= set(CAPTIONS)


def test_a_name_isnt_answered_by_another_folder_of_that_name(tmp_path, monkeypatch):
    name = f'photos-{uuid.uuid4()}'
    load_images(classes(tmp_path / 'somewhere' / name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('MINIAI_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match=name):
        load_images(name)


@pytest.mark.parametrize('value', [0, -3, 2.5, True, '8', float('nan'), (8, 8), 10**6], ids=str)
def test_sizes_and_batches_are_whole_numbers(value):
    ims = [Image.new('L', (8, 8))]
    with pytest.raises(ValueError, match='size is .*whole number'):
        images_to_tensor(ims, size=value)
    if value != 10**6:
        with pytest.raises(ValueError, match='batch_size is .*whole number'):
            TensorLoader(torch.zeros(3), batch_size=value)


@pytest.mark.parametrize('share', [0, 1, 2.5, -1, 3, float('nan')])
def test_shares_are_between_0_and_1(tiny_pictures, share):
    with pytest.raises(ValueError, match='a share between 0 and 1'):
        load_images(tiny_pictures, test_size=share)
    if share:
        with pytest.raises(ValueError, match=f'valid_size is {share}'):
            DataLoaders.from_dataset(DIGITS, valid_size=share)
