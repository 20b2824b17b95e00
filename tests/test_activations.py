"Lesson 14: hooks never leak, statistics and summaries are right, initialisation agrees with torch."

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from miniai.activations import ActivationStats, Hooks, init_kaiming, lsuv, modes_kept, summary
from miniai.callbacks import EMACB
from miniai.data import DataLoaders, TensorLoader
from miniai.learner import EVENTS, Callback, CancelFit, DeviceCB, Learner

quick = settings(deadline=None, derandomize=True, max_examples=100)


def hooks(*models):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks)
        for model in models
        for m in model.modules()
    )


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def loaders(n=40):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 4, 4, generator=g), torch.randint(0, 3, (n,), generator=g)
    return DataLoaders(
        TensorLoader(x, y, batch_size=16, shuffle=True), TensorLoader(x, y, batch_size=16)
    )


def learner(model=None, cbs=()):
    return Learner(model or net(), loaders(), F.cross_entropy, 0.1, list(cbs), torch.optim.SGD)


# ---- hooks


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, GeneratorExit])
def test_hooks_are_gone_after_any_error(error):
    model = net()

    def func(i, m, inputs, output):
        raise error

    with pytest.raises(error):
        with Hooks(model.modules(), func):
            model(torch.zeros(2, 16))
    assert hooks(model) == 0


def test_hooks_refuse_what_isnt_a_module_before_hanging_any():
    model = net()
    with pytest.raises(TypeError, match='function'):
        Hooks([model[1], F.relu], print)
    h = Hooks([model[1]], lambda *a: None)
    with h:
        with pytest.raises(RuntimeError, match='already'):
            h.__enter__()
        assert hooks(model) == 1
    assert hooks(model) == 0
    h.__exit__()  # twice does no harm
    with h:
        assert hooks(model) == 1  # and a second use is fine
    assert hooks(model) == 0


def test_others_hooks_stay():
    model = net()
    own = model[1].register_forward_hook(lambda *a: None)
    with Hooks(model, lambda *a: None):
        assert hooks(model) == 7
    assert hooks(model) == 1
    own.remove()


def test_output_can_be_replaced():
    model = net()
    with Hooks([model[-1]], lambda i, m, inputs, output: output * 0 + 7):
        assert (model(torch.zeros(2, 16)) == 7).all()


# ---- statistics


@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError, CancelFit])
def test_stats_leave_no_hook_whatever_happens_where(event, error):
    def fail(self, learn):
        raise error

    trouble = type('Trouble', (Callback,), {event: fail, 'order': 95})()
    stats, learn = ActivationStats(), learner()
    try:
        learn.fit(1, cbs=[stats, trouble])
    except (error, KeyboardInterrupt):
        pass
    assert hooks(learn.model) == 0
    learn.fit(1, cbs=[stats])  # and the next fit is as if nothing had happened
    assert (
        hooks(learn.model) == 0
        and stats.table().shape == (3, 2, 43)
        and stats.table().isfinite().all()
    )


def test_stats_change_nothing():
    plain, watched = learner(), learner()
    torch.manual_seed(1)
    plain.fit(2)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    watched.fit(2, cbs=[ActivationStats()])
    assert torch.equal(after, torch.get_rng_state())
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.model.state_dict().values(), watched.model.state_dict().values())
    )


def test_stats_dont_get_into_copies():
    ema, learn = EMACB(), learner()
    learn.fit(1, cbs=[ActivationStats(), ema])
    assert hooks(ema.model, learn.model, copy.deepcopy(learn.model)) == 0
    pickle.dumps(learn.model)


def test_stats_equal_a_calculation_by_hand():
    seen = []

    class Keep(Callback):
        def before_predict(self, learn):
            if learn.training:
                seen.append((learn.batch[0], copy.deepcopy(learn.model)))

    stats = ActivationStats(bins=10, top=1.0)
    learner().fit(2, cbs=[Keep(), stats])
    assert stats.names == ['2', '4'] and len(seen) == 6
    for step, (x, model) in enumerate(seen):
        with torch.no_grad():
            for col, upto in enumerate((3, 5)):
                a = model[:upto](x)
                assert torch.isclose(stats.means[step, col], a.mean()) and torch.isclose(
                    stats.stds[step, col], a.std()
                )
                assert torch.isclose(stats.dead[step, col], (a == 0).all(0).float().mean())
                edges = (
                    torch.bucketize(
                        a.flatten().clamp(max=1.0), torch.linspace(0, 1, 11), right=True
                    ).clamp(1, 10)
                    - 1
                )
                assert (
                    stats.hists[step, col] - edges.bincount(minlength=10)
                ).abs().sum() <= 2  # a value on an edge may go either way


def test_stats_count_dead_channels_of_convolutions():
    conv = nn.Conv2d(1, 4, 3, padding=1)
    nn.init.constant_(conv.bias, -100.0)
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.bias[0] = 1.0
    stats = ActivationStats()
    learner(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))).fit(1, cbs=[stats])
    assert stats.dead[0, 0] == 0.75


def test_stats_every_and_nan():
    stats = ActivationStats(every=2)
    learner().fit(2, cbs=[stats])
    assert len(stats.table()) == 3

    class Spoil(Callback):
        def before_batch(self, learn):
            learn.batch = learn.batch[0] * torch.nan, learn.batch[1]

    stats = ActivationStats()
    learner().fit(1, cbs=[Spoil(), stats], valid=False)
    assert stats.means.isnan().all() and stats.hists.isfinite().all()


def test_stats_errors():
    with pytest.raises(ValueError, match='nothing recorded'):
        ActivationStats().means
    with pytest.raises(ValueError, match=r"no layer to watch.*Linear"):
        learner().fit(1, cbs=[ActivationStats(nn.SiLU)])
    for bad in (dict(every=0), dict(bins=0), dict(top=0.0), dict(top=float('nan'))):
        with pytest.raises(ValueError, match='above 0'):
            ActivationStats(**bad)


# ---- initialisation


def test_init_kaiming_reaches_all_layers_and_only_those():
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3),
        nn.BatchNorm1d(3),
        nn.Sequential(nn.Linear(5, 4, bias=False)),
        nn.Conv3d(1, 2, 2),
    )
    norm = copy.deepcopy(model[1].state_dict())
    init_kaiming(model, generator=torch.Generator().manual_seed(0))
    gen = torch.Generator().manual_seed(0)
    for m in (model[0], model[2][0], model[3]):
        assert torch.equal(
            m.weight, nn.init.kaiming_normal_(torch.empty_like(m.weight), generator=gen)
        )
    assert (model[0].bias == 0).all() and all(
        torch.equal(v, norm[k]) for k, v in model[1].state_dict().items()
    )


@quick
@given(
    st.integers(1, 5), st.integers(2, 9), st.floats(1e-3, 1e3), st.booleans(), st.integers(0, 99)
)
def test_lsuv_is_exact_in_one_pass(depth, width, scale, bias, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        *[m for _ in range(depth) for m in (nn.Linear(width, width, bias=bias), nn.Tanh())]
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    x, outs = torch.randn(64, width), []
    lsuv(model, x)
    with (
        torch.no_grad(),
        Hooks(
            [m for m in model if isinstance(m, nn.Linear)],
            lambda i, m, inputs, output: outs.append(output),
        ),
    ):
        model(x)
    for o in outs:
        assert abs(o.std() - 1) < 1e-3 and (not bias or abs(o.mean()) < 1e-3)


def test_lsuv_keeps_modes_and_averages_and_handles_shared_layers():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Dropout(), nn.BatchNorm1d(6).eval(), shared)
    stats, rng = copy.deepcopy(model[2].state_dict()), torch.get_rng_state()
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    lsuv(model, x)
    assert abs(shared(x).std() - 1) < 1e-4  # right for its first use
    assert model[1].training and not model[2].training and torch.equal(rng, torch.get_rng_state())
    assert (
        all(torch.equal(v, stats[k]) for k, v in model[2].state_dict().items())
        and hooks(model) == 0
    )


def test_lsuv_skips_and_refuses():
    model = net()
    last = model[-1].weight.detach().clone()
    lsuv(model, torch.randn(30, 16), skip=[model[-1]])
    assert torch.equal(last, model[-1].weight)
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[3].bias)
    with pytest.raises(ValueError, match="layer '3'"):
        lsuv(model, torch.randn(30, 16))
    with pytest.raises(ValueError, match='all rows of x are the same'):
        lsuv(model, torch.zeros(30, 16))
    assert model.training and hooks(model) == 0


# ---- summary


def test_summary_counts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    model[0].bias.requires_grad_(False)
    s = summary(learner(model, [DeviceCB('cpu')]))
    assert s.n_params == 54 + 6 + 288 + 3 and s.n_trainable == s.n_params - 6
    assert [row[2] for row in s.rows] == [(16, 6, 4, 4), (16, 6, 4, 4), (16, 96), (16, 3)]
    flops = [2 * 9 * 6 * 16, 0, 0, 2 * 96 * 3]
    assert [round(row[4] * 1e6) for row in s.rows] == flops
    assert round(s.mflops * 1e6) == sum(flops)
    assert 'Conv2d' in repr(s) and '351 parameters' in repr(s)


def test_summary_changes_nothing_and_sees_what_callbacks_make_of_a_batch():
    class TwoInputs(Callback):
        def before_batch(self, learn):
            x, y = learn.batch
            learn.batch = (x, x[:, :, :2]), y

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(24, 3), nn.BatchNorm1d(3)

        def forward(self, a, b):
            return self.norm(self.linear(torch.cat([a.flatten(1), b.flatten(1)], 1)))

    learn = learner(Both(), [TwoInputs()])
    state, rng = copy.deepcopy(learn.model.state_dict()), torch.get_rng_state()
    s = summary(learn)
    assert [row[:3] for row in s.rows] == [
        ('linear', 'Linear', (16, 3)),
        ('norm', 'BatchNorm1d', (16, 3)),
    ]
    assert '(16, 1, 2, 4)' in s.inputs and round(s.mflops * 1e6) == 2 * 24 * 3
    assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and hooks(learn.model) == 0
    assert learn.model.training and not hasattr(learn, 'opt')


def test_modes_kept():
    model = net().eval()
    model[4].train()
    with pytest.raises(KeyError), modes_kept(model):
        model.train()
        raise KeyError
    assert [m.training for m in model] == [i == 4 for i in range(6)]
