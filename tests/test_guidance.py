"""Guidance against its formula and diffusers', in one call, with every scheduler; bad input.

Also: a world where the answer is known, guiding by a guide model, and the callback that keeps one.
"""

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler as TheirDDIM
from diffusers import DDPMScheduler as TheirDDPM
from diffusers import DPMSolverMultistepScheduler as TheirDPM
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from miniai.callbacks import EMACB
from miniai.diffusion import sample
from miniai.guidance import AutoGuidance, Guidance, GuideModelCB, rescale_guided
from miniai.learner import Callback, Learner
from miniai.samplers import DDIMScheduler, DPMSolverScheduler, EulerScheduler, HeunScheduler
from miniai.schedulers import DDPMScheduler
from miniai.unet import UNet


def awake(model):
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=gen)
    return model.eval()


@pytest.fixture(scope='module')
def net():
    return awake(UNet(widths=(16, 16), num_classes=4))


class Counted:
    "A model that notes how many pictures it's asked about, call by call."

    def __init__(self, model):
        self.model, self.num_classes, self.calls = model, model.num_classes, []

    def __call__(self, x, t, context):
        self.calls.append(len(x))
        return self.model(x, t, context)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the formula ---
@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    n=st.integers(1, 5),
    scale=st.sampled_from([-1.0, 0, 0.5, 1, 1.5, 2, 7.5, 15]),
    rescale=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
    negative=st.booleans(),
    single=st.booleans(),
    interval=st.sampled_from([None, (0, 999), (200, 700), (700, 1000), (500, 500)]),
)
def test_it_is_the_formula_picture_by_picture(
    net, n, scale, rescale, seed, negative, single, interval
):
    gen = generator(seed)
    x, t = torch.randn(n, 1, 4, 4, generator=gen), torch.randint(0, 1000, (n,), generator=gen)
    cond = torch.randint(0, 5, () if single else (n,), generator=gen)
    uncond = torch.randint(0, 4, () if single else (n,), generator=gen) if negative else None
    with torch.no_grad():
        got = Guidance(net, cond, uncond, scale, rescale, interval)(x, t)
        for i in range(n):
            c, u = (
                net(x[i : i + 1], t[i : i + 1], torch.as_tensor(o).expand(n)[i : i + 1])
                for o in (cond, 4 if uncond is None else uncond)
            )
            want = c if interval and not interval[0] <= t[i] <= interval[1] else u + scale * (c - u)
            if rescale and want is not c:
                want = want * (rescale * c.std() / want.std() + 1 - rescale)
            assert torch.allclose(got[i : i + 1], want, atol=1e-4)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 6), st.integers(2, 6)),
    amount=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_rescaling_is_that_of_diffusers(shape, amount, seed):
    a, b = (
        3 * torch.randn(2, *shape, generator=generator(seed)).unbind()[0],
        torch.randn(shape, generator=generator(seed + 1)),
    )
    assert torch.allclose(
        rescale_guided(a, b, amount), rescale_noise_cfg(a, b, amount), atol=1e-4, rtol=1e-4
    )
    if amount == 1:
        assert torch.allclose(
            rescale_guided(a, b, 1).flatten(1).std(1), b.flatten(1).std(1), atol=1e-4
        )


@pytest.mark.parametrize('scale', [1.5, 4.0, 7.5])
@pytest.mark.parametrize('rescale', [0.0, 0.7])
def test_it_is_the_guider_of_diffusers(net, scale, rescale):
    x, t, cond = (
        torch.randn(5, 1, 8, 8, generator=generator()),
        torch.tensor([5, 100, 400, 700, 999]),
        torch.arange(5),
    )
    theirs = ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=rescale)
    with torch.no_grad():
        assert torch.allclose(
            Guidance(net, cond, scale=scale, rescale=rescale)(x, t),
            theirs.forward(net(x, t, cond), net(x, t)).pred,
            atol=1e-4,
        )


def test_a_prediction_without_variance_is_no_reason_for_nan():
    assert torch.equal(
        rescale_guided(torch.zeros(2, 1, 4, 4), torch.randn(2, 1, 4, 4), 0.7),
        torch.zeros(2, 1, 4, 4),
    )
    fresh = Guidance(
        UNet(widths=(16,), num_classes=2), 1, scale=3, rescale=0.7
    )  # answers 0 to everything
    assert sample(fresh, DDPMScheduler(), (2, 1, 4, 4), 3, generator()).isfinite().all()


# --- calls ---
@pytest.mark.parametrize(
    'kw, rows',
    [
        (dict(scale=3), [6] * 10),
        (dict(scale=1), [3] * 10),
        (dict(scale=0), [3] * 10),
        (dict(scale=-1), [6] * 10),
        (dict(scale=3, rescale=0.5), [6] * 10),
        (dict(scale=3, interval=(300, 700)), [3] * 3 + [6] * 4 + [3] * 3),
        (dict(scale=0, interval=(300, 700)), [3] * 10),
        (dict(scale=0, rescale=0.5), [6] * 10),
    ],
)
def test_one_call_per_step(net, kw, rows):
    model = Counted(net)
    scheduler = DDPMScheduler(
        timestep_spacing='trailing'
    )  # 999, 899, ...: those from 699 to 399 lie within
    sample(Guidance(model, torch.tensor([0, 1, 2]), **kw), scheduler, (3, 1, 8, 8), 10, generator())
    assert model.calls == rows


# --- with every scheduler, and for every prediction ---
SCHEDULERS = [DDPMScheduler, DDIMScheduler, DPMSolverScheduler, EulerScheduler, HeunScheduler]


@pytest.mark.parametrize(
    'make',
    [*SCHEDULERS, TheirDDPM, TheirDDIM, TheirDPM],
    ids=lambda c: f"{c.__module__.split('.')[0]}-{c.__name__}",
)
def test_it_works_with_any_scheduler(net, make):
    classes = torch.tensor([0, 1, 2, 3])
    start = torch.randn(4, 1, 8, 8, generator=generator()) * _start(make)

    def draw(model):
        return sample(model, make(), start, 6, generator(1))

    plain = draw(lambda x, t: net(x, t, classes))
    same = draw(Guidance(net, classes, scale=1))
    assert same.isfinite().all() and torch.allclose(same, plain, atol=1e-4)
    assert not torch.allclose(draw(Guidance(net, classes, scale=4)), plain, atol=1e-3)


def _start(make):
    s = make()
    s.set_timesteps(6)
    return s.init_noise_sigma


@pytest.mark.parametrize('make', [DDPMScheduler, DDIMScheduler, DPMSolverScheduler])
@pytest.mark.parametrize(
    'kw', [dict(scale=3), dict(scale=3, uncond=0), dict(scale=5, interval=(200, 800))]
)
def test_the_same_pictures_whether_the_model_speaks_of_noise_v_or_the_picture(net, make, kw):
    acp = DDPMScheduler().alphas_cumprod

    def speaks(kind):
        def model(x, t, context):
            v, a = net(x, t, context), acp[t].view(-1, 1, 1, 1)
            return {
                'v_prediction': v,
                'epsilon': a.sqrt() * v + (1 - a).sqrt() * x,
                'sample': a.sqrt() * x - (1 - a).sqrt() * v,
            }[kind]

        model.num_classes = 4
        extra = {} if make is DPMSolverScheduler else dict(clip_sample=False)
        return sample(
            Guidance(model, torch.tensor([1, 2, 3]), **kw),
            make(prediction_type=kind, **extra),
            (3, 1, 8, 8),
            12,
            generator(),
        )

    v, eps, x0 = (speaks(k) for k in ('v_prediction', 'epsilon', 'sample'))
    size = v.abs().max()
    assert torch.allclose(v, eps, atol=2e-3 * size) and torch.allclose(v, x0, atol=2e-3 * size)


# --- a world in which the answer is known ---
def test_two_known_gaussians():
    """Two classes with means +-m and one standard deviation s.

    For a Gaussian, guidance between the two classes themselves (one as `uncond`) is exact:
    u + w(c - u) is the perfect guess for a Gaussian with mean u + w(c - u) and the same s."""
    m, s, scheduler = (
        0.5,
        0.4,
        DDIMScheduler(
            beta_schedule='squaredcos_cap_v2',
            prediction_type='sample',
            timestep_spacing='trailing',
            clip_sample=False,
        ),
    )

    def perfect(x, t, context):
        a, mean = (
            scheduler.alphas_cumprod[t].view(-1, 1, 1, 1),
            (2 * m * context.float() - m).view(-1, 1, 1, 1),
        )
        return mean + a.sqrt() * s**2 / (a * s**2 + 1 - a) * (x - a.sqrt() * mean)

    for w in (0, 1, 2, 4):
        end = sample(
            Guidance(perfect, 1, uncond=0, scale=w), scheduler, (4000, 1, 1, 1), 100, generator()
        )
        assert abs(end.mean() - (-m + 2 * m * w)) < 0.03 and abs(end.std() - s) < 0.03


# --- it's a model like any other ---
def test_contexts_of_vectors_and_for_all_pictures():
    "Token vectors `(n, tokens, dim)`, as for lessons to come: one for all, or one each."

    def model(x, t, context):
        return x * 0 + context.sum((1, 2)).view(-1, 1, 1, 1)

    x, t = torch.zeros(3, 1, 2, 2), torch.zeros(3)
    each, none = torch.arange(3.0).view(3, 1, 1).expand(3, 5, 2), torch.ones(1, 5, 2)
    got = Guidance(model, each, none, scale=3)(x, t)
    assert torch.equal(got[:, 0, 0, 0], 10 + 3 * (torch.tensor([0.0, 10, 20]) - 10))
    assert torch.equal(Guidance(model, none, 0 * none, scale=2)(x, t), torch.full_like(x, 20))
    with pytest.raises(ValueError, match='uncond is needed'):
        Guidance(model, each)
    with pytest.raises(ValueError, match='for 3 pictures, but there are 2'):
        Guidance(model, each, none)(x[:2], t[:2])


def test_it_copies_pickles_and_keeps_the_mode_of_its_model(net):
    x, t = torch.randn(2, 1, 8, 8, generator=generator()), torch.tensor([3, 600])
    g = Guidance(net, torch.tensor([1, 2]), scale=3, rescale=0.5, interval=(0, 800))
    with torch.no_grad():
        for other in (copy.deepcopy(g), pickle.loads(pickle.dumps(g))):
            assert torch.equal(other(x, t), g(x, t))
    assert not g.training and not net.training
    sample(g, DDPMScheduler(), (2, 1, 8, 8), 2, generator())
    assert not net.training
    busy = copy.deepcopy(net).train()
    sample(Guidance(busy, 1), DDPMScheduler(), (2, 1, 8, 8), 2, generator())
    assert busy.training and all(m.training for m in busy.modules())


def test_with_a_generator_each_the_batch_does_not_matter(net):
    def draw(idx):
        guided = Guidance(net, torch.tensor(idx) % 4, scale=2)
        gens = [generator(i) for i in idx]
        return sample(guided, DDPMScheduler(), (len(idx), 1, 8, 8), 6, gens)

    whole = draw(list(range(6)))
    assert torch.allclose(whole, torch.cat([draw([0, 1]), draw([2]), draw([3, 4, 5])]), atol=1e-3)


# --- guided by a worse model
@pytest.fixture(scope='module')
def two():
    return awake(UNet(widths=(16,))), awake(UNet(widths=(16,), n_blocks=2))


@pytest.mark.parametrize('scale', [-1.0, 0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize('interval', [None, (200, 600), (0, 50)])
def test_autoguidance_is_the_formula_picture_by_picture(two, scale, interval):
    x, t = torch.randn(5, 1, 8, 8, generator=generator()), torch.tensor([5, 200, 400, 600, 999])
    low, high = interval or (0, 999)
    with torch.no_grad():
        got = AutoGuidance(*two, scale, interval)(x, t)
        good, guide = (m(x, t) for m in two)
    for i, time in enumerate(t.tolist()):
        want = guide[i] + scale * (good[i] - guide[i]) if low <= time <= high else good[i]
        assert torch.allclose(got[i], want, atol=1e-4)


def test_autoguidance_asks_the_guide_only_where_it_guides_and_hands_the_context_on():
    calls = []

    def model(name, value):
        def answer(x, t, *context):
            calls.append((name, context))
            return x * 0 + value

        return answer

    x, good, guide = torch.zeros(2, 1, 4, 4), model('good', 2.0), model('guide', 1.0)
    guided = AutoGuidance(good, guide, 3.0, interval=(0, 499))
    assert torch.equal(guided(x, torch.tensor([700, 800]), 'c'), x + 2)
    assert torch.equal(guided(x, torch.tensor([700, 100])), torch.stack([x[0] + 2, x[0] + 4]))
    assert torch.equal(AutoGuidance(good, guide, 1.0)(x, torch.tensor([1, 2])), x + 2)
    assert [name for name, _ in calls] == ['good', 'good', 'guide', 'good']
    assert calls[0][1] == ('c',)


def test_autoguidance_copies_and_keeps_modes(two):
    g = AutoGuidance(*two, 2.0, interval=(0, 800))
    x, t = torch.randn(2, 1, 8, 8, generator=generator()), torch.tensor([3, 900])
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(g)))(x, t), g(x, t))
    assert not g.training and not any(m.training for m in g.modules())


def fitted(at, cbs=(), epochs=4):
    "A `GuideModelCB` after a fit of 10 steps an epoch, and the average's weight after each step."
    torch.manual_seed(0)
    ema, weights = EMACB(0.5), []
    keep = GuideModelCB(ema, at)

    class Watch(Callback):
        order = 100

        def after_step(self, learn):
            weights.append(ema.model.weight.item())

    x = torch.randn(40, 1, generator=generator())
    loader = [(b, 3 * b) for b in x.split(4)]
    dls = SimpleNamespace(train=loader, valid=None)
    learn = Learner(nn.Linear(1, 1), dls, lr=0.1, cbs=[ema, keep, Watch(), *cbs])
    learn.fit(epochs)
    return learn, keep, weights


@pytest.mark.parametrize('at', [0.1, 0.2, 0.55])
def test_the_guide_model_is_the_average_as_it_was_at_that_share_of_training(at):
    learn, keep, weights = fitted(at)
    assert len(weights) == 40 and not keep.model.training
    # `pct` is that of the steps before the present one
    assert keep.model.weight.item() == weights[round(at * 40)] != weights[-1]


def test_the_guide_model_survives_being_saved():
    learn, keep, _ = fitted(0.2)
    for model in (keep.model, None):
        keep.model = model
        other = GuideModelCB(EMACB(), 0.2)
        other.load_state_dict(learn, keep.state_dict(learn))
        assert (other.model is None) == (model is None)
        if model is not None:
            assert torch.equal(other.model.weight, model.weight)
            assert not other.model.weight.requires_grad


# --- what doesn't fit ---
@pytest.mark.parametrize(
    'cond, error, words',
    [
        (4.5, TypeError, 'whole numbers'),
        (torch.tensor([True]), TypeError, 'whole numbers'),
        (5, ValueError, 'from 0 to 3, or 4 for none'),
        (-1, ValueError, 'from 0 to 3'),
        ([0, 9], ValueError, r'\[0, 9\]'),
        ([[0], [1]], ValueError, r'shape \(2, 1\)'),
        ([], (TypeError, ValueError), 'cond must'),
    ],
)
def test_wishes_that_are_none(net, cond, error, words):
    with pytest.raises(error, match=words):
        Guidance(net, cond)
    with pytest.raises(error, match=words.replace('cond must', 'uncond must')):
        Guidance(net, 0, uncond=cond)


def test_models_that_take_no_wishes():
    with pytest.raises(ValueError, match='built without classes'):
        Guidance(UNet(widths=(16,)), 1)
    for model in (lambda x, t: x, nn.Identity()):
        with pytest.raises(ValueError, match='context.*arguments'):
            Guidance(model, 1)
    with pytest.raises(TypeError, match='model'):
        Guidance('unet', 1)


@pytest.mark.parametrize(
    'kw, words',
    [
        (dict(scale=math.nan), 'finite'),
        (dict(scale=math.inf), 'finite'),
        (dict(scale='2'), 'finite'),
        (dict(scale=None), 'finite'),
        (dict(rescale=math.nan), 'share from 0 to 1'),
        (dict(interval=(math.nan, 500)), 'interval'),
        (dict(rescale=1.5), 'share from 0 to 1'),
        (dict(rescale=-0.1), 'share from 0 to 1'),
        (dict(interval=(700, 200)), 'interval'),
    ],
)
def test_settings_that_cannot_be(net, kw, words):
    with pytest.raises(ValueError, match=words):
        Guidance(net, 1, **kw)


X0 = torch.zeros(8, 1, 8, 8)
AUTO = [
    (lambda a, b: AutoGuidance(a, None), TypeError, 'guide model.*NoneType'),
    (lambda a, b: AutoGuidance(a, b, math.inf), ValueError, 'finite'),
    (lambda a, b: AutoGuidance(a, b, interval=(500, 100)), ValueError, 'interval'),
    (lambda a, b: AutoGuidance(a, lambda x, t: x[..., :4])(X0, X0[0, 0, 0]), ValueError, 'answers'),
    (lambda a, b: GuideModelCB(None, at=1.5), ValueError, 'between 0 and 1'),
    (lambda a, b: GuideModelCB(None, at=0), ValueError, 'between 0 and 1'),
]


@pytest.mark.parametrize('make, error, words', AUTO)
def test_autoguidance_names_bad_input(two, make, error, words):
    with pytest.raises(error, match=words):
        make(*two)


@pytest.mark.parametrize('n', [1, 2, 5])
def test_wishes_for_another_number_of_pictures(net, n):
    g = Guidance(net, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=f'for 3 pictures, but there are {n}'):
        g(torch.zeros(n, 1, 8, 8), torch.zeros(n))
