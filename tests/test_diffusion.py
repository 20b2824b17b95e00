"Training and sampling, and the U-Net's classes and patches: what is promised, what is refused."

import copy
import json
import pickle
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler as TheirDDIM
from diffusers import DDPMScheduler as TheirDDPM
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from miniai.data import DataLoaders, TensorLoader
from miniai.diffusion import (
    DiffusionCB,
    diffusion_learner,
    sample,
    sample_batches,
    stratified_times,
)
from miniai.learner import Callback
from miniai.momentum import MomentumScheduler
from miniai.samplers import (
    DDIMScheduler,
    DPMSolverScheduler,
    EulerAncestralScheduler,
    EulerScheduler,
    HeunScheduler,
)
from miniai.schedulers import DDPMScheduler, randn
from miniai.tensors import set_seed
from miniai.unet import SelfAttention, UNet


def awake(model, seed=0):
    "`model` with every weight changed a little: a fresh one answers 0 to everything."
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05*torch.randn(p.shape, generator=gen)
    return model.eval()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def generators(seeds):
    return [torch.Generator().manual_seed(int(s)) for s in seeds]


@pytest.fixture(scope='module')
def model():
    return awake(UNet(widths=(16, 16)))


SCHEDULERS = [
    lambda: DDPMScheduler(),
    lambda: DDPMScheduler(
        variance_type='fixed_large', prediction_type='v_prediction', timestep_spacing='trailing'
    ),
    lambda: TheirDDPM(),
    lambda: TheirDDIM(),
    lambda: TheirDDPM(variance_type='fixed_large'),
]


# --- generators ---
@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    double=st.booleans(),
)
def test_randn_with_one_generator_each_is_their_draws_side_by_side(shape, seed, double):
    dtype = torch.float64 if double else torch.float32
    seeds = range(seed, seed + shape[0])
    got = randn(tuple(shape), generators(seeds), 'cpu', dtype)
    assert got.dtype == dtype and got.shape == tuple(shape)
    for x, g in zip(got, generators(seeds)):
        assert torch.equal(x, torch.randn(1, *shape[1:], generator=g, dtype=dtype)[0])
    one = torch.Generator().manual_seed(seed)
    assert torch.equal(
        randn(tuple(shape), one), torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    )


@pytest.mark.parametrize('make', SCHEDULERS)
def test_the_same_seed_draws_the_same_pictures_whatever_the_global_generators(model, make):
    def draw(seed): return sample(model, make(), (3, 1, 8, 8), 8, seeded(seed))
    torch.manual_seed(1)
    a = draw(5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    b = draw(5)
    assert torch.equal(a, b) and not torch.allclose(a, draw(6), atol=0.1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('make', SCHEDULERS)
@pytest.mark.parametrize('batch', [1, 2, 5, 7])
def test_with_a_generator_each_the_batch_size_does_not_change_a_picture(model, make, batch):
    n = 7
    whole = sample(model, make(), (n, 1, 8, 8), 8, generators(range(n)))
    parts = torch.cat(
        [
            sample(model, make(), (len(s), 1, 8, 8), 8, generators(s))
            for s in torch.arange(n).split(batch)
        ]
    )
    # other batch sizes round otherwise, and clipped guesses of a random network magnify that;
    # with another seed they would differ by about 1
    assert torch.allclose(whole, parts, atol=2e-3)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    assert torch.allclose(
        sample(model, make(), (n, 1, 8, 8), 8, generators(order.tolist())), whole[order], atol=2e-3
    )


def test_with_a_single_generator_it_does(model):
    "What the list is for: one stream of noise is dealt out to all pictures, step after step."
    a = sample(model, DDPMScheduler(), (4, 1, 8, 8), 8, torch.Generator().manual_seed(0))
    b = sample(model, DDPMScheduler(), (2, 1, 8, 8), 8, torch.Generator().manual_seed(0))
    assert not torch.allclose(a[:2], b, atol=1e-2)


def test_a_list_of_generators_gives_what_diffusers_gives(model):
    kw = dict(
        beta_schedule='squaredcos_cap_v2',
        prediction_type='v_prediction',
        timestep_spacing='trailing',
    )
    a, b = (
        sample(model, make(**kw), (3, 1, 8, 8), 20, generators(range(3)))
        for make in (DDPMScheduler, TheirDDPM)
    )
    assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    'generator, error, words',
    [
        (generators(range(2)), ValueError, '2 generators for 3 pictures'),
        ([], ValueError, '0 generators for 3 pictures'),
        (42, TypeError, 'manual_seed'),
        ([1, 2, 3], TypeError, 'manual_seed'),
    ],
)
@pytest.mark.parametrize('start', [(3, 1, 8, 8), torch.zeros(3, 1, 8, 8)], ids=['shape', 'tensor'])
def test_generators_that_do_not_fit_are_refused_at_once(generator, error, words, start):
    def never(x, t):
        raise AssertionError('the model was called')

    with pytest.raises(error, match=words):
        sample(never, DDPMScheduler(), start, 5, generator)


@pytest.mark.parametrize('shape', [(0, 1, 8, 8), (2, 1, -8, 8), (2, 1, 8.0, 8), ()])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(ValueError, match='positive whole numbers'):
        sample(lambda x, t: x, DDPMScheduler(), shape, 5)


def test_a_model_that_answers_in_another_shape_is_refused():
    with pytest.raises(ValueError, match='shaped like the sample'):
        sample(lambda x, t: x[:, :, :4], DDPMScheduler(), (2, 1, 8, 8), 5)


def test_pictures_of_the_wrong_size_are_refused(model):
    for shape, words in (((2, 3, 8, 8), 'in_channels'), ((2, 1, 7, 8), 'multiples of 2')):
        with pytest.raises(ValueError, match=words):
            sample(model, DDPMScheduler(), shape, 5)


def test_sampling_leaves_each_module_in_its_mode():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Dropout(0.9).train(), nn.Dropout(0.9).eval()

        def forward(self, x, t):
            assert not any(m.training for m in self.modules())
            return self.b(self.a(x))

    m = Two()
    sample(m, DDPMScheduler(), (1, 1, 8, 8), 3)
    assert m.training and m.a.training and not m.b.training
    with pytest.raises(ValueError):
        sample(m, DDPMScheduler(), (1, 1, 8, 8), 3, callback=lambda *a: int('x'))
    assert m.training and m.a.training and not m.b.training


# --- precision ---
ALL = [
    DDPMScheduler, DDIMScheduler, EulerScheduler, EulerAncestralScheduler, HeunScheduler,
    DPMSolverScheduler, MomentumScheduler, TheirDDPM, TheirDDIM, diffusers.EulerDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('make', ALL, ids=lambda c: f"{c.__module__.split('.')[0]}-{c.__name__}")
def test_a_model_of_any_precision_draws_what_it_draws_in_single(model, make, dtype):
    "It's asked in its own precision; pictures and steps are in single precision or finer."
    start = torch.randn(2, 1, 8, 8, generator=seeded(0))
    kw = dict(prediction_type='v_prediction')
    other, asked = copy.deepcopy(model).to(dtype), set()
    other.register_forward_pre_hook(lambda m, args: asked.add(args[0].dtype))
    scale = make(**kw).init_noise_sigma
    want = sample(model, make(**kw), start*float(scale), 30, seeded(1))
    got = sample(other, make(**kw), start*float(scale), 30, seeded(1))
    assert asked == {dtype} and got.dtype == torch.promote_types(dtype, torch.float32)
    noisy = 'DDPM' in make.__name__ or 'Ancestral' in make.__name__
    if dtype != torch.float64 or not noisy:         # (doubles are drawn from other random bits)
        # what a half rounds off in each answer, added up
        assert (got - want).abs().mean() < 60*torch.finfo(dtype).eps + 1e-3
    free = sample(other, make(**kw), (2, 1, 8, 8), 5, seeded(1))
    assert free.dtype == got.dtype and free.isfinite().all()


def test_a_thousand_small_steps_are_not_lost_in_half_precision():
    "A picture kept in a half would stay where it is, when steps are smaller than its rounding."
    s = DDPMScheduler(beta_schedule='squaredcos_cap_v2', prediction_type='sample')
    kind = nn.Linear(1, 1).to(torch.bfloat16)       # for its weights' precision
    answer = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    kind.forward = lambda x, t: answer.to(x.dtype).expand_as(x)
    end = sample(kind, s, (4, 1, 8, 8), 1000, seeded(0))
    assert end.dtype == torch.float32 and (end - answer).abs().max() < 0.01


def test_a_function_is_asked_in_the_precision_of_the_start():
    asked = []

    def net(x, t):
        asked.append(x.dtype)
        return x

    for dtype in (torch.float16, torch.float32, torch.float64):
        end = sample(net, DDPMScheduler(), torch.zeros(1, 1, 4, 4, dtype=dtype), 2, seeded(0))
        assert asked[-1] == dtype and end.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize('start', [
    torch.zeros(1, 1, 8, 8, dtype=torch.long), torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
    torch.full((1, 1, 8, 8), torch.nan), torch.full((1, 1, 8, 8), torch.inf),
])
def test_a_start_that_is_no_picture_is_refused(start):
    with pytest.raises(ValueError, match='must be finite floats'):
        sample(lambda x, t: x, DDPMScheduler(), start, 2)


# --- many pictures ---
@pytest.mark.parametrize('n, size, sizes', [
    (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3]), (1, 1, [1]),
])
def test_many_are_drawn_in_batches(model, capsys, n, size, sizes):
    gens = generators(range(n))
    batches = list(sample_batches(model, DDPMScheduler(), (n, 1, 8, 8), 3, gens, batch_size=size))
    assert [len(x) for x in batches] == sizes
    whole = sample(model, DDPMScheduler(), (n, 1, 8, 8), 3, generators(range(n)))
    assert torch.allclose(torch.cat(batches), whole, atol=2e-3)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (len(sizes) if len(sizes) > 1 else 0)
    assert len(sizes) == 1 or said[-1] == f'{n} of {n} drawn'


def test_one_generator_for_all_batches_draws_no_picture_twice(model):
    draw = sample_batches(model, DDPMScheduler(), (6, 1, 8, 8), 3, seeded(0), batch_size=3)
    a, b = draw
    assert (a - b).abs().mean() > 0.05


def test_a_model_for_each_batch(model):
    def model_for(rows):
        return lambda x, t: model(x, t) + torch.arange(6.)[rows].view(-1, 1, 1, 1)

    gens = [seeded(i) for i in range(6)]
    drawn = sample_batches(model, DDPMScheduler(), (6, 1, 8, 8), 2, gens, None, 4, model_for)
    gens = [seeded(i) for i in range(6)]
    whole = sample(model_for(slice(6)), DDPMScheduler(), (6, 1, 8, 8), 2, gens)
    assert torch.allclose(torch.cat([*drawn]), whole, atol=2e-3)


@pytest.mark.parametrize('shape, most', [
    ((10**9, 1, 8, 8), 4096), ((10**9, 3, 64, 64), 64), ((10**9, 1, 600, 600), 1),
])
def test_a_batch_is_bounded_however_many_there_are(shape, most):
    seen = []

    def net(x, t):
        seen.append(len(x))
        return x

    first = next(sample_batches(net, DDPMScheduler(), shape, 1))
    assert seen == [most] == [len(first)]


# --- what a model is trained on ---
@pytest.mark.parametrize('make', [c for c in ALL if c.__module__.startswith('miniai')])
@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
def test_every_scheduler_trains_on_pictures_of_variance_one(make, kind):
    """Against the closed form; and what a sampler asks the model at, it was trained on.

    Samplers that count in sigma add noise without scaling: a model saw numbers up to 157."""
    scheduler, dls = make(prediction_type=kind, beta_start=1e-4, beta_end=0.02), toys()
    scheduler.set_timesteps(7)                      # as after drawing in the middle of a training
    cb, x0 = DiffusionCB(scheduler), dls.train.tensors[0]
    learn = SimpleNamespace(batch=(x0, None), i=0, training=True, model=None)
    torch.manual_seed(0)
    cb.before_batch(learn)
    (x_t, t), target = learn.batch
    a = TheirDDPM().alphas_cumprod[t].view(-1, 1, 1, 1)
    noise = target if kind == 'epsilon' else (1 - a).sqrt()*x_t + a.sqrt()*target
    assert torch.allclose(x_t, a.sqrt()*x0 + (1 - a).sqrt()*noise, atol=1e-4)
    assert 0.5 < x_t[t > 900].var() < 2
    at = scheduler.timesteps[scheduler.order:][:1]
    if at == at.round():
        start = scheduler.add_noise(x0[:1], noise[:1], at)
        seen = scheduler.scale_model_input(start, at[0])
        assert torch.allclose(seen, scheduler.noisy(x0[:1], noise[:1], at.long()), atol=1e-3)


def test_stratified_times_are_uniform_each_and_even_together():
    set_seed(0)
    t = torch.stack([stratified_times(64, 1000) for _ in range(2000)]).float()
    assert t.min() == 0 and t.max() == 999
    assert (t.sort(1)[0]//(1000/64)).std(0).max() < 0.3         # one in each strip
    assert (t.mean(0) - 499.5).abs().max() < 40                 # and each picture's is anywhere


# --- the U-Net's classes and patches ---
def test_without_classes_nothing_has_changed():
    "Weights drawn in the same order, no new names in the state: what was saved before still loads."
    set_seed(0)
    a = UNet(1, (16, 32))
    set_seed(0)
    b = UNet(1, (16, 32), num_classes=7)
    extra = set(b.state_dict()) - set(a.state_dict())
    assert extra == {'classes.weight'} and b.classes.weight.shape == (8, 64)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert sum(p.numel() for p in a.parameters()) == 109_905


def test_attention_equals_pytorchs():
    att, h = awake(SelfAttention(32)), torch.randn(2, 32, 4, 4, generator=seeded(0))
    theirs = nn.MultiheadAttention(32, 2, batch_first=True).requires_grad_(False)
    for a, b in ((theirs.in_proj_weight, att.qkv.weight), (theirs.in_proj_bias, att.qkv.bias),
                 (theirs.out_proj.weight, att.out.weight), (theirs.out_proj.bias, att.out.bias)):
        a.copy_(b)
    y = att.norm(h).flatten(2).transpose(1, 2)
    assert torch.allclose(att(h), h + theirs(y, y, y)[0].transpose(1, 2).view_as(h), atol=1e-4)


def test_saved_with_classes_and_patches_and_loaded_again(tmp_path):
    a = awake(UNet(2, (16, 16), num_classes=3, patch_size=2, sample_size=[8, 8]))
    a.save_pretrained(tmp_path)
    b = UNet.from_pretrained(tmp_path)
    x, t, y = torch.randn(4, 2, 8, 8), torch.arange(4) * 100, torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        want = a(x, t, y)
        for m in (b, copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
            assert torch.equal(m(x, t, y), want)
    assert (b.num_classes, b.patch_size, b.sample_size) == (3, 2, [8, 8])


def test_a_model_saved_before_there_were_classes_still_loads(tmp_path):
    a = awake(UNet(1, (16, 16), sample_size=[8, 8]))
    a.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(
        json.dumps({k: v for k, v in config.items() if k not in ('num_classes', 'patch_size')})
    )
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        assert torch.equal(UNet.from_pretrained(tmp_path)(x, t), a(x, t))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    levels=st.integers(1, 3),
    patch=st.integers(1, 3),
    h=st.integers(1, 24),
    w=st.integers(1, 24),
    channels=st.integers(1, 3),
)
def test_sizes_that_fit_come_back_and_others_are_refused(levels, patch, h, w, channels):
    m, factor = (
        UNet(channels, [16] * levels, emb_dim=8, patch_size=patch),
        patch * 2 ** (levels - 1),
    )
    x = torch.zeros(1, channels, h, w)
    if h % factor or w % factor:
        with pytest.raises(ValueError, match=f'multiples of {factor}'):
            m(x, torch.zeros(1))
    else:
        assert m(x, torch.zeros(1)).shape == x.shape


def test_each_picture_has_its_own_class():
    m, gen = awake(UNet(widths=(16,), num_classes=5)), torch.Generator().manual_seed(0)
    x, t, y = (
        torch.randn(12, 1, 8, 8, generator=gen),
        torch.randint(0, 1000, (12,), generator=gen),
        torch.randint(0, 6, (12,), generator=gen),
    )
    with torch.no_grad():
        together = m(x, t, y)
        for i in range(12):
            context = None if y[i] == 5 else y[i : i + 1]
            assert torch.allclose(
                together[i : i + 1], m(x[i : i + 1], t[i : i + 1], context), atol=1e-5
            )
        assert (m(x, t, (y + 1) % 6) - together).flatten(1).abs().max(1)[0].min() > 1e-3


def test_only_the_classes_that_were_named_are_learned():
    m = awake(UNet(widths=(16,), num_classes=4))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 500, 999])
    for context, rows in (
        (torch.tensor([1, 3, 1]), [1, 3]),
        (None, [4]),
        (torch.tensor([4, 0, 0]), [0, 4]),
    ):
        m.zero_grad()
        m(x, t, context).square().sum().backward()
        assert m.classes.weight.grad.abs().sum(1).nonzero()[:, 0].tolist() == rows


@pytest.mark.parametrize(
    'context, error, words',
    [
        (torch.tensor([0, 5]), ValueError, 'from 0 to 3, or 4 for none'),
        (torch.tensor([-1, 0]), ValueError, 'from 0 to 3'),
        (torch.tensor([0]), ValueError, 'each of 2 pictures'),
        (torch.zeros(2, 4), TypeError, 'int64'),
        (torch.tensor([[0], [1]]), ValueError, 'one class for each'),
        (torch.tensor([0.0, 1.0]), TypeError, 'long'),
        ([0, 1], TypeError, 'int64'),
    ],
)
def test_contexts_that_are_no_classes_are_refused(context, error, words):
    with pytest.raises(error, match=words):
        UNet(widths=(16,), num_classes=4)(torch.zeros(2, 1, 8, 8), torch.zeros(2), context)


def test_a_context_for_a_model_without_conditioning_is_refused():
    with pytest.raises(ValueError, match='num_classes'):
        UNet(widths=(16,))(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    'kw, words',
    [
        (dict(patch_size=0), 'patch_size'),
        (dict(num_classes=0), 'num_classes'),
        (dict(widths=()), 'width'),
    ],
)
def test_networks_that_cannot_be_are_refused(kw, words):
    with pytest.raises(ValueError, match=words):
        UNet(**kw)


# --- training with labels ---
def toys(labels=True, n=64):
    gen = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(n, 1, 4, 4, generator=gen),
        torch.arange(n) % 3 if labels else torch.full((n,), -1),
    )
    return DataLoaders(TensorLoader(x, y, batch_size=16), TensorLoader(x, y, batch_size=16))


class Watch(Callback):
    order = -10

    def __init__(self):
        self.seen = {True: [], False: []}

    def before_batch(self, learn):
        self.seen[learn.training].append(learn.batch)


@pytest.mark.parametrize('drop', [0.1, 0.25, 0.9])
def test_condition_dropout_hides_its_share_in_training_only(drop):
    set_seed(0)
    watch, dls = Watch(), toys(n=960)
    learn = diffusion_learner(
        UNet(widths=(8,), head_dim=8, num_classes=3),
        dls,
        DDPMScheduler(),
        cbs=[watch],
        device='cpu',
        cond_drop=drop,
    ).fit(1)
    told, told_held = (torch.cat([b[0][2] for b in watch.seen[k]]) for k in (True, False))
    y = dls.train.tensors[1]
    hidden = told == 3
    assert torch.equal(told[~hidden], y[~hidden]) and torch.equal(told_held, y)
    assert abs(hidden.float().mean() - drop) < 0.06  # four standard deviations of 960 draws
    assert len(learn.ema.model.classes.weight) == 4


def test_without_it_the_batches_are_as_before():
    "No label is passed and no random number more is drawn."
    set_seed(0)
    watch = Watch()
    diffusion_learner(
        UNet(widths=(8,), head_dim=8), toys(), DDPMScheduler(), cbs=[watch], device='cpu'
    ).fit(1)
    set_seed(0)
    again = Watch()
    diffusion_learner(
        UNet(widths=(8,), head_dim=8),
        toys(labels=False),
        DDPMScheduler(),
        cbs=[again],
        device='cpu',
    ).fit(1)
    for ((x, t), target), ((x2, t2), target2) in zip(watch.seen[True], again.seen[True]):
        assert torch.equal(x, x2) and torch.equal(t, t2) and torch.equal(target, target2)


def test_conditional_training_is_refused_where_it_cannot_be():
    def make(model, dls, drop):
        return diffusion_learner(model, dls, DDPMScheduler(), device='cpu', cond_drop=drop)

    with pytest.raises(ValueError, match='built with num_classes'):
        make(UNet(widths=(16,)), toys(), 0.1).fit(1)
    with pytest.raises(ValueError, match=r'run from -1 to -1 \(-1: no label\)'):
        make(UNet(widths=(16,), num_classes=3), toys(labels=False), 0.1).fit(1)
    with pytest.raises(ValueError, match='run from 0 to 2'):
        make(UNet(widths=(16,), num_classes=2), toys(), 0.1).fit(1)
    for drop in (-0.1, 0, 1.5, float('nan'), True, '0.1'):
        with pytest.raises(ValueError, match='share between 0 and 1'):
            DiffusionCB(DDPMScheduler(), drop)


def test_a_conditional_learner_gives_predictions_of_noisy_pictures():
    learn = diffusion_learner(
        UNet(widths=(16,), num_classes=3), toys(), DDPMScheduler(), device='cpu', cond_drop=0.1
    )
    preds, targets = learn.get_preds()
    assert preds.shape == targets.shape == (64, 1, 4, 4) and targets.std() > 0.5
