"Lesson 13: convolutions equal PyTorch's, bad input is refused, and the block starts as its skip."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from miniai.conv import ResBlock, conv2d, conv_transpose2d, norm, unfold, zero_

few = settings(deadline=None, derandomize=True, max_examples=200)
sizes = st.integers(1, 4)


@few
@given(
    n=sizes,
    c_in=sizes,
    c_out=sizes,
    k=st.integers(1, 5),
    stride=sizes,
    padding=st.integers(0, 3),
    h=st.integers(1, 12),
    w=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_convolution_is_pytorchs(n, c_in, c_out, k, stride, padding, h, w, seed):
    g = torch.Generator().manual_seed(seed)
    shapes = (n, c_in, h, w), (c_out, c_in, k, k), (c_out,)
    x, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    if k > min(h, w) + 2 * padding:
        with pytest.raises(ValueError, match='fit'):
            conv2d(x, weight, bias, stride, padding)
        return
    # not laid out in order: strides must be honoured
    x = x.transpose(2, 3).contiguous().transpose(2, 3)
    theirs = F.conv2d(x, weight, bias, stride, padding)
    assert torch.allclose(conv2d(x, weight, bias, stride, padding), theirs, atol=1e-9)
    assert torch.equal(
        unfold(x, k, stride, padding), F.unfold(x, k, stride=stride, padding=padding)
    )


@few
@given(
    n=sizes,
    c_in=sizes,
    c_out=sizes,
    k=st.integers(1, 5),
    stride=sizes,
    padding=st.integers(0, 2),
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_transposed_convolution_is_pytorchs(n, c_in, c_out, k, stride, padding, h, w, seed):
    if min(h - 1, w - 1) * stride + k - 2 * padding < 1:
        return
    g = torch.Generator().manual_seed(seed)
    shapes = (n, c_in, h, w), (c_in, c_out, k, k)
    y, weight = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    up = conv_transpose2d(y, weight, stride, padding)
    theirs = F.conv_transpose2d(y, weight, stride=stride, padding=padding)
    assert torch.allclose(up, theirs, atol=1e-9)
    # its definition: <A x, y> = <x, A^T y>
    x = torch.randn(up.shape, generator=g, dtype=torch.float64)
    down = conv2d(x, weight, None, stride, padding)
    assert torch.allclose((down * y).sum(), (x * up).sum(), atol=1e-8)


@pytest.mark.parametrize(
    'f,shape,weight,words',
    [
        (conv2d, (1, 2, 8, 8), (4, 3, 3, 3), '3 channels'),
        (conv2d, (3, 8, 8), (4, 3, 3, 3), '3 channels'),
        (conv_transpose2d, (1, 2, 8, 8), (3, 4, 3, 3), '3 channels'),
        (conv2d, (1, 3, 2, 8), (4, 3, 3, 3), 'fit'),
    ],
)
def test_refused(f, shape, weight, words):
    with pytest.raises(ValueError, match=words):
        f(torch.zeros(shape), torch.zeros(weight))
    for kernel, stride in ((0, 1), (2, 0)):
        with pytest.raises(ValueError, match='fit|stride is 0'):
            unfold(torch.zeros(1, 1, 4, 4), kernel, stride)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    sizes, sizes, st.sampled_from([None, 3]), st.integers(1, 7), st.integers(2, 7), st.booleans()
)
def test_resblock_starts_as_its_way_around_and_learns(c_in, c_out, c_emb, h, w, same):
    c_out = c_in if same else c_out
    block = ResBlock(c_in, None if same else c_out, c_emb)
    x, emb = torch.randn(2, c_in, h, w), torch.randn(2, c_emb or 1)
    y = block(x, emb) if c_emb else block(x)
    assert y.shape == (2, c_out, h, w) and torch.equal(y, block.skip(x))
    y.square().sum().backward()
    assert block.conv2.weight.grad.abs().sum() > 0
    assert block.conv1.weight.grad.abs().sum() == 0  # behind the zeros: it comes in one step later


def test_embedding_scales_and_shifts_each_picture_by_its_own():
    torch.manual_seed(0)
    block = ResBlock(4, 4, c_emb=3)
    torch.nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(1, 4, 5, 5).expand(2, -1, -1, -1), torch.randn(2, 3)
    y = block(x, emb)
    assert not torch.allclose(y[0], y[1], atol=1e-3)
    assert torch.allclose(y[1:], block(x[1:], emb[1:]), atol=1e-5)


def test_names_that_shipped_weights_use():
    names = {k.split('.')[0] for k in ResBlock(3, 4, 5).state_dict()}
    assert names == {'norm1', 'conv1', 'emb', 'norm2', 'conv2', 'skip'}


@pytest.mark.parametrize('width,groups', [(1, 1), (6, 2), (8, 8), (12, 4), (48, 8)])
def test_norm_has_groups_that_divide(width, groups):
    assert norm(width).num_groups == groups
    assert zero_(norm(width)).weight.abs().sum() == 0


@pytest.mark.parametrize('f', [conv2d, conv_transpose2d])
@pytest.mark.parametrize('kernel', [(3, 5), (5, 3), (1, 2)])
def test_kernels_that_arent_square_are_refused(f, kernel):
    with pytest.raises(ValueError, match='square'):
        f(torch.zeros(1, 2, 8, 8), torch.zeros(2, 2, *kernel))


def test_nothing_is_broadcast_or_cut_off():
    x, weight = torch.zeros(1, 2, 8, 8), torch.zeros(2, 2, 3, 3)
    with pytest.raises(RuntimeError):
        conv2d(x, weight, torch.ones(1))
    with pytest.raises(ValueError, match='fit|padding is -1'):
        conv2d(x, weight, padding=-1)
