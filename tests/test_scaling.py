"""Training: killed at random moments, two processes against one, and what each callback claims to equal."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
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
    RecorderCB,
    ScheduleCB,
    SchedulerCB,
    accuracy,
    lr_find,
    overfit_one_batch,
)
from miniai.checkpoint import CheckpointCB, load_state
from miniai.data import DataLoaders, TensorLoader
from miniai.learner import EVENTS, Callback, CancelFit, DeviceCB, Learner
from miniai.scaling import (
    AccelerateCB,
    AccumulateCB,
    MixedPrecisionCB,
    MomentumCB,
    _Shard,
    cosine,
    one_cycle,
    smoothed,
)
from miniai.tensors import set_seed

CPU = torch.device('cpu')


def data(n=40, bs=8, shuffle=True):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 4, 4, generator=g)
    y = (x.mean((1, 2, 3)) > 0).long()
    return DataLoaders(
        TensorLoader(x, y, batch_size=bs, shuffle=shuffle),
        TensorLoader(x[:20], y[:20], batch_size=bs),
    )


def learner(
    cbs=(), seed=0, dls=None, lr=0.1, drop=0.2, opt_func=partial(torch.optim.SGD, momentum=0.9)
):
    set_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(drop), nn.Linear(12, 2)
    )
    return Learner(model, dls or data(), F.cross_entropy, lr, [DeviceCB(CPU), *cbs], opt_func)


def same(a, b):
    return all(
        torch.equal(p, q)
        for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values())
    )


def run(code, *args, timeout=100, launch=()):
    env = os.environ | dict(
        OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', PYTHONPATH=str(Path(__file__).parent.parent)
    )
    out = subprocess.run(
        [sys.executable, *launch, *(['-c', code] if not launch else [code]), *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


# --- checkpoints


class StopAfter(Callback):
    def __init__(self, n):
        self.n = n

    def after_epoch(self, learn):
        if learn.epoch + 1 == self.n and not learn.training:
            raise CancelFit


def full(seed):
    return learner(
        [MetricsCB(accuracy), ScheduleCB(one_cycle), MomentumCB(), EMACB(0.9), RecorderCB()], seed
    )


@pytest.mark.parametrize('stop', [KeyboardInterrupt, CancelFit])
def test_stopped_in_the_middle_of_an_epoch(tmp_path, stop):
    class Boom(Callback):
        def after_backward(self, learn):
            if learn.n_steps == 13:
                raise stop  # in the third of ten epochs

    whole, first = full(1).fit(10), full(1)
    try:
        first.fit(10, cbs=[CheckpointCB(tmp_path), Boom()])
    except KeyboardInterrupt:
        assert stop is KeyboardInterrupt
    steps = []

    class Count(Callback):
        def after_step(self, learn):
            steps.append(learn.n_steps)

    late = full(2).load_checkpoint(tmp_path).fit(10, cbs=[Count()])
    assert (
        same(whole, late)
        and whole.history == late.history
        and whole.cbs[5].losses == late.cbs[5].losses
        and steps == list(range(10, 50))
    )


def test_every_and_keep(tmp_path):
    done = lambda: sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    cb = CheckpointCB(tmp_path, every=3, keep=3)
    learner([cb]).fit(7)
    assert (
        done() == ['epoch-000003', 'epoch-000006', 'epoch-000007']
        and cb.last.name == 'epoch-000007'
    )
    learn = learner([CheckpointCB(tmp_path, keep=1)]).fit(1)
    assert done() == ['epoch-000001']  # a new run in an old folder: the new one is the latest
    assert learner().load_checkpoint(tmp_path).fit(1).n_steps == 5  # nothing is left to do
    for kw in (dict(every=0), dict(keep=0)):
        with pytest.raises(ValueError):
            CheckpointCB(tmp_path, **kw)
    (tmp_path / 'f').write_text('')
    with pytest.raises(ValueError, match='is a file'):
        CheckpointCB(tmp_path / 'f')


@pytest.mark.parametrize(
    'sched',
    [
        lambda: SchedulerCB(partial(S.OneCycleLR, max_lr=0.2, total_steps=30)),
        lambda: SchedulerCB(partial(S.StepLR, step_size=2), per='epoch'),
        lambda: SchedulerCB(partial(S.ReduceLROnPlateau, patience=1, mode='max'), per='epoch'),
        lambda: SchedulerCB(partial(S.MultiStepLR, milestones=[3, 4]), per='epoch'),
        lambda: SchedulerCB(
            lambda o: S.SequentialLR(o, [S.LinearLR(o), S.CosineAnnealingLR(o, 20)], [7])
        ),
    ],
)
@pytest.mark.filterwarnings('ignore:Detected call of')
def test_torch_schedulers_resume(tmp_path, sched):
    make = lambda seed: learner([MetricsCB(), RecorderCB(), sched()], seed)
    whole = make(1).fit(6)
    make(1).fit(6, cbs=[CheckpointCB(tmp_path), StopAfter(3)])
    late = make(2).load_checkpoint(tmp_path).fit(6)
    assert (
        whole.cbs[2].lrs == late.cbs[2].lrs and same(whole, late) and len(set(whole.cbs[2].lrs)) > 1
    )


KILL = '''
import os, random, signal, sys, time
import torch
sys.path.insert(0, sys.argv[2])
from test_training import full, CheckpointCB, load_state, same
torch.set_num_threads(1)
folder, dice, kills, loads, newest = sys.argv[1], random.Random(0), 0, 0, 0
EPOCHS = 10**6
full(0).fit(1, cbs=[CheckpointCB(folder + '-warm')])            # everything that's imported late is there before the first fork
while kills < 50:
    pid = os.fork()
    if pid == 0:                                     # a warm copy of this process: torch needn't be imported fifty times
        learn = full(os.getpid())
        if os.path.exists(folder + '/latest.json'): learn.load_checkpoint(folder)
        learn.fit(EPOCHS, cbs=[CheckpointCB(folder)])
        os._exit(3)
    time.sleep(dice.uniform(0.02, 0.3))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    kills += 1
    if os.path.exists(folder + '/latest.json'):
        done = load_state(folder)['epochs_done']; loads += 1
        assert done >= newest, (done, newest)
        newest = done
print(kills, loads, newest)
'''


def test_killed_fifty_times(tmp_path):
    # without end, killed again and again, each time carried on: and it's still the run that was never interrupted
    kills, loads, newest = map(int, run(KILL, tmp_path / 'ck', Path(__file__).parent).split())
    assert kills == 50 and loads >= 45 and newest > 50
    late = full(2).load_checkpoint(tmp_path / 'ck')
    assert (
        late.resume['epochs_done'] == newest
        and late.resume['n_steps'] == 5 * newest
        and len(late.resume['cbs']['MetricsCB']['history']) == newest
    )


# --- schedules


@given(n=st.integers(20, 200), warm=st.floats(0.1, 0.6))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_one_cycle_is_torchs(n, warm):
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    k = max(2, round(warm * (n - 1)))
    sched = S.OneCycleLR(
        opt, max_lr=1.0, total_steps=n, pct_start=(k + 1) / n, cycle_momentum=False
    )
    for i in range(n):
        assert math.isclose(
            opt.param_groups[0]['lr'], one_cycle(i / (n - 1), warmup=k / (n - 1)), abs_tol=1e-9
        )
        if i < n - 1:
            opt.step()
            sched.step()


def test_schedulers_step_when_they_should():
    with pytest.raises(ValueError, match="'batch' or 'epoch'"):
        SchedulerCB(None, per='step')
    with pytest.raises(ValueError, match='MetricsCB'):
        learner([SchedulerCB(S.ReduceLROnPlateau, per='epoch')]).fit(2)
    with pytest.raises(ValueError, match='sets the learning rate'):
        learner([SchedulerCB(None), ScheduleCB()])
    with pytest.raises(ValueError, match='no momentum'):
        learner([MomentumCB()], opt_func=torch.optim.Adagrad).fit(1)


# --- lr finder, one batch


def test_lr_find_leaves_no_trace():
    learn = full(3).fit(1)
    before = (
        [t.clone() for t in learn.model.state_dict().values()],
        repr(learn.opt.state_dict()),
        torch.get_rng_state(),
        repr(learn.history),
        learn.n_steps,
        list(learn.cbs),
        learn.cbs[4].t,
    )
    found = lr_find(learn, n_steps=80)
    overfit_one_batch(learn, 10)
    after = (
        list(learn.model.state_dict().values()),
        repr(learn.opt.state_dict()),
        torch.get_rng_state(),
        repr(learn.history),
        learn.n_steps,
        list(learn.cbs),
        learn.cbs[4].t,
    )
    assert (
        all(torch.equal(a, b) for a, b in zip(before[0], after[0]))
        and torch.equal(before[2], after[2])
        and before[1] == after[1]
        and before[3:] == after[3:]
    )
    assert 1e-3 < found.suggestion < 10

    class Boom(Callback):
        def after_step(self, learn):
            if learn.n_steps == 5:
                raise KeyboardInterrupt

    learn.cbs.append(Boom())
    with pytest.raises(KeyboardInterrupt):
        lr_find(learn)
    assert all(
        torch.equal(a, b) for a, b in zip(before[0], learn.model.state_dict().values())
    ) and torch.equal(before[2], torch.get_rng_state())


@given(curvature=st.floats(0.1, 100.0))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_lr_find_on_a_bowl(curvature):
    # for f(w) = c w^2/2 gradient descent diverges from a rate of 2/c on; the suggestion must lie below, and be no timid one
    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.w * torch.ones(len(x), 1)

    dls = SimpleNamespace(train=[(torch.zeros(1, 1), torch.zeros(1, 1))] * 5, valid=[])
    learn = Learner(
        Bowl(),
        dls,
        lambda p, y: curvature / 2 * (p**2).mean(),
        1e-3,
        [DeviceCB(CPU)],
        torch.optim.SGD,
    )
    s = lr_find(learn, 1e-5, 100.0, 200).suggestion
    assert 0.005 / curvature < s < 2 / curvature


def test_lr_find_that_never_falls():
    with pytest.raises(ValueError, match='smaller learning rate'):
        lr_find(learner(drop=0.0), 1e3, 1e6, 50)
    with pytest.raises(ValueError, match='low < high'):
        lr_find(learner(), 1.0, 0.1)


def test_smoothed():
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5) and smoothed(
        [1.0, 3.0], 0.5
    ) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])


# --- accumulation, precision


@given(n=st.integers(5, 60), bs=st.integers(1, 9), k=st.integers(1, 5))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_accumulated_is_one_large_batch(n, bs, k):
    a = learner([ScheduleCB(cosine)], dls=data(n, bs * k, shuffle=False), drop=0.0).fit(
        2, valid=False
    )
    b = learner(
        [ScheduleCB(cosine), AccumulateCB(k), GradClipCB(1e3)],
        dls=data(n, bs, shuffle=False),
        drop=0.0,
    ).fit(2, valid=False)
    assert a.n_steps == b.n_steps and a.lrs == b.lrs
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        assert torch.allclose(p, q, atol=1e-5)


class Fp16OnCPU(MixedPrecisionCB):
    "The way of float16, scaled loss and all, on a processor, where nobody would use it, to test it."

    def can(self, device):
        return True


def test_fp16_scales_skips_and_clips():
    seen, norms = [], []

    class Watch(Callback):
        order = 1

        def after_predict(self, learn):
            seen.append((learn.preds.dtype, learn.train_cb.scaler.get_scale()))

        def after_backward(self, learn):
            norms.append(
                torch.stack([p.grad.norm() for p in learn.model.parameters()]).norm().item()
            )

    mixed = Fp16OnCPU('fp16')
    learn = learner([mixed, GradClipCB(0.5), Watch()], drop=0.0).fit(3, valid=False)
    assert {d for d, _ in seen} == {torch.float32} and seen[0][1] == 65536.0 and max(norms) <= 0.51
    assert learn.train_cb.scaler is None and not torch.is_autocast_enabled('cpu')


def test_overflow_skips_the_step_and_lowers_the_scale():
    scales, ws = [], []

    class Watch(Callback):
        order = -14.5  # after the gradients were unscaled

        def before_backward(self, learn):
            scales.append(learn.train_cb.scaler.get_scale())
            ws.append(learn.model[1].weight.detach().clone())
            if learn.n_steps == 1:
                learn.loss = learn.loss * torch.inf

    learner([Fp16OnCPU('fp16'), Watch()], drop=0.0).fit(1, valid=False)
    assert (
        torch.equal(ws[1], ws[2])
        and not torch.equal(ws[0], ws[1])
        and not torch.equal(ws[2], ws[3])
        and scales[:3] == [65536.0, 65536.0, 32768.0]
    )


def test_mixed_precision_with_accumulation_and_resume(tmp_path):
    make = lambda seed: learner(
        [Fp16OnCPU('fp16'), AccumulateCB(2), GradClipCB(1.0), ScheduleCB()], seed
    )
    whole = make(1).fit(4)
    make(1).fit(4, cbs=[CheckpointCB(tmp_path), StopAfter(2)])
    assert same(whole, make(2).load_checkpoint(tmp_path).fit(4)) and whole.n_steps == 12


def test_inactive_says_so_once(capsys):
    if torch.cuda.is_available():
        pytest.skip('here it would be active')
    learner([MixedPrecisionCB('fp16')]).fit(1).fit(1)
    assert capsys.readouterr().out.count('inactive') == 1
    with pytest.raises(ValueError, match="'bf16' or 'fp16'"):
        MixedPrecisionCB('half')


@pytest.mark.parametrize('event', EVENTS)
def test_interrupts_leave_no_precision_behind(event):
    class Boom(Callback):
        order = 500

    boom = Boom()
    setattr(boom, event, lambda learn: (_ for _ in ()).throw(KeyboardInterrupt))
    learn = learner(
        [
            MixedPrecisionCB('bf16'),
            AccumulateCB(3),
            RecorderCB(),
            MomentumCB(),
            SchedulerCB(lambda o: S.StepLR(o, 1)),
            EMACB(),
        ]
    )
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=[boom])
    assert (
        not torch.is_autocast_enabled('cpu')
        and learn.train_cb.weight == 1
        and learn.train_cb.scaler is None
        and all(p.grad is None for p in learn.model.parameters())
    )
    learn.fit(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
def test_mixed_precision_on_a_gpu(dtype):
    learn = Learner(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2)),
        data(400),
        F.cross_entropy,
        0.1,
        [DeviceCB('cuda'), MixedPrecisionCB(dtype), MetricsCB(accuracy)],
        torch.optim.SGD,
    ).fit(20)
    assert learn.history[-1]['accuracy'] > 0.9


# --- several processes


@given(n=st.integers(1, 50), bs=st.integers(1, 9), world=st.integers(1, 5))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_shares_make_the_whole(n, bs, world):
    dl = TensorLoader(torch.arange(n), torch.arange(n), batch_size=bs)
    shares, large = (
        [_Shard(dl, r, world) for r in range(world)],
        TensorLoader(torch.arange(n), torch.arange(n), batch_size=bs * world),
    )
    seen = 0
    for parts, (whole, _) in zip(zip(*shares), large):
        counted = [p[1] for p, s in zip(parts, shares) if s.counts]
        assert torch.equal(torch.cat(counted), whole)
        # the mean over processes of weighted means is the mean of all rows
        mean = sum(s.weight * p[1].float().mean() for p, s in zip(parts, shares)) / world
        assert math.isclose(mean, whole.float().mean(), rel_tol=1e-5)
        seen += 1
    assert seen == len(large) == len(shares[0])


SCRIPT = '''
import json, sys
import torch
from accelerate import Accelerator
sys.path.insert(0, sys.argv[1])
from test_training import *
out, bs = sys.argv[2], int(sys.argv[3])
dls = data(74, bs)                                   # the last batches are odd ones
acc = AccelerateCB(Accelerator(cpu=True))
learn = learner([MetricsCB(accuracy, seen=Seen()), ScheduleCB(), EMACB(0.9), RecorderCB(), acc, CheckpointCB(out + '/ck')], dls=dls, drop=0.)
learn.fit(4)
preds, y = learn.get_preds()
assert len(y) == 20 and torch.equal(y, dls.valid.tensors[1]) and learn.dls is dls and type(learn.model).__name__ == 'Sequential'
if acc.is_main:
    torch.save(learn.model.state_dict(), out + '/weights.pt'); torch.save(learn.cbs[3].model.state_dict(), out + '/ema.pt')
    json.dump(dict(history=learn.history, n_steps=learn.n_steps, world=acc.acc.num_processes), open(out + '/h.json', 'w'))
'''


class Seen:
    "Collects like torchmetrics: how many rows, and how many right."

    def __init__(self):
        self.reset()

    def reset(self):
        self.n, self.right = 0, 0

    def update(self, preds, y):
        self.n += len(y)
        self.right += (preds.argmax(1) == y).sum().item()

    def compute(self):
        return {'rows': self.n, 'right': self.right}


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    pytest.importorskip('accelerate')
    script = tmp_path / 'train.py'
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    for name, world, bs in (('one', 1, 16), ('two', 2, 8)):
        (tmp_path / name).mkdir()
        launch = (
            ()
            if world == 1
            else (
                '-m',
                'accelerate.commands.launch',
                '--multi_gpu',
                '--num_processes',
                '2',
                '--num_machines',
                '1',
                '--mixed_precision',
                'no',
                '--dynamo_backend',
                'no',
                '--main_process_port',
                '0',
            )
        )
        run(str(script) if launch else SCRIPT, here, tmp_path / name, bs, launch=launch)
    one, two = (json.loads((tmp_path / n / 'h.json').read_text()) for n in ('one', 'two'))
    assert (one['world'], two['world']) == (1, 2) and one['n_steps'] == two['n_steps'] == 20
    for a, b in zip(one['history'], two['history']):
        assert a.keys() == b.keys() and b['rows'] == 20
        for k in a:
            assert abs(a[k] - b[k]) < 1e-5, (k, a, b)
    for f in ('weights.pt', 'ema.pt'):
        a, b = (torch.load(tmp_path / n / f, weights_only=True) for n in ('one', 'two'))
        for k in a:
            assert (a[k] - b[k]).abs().max() < 1e-5
    # one process wrote, and what it wrote carries on alone
    assert sorted(p.name for p in (tmp_path / 'two' / 'ck').iterdir()) == [
        'epoch-000003',
        'epoch-000004',
        'latest.json',
    ]
    assert load_state(tmp_path / 'two' / 'ck')['epochs_done'] == 4


def test_without_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(ImportError, match='pip install accelerate'):
        AccelerateCB()
