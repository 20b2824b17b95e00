"""The Learner: interrupts and cancelling at every event, errors that say where, refusals."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from miniai.callbacks import (
    EMACB,
    GradClipCB,
    MetricsCB,
    NaNStopCB,
    ProgressCB,
    RecorderCB,
    ScheduleCB,
    accuracy,
)
from miniai.data import DataLoaders, TensorLoader, generators_of
from miniai.learner import (
    EVENTS,
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    DeviceCB,
    Learner,
    TrainCB,
    describe,
)
from miniai.tensors import set_seed

CPU = torch.device('cpu')


def data(n=40, bs=8, generator=None):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 4, 4, generator=g), torch.randint(0, 3, (n,), generator=g)
    return DataLoaders(
        TensorLoader(x, y, batch_size=bs, shuffle=True, generator=generator),
        TensorLoader(x[:20], y[:20], batch_size=bs),
    )


class Counter(nn.Module):
    "A layer that changes a buffer in every forward pass, in evaluation mode too."

    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(1))

    def forward(self, x):
        self.calls += 1 + torch.rand(1)
        return x


def net(seed=0):
    set_seed(seed)
    layers = [nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, Counter(), nn.Linear(12, 3))


def learner(cbs=(), seed=0, dls=None):
    return Learner(net(seed), dls or data(), F.cross_entropy, 1e-2, [DeviceCB(CPU), *cbs])


def state(learn):
    "Everything that looking could change, as bytes."
    tensors = [*learn.model.parameters(), *learn.model.buffers(), torch.get_rng_state()]
    tensors += [g.get_state() for g in generators_of(learn.dls)]
    modes = [m.training for m in learn.model.modules()]
    numbers = repr((random.getstate(), np.random.get_state(), modes))
    return [t.detach().numpy().tobytes() for t in tensors] + [numbers]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


# --- interrupts and cancelling


class Hooked(Callback):
    "Hangs a hook on a layer for as long as the fit lasts."

    order = -200
    hook = None

    def before_fit(self, learn):
        self.hook = learn.model[1].register_forward_hook(lambda *a: None)

    def cleanup_fit(self, learn):
        if self.hook:
            self.hook.remove()


class At(Callback):
    "Raises `what` the `nth` time `event` happens."

    def __init__(self, event, what, nth=1, order=0):
        self.n, self.order = 0, order

        def f(learn):
            self.n += 1
            if self.n == nth:
                raise what

        setattr(self, event, f)


@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('what', [KeyboardInterrupt, RuntimeError])
def test_interrupted_at_any_event(event, what):
    for order in (-1000, 0, 1000):
        for nth in (1, 2) if order == 0 and not event.endswith('fit') else (1,):
            cbs = [MetricsCB(accuracy), ScheduleCB(), EMACB(), NaNStopCB(), GradClipCB()]
            learn = learner([Hooked(), *cbs, ProgressCB(show=False), RecorderCB()])
            own = list(learn.cbs)
            with pytest.raises(what):
                learn.fit(2, cbs=[At(event, what, nth, order)])
            assert learn.cbs == own and torch.is_grad_enabled()
            assert not any(m._forward_hooks for m in learn.model.modules())
            assert all(p.isfinite().all() for p in learn.model.parameters())
            # the next fit is as any other: no gradient that was left behind leaks into it
            fresh = learner([ScheduleCB(), GradClipCB()])
            fresh.model.load_state_dict(learn.model.state_dict())
            for one in (learn, fresh):
                set_seed(3)
                one.fit(1)
            assert same(learn.model, fresh.model) and len(learn.history) == 1


@pytest.mark.parametrize('event', [e for e in EVENTS if not e.startswith('cleanup')])
def test_cancel_at_any_event_ends_its_scope_only(event):
    depth = dict(fit=0, epoch=1).get(event.split('_')[-1], 2)
    for i, cancel in enumerate((CancelFit, CancelEpoch, CancelBatch)[: depth + 1]):
        steps = []

        class Count(Callback):
            order = 1000

            def cleanup_batch(self, learn):
                steps.append((learn.epoch, learn.training))

        learn = learner([Hooked(), Count()]).fit(2, cbs=[At(event, cancel)])
        assert not any(m._forward_hooks for m in learn.model.modules())
        # five training and three validation batches in each of two epochs
        if i == 2:
            assert len(steps) == 16
        elif i == 1:    # cancelled in the first training epoch: by then 0, 1 or 5 batches
            assert len(steps) == 11 + (5 if event == 'after_epoch' else event != 'before_epoch')
        else:
            first = dict(before_fit=0, before_epoch=0, after_epoch=5, after_fit=16)
            assert len(steps) == first.get(event, 1)


@pytest.mark.parametrize('what', [KeyboardInterrupt, ValueError])
def test_a_failing_cleanup_keeps_nobody_from_cleaning_up(what):
    learn = learner([Hooked()])
    with pytest.raises(what):
        learn.fit(1, cbs=[At('cleanup_fit', what, 1, -999)])
    assert not any(m._forward_hooks for m in learn.model.modules())


@pytest.mark.parametrize('late', [CancelFit, CancelEpoch, ValueError])
def test_no_cleanup_swallows_an_interrupt(late):
    with pytest.raises(KeyboardInterrupt):
        learner().fit(2, cbs=[At('after_loss', KeyboardInterrupt), At('cleanup_epoch', late)])


def test_a_cancel_in_a_cleanup_counts():
    learn = learner([MetricsCB()]).fit(5, cbs=[At('cleanup_epoch', CancelFit, 4, 1000)])
    assert [row['epoch'] for row in learn.history] == [0, 1]


# --- errors


def refused(kind, *words, cbs=(), **kwargs):
    settings = dict(model=net(), dls=data(), loss_func=F.cross_entropy, cbs=[DeviceCB(CPU), *cbs])
    with pytest.raises(kind) as e:
        Learner(**settings | kwargs).fit(1)
    text = '\n'.join([str(e.value), *getattr(e.value, '__notes__', [])])
    for word in words:
        assert word in text, (word, text)
    assert text.count('(in ') <= 1


class Oops(Callback):
    def after_predict(self, learn):
        raise AttributeError('oops')


def bad_metric(preds, y):
    raise IndexError('no such class')


def rows(preds, y):
    return F.cross_entropy(preds, y, reduction='none')


HERE = 'epoch 0, training batch 0: tuple of 2: [float32 (8, 1, 4, 4), int64 (8,)]'
PREDS = 'predictions float32 (8, 3)'


@pytest.mark.parametrize(
    'kind, words, kwargs',
    [
        (AttributeError, ['oops', 'Oops.after_predict', HERE, PREDS], dict(cbs=[Oops()])),
        (IndexError, ['MetricsCB.after_loss', 'validation batch 0', PREDS],
         dict(cbs=[MetricsCB(bad_metric)])),
        (ValueError, ["metric 'rows'", 'one number', 'float32 (8,)'], dict(cbs=[MetricsCB(rows)])),
        (ValueError, ['TrainCB.loss', HERE, PREDS],
         dict(loss_func=F.binary_cross_entropy_with_logits)),
        (TypeError, ["reduction='none'", 'float32 (8,)', 'TrainCB.loss'], dict(loss_func=rows)),
        (TypeError, ['must be one number', 'float'], dict(loss_func=lambda p, y: 1.)),
        (RuntimeError, ['TrainCB.predict', HERE], dict(model=nn.Linear(5, 3))),
    ],
)
def test_errors_name_callback_event_and_shapes(kind, words, kwargs):
    refused(kind, *words, **kwargs)


@pytest.mark.parametrize(
    'change, word',
    [
        (lambda b: {'x': b[0], 'y': b[1]}, "{'x': float32 (8, 1, 4, 4), 'y': int64 (8,)}"),
        (lambda b: b[0], 'but this is float32 (8, 1, 4, 4)'),
        (lambda b: (*b, 'cat'), 'tuple of 3: [float32 (8, 1, 4, 4), int64 (8,), str]'),
    ],
)
def test_wrong_batch_structure(change, word):
    class Change(Callback):
        def before_batch(self, learn):
            learn.batch = change(learn.batch)

    refused(TypeError, 'pair (inputs, targets)', word, 'TrainCB.predict', cbs=[Change()])


def test_describe():
    x = torch.zeros(2, 3)
    assert describe((x, [1, x, None])) == 'tuple of 2: [float32 (2, 3), list of 3: [int, ' \
                                          'float32 (2, 3), NoneType]]'
    assert describe([1]*9) == 'list of 9: [int, int, int, int]'


class Liar(list):
    def __len__(self):
        return 3


@pytest.mark.parametrize(
    'which, dl, kind, word',
    [
        ('train', [], ValueError, 'dls.train has no batches'),
        ('valid', [], ValueError, 'dls.valid has no batches'),
        ('train', Liar(), ValueError, 'gave no batch'),
        ('train', iter([]), TypeError, 'len()'),
    ],
)
def test_loaders_that_give_nothing(which, dl, kind, word):
    dls = data()
    setattr(dls, which, dl)
    model = net()
    before = copy.deepcopy(model)
    refused(kind, word, dls=dls, model=model)
    assert same(model, before), 'refused before anything was trained'


def test_no_validation():
    dls = data()
    for valid in ([], None):
        learn = learner([MetricsCB()], dls=SimpleNamespace(train=dls.train, valid=valid))
        learn.fit(1, valid=valid is None)
        assert list(learn.history[0]) == ['epoch', 'train_loss']
    assert learner([MetricsCB()]).fit(0).pct == 0


@pytest.mark.parametrize(
    'kind, cbs, words',
    [
        (ValueError, [ScheduleCB(), ScheduleCB()], ['ScheduleCB', 'sets the learning rate']),
        (ValueError, [TrainCB(), type('MyTrainCB', (TrainCB,), {})()], ['MyTrainCB', 'trains']),
        (TypeError, [MetricsCB], ['MetricsCB', 'instances of Callback']),
        (TypeError, [print], ['builtin_function_or_method']),
    ],
)
def test_clashes_are_refused_and_nothing_changes(kind, cbs, words):
    refused(kind, *words, cbs=cbs)
    learn = learner()
    before = state(learn)
    with pytest.raises(kind):
        learn.fit(1, cbs=cbs)
    assert state(learn) == before and len(learn.cbs) == 1


@pytest.mark.parametrize('name', ['after_bach', 'before_fitt', 'cleanup_step', 'after_validate'])
def test_misspelt_events_are_refused(name):
    with pytest.raises(TypeError, match=f'{name} is no event; did you mean'):
        type('Mine', (Callback,), {name: lambda self, learn: None})


# --- what a batch does


def test_another_train_cb_takes_the_place_of_the_usual_one():
    steps = []

    class Quiet(TrainCB):
        def step(self, learn):
            steps.append(learn.n_steps)

    learn = learner()
    before = copy.deepcopy(list(learn.model.parameters()))
    learn.fit(1, cbs=[Quiet()])
    assert steps == list(range(5)) and all(map(torch.equal, before, learn.model.parameters()))
    learn.fit(1)
    assert not all(map(torch.equal, before, learn.model.parameters())), 'of that fit only'


def test_several_inputs():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(16, 3)

        def forward(self, a, b):
            return self.lin((a + b).flatten(1))

    class Pair(Callback):
        def before_batch(self, learn):
            x, y = learn.batch
            learn.batch = (x, x), y

    learn = Learner(Sum(), data(), F.cross_entropy, cbs=[Pair()]).fit(1)
    assert learn.n_steps == 5 and learn.pct == 1


# --- looking


@pytest.mark.parametrize('generator', [False, True])
def test_looking_changes_no_byte(generator):
    dls = data(generator=torch.Generator().manual_seed(5) if generator else None)
    learn = learner([MetricsCB(accuracy), EMACB()], dls=dls).fit(1)
    other = TensorLoader(*dls.valid.tensors, shuffle=True, generator=torch.Generator())
    kept = copy.deepcopy((learn.cbs[2].model, learn.history, learn.opt.state_dict()))
    for look in (
        learn.get_preds,
        lambda: learn.get_preds(dls.train),
        lambda: learn.get_preds(other),
    ):
        for mode in (True, False):
            learn.model.train(mode)
            learn.model[4].train(not mode)  # mixed modes come back too
            before = state(learn), other.generator.get_state().tolist()
            look()
            assert (state(learn), other.generator.get_state().tolist()) == before
    ema, history, opt = kept
    assert same(ema, learn.cbs[2].model) and history == learn.history
    assert repr(opt) == repr(learn.opt.state_dict())


def test_get_preds():
    learn = learner([MetricsCB(accuracy)]).fit(2)
    preds, y = learn.get_preds()
    assert preds.shape == (20, 3) and torch.equal(y, learn.dls.valid.tensors[1])
    assert abs(learn.history[-1]['valid_loss'] - F.cross_entropy(preds, y).item()) < 1e-4
    assert len(learn.get_preds(learn.dls.train)[0]) == 40


def test_predicting_measures_nothing():
    class Mine(Callback):
        def after_loss(self, learn):
            raise AssertionError

        after_batch = after_epoch = after_fit = after_loss

    learn = learner([Mine()])
    assert len(learn.get_preds()[0]) == 20
