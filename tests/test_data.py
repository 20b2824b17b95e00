"""Bad luck with data: what is said when pictures can't be had."""
import os
import numpy as np
import pytest
import torch
from PIL import Image
from miniai.data import DataLoaders, TensorLoader, images_to_tensor, load_digits, load_images


def test_unknown_name():
    with pytest.raises(FileNotFoundError, match="no data set called 'mnits'"): load_images('mnits')


def test_no_network_names_both_remedies(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.delenv('MINIAI_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match='network.*MINIAI_DATA'): load_images('nobody-here/no-such-set')


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match='is empty'): load_images(tmp_path)


def test_a_folder_without_pictures(tmp_path):
    (tmp_path/'a.csv').write_text('x,y\n1,2\n')
    with pytest.raises(ValueError, match='no pictures|read as pictures'): load_images(tmp_path)


def test_a_folder_of_pictures_without_classes(tmp_path):
    for i in range(20): Image.fromarray(np.full((8, 8), i*10, np.uint8)).save(tmp_path/f'{i}.png')
    dls = DataLoaders.from_dataset(load_images(tmp_path), device='cpu')
    x, y = next(iter(dls.train))
    assert x.shape == (18, 1, 8, 8) and (y == -1).all() and len(dls.valid.tensors[0]) == 2


def test_folder_found_through_the_variable(tiny_pictures, monkeypatch):
    monkeypatch.setenv('MINIAI_DATA', str(tiny_pictures.parent))
    a, b = load_images('pics'), load_images('somebody/pics')
    assert len(a['train']) == len(b['train']) == 54 and a['test']['label'] == b['test']['label']


@pytest.mark.skipif(not os.path.isdir(os.path.join(os.environ.get('MINIAI_DATA', ''), 'mnist')), reason='no local copy of MNIST in MINIAI_DATA')
def test_mnist_from_a_local_copy():
    ds = load_images('ylecun/mnist')
    x = images_to_tensor(ds['test'].select(range(100))['image'])
    assert x.shape == (100, 1, 28, 28) and x.min() == -1 and x.max() == 1 and ds['train'].features['label'].num_classes == 10


def test_unequal_sizes_and_how_to_mend_them():
    ims = [Image.new('L', (8, 8)), Image.new('L', (9, 8))]
    with pytest.raises(ValueError, match='different sizes.*size='): images_to_tensor(ims)
    assert images_to_tensor(ims, size=8).shape == (2, 1, 8, 8)


@pytest.mark.parametrize('call,match', [(lambda: load_digits(4), '8 or more'), (lambda: images_to_tensor([]), 'empty'), (lambda: images_to_tensor([Image.new('L', (8, 8))], channels=2), 'channels'),
                                        (lambda: TensorLoader(torch.zeros(3), torch.zeros(4)), 'equal lengths'), (lambda: TensorLoader(torch.zeros(3), batch_size=0), 'at least 1'),
                                        (lambda: DataLoaders.from_dataset({'train': None}), 'train')])
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match): call()
