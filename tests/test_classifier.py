"Lessons 09: augmentation, test-time augmentation, and climbing by the pixels' slope."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from miniai.classifier import (
    AugmentCB,
    Classifier,
    RandomAffines,
    affine,
    predict_tta,
    random_affine,
    train_classifier,
    tta_views,
)
from miniai.data import DataLoaders, TensorLoader, import_torchvision, load_digits
from miniai.learner import Callback, Learner
from miniai.score import Critic, DissolveCB, backprop_slope, climb, dissolve, nudged_slope
from miniai.tensors import set_seed

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
        train_classifier(loaders(), n_classes=2, n_epochs=1)


def test_held_out_rows_are_never_changed(dls):
    before = [t.clone() for t in dls.train.tensors + dls.valid.tensors]
    set_seed(0)
    train_classifier(dls, n_epochs=1, cbs=[AugmentCB()], device='cpu')
    assert all(torch.equal(a, b) for a, b in zip(before, dls.train.tensors + dls.valid.tensors))


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


def test_each_picture_is_bent_by_itself_and_by_the_seed():
    same = torch.ones(6, 1, 8, 8)
    same[..., :4] = -1
    bend = random_affine()
    set_seed(0)
    a = torch.stack([bend(o) for o in same])
    set_seed(0)
    b = torch.stack([bend(o) for o in same])
    assert torch.equal(a, b) and all(not torch.equal(a[0], o) for o in a[1:])
    assert a.shape == same.shape and a.min() >= -1 and a.max() <= 1
    for transform in (None, bend):
        one, two = run(transform, 1), run(transform, 1)
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


def test_no_bending_is_no_change():
    x = torch.rand(1, 8, 8) * 2 - 1
    assert torch.allclose(random_affine(0, 0, 0, 0)(x), x, atol=1e-5)


# ---- several looks


@quick
@given(st.integers(1, 5), st.sampled_from([1, 3]), st.integers(8, 20))
def test_views_are_seven_of_the_same_shape_and_move_by_whole_pixels_exactly(n, c, side):
    x = torch.rand(n, c, side, side, generator=torch.Generator().manual_seed(side)) * 2 - 1
    views = tta_views(x, degrees=0.0, shift=1 / side)  # one whole pixel: no interpolation
    assert len(views) == 7 and all(torch.allclose(v, x, atol=1e-5) for v in views[:3])
    right, left, down, up = views[3:]
    assert torch.allclose(right[..., 1:], x[..., :-1], atol=1e-4) and torch.allclose(
        left[..., :-1], x[..., 1:], atol=1e-4
    )
    assert torch.allclose(down[..., 1:, :], x[..., :-1, :], atol=1e-4) and torch.allclose(
        up[..., :-1, :], x[..., 1:, :], atol=1e-4
    )
    assert torch.allclose(right[..., 0], torch.tensor(-1.0), atol=1e-4)


def test_predict_tta_is_the_mean_over_views_and_touches_nothing():
    torch.manual_seed(0)
    net, x = Classifier(), torch.rand(9, 1, 8, 8) * 2 - 1
    net.body[0].eval()
    modes, state, rng = (
        [m.training for m in net.modules()],
        {k: v.clone() for k, v in net.state_dict().items()},
        torch.get_rng_state(),
    )
    p = predict_tta(net, x, batch_size=4)
    assert [m.training for m in net.modules()] == modes and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    net.eval()
    with torch.no_grad():
        by_hand = sum(net(v).softmax(1) for v in tta_views(x)) / 7
    assert (
        torch.allclose(p, by_hand, atol=1e-6)
        and torch.allclose(p.sum(1), torch.ones(9))
        and not p.requires_grad
    )
    with torch.no_grad():
        assert torch.allclose(
            predict_tta(net, x, views=lambda v: [v]), net(x).softmax(1), atol=1e-6
        )


# ---- the magic function


@quick
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(0, 99))
def test_both_slopes_equal_the_closed_form(n, c, side, seed):
    g = torch.Generator().manual_seed(seed)
    x, w = (
        torch.randn(n, c, side, side, dtype=torch.float64, generator=g),
        torch.randn(c, side, side, dtype=torch.float64, generator=g),
    )
    f, exact = (lambda x: (x * w).sin().flatten(1).sum(1)), w * (x * w).cos()
    assert torch.allclose(backprop_slope(f, x), exact, atol=1e-12) and torch.allclose(
        nudged_slope(f, x), exact, atol=1e-6
    )


def test_slopes_agree_on_a_network_and_leave_it_alone():
    torch.manual_seed(0)
    net, x = Critic(3).double().eval(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    f = lambda x: net(x).log_softmax(1)[:, 1]
    before = x.clone()
    with torch.no_grad():
        assert torch.allclose(backprop_slope(f, x), nudged_slope(f, x), atol=1e-7)
    assert (
        torch.equal(x, before)
        and not x.requires_grad
        and all(p.grad is None for p in net.parameters())
    )


def test_climb_reaches_the_top_of_a_hill_by_steps_of_the_right_length():
    top = torch.full((2, 1, 4, 4), 0.7)
    path = climb(
        lambda x: -(x - top).square().flatten(1).sum(1), torch.zeros_like(top), steps=40, length=0.5
    )
    assert len(path) == 41 and torch.equal(path[0], torch.zeros_like(top))
    for i, (a, b) in enumerate(zip(path, path[1:])):
        assert torch.allclose(
            (b - a).flatten(1).norm(dim=1), torch.tensor(0.5 * (1 - i / 40)), atol=1e-5
        )
    assert (path[-1] - top).flatten(1).norm(dim=1).max() < 0.05
    assert torch.equal(climb(lambda x: x.flatten(1).sum(1) * 0, top)[-1], top)  # flat ground: stay


def test_climb_refuses_nan():
    with pytest.raises(ValueError, match='step 0'):
        climb(lambda x: (x * torch.nan).flatten(1).sum(1), torch.zeros(1, 1, 2, 2))


@quick
@given(st.integers(1, 5), st.integers(0, 99))
def test_dissolve_is_the_formula(n, seed):
    x, gen = torch.randn(n, 1, 3, 3), torch.Generator().manual_seed(seed)
    noisy, s = dissolve(x, generator=gen)
    gen = torch.Generator().manual_seed(seed)
    assert torch.equal(s, torch.rand(n, generator=gen)) and s.shape == (n,)
    v, noise = s.view(-1, 1, 1, 1), torch.randn(x.shape, generator=gen)
    assert torch.allclose(noisy, (1 - v**2).sqrt() * x + v * noise)
    assert torch.equal(dissolve(x, torch.zeros(n))[0], x)


@pytest.mark.parametrize(
    's', [torch.tensor([0.5]), torch.tensor([-0.1, 0.5]), torch.tensor([[0.5, 0.5]])]
)
def test_dissolve_refuses(s):
    with pytest.raises(ValueError, match='amount of noise'):
        dissolve(torch.zeros(2, 1, 3, 3), s)


def test_dissolve_callback_gives_the_target_it_was_asked_for():
    seen, asked = [], []

    class Keep(Callback):
        def before_predict(self, learn):
            seen.append(learn.batch)

    def target(x, y, noisy, s):
        asked.append((x, noisy))
        return noisy - x

    Learner(nn.Conv2d(1, 1, 1), loaders(), F.mse_loss, cbs=[DissolveCB(target), Keep()]).fit(1)
    assert len(seen) == len(asked) == 6
    for (inputs, wanted), (x, noisy) in zip(seen, asked):
        assert torch.equal(inputs, noisy) and torch.equal(wanted, noisy - x)


@pytest.mark.parametrize('size', [8, 9, 28])
def test_critic_sizes(size):
    assert Critic(4, 3, size)(torch.zeros(2, 3, size, size)).shape == (2, 4)
