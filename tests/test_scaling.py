"""Scaling: what accumulation, half precision and several processes claim to equal."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from miniai.callbacks import EMACB, GradClipCB, MetricsCB, RecorderCB, ScheduleCB, accuracy
from miniai.checkpoint import CheckpointCB, checkpoints, load_state
from miniai.data import DataLoaders, TensorLoader
from miniai.learner import EVENTS, Callback, CancelFit, DeviceCB, Learner
from miniai.scaling import AccelerateCB, AccumulateCB, MixedPrecisionCB, _Shard
from miniai.tensors import set_seed

CPU = torch.device('cpu')
SGD = partial(torch.optim.SGD, momentum=0.9)


def data(n=40, bs=8, shuffle=True):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 4, 4, generator=g)
    y = (x.mean((1, 2, 3)) > 0).long()
    valid = TensorLoader(x[:20], y[:20], batch_size=bs)
    return DataLoaders(TensorLoader(x, y, batch_size=bs, shuffle=shuffle), valid)


def learner(cbs=(), seed=0, dls=None, drop=0.2):
    set_seed(seed)
    body = [nn.Linear(16, 12), nn.ReLU(), nn.Dropout(drop), nn.Linear(12, 2)]
    model = nn.Sequential(nn.Flatten(), *body)
    return Learner(model, dls or data(), F.cross_entropy, 0.1, [DeviceCB(CPU), *cbs], SGD)


def same(a, b):
    pairs = zip(a.model.state_dict().values(), b.model.state_dict().values())
    return all(torch.equal(p, q) for p, q in pairs)


class StopAfter(Callback):
    def __init__(self, n):
        self.n = n

    def after_epoch(self, learn):
        if learn.epoch + 1 == self.n and not learn.training:
            raise CancelFit


@given(n=st.integers(5, 60), bs=st.integers(1, 9), k=st.integers(1, 5))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_accumulated_is_one_large_batch(n, bs, k):
    large, small = data(n, bs * k, shuffle=False), data(n, bs, shuffle=False)
    a = learner([ScheduleCB()], dls=large, drop=0.0).fit(2, valid=False)
    cbs = [ScheduleCB(), AccumulateCB(k), GradClipCB(1e3)]
    b = learner(cbs, dls=small, drop=0.0).fit(2, valid=False)
    assert a.n_steps == b.n_steps and a.lrs == b.lrs
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        assert torch.allclose(p, q, atol=1e-5)


class Fp16OnCPU(MixedPrecisionCB):
    "The way of float16, scaled loss and all, on a processor, where nobody would use it."

    def can(self, device):
        return True


class Watch(Callback):
    "Writes down types, scales, gradient norms and weights."

    order = -14

    def __init__(self, mixed, spoil=None):
        self.mixed, self.spoil = mixed, spoil
        self.dtypes, self.scales, self.norms, self.weights = [], [], [], []

    def after_predict(self, learn):
        self.dtypes.append(learn.preds.dtype)

    def before_backward(self, learn):
        self.scales.append(self.mixed.scaler.get_scale())
        self.weights.append(learn.model[1].weight.detach().clone())
        if learn.n_steps == self.spoil:
            learn.loss = learn.loss * torch.inf

    def before_step(self, learn):
        norms = [p.grad.norm() for p in learn.model.parameters()]
        self.norms.append(torch.stack(norms).norm().item())


def test_fp16_scales_and_clips():
    mixed = Fp16OnCPU('fp16')
    watch = Watch(mixed)
    learner([mixed, GradClipCB(0.5), watch], drop=0.0).fit(3, valid=False)
    assert set(watch.dtypes) == {torch.float32} and watch.scales[0] == 65536.0
    assert max(watch.norms) <= 0.51 and mixed.scaler is None
    assert not torch.is_autocast_enabled('cpu')


def test_overflow_skips_the_step_and_lowers_the_scale():
    mixed = Fp16OnCPU('fp16')
    watch = Watch(mixed, spoil=1)
    watch.order = -20  # before the loss is scaled
    learner([mixed, watch], drop=0.0).fit(1, valid=False)
    equal = [torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:])]
    assert equal == [False, True, False, False]
    assert watch.scales[:3] == [65536.0, 65536.0, 32768.0]


def test_mixed_precision_with_accumulation_and_resume(tmp_path):
    def make(seed):
        return learner([Fp16OnCPU('fp16'), AccumulateCB(2), GradClipCB(1.0), ScheduleCB()], seed)

    whole = make(1).fit(4)
    make(1).fit(4, cbs=[CheckpointCB(tmp_path), StopAfter(2)])
    late = make(2).fit(4, cbs=[CheckpointCB(tmp_path, resume=True)])
    assert same(whole, late) and whole.n_steps == 12


def test_inactive_says_so_once(capsys):
    if torch.cuda.is_available():
        pytest.skip('here it would be active')
    learner([MixedPrecisionCB('fp16')]).fit(1).fit(1)
    assert capsys.readouterr().out.count('inactive') == 1
    with pytest.raises(ValueError, match="'bf16' or 'fp16'"):
        MixedPrecisionCB('half')
    with pytest.raises(ValueError, match='n is .*expected'):
        AccumulateCB(0)


@pytest.mark.parametrize('event', EVENTS)
def test_interrupts_leave_no_precision_behind(event):
    def boom(learn):
        raise KeyboardInterrupt

    late = Callback()
    late.order = 500
    setattr(late, event, boom)
    learn = learner([MixedPrecisionCB('bf16'), AccumulateCB(3), RecorderCB(), EMACB()])
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=[late])
    assert not torch.is_autocast_enabled('cpu')
    assert all(p.grad is None for p in learn.model.parameters())
    learn.fit(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
def test_mixed_precision_on_a_gpu(dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))
    cbs = [DeviceCB('cuda'), MixedPrecisionCB(dtype), MetricsCB(accuracy)]
    learn = Learner(model, data(400), F.cross_entropy, 0.1, cbs, torch.optim.SGD).fit(20)
    assert learn.history[-1]['accuracy'] > 0.9


@given(n=st.integers(1, 50), bs=st.integers(1, 9), world=st.integers(1, 5))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_shares_make_the_whole(n, bs, world):
    rows = torch.arange(n)
    shares = [_Shard(TensorLoader(rows, rows, batch_size=bs), r, world) for r in range(world)]
    large = TensorLoader(rows, rows, batch_size=bs * world)
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
from test_scaling import *
out, bs = sys.argv[2], int(sys.argv[3])
dls = data(74, bs)                                   # the last batches are odd ones
acc = AccelerateCB(Accelerator(cpu=True))
ema, metrics = EMACB(0.9), MetricsCB(accuracy, seen=Right())
cbs = [metrics, ScheduleCB(), ema, RecorderCB(), acc, CheckpointCB(out + '/ck')]
learn = learner(cbs, dls=dls, drop=0.).fit(4)
preds, y = learn.get_preds()
assert len(y) == 20 and torch.equal(y, dls.valid.tensors[1])
assert learn.dls is dls and type(learn.model).__name__ == 'Sequential' and learn.is_main
if acc.acc.is_main_process:
    torch.save(learn.model.state_dict(), out + '/weights.pt')
    torch.save(ema.model.state_dict(), out + '/ema.pt')
    figures = dict(history=learn.history, n_steps=learn.n_steps, world=acc.acc.num_processes)
    json.dump(figures, open(out + '/h.json', 'w'))
'''


class Right:
    "Collects as torchmetrics do: the share of rows that are right."

    def __init__(self):
        self.reset()

    def reset(self):
        self.n, self.right = 0, 0

    def update(self, preds, y):
        self.n, self.right = self.n + len(y), self.right + (preds.argmax(1) == y).sum().item()

    def compute(self):
        return self.right / self.n + 100 * self.n


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    pytest.importorskip('accelerate')
    script = tmp_path / 'train.py'
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    env = os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true')
    env['PYTHONPATH'] = os.pathsep.join([str(here.parent), *sys.path])
    launch = (
        '-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 '
        '--mixed_precision no --dynamo_backend no --main_process_port 0'
    )
    for name, words, bs in (('one', [], 16), ('two', launch.split(), 8)):
        words = [sys.executable, *words, script, here, tmp_path / name, str(bs)]
        for _ in range(2):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            (tmp_path / name).mkdir()
            out = subprocess.run(words, env=env, capture_output=True, text=True, timeout=200)
            # the free port that the launcher chose may be taken before it's used
            if 'in use' not in out.stderr and 'onnect' not in out.stderr:
                break
        assert out.returncode == 0, out.stderr[-3000:]
    one, two = (json.loads((tmp_path / n / 'h.json').read_text()) for n in ('one', 'two'))
    assert (one['world'], two['world']) == (1, 2) and one['n_steps'] == two['n_steps'] == 20
    for a, b in zip(one['history'], two['history'], strict=True):
        assert a.keys() == b.keys() and round(b['seen'] // 100) == 20
        for k in a:
            assert abs(a[k] - b[k]) < 1e-4, (k, a, b)
    for f in ('weights.pt', 'ema.pt'):
        a, b = (torch.load(tmp_path / n / f, weights_only=True) for n in ('one', 'two'))
        for k in a:
            assert (a[k] - b[k]).abs().max() < 1e-4
    # one process wrote
    there = checkpoints(tmp_path / 'two' / 'ck')
    assert [p.name for p in there] == ['epoch-000003.ckpt', 'epoch-000004.ckpt']
    assert load_state(there[-1])['epochs_done'] == 4


def test_without_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(ImportError, match='pip install accelerate'):
        AccelerateCB()
