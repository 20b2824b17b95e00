"""The judge of captioned pictures: what it measures, against what was drawn, and what it won't take."""

import os

import pytest
import torch
from torch.nn import functional as F

from miniai.captions import (
    CaptionJudge,
    between,
    firm,
    ink_map,
    measure_colours,
    name_colours,
    shaken,
    stroke_width,
    train_judge,
)
from miniai.data import ATTRIBUTES, COLOURS, captioned_digits, colour, slant_of


@pytest.fixture(scope='module')
def digits():
    return captioned_digits(n_train=1500, n_test=1500, seed=3)


def measured(ds):
    x, judge = ds.x[:], CaptionJudge().eval()
    return {
        k: (v == a).float().mean().item()
        for (k, v), a in zip(judge(x).items(), ds.attributes.T)
        if k != 'label'
    }


@pytest.mark.parametrize('split', ['test', 'unseen'])
def test_measurements_on_real_digits_and_the_shipped_borders(digits, split):
    goals = dict(ink=0.98, paper=0.99, thickness=0.95, slant=0.95)
    got = measured(digits[split])
    assert all(got[k] >= v for k, v in goals.items()), got


@pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get('MINIAI_DATA', ''), 'mnist')),
    reason='no local copy of MNIST in MINIAI_DATA',
)
def test_measurements_on_mnist():
    from miniai.data import load_images

    dd = load_images('ylecun/mnist')
    got = measured(
        captioned_digits(
            {'train': dd['train'].select(range(100)), 'test': dd['test'].select(range(1500))},
            n_train=100,
            n_test=1500,
        )['test']
    )
    assert (
        got['ink'] >= 0.98
        and got['paper'] >= 0.99
        and got['thickness'] >= 0.95
        and got['slant'] >= 0.95
    ), got


def test_the_borders_are_what_training_pictures_say(digits):
    ds, judge = digits['train'], CaptionJudge()
    m = firm(ink_map(ds.x[:]))
    assert torch.allclose(between(stroke_width(m), ds.attributes[:, 3]), judge.widths, atol=0.15)
    assert torch.allclose(between(slant_of(m), ds.attributes[:, 4]), judge.slants, atol=0.02)


@pytest.mark.parametrize('w,h', [(2, 20), (3, 24), (5, 10), (8, 8)])
def test_width_of_a_bar_is_twice_area_over_outline(w, h):
    m = torch.zeros(1, 32, 32)
    m[0, 4 : 4 + h, 6 : 6 + w] = 1
    exact = 2 * w * h / (2 * (w + h))
    assert abs(stroke_width(m).item() / exact - 1) < 0.03
    big = F.interpolate(m[None], scale_factor=2)[0]
    assert abs(stroke_width(big).item() / exact - 1) < 0.03  # in pixels of 32, whatever the size


def test_slant_of_a_sheared_bar():
    y, x = torch.meshgrid(torch.arange(64.0) - 31.5, torch.arange(64.0) - 31.5, indexing='ij')
    for s in (-0.5, -0.2, 0.0, 0.3):
        assert (
            abs(slant_of(((x + s * y).abs() < 4).float()[None]).item() - s) < 0.08 * abs(s) + 1e-4
        )


def test_every_pair_of_colours_is_named():
    m = torch.zeros(32, 32)
    m[8:24, 12:18] = 1
    for ink in COLOURS:
        for paper in COLOURS:
            if ink == paper:
                continue
            c, p = colour(ink)[:, None, None], colour(paper)[:, None, None]
            i, q = map(name_colours, measure_colours((p + m * (c - p))[None]))
            assert (list(COLOURS)[i], list(COLOURS)[q]) == (ink, paper)


def test_larger_pictures_are_judged_alike():
    small, large = (captioned_digits(n_train=1, n_test=150, size=s)['test'] for s in (32, 64))
    assert torch.equal(small.attributes, large.attributes)
    got = measured(large)
    assert got['thickness'] >= 0.95 and got['slant'] >= 0.95 and got['ink'] >= 0.98, got


def test_an_empty_tile_has_no_digit():
    seen = CaptionJudge().eval()(colour('red')[:, None, None].expand(2, 3, 32, 32))
    assert seen['paper'].tolist() == [2, 2] and all(
        (seen[k] == -1).all() for k in ('label', 'thickness', 'slant')
    )


def test_score_counts_what_is_asked(digits):
    judge, ds = CaptionJudge().eval(), digits['test']
    x, a = ds.x[:100], ds.attributes[:100].clone()
    a[:50, 1] = (a[:50, 1] + 1) % 8
    assert judge.score(x, dict(ink=a[:, 1]))['ink'] == 0.5
    a[:50, 1] = -1
    assert judge.score(x, dict(ink=a[:, 1])) == dict(ink=1.0, all=1.0)
    whole = judge.score(x, a)
    seen = judge(x)
    ok = torch.stack([(seen[k] == a[:, i]) | (a[:, i] == -1) for i, k in enumerate(ATTRIBUTES)])
    assert whole['all'] == pytest.approx(ok.all(0).float().mean().item()) and whole[
        'colours'
    ] == pytest.approx(ok[:3].all(0).float().mean().item())


def test_shaking_nothing_changes_nothing():
    m = torch.rand(5, 1, 32, 32) * 2 - 1
    assert torch.allclose(shaken(m, 0.0), m, atol=1e-5) and not torch.allclose(
        shaken(m), m, atol=0.1
    )


def test_a_short_training_beats_luck_by_far():
    judge = train_judge(n_pictures=1500)
    ds = captioned_digits(n_train=1, n_test=500)['test']
    assert judge.score(ds.x[:], ds.attributes)['label'] > 0.4


@pytest.mark.parametrize(
    'call,match',
    [
        (lambda j: j(torch.zeros(2, 1, 32, 32)), 'n, 3, h, w'),
        (lambda j: j(torch.zeros(2, 3, 4, 4)), '8x8'),
        (lambda j: j(torch.full((1, 3, 32, 32), torch.nan)), 'NaN'),
        (lambda j: j.score(torch.zeros(2, 3, 32, 32), torch.zeros(2, 4)), 'attributes'),
        (lambda j: j.score(torch.zeros(2, 3, 32, 32), dict(hue=torch.zeros(2))), 'hue'),
        (lambda j: j.score(torch.zeros(2, 3, 32, 32), dict(ink=torch.zeros(3))), '2 pictures'),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call(CaptionJudge().eval())


def test_a_judge_in_training_mode_says_so():
    with pytest.raises(RuntimeError, match='eval'):
        CaptionJudge()(torch.zeros(1, 3, 32, 32))
