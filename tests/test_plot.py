"Pictures from numbers and from PIL pictures of every mode; labels that fit or are refused."

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from miniai.plot import animate, image_grid, show_images, to_pil

GREY = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


def pil(a, mode=None):
    im = Image.fromarray(np.asarray(a))
    return im if mode is None else im.convert(mode)


def palette(colours, transparency=None):
    "A picture of mode P whose pixels are the first of `colours`, then the second, ..."
    im = Image.frombytes('P', (len(colours), 1), bytes(range(len(colours))))
    im.putpalette([v for c in colours for v in c])
    if transparency is not None:
        im.info['transparency'] = transparency
    return im


@pytest.mark.parametrize('im', [
    pil(GREY), pil(GREY.astype(np.uint16) * 257), pil(GREY.astype('>u2') * 257),
    pil(GREY.astype(np.int32)), pil(GREY.astype(np.int32) * 257),
    pil(GREY.astype(np.float32) / 255), pil(GREY.astype(np.float32)),
    pil(GREY.astype(np.float32) * 257), pil(GREY, 'LA'), pil(GREY, 'P'),
], ids=lambda im: im.mode)
def test_grey_pictures_of_every_mode_stay_grey_and_equal(im):
    out = to_pil(im)
    assert out.mode == 'L' and np.array_equal(out, GREY)


@pytest.mark.parametrize('im, mode, pixels', [
    (pil(np.eye(2, dtype=bool)), 'L', [[255, 0], [0, 255]]),
    (pil(np.full((1, 2, 3), 60, np.uint8), 'CMYK'), 'RGB', [[[60] * 3] * 2]),
    (pil(np.full((1, 2, 3), 60, np.uint8), 'HSV'), 'RGB', [[[60] * 3] * 2]),
    (palette([(9, 9, 9), (70, 70, 70)]), 'L', [[9, 70]]),
    (palette([(9, 9, 9), (70, 70, 70)], transparency=0), 'L', [[255, 70]]),
    (palette([(9, 9, 9), (200, 0, 0)]), 'RGB', [[[9, 9, 9], [200, 0, 0]]]),
    (palette([(0, 255, 0), (200, 0, 0)], transparency=0), 'RGB', [[[255] * 3, [200, 0, 0]]]),
    (pil(np.uint8([[[7, 0], [7, 255], [0, 51]]])), 'L', [[255, 7, 204]]),
    (pil(np.uint8([[[1, 2, 3, 0], [1, 2, 3, 255]]])), 'RGB', [[[255] * 3, [1, 2, 3]]]),
    (pil(np.float32([[-0.02, 0.5, 1.04]])), 'L', [[0, 128, 255]]),    # as resizing may leave it
])
def test_pixels(im, mode, pixels):
    out = to_pil(im)
    assert out.mode == mode and np.array_equal(out, pixels)


def test_transparency_shows_the_background():
    im = pil(np.uint8([[[7, 0], [7, 255]]]))
    assert np.array_equal(to_pil(im, background='black'), [[0, 7]])
    assert np.array_equal(to_pil(im, background=(1, 2, 3)), [[[1, 2, 3], [7, 7, 7]]])
    keyed = pil(np.uint8([[7, 8]]))
    keyed.info['transparency'] = 7                          # a grey value declared transparent
    assert np.array_equal(to_pil(keyed), [[255, 8]])


@pytest.mark.parametrize('x, pixels', [
    (np.uint16([[0, 257, 65535]]), [[0, 1, 255]]),
    (np.array([[True, False]]), [[255, 0]]),
    (torch.tensor([[0, 7, 255]]), [[0, 7, 255]]),
    (torch.tensor([[-1.5, 0.0, 1.5]], dtype=torch.bfloat16), [[0, 128, 255]]),
    (torch.zeros(1, 1, 2, requires_grad=True), [[128, 128]]),
    (np.zeros((2, 2, 3), np.uint8), [[[0] * 3] * 2] * 2),
    (np.zeros((2, 2, 1), np.uint8), [[0, 0]] * 2),
])
def test_arrays(x, pixels):
    assert np.array_equal(to_pil(x), pixels)


@pytest.mark.parametrize('x, message', [
    (torch.zeros(2, 8, 8), r'shape \(2, 8, 8\)'),
    (torch.zeros(5), r'shape \(5,\)'),
    (torch.zeros(4, 1, 8, 8), 'show_images'),
    (torch.zeros(0, 8), 'shape'),
    (torch.full((2, 2), torch.nan), 'NaN'),
    (torch.tensor([[0, 256]]), '0 to 256'),
    (np.array([[-1, 3]]), '-1 to 3'),
    (pil(np.float32([[np.nan]])), 'nan'),
    (pil(np.float32([[-1, 1]])), '-1 to 1'),
    (pil(np.int32([[-5, 1]])), '-5 to 1'),
    (pil(np.int32([[0, 70000]])), '70000'),
])
def test_refused_pictures(x, message):
    with pytest.raises(ValueError, match=message):
        to_pil(x)


def drawn(*args, **kwargs):
    "The texts of a figure, and whether each lies inside it and none touches another."
    show_images(*args, **kwargs)
    fig = plt.gcf()
    draw = fig.canvas.get_renderer()
    texts = [t for t in fig.axes[0].texts + fig.texts if t.get_text()]
    boxes = [t.get_window_extent(draw) for t in texts]
    inside = all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= fig.bbox.width and b.y1 <= fig.bbox.height
                 for b in boxes)
    apart = not any(b.overlaps(c) for i, b in enumerate(boxes) for c in boxes[:i])
    plt.close(fig)
    return [t.get_text() for t in texts], inside and apart


@pytest.mark.parametrize('labels', [
    dict(row_labels=['before', 'after\ntraining']),
    dict(col_labels=['0', 'a long label', '$x_t$', '']),
    dict(row_labels=['a', 'b'], col_labels=range(4)),
    dict(titles=np.arange(7)),
    dict(titles=[f'{i}, read {i}\nsure' for i in range(7)], row_labels=['one row', 'another'],
         suptitle='everything at once, in a line that is longer than the sheet of pictures'),
])
@pytest.mark.parametrize('size', [20, 64])
def test_labels_stand_inside_and_apart(labels, size):
    xs = torch.zeros(7, 1, 8, 8)
    texts, fits = drawn(xs, size=size, **labels)
    wanted = [str(t) for k in ('titles', 'col_labels', 'row_labels') for t in labels.get(k, ())]
    wanted += [labels[k] for k in ('suptitle',) if k in labels]
    assert fits and texts == [t for t in wanted if t]


@pytest.mark.parametrize('labels, message', [
    (dict(titles='ab'), '2 titles for 7 pictures'),
    (dict(row_labels='abc', ncols=4), '3 row_labels for 2 rows'),
    (dict(col_labels='abc', ncols=4), '3 col_labels for 4 columns'),
    (dict(row_labels='abc', col_labels='abcd'), '3 row_labels for 2 rows'),
])
def test_refused_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        show_images(torch.zeros(7, 1, 8, 8), **labels)


@pytest.mark.parametrize('f', [show_images, image_grid, animate])
def test_nothing_to_show(f):
    with pytest.raises(ValueError, match='empty'):
        f([])


def test_sheets():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sheet = image_grid([torch.zeros(1, 8, 8), torch.zeros(3, 4, 8)], ncols=5)
    assert sheet.size == (2 * 70 + 6, 76) and sheet.getpixel((2, 2)) == (255, 255, 255)
    assert sheet.getpixel((100, 20)) == (255, 255, 255) and sheet.getpixel((100, 60)) == (128,) * 3
