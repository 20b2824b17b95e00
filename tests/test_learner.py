"""The Learner: interrupts at every event, errors that say where, looks that change nothing, and resume to the last bit."""

import copy
import inspect
import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from miniai import learner as L
from miniai.callbacks import (
    EMACB,
    GradClipCB,
    MetricsCB,
    NaNStopCB,
    ProgressCB,
    ScheduleCB,
    TimeBudgetCB,
    accuracy,
)
from miniai.checkpoint import load_state, save_state
from miniai.data import DataLoaders, TensorLoader
from miniai.learner import (
    EVENTS,
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    DeviceCB,
    Learner,
    TrainCB,
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


class Twitch(nn.Module):
    "A layer that changes a buffer in every forward pass, in evaluation mode too."

    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(1))
        self.register_buffer('noise', torch.zeros(1), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.noise += torch.rand(1)
        return x


def net(seed=0, width=12):
    set_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(16, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Dropout(0.2),
        Twitch(),
        nn.Linear(width, 3),
    )


def learner(cbs=(), seed=0, dls=None, opt_func=torch.optim.AdamW, **kw):
    return Learner(
        net(seed, **kw), dls or data(), F.cross_entropy, 1e-2, [DeviceCB(CPU), *cbs], opt_func
    )


def bits(learn, lasting=False):
    "Everything that could change, as bytes; with `lasting`, only what a state_dict holds of the model."
    tensors = (
        learn.model.state_dict().values()
        if lasting
        else [*learn.model.parameters(), *learn.model.buffers()]
    )
    ts = [*tensors, torch.get_rng_state(), *(g.get_state() for g in L._generators(learn.dls))]
    return [t.detach().numpy().tobytes() for t in ts] + [
        repr(random.getstate()),
        repr(np.random.get_state()),
        [m.training for m in learn.model.modules()],
    ]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_the_loop_is_under_80_lines():
    assert len(inspect.getsource(L.Loop).splitlines()) < 80


# --- interrupts


class Hooked(Callback):
    "Hangs a hook on a layer for as long as the fit lasts."

    order = -200

    def before_fit(self, learn):
        self.hook = learn.model[1].register_forward_hook(lambda *a: None)

    def cleanup_fit(self, learn):
        self.hook.remove()


class At(Callback):
    "Raises `what` the `nth` time `event` happens."

    def __init__(self, event, what, nth, order):
        self.n, self.order = 0, order

        def f(learn):
            self.n += 1
            if self.n == nth:
                raise what

        setattr(self, event, f)


@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('what', [KeyboardInterrupt, RuntimeError])
def test_interrupted_at_any_event(event, what):
    for nth in (1, 2):
        for order in (-1000, 0, 1000):
            if event.endswith('fit') and nth == 2:
                continue
            learn = learner(
                [
                    Hooked(),
                    MetricsCB(accuracy),
                    ScheduleCB(),
                    EMACB(),
                    NaNStopCB(),
                    GradClipCB(),
                    ProgressCB(show=False),
                ]
            )
            cbs = list(learn.cbs)
            with pytest.raises(what):
                learn.fit(2, cbs=[At(event, what, nth, order)])
            assert learn.cbs == cbs and torch.is_grad_enabled()
            assert not any(m._forward_hooks for m in learn.model.modules())
            assert all(p.isfinite().all() for p in learn.model.parameters())
            # a fit after the interrupt is a fit as any other: gradients left behind don't leak into it
            fresh = learner([ScheduleCB(), GradClipCB()])
            fresh.model.load_state_dict(learn.model.state_dict())
            set_seed(3)
            learn.fit(1)
            set_seed(3)
            fresh.fit(1)
            assert same(learn.model, fresh.model) and len(learn.history) == 1


@pytest.mark.parametrize('event', [e for e in EVENTS if not e.startswith('cleanup')])
def test_cancel_at_any_event_ends_its_scope_only(event):
    for cancel in (CancelFit, CancelEpoch, CancelBatch):
        inside = {'fit': 0, 'epoch': 1}.get(event.split('_')[1], 2)
        if inside < {CancelFit: 0, CancelEpoch: 1, CancelBatch: 2}[cancel]:
            continue  # there is no such scope yet
        learn = learner([Hooked(), MetricsCB()]).fit(2, cbs=[At(event, cancel, 1, 0)])
        assert not any(m._forward_hooks for m in learn.model.modules())
        epochs = [h['epoch'] for h in getattr(learn, 'history', [])]
        assert 1 in epochs if cancel is not CancelFit else 1 not in epochs or event == 'after_fit'


def test_a_failing_cleanup_keeps_nobody_from_cleaning_up():
    learn = learner([Hooked()])
    for what in (KeyboardInterrupt, ValueError):
        with pytest.raises(what):
            learn.fit(1, cbs=[At('cleanup_fit', what, 1, -999)])
        assert not any(m._forward_hooks for m in learn.model.modules())


# --- errors


def refused(kind, *words, **kw):
    cbs = kw.pop('cbs', ())
    with pytest.raises(kind) as e:
        Learner(
            **(
                dict(model=net(), dls=data(), loss_func=F.cross_entropy, cbs=[DeviceCB(CPU), *cbs])
                | kw
            )
        ).fit(1)
    for w in words:
        assert w in str(e.value), (w, str(e.value))


def test_errors_name_callback_event_and_shapes():
    class Oops(Callback):
        def after_predict(self, learn):
            learn.preds.nonsense

    refused(
        AttributeError,
        'Oops.after_predict',
        'epoch 0',
        'training batch 0',
        'float32 (8, 1, 4, 4)',
        'int64 (8,)',
        'predictions float32 (8, 3)',
        cbs=[Oops()],
    )

    def bad_metric(preds, y):
        raise IndexError('no such class')

    refused(
        IndexError,
        "metric 'bad_metric'",
        'MetricsCB.after_loss',
        'validation batch 0',
        '(8, 3)',
        cbs=[MetricsCB(bad_metric)],
    )
    refused(
        ValueError,
        "metric 'per_row'",
        'expected one number',
        '(8,)',
        cbs=[MetricsCB(per_row=lambda p, y: (p.argmax(1) == y).float())],
    )
    # a loss that needs other targets
    with pytest.warns(UserWarning):
        refused(
            Exception,
            'TrainCB.get_loss',
            'targets int64 (8,)',
            'predictions float32 (8, 3)',
            loss_func=F.mse_loss,
        )
    refused(
        Exception,
        'TrainCB.get_loss',
        'targets int64 (8,)',
        loss_func=F.binary_cross_entropy_with_logits,
    )
    refused(
        TypeError,
        "reduction='none'",
        'float32 (8,)',
        loss_func=lambda p, y: F.cross_entropy(p, y, reduction='none'),
    )
    # the model, not a callback
    refused(RuntimeError, 'TrainCB.predict', 'float32 (8, 1, 4, 4)', model=nn.Linear(5, 3))


def test_metric_that_is_none():
    with pytest.raises(TypeError, match="metric 'seven' is a int"):
        MetricsCB(seven=7)


@pytest.mark.parametrize(
    'change, word',
    [
        (lambda b: {'x': b[0], 'y': b[1]}, "'x': float32 (8, 1, 4, 4)"),
        (lambda b: b[0], 'but this is float32 (8, 1, 4, 4)'),
        (lambda b: (*b, b[1]), 'tuple of 3'),
    ],
)
def test_wrong_batch_structure(change, word):
    class Change(Callback):
        def before_batch(self, learn):
            learn.batch = change(learn.batch)

    refused(TypeError, 'pair (inputs, targets)', word, 'TrainCB.predict', cbs=[Change()])


def test_loaders_that_give_nothing():
    full = data()
    for which in ('train', 'valid'):
        for dl, kind, word in (
            ([], ValueError, 'no batches'),
            (iter(full.train), TypeError, 'no length'),
        ):
            dls = SimpleNamespace(train=full.train, valid=full.valid)
            setattr(dls, which, dl)
            refused(kind, word, {'train': 'training', 'valid': 'validation'}[which], dls=dls)

    class Liar(list):
        def __len__(self):
            return 3

    refused(ValueError, 'gave no batch', dls=SimpleNamespace(train=Liar(), valid=full.valid))
    learner(dls=SimpleNamespace(train=full.train, valid=[])).fit(1, valid=False)


def test_clashes():
    refused(ValueError, 'ScheduleCB', 'sets the learning rate', cbs=[ScheduleCB(), ScheduleCB()])

    class Scaler(Callback):
        order = 5

    class Clip(Callback):
        order, runs_after = 5, ('Scaler',)

    refused(
        ValueError,
        'order clash',
        'Clip (order 5) must run after Scaler (order 5)',
        cbs=[Scaler(), Clip()],
    )
    late = Clip()
    late.order = 6
    learner([Scaler(), late]).fit(1)
    refused(TypeError, 'MetricsCB is a class', cbs=[MetricsCB])
    refused(TypeError, 'subclass of Callback', cbs=[print])
    bad = MetricsCB()
    bad.order = 'last'
    refused(TypeError, "order is 'last'", cbs=[bad])


def test_a_fit_s_own_strategy_takes_the_place():
    seen = []

    class Quiet(TrainCB):
        def step(self, learn):
            seen.append(1)

    learn = learner()
    before = copy.deepcopy(learn.model)
    learn.fit(1, cbs=[Quiet()])
    assert len(seen) == 5 and all(
        torch.equal(a, b) for a, b in zip(before.parameters(), learn.model.parameters())
    )
    assert sum(isinstance(cb, TrainCB) for cb in learn.cbs) == 1


# --- metrics


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
    for h in learn.history:
        assert abs(h['accuracy'] - h['MeanOfRows']) < 1e-6 and h['both'] == h['MeanOfRows']
    preds, y = learn.get_preds()
    assert abs(learn.history[-1]['accuracy'] - (preds.argmax(1) == y).float().mean().item()) < 1e-6
    assert abs(learn.history[-1]['valid_loss'] - F.cross_entropy(preds, y).item()) < 1e-5


def test_progress(capsys):
    learner([ProgressCB(show=False)]).fit(1)
    assert capsys.readouterr().out == ''
    learner([MetricsCB(), ProgressCB(n_lines=5)]).fit(10)
    out = capsys.readouterr().out.splitlines()
    assert (
        4 <= len(out) <= 7
        and all('\r' not in o and 'loss' in o for o in out)
        and out[-1].startswith('100%')
        and 'held-out' in out[-1]
    )


# --- looking


@pytest.mark.parametrize('generator', [False, True])
def test_looking_changes_no_byte(generator):
    import matplotlib

    matplotlib.use('Agg')
    learn = learner(
        [MetricsCB(accuracy), EMACB()],
        dls=data(generator=torch.Generator().manual_seed(5) if generator else None),
    ).fit(1)
    ema, history, opt = (
        copy.deepcopy(learn.cbs[2].model),
        copy.deepcopy(learn.history),
        copy.deepcopy(learn.opt.state_dict()),
    )
    for look in (
        lambda: learn.summary(),
        lambda: learn.show_batch(4),
        lambda: learn.predict(torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))),
        lambda: learn.get_preds(),
        lambda: learn.get_preds(learn.dls.train),
    ):
        for mode in (True, False):
            learn.model.train(mode)
            learn.model[4].train(not mode)  # mixed modes come back too
            before = bits(learn)
            look()
            assert bits(learn) == before
    assert (
        same(ema, learn.cbs[2].model)
        and history == learn.history
        and not any(m._forward_hooks for m in learn.model.modules())
    )
    assert repr(opt) == repr(learn.opt.state_dict())


def test_summary_counts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    model[0].bias.requires_grad_(False)
    s = Learner(model, data(), F.cross_entropy, cbs=[DeviceCB(CPU)]).summary()
    assert s.n_params == 54 + 6 + 288 + 3 and s.n_trainable == s.n_params - 6
    assert [r[2] for r in s.rows] == [(8, 6, 4, 4), (8, 6, 4, 4), (8, 96), (8, 3)]
    assert (
        abs(s.rows[0][4] * 1e6 - 2 * 9 * 6 * 16) < 1e-6
        and abs(s.rows[3][4] * 1e6 - 2 * 96 * 3) < 1e-6
        and abs(s.mflops * 1e6 - 2 * 9 * 6 * 16 - 2 * 96 * 3) < 1e-6
    )
    assert 'Conv2d' in repr(s) and '351 parameters' in repr(s)


# --- state on disk


def test_state_goes_round(tmp_path):
    state = {
        'a': torch.randn(2, 3, dtype=torch.float64),
        'b': {1: (2, [3.0, None, 'x'])},
        'h': torch.ones(2, dtype=torch.bfloat16),
        'inf': float('inf'),
        'e': torch.zeros(0, 2),
    }
    save_state(tmp_path, 'one', state)
    out = load_state(tmp_path)
    assert (
        all(torch.equal(out[k], state[k]) and out[k].dtype == state[k].dtype for k in 'ahe')
        and out['b'] == state['b']
        and out['inf'] == state['inf']
    )
    for i in range(4):
        save_state(tmp_path, 'one', {'i': i})
    assert load_state(tmp_path) == {'i': 3} and sum(p.is_dir() for p in tmp_path.iterdir()) == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


class Stop(Callback):
    "Writes a checkpoint after the epoch and stops."

    order = 1000

    def __init__(self, folder, done):
        self.folder, self.done = folder, done

    def cleanup_epoch(self, learn):
        if learn.epoch + 1 == self.done and learn.training == learn.passes[-1] and learn.complete:
            learn.save_checkpoint(self.folder)
            raise CancelFit


@pytest.fixture
def saved(tmp_path):
    learn = learner([MetricsCB(accuracy), EMACB()])
    learn.fit(4, cbs=[Stop(tmp_path / 'ck', 2)])
    return tmp_path / 'ck'


def damage(folder):
    "(name, what to do to a checkpoint, a word in the error)"
    one = next(p for p in folder.iterdir() if p.is_dir())
    t, s = one / 'tensors.safetensors', one / 'state.json'

    def cut(p, n):
        p.write_bytes(p.read_bytes()[:n])

    def flip(p, at):
        b = bytearray(p.read_bytes())
        b[at] ^= 1
        p.write_bytes(bytes(b))

    yield 'tensors cut', lambda: cut(t, t.stat().st_size // 2), 'truncated'
    yield 'tensors empty', lambda: cut(t, 0), 'truncated'
    yield 'tensors head', lambda: flip(t, 3), 'corrupted'
    yield 'tensors bit', lambda: flip(t, -5), 'corrupted'
    yield 'state cut', lambda: cut(s, s.stat().st_size - 7), 'truncated'
    yield 'state empty', lambda: cut(s, 0), 'truncated'
    yield (
        'state digit',
        lambda: s.write_text(s.read_text().replace('"n_steps", 10', '"n_steps", 11')),
        'corrupted',
    )
    yield 'foreign json', lambda: s.write_text('{"epoch": 3}'), 'foreign'
    yield 'foreign list', lambda: s.write_text('[1]'), 'foreign'
    yield 'foreign bytes', lambda: s.write_bytes(b'\x80\x04\x95pickle'), 'truncated'
    yield 'pointer', lambda: (folder / 'latest.json').write_text('{'), 'truncated'
    yield 'no tensors', lambda: t.unlink(), 'missing'
    yield 'gone', lambda: shutil.rmtree(one), 'missing'


def test_damaged_checkpoints_are_refused_and_nothing_changes(saved, tmp_path):
    for i, (name, _, word) in enumerate(list(damage(saved))):
        folder = tmp_path / f'copy{i}'
        shutil.copytree(saved, folder)
        dict((n, f) for n, f, _ in damage(folder))[name]()
        learn = learner([MetricsCB(accuracy), EMACB()], seed=7)
        before = bits(learn)
        with pytest.raises((ValueError, FileNotFoundError), match=word):
            learn.load_checkpoint(folder)
        assert bits(learn) == before and learn.resume is None, name


def test_other_models_are_refused_and_the_first_mismatch_is_named(saved):
    deeper = learner(seed=7)
    deeper.model.append(nn.Linear(3, 3))
    shallow = learner(seed=7)
    shallow.model = shallow.model[:6]
    half = learner(seed=7)
    half.model.double()
    gen = learner(seed=7, dls=data(generator=torch.Generator()))
    for learn, words in (
        (learner(seed=7, width=13), ["'1.weight'", '(12, 16)', '(13, 16)']),
        (deeper, ["no '7.weight'"]),
        (shallow, ["has '6.weight'"]),
        (half, ["'1.weight'", 'float64']),
        (learner(seed=7, opt_func=torch.optim.SGD), ['AdamW', 'SGD']),
        (learner(seed=7, dls=data(bs=10)), ['5 training batches', '4 here']),
        (gen, ['0 random generators', '1 here']),
    ):
        before = bits(learn)
        with pytest.raises(ValueError) as e:
            learn.load_checkpoint(saved)
        for w in words:
            assert w in str(e.value), (w, str(e.value))
        assert bits(learn) == before and learn.resume is None


def test_a_callback_that_is_missing_is_named_before_anything_happens(saved):
    learn = learner([MetricsCB()], seed=7).load_checkpoint(saved)
    before = bits(learn)
    with pytest.raises(ValueError, match='EMACB'):
        learn.fit(4)
    assert bits(learn) == before
    learn.cbs.append(EMACB())
    learn.fit(4)
    assert learn.n_steps == 20


def test_a_state_that_is_no_learner(tmp_path):
    save_state(tmp_path, 'x', {'weights': torch.ones(1)})
    with pytest.raises(ValueError, match="no 'model'"):
        learner().load_checkpoint(tmp_path)


def test_loading_executes_no_code(tmp_path, saved):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/owned',)

    one = next(p for p in saved.iterdir() if p.is_dir())
    for f in ('tensors.safetensors', 'state.json'):
        whole = (one / f).read_bytes()
        (one / f).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ValueError):
            learner([MetricsCB(), EMACB()]).load_checkpoint(saved)
        (one / f).write_bytes(whole)
    assert not (tmp_path / 'owned').exists()
    assert 'pickle' not in inspect.getsource(
        L.load_state
    ) and 'torch.load' not in inspect.getsource(L)


class Augment(Callback):
    "Draws from all three sources of random numbers."

    def before_batch(self, learn):
        if learn.training:
            x, y = learn.batch
            learn.batch = (
                x * np.random.uniform(0.9, 1.1)
                + random.uniform(-0.1, 0.1)
                + 0.1 * torch.randn_like(x),
                y,
            )


@pytest.mark.parametrize(
    'opt_func',
    [
        torch.optim.AdamW,
        torch.optim.RMSprop,
        lambda ps, lr: torch.optim.SGD(ps, lr, momentum=0.9, nesterov=True),
    ],
)
@pytest.mark.parametrize('generator', [False, True])
@pytest.mark.parametrize('stop', [1, 3])
def test_resume_to_the_last_bit(tmp_path, opt_func, generator, stop):
    def make(seed):
        dls = data(generator=torch.Generator().manual_seed(seed) if generator else None)
        return learner(
            [
                Augment(),
                MetricsCB(accuracy),
                ScheduleCB(),
                EMACB(0.9),
                GradClipCB(0.5),
                NaNStopCB(3),
            ],
            seed,
            dls,
            opt_func,
        )

    whole = make(1).fit(4)
    end = bits(whole, True)
    make(1).fit(4, cbs=[Stop(tmp_path, stop)])
    late = make(2).load_checkpoint(tmp_path)
    late.fit(4)
    assert end == bits(late, True) and same(whole.cbs[4].model, late.cbs[4].model)
    assert (
        whole.history == late.history
        and whole.lrs == late.lrs
        and whole.n_steps == late.n_steps
        and repr(whole.opt.state_dict()) == repr(late.opt.state_dict())
    )


def test_resume_with_torch_loader(tmp_path):
    def make(seed):
        x, y = data().train.tensors
        set_seed(seed)
        dl = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y),
            batch_size=8,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
        )
        return learner([MetricsCB()], seed, SimpleNamespace(train=dl, valid=data().valid))

    end = bits(make(1).fit(3), True)
    make(1).fit(3, cbs=[Stop(tmp_path, 1)])
    assert end == bits(make(2).load_checkpoint(tmp_path).fit(3), True)


def test_time_budget_counts_what_was_spent():
    cb, learn = TimeBudgetCB(0.3), learner()
    learn.fit(10**6, cbs=[cb], valid=False)
    state = cb.state_dict(learn)
    assert state['spent'] >= 0.3
    again = TimeBudgetCB(0.3)
    again.load_state_dict(learn, state)
    learn.training, learn.total_steps = True, learn.n_steps
    with pytest.raises(CancelFit):
        again.before_batch(learn)
