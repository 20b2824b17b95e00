"""The callbacks: what each claims to equal, what each refuses, and the learning-rate finder."""

import copy
import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as S

from miniai.callbacks import (
    EMACB,
    GradClipCB,
    MetricsCB,
    NaNStopCB,
    ProgressCB,
    RecorderCB,
    ScheduleCB,
    SchedulerCB,
    TimeBudgetCB,
    accuracy,
    lr_find,
    warmup_cosine,
)
from miniai.data import DataLoaders, TensorLoader
from miniai.learner import Callback, CancelEpoch, CancelFit, DeviceCB, Learner
from miniai.tensors import set_seed

CPU = torch.device('cpu')


def data(n=40, bs=8):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 4, 4, generator=g)
    y = (x.mean((1, 2, 3)) > 0).long()
    valid = TensorLoader(x[:20], y[:20], batch_size=bs)
    return DataLoaders(TensorLoader(x, y, batch_size=bs, shuffle=True), valid)


def learner(cbs=(), seed=0, lr=0.1, drop=0.2, opt_func=partial(torch.optim.SGD, momentum=0.9)):
    set_seed(seed)
    layers = [nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(drop), nn.Linear(12, 2)]
    model = nn.Sequential(*layers)
    return Learner(model, data(), F.cross_entropy, lr, [DeviceCB(CPU), *cbs], opt_func)


@pytest.mark.parametrize(
    'make, kind, word',
    [
        (lambda: MetricsCB(seven=7), TypeError, "metric 'seven'.*int"),
        (lambda: SchedulerCB(None, per='step'), ValueError, "'batch' or 'epoch'"),
        (lambda: GradClipCB(0), ValueError, 'max_norm is 0'),
        (lambda: GradClipCB(math.nan), ValueError, 'max_norm is nan'),
        (lambda: EMACB(1.), ValueError, 'decay is 1.0'),
        (lambda: TimeBudgetCB(0), ValueError, 'seconds is 0'),
        (lambda: TimeBudgetCB(math.inf), ValueError, 'seconds is inf'),
        (lambda: lr_find(learner(), 1., 0.1), ValueError, 'low is 1.0.*below high'),
        (lambda: lr_find(learner(drop=0.), 1e3, 1e6, 50), ValueError, 'smaller low'),
        (lambda: lr_find(learner(drop=0., opt_func=Adrift)), ValueError, 'fell in only 0 of'),
        (lambda: learner([SchedulerCB(S.ReduceLROnPlateau, per='epoch')]).fit(2), ValueError,
         'MetricsCB'),
        (lambda: learner([SchedulerCB(None), ScheduleCB()]), ValueError, 'sets the learning rate'),
    ],
)
def test_refused(make, kind, word):
    with pytest.raises(kind, match=word):
        make()


class Adrift(torch.optim.SGD):
    "An optimiser that begins by ruining the weights."

    def __init__(self, params, lr):
        params = list(params)
        super().__init__(params, lr)
        with torch.no_grad():
            params[0].fill_(math.nan)


# --- metrics and progress


class MeanOfRows:
    "A metric with torchmetrics' protocol."

    def __init__(self):
        self.reset()

    def reset(self):
        self.right, self.n = 0, 0

    def update(self, preds, target):
        self.right, self.n = self.right + (preds.argmax(-1) == target).sum(), self.n + len(target)

    def compute(self):
        return self.right / self.n


def test_metrics_objects_and_functions_agree():
    learn = learner([MetricsCB(accuracy, MeanOfRows(), both=MeanOfRows())]).fit(3)
    assert [row['epoch'] for row in learn.history] == [0, 1, 2]
    for row in learn.history:
        assert abs(row['accuracy'] - row['MeanOfRows']) < 1e-5 and row['both'] == row['MeanOfRows']
    preds, y = learn.get_preds()
    assert abs(learn.history[-1]['accuracy'] - accuracy(preds, y).item()) < 1e-5
    assert abs(learn.history[-1]['valid_loss'] - F.cross_entropy(preds, y).item()) < 1e-4


def test_an_epoch_that_ends_early_is_the_mean_of_what_was_seen():
    class Early(Callback):
        order = 1000

        def after_batch(self, learn):
            if learn.training and learn.i == 2:
                raise CancelEpoch

    record = RecorderCB()
    learn = learner([MetricsCB(), record, Early()]).fit(2)
    for i, row in enumerate(learn.history):
        assert abs(row['train_loss'] - sum(record.losses[3*i:3*i + 3])/3) < 1e-5


def test_recorder():
    record, sched = RecorderCB(), ScheduleCB()
    learn = learner([record, sched]).fit(3)
    assert len(record.losses) == 15 and record.lrs == learn.lrs and learn.n_steps == 15


def test_progress_lines(capsys):
    learner([ProgressCB(show=False)]).fit(1)
    assert capsys.readouterr().out == ''
    for n_lines, fewest, most in ((5, 5, 7), (1, 1, 3)):
        learner([MetricsCB(), ProgressCB(n_lines=n_lines)]).fit(10)
        lines = capsys.readouterr().out.splitlines()
        assert fewest <= len(lines) <= most and all('loss' in line for line in lines)
        assert lines[-1].startswith('100%') and 'held-out' in lines[-1]
    learn = learner([ProgressCB()])
    learn.is_main = False
    learn.fit(1)
    assert capsys.readouterr().out == ''


def test_progress_bar_shows_what_was_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    progress, record = ProgressCB(), RecorderCB()
    learner([progress, record, MetricsCB()]).fit(50)
    assert capsys.readouterr().out and progress.bar is None
    # 250 steps: every mean is of three of them, in the middle of which it is drawn
    assert len(progress.points) == 84
    for i, (step, loss) in enumerate(progress.points[:-1]):
        assert step == 3*i + 1.5 and abs(loss - sum(record.losses[3*i:3*i + 3])/3) < 1e-5


# --- schedules and budgets


@given(n=st.integers(5, 200), warmup=st.floats(0.01, 0.9))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_warmup_cosine_is_torchs(n, warmup):
    n_up = max(1, round(warmup*n))
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    sched = S.CosineAnnealingLR(opt, n)
    for i in range(n + 1):
        pct = (n_up + i)/(n_up + n)
        assert abs(warmup_cosine(pct, n_up/(n_up + n)) - opt.param_groups[0]['lr']) < 1e-6
        opt.step()
        sched.step()
    for i in range(n_up):
        assert abs(warmup_cosine(i/(n_up + n), n_up/(n_up + n)) - i/n_up) < 1e-6


def test_schedule_keeps_the_proportions_of_parameter_groups():
    def opt_func(params, lr):
        params = list(params)
        return torch.optim.SGD([dict(params=params[:1], lr=lr), dict(params=params[1:], lr=lr/10)])

    seen = []

    class Watch(Callback):
        order = 50

        def before_step(self, learn):
            seen.append([g['lr'] for g in learn.opt.param_groups])

    learner([ScheduleCB(lambda pct: 1 - pct), Watch()], opt_func=opt_func).fit(1)
    expected = [[0.1*(1 - i/5), 0.01*(1 - i/5)] for i in range(5)]
    assert torch.allclose(torch.tensor(seen), torch.tensor(expected), atol=1e-6)


def test_torch_schedulers_step_when_they_should():
    record = RecorderCB()
    halve = SchedulerCB(partial(S.StepLR, step_size=2, gamma=0.5), per='epoch')
    learner([record, halve], lr=0.4).fit(6)
    assert record.lrs[::5] == [0.4, 0.4, 0.2, 0.2, 0.1, 0.1]
    record = RecorderCB()
    learner([record, SchedulerCB(partial(S.OneCycleLR, max_lr=0.4, total_steps=10))]).fit(2)
    assert len(record.lrs) == 10 and abs(max(record.lrs) - 0.4) < 1e-6
    record, never = RecorderCB(), partial(
        S.ReduceLROnPlateau, patience=0, threshold=1e9, threshold_mode='abs')
    learner([record, MetricsCB(), SchedulerCB(never, per='epoch')], lr=0.4).fit(3)
    assert torch.allclose(torch.tensor(record.lrs[::5]), torch.tensor([0.4, 0.4, 0.04]))


def test_time_budget_follows_its_clock():
    ticks = iter(range(10**6))
    learn = learner([ScheduleCB(lambda pct: pct)])
    learn.fit(10**6, cbs=[TimeBudgetCB(50, clock=lambda: next(ticks))], valid=False)
    # one tick a batch
    assert learn.n_steps == 50 and learn.pct == 1
    assert torch.allclose(torch.tensor(learn.lrs[1:]), 0.1*torch.arange(1, 50)/50, atol=1e-6)


def test_time_budget_counts_what_was_spent():
    budget, learn = TimeBudgetCB(0.3), learner()
    learn.fit(10**6, cbs=[budget], valid=False)
    state = budget.state_dict(learn)
    assert state['spent'] >= 0.3
    again = TimeBudgetCB(0.3)
    again.load_state_dict(learn, state)
    learn.training = True
    with pytest.raises(CancelFit):
        again.before_batch(learn)


# --- weights and gradients


def test_ema_of_weights_and_buffers():
    set_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    ema, by_hand = EMACB(0.5), [p.detach().clone() for p in model.parameters()]

    class ByHand(Callback):
        t = 0

        def before_step(self, learn):
            assert not any(p.requires_grad for p in ema.model.parameters())

        def after_step(self, learn):
            d = min(0.5, (1 + self.t)/(10 + self.t))
            self.t += 1
            for a, p in zip(by_hand, learn.model.parameters()):
                a.copy_(d*a + (1 - d)*p.detach())

    Learner(model, data(), F.cross_entropy, 0.1, [ema, ByHand()]).fit(3).fit(1)
    for a, b in zip(ema.model.parameters(), by_hand):
        assert torch.allclose(a, b, atol=1e-5)
    for a, b in zip(ema.model.buffers(), model.buffers()):
        assert torch.equal(a, b)


@pytest.mark.parametrize('max_norm', [1e-3, 1e3])
def test_clipping(max_norm):
    norms = []

    class Norms(Callback):
        def __init__(self, order):
            self.order = order

        def after_backward(self, learn):
            grads = [p.grad.flatten() for p in learn.model.parameters()]
            norms.append(torch.cat(grads).norm().item())

    learner([Norms(-1), GradClipCB(max_norm), Norms(1)]).fit(1)
    for before, after in zip(norms[::2], norms[1::2]):
        assert abs(after - min(before, max_norm)) < 1e-4*max_norm + 1e-5


class Ruin(Callback):
    "Makes the weights NaN after a step; the losses are, from then on."

    order = 25

    def __init__(self, step):
        self.step_to_ruin = step

    def after_step(self, learn):
        if learn.n_steps == self.step_to_ruin:
            with torch.no_grad():
                learn.model[1].weight.fill_(math.nan)


@pytest.mark.parametrize('every', [1, 4, 25])
@pytest.mark.parametrize('step', [0, 5, 13])
def test_nan_stops_and_the_last_good_weights_come_back(every, step):
    good = {}

    class Keep(Callback):
        order = 19    # before NaNStopCB looks

        def after_loss(self, learn):
            if learn.training and learn.n_steps % every == 0 and learn.loss.isfinite():
                good.update(copy.deepcopy(dict(m=learn.model.state_dict(),
                                               e=ema.model.state_dict())))

    watch, ema = NaNStopCB(every), EMACB(0.9)
    learn = learner([watch, ema, Keep(), Ruin(step)]).fit(3)
    assert watch.stopped and learn.n_steps <= step + 1 + every
    for model, expected in ((learn.model, good['m']), (ema.model, good['e'])):
        for k, v in model.state_dict().items():
            assert v.isfinite().all() and torch.equal(v, expected[k])
    # and it can be fitted again
    learn.cbs = [cb for cb in learn.cbs if not isinstance(cb, Ruin)]
    learn.fit(1)
    assert not watch.stopped and all(p.isfinite().all() for p in learn.model.parameters())


def test_nan_stop_leaves_sound_fits_alone(capsys):
    plain, watched = learner().fit(3), learner([NaNStopCB(2)]).fit(3)
    assert all(map(torch.equal, plain.model.parameters(), watched.model.parameters()))
    assert capsys.readouterr().out == ''


# --- the learning-rate finder


def looks(learn):
    "Everything that looking could change."
    kept = learn.n_steps, learn.history, learn.cbs, learn.cbs[3].t, learn.opt.state_dict()
    tensors = [*learn.model.state_dict().values(), torch.get_rng_state()]
    return repr(kept), [t.numpy().tobytes() for t in tensors]


@pytest.mark.parametrize('interrupt', [False, True])
def test_lr_find_leaves_no_trace(interrupt):
    class Boom(Callback):
        def after_step(self, learn):
            if interrupt and learn.n_steps == 5:
                raise KeyboardInterrupt

    learn = learner([MetricsCB(accuracy), ScheduleCB(), EMACB(0.9), RecorderCB()], 3).fit(1)
    learn.cbs.append(Boom())
    before = looks(learn)
    if interrupt:
        with pytest.raises(KeyboardInterrupt):
            lr_find(learn)
    else:
        found = lr_find(learn, n_steps=80)
        assert 1e-3 < found.suggestion < 10 and len(found.lrs) == len(found.losses) <= 80
    assert looks(learn) == before


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.w * torch.ones(len(x), 1)


@given(curvature=st.floats(0.1, 100.0))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_lr_find_on_a_bowl(curvature):
    # for f(w) = c w^2/2 gradient descent diverges from a rate of 2/c on; the suggestion must lie
    # below that, and not far below
    dls = SimpleNamespace(train=[(torch.zeros(1, 1), torch.zeros(1, 1))] * 5, valid=[])

    def loss(preds, y):
        return curvature / 2 * (preds**2).mean()

    learn = Learner(Bowl(), dls, loss, 1e-3, [DeviceCB(CPU)], torch.optim.SGD)
    assert 0.005 / curvature < lr_find(learn, 1e-5, 100.0, 200).suggestion < 2 / curvature


def test_accuracy_broadcasts_nothing():
    preds, targets = torch.eye(6, 3), torch.tensor([0, 1, 2, 0, 0, 1])
    assert accuracy(preds, targets[:, None]) == accuracy(preds, targets) == 5 / 6
    for wrong in (targets[:1], torch.eye(6, 3)):
        with pytest.raises(ValueError, match='shape'):
            accuracy(preds, wrong)
