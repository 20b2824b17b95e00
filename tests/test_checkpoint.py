"""Checkpoints: resumed to the last bit, killed at random moments, damaged, foreign, mismatched."""

import os
import pickle
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from miniai.callbacks import (
    EMACB,
    GradClipCB,
    MetricsCB,
    NaNStopCB,
    RecorderCB,
    ScheduleCB,
    SchedulerCB,
    accuracy,
)
from miniai.checkpoint import CheckpointCB, atomic_write, checkpoints, load_state, save_state
from miniai.data import DataLoaders, TensorLoader, generators_of
from miniai.learner import Callback, CancelFit, DeviceCB, Learner
from miniai.tensors import set_seed

CPU = torch.device('cpu')


def data(bs=8, seed=None, shift=0.0):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 4, 4, generator=g) + shift
    y = torch.randint(0, 3, (40,), generator=g)
    order = None if seed is None else torch.Generator().manual_seed(seed)
    train = TensorLoader(x, y, batch_size=bs, shuffle=True, generator=order)
    return DataLoaders(train, TensorLoader(x[:20], y[:20], batch_size=bs))


def learner(cbs=(), seed=0, dls=None, width=12, lr=1e-2, opt_func=torch.optim.AdamW):
    set_seed(seed)
    body = [nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)]
    model = nn.Sequential(nn.Flatten(), *body, nn.Linear(width, 3))
    return Learner(model, dls or data(), F.cross_entropy, lr, [DeviceCB(CPU), *cbs], opt_func)


def full(seed, dls=None, opt_func=torch.optim.AdamW):
    cbs = [Augment(), MetricsCB(accuracy), ScheduleCB(), EMACB(0.9), GradClipCB(0.5)]
    return learner([*cbs, NaNStopCB(3), RecorderCB()], seed, dls, opt_func=opt_func)


class Augment(Callback):
    "Draws from all three sources of random numbers."

    def before_batch(self, learn):
        if learn.training:
            x, y = learn.batch
            x = x * np.random.uniform(0.9, 1.1) + random.uniform(-0.1, 0.1)
            learn.batch = x + 0.1 * torch.randn_like(x), y


class StopAfter(Callback):
    "Ends the fit after `n` epochs, or in the middle of the next, by `what`."

    order = 2000

    def __init__(self, n, what=None):
        self.n, self.what = n, what

    def cleanup_epoch(self, learn):
        if self.what is None and learn.epoch + 1 == self.n and not learn.training:
            raise CancelFit

    def after_backward(self, learn):
        if self.what and learn.epoch == self.n and learn.i == 2:
            raise self.what


def bits(learn):
    "Everything that could change, as bytes."
    tensors = [*learn.model.state_dict().values(), torch.get_rng_state()]
    tensors += [g.get_state() for g in generators_of(learn.dls)]
    return [t.numpy().tobytes() for t in tensors] + [random.getstate(), repr(np.random.get_state())]


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


OPTIMISERS = [
    torch.optim.AdamW,
    torch.optim.RMSprop,
    partial(torch.optim.SGD, momentum=0.9, nesterov=True),
]


@pytest.mark.parametrize('opt_func', OPTIMISERS)
@pytest.mark.parametrize('seeds', [(None, None), (1, 2)])
@pytest.mark.parametrize('stop', [(1,), (3,), (2, KeyboardInterrupt), (2, CancelFit)])
def test_resume_to_the_last_bit(tmp_path, opt_func, seeds, stop):
    whole = full(1, data(seed=seeds[0]), opt_func).fit(4)
    end = bits(whole)
    try:
        full(1, data(seed=seeds[0]), opt_func).fit(
            4, cbs=[CheckpointCB(tmp_path), StopAfter(*stop)]
        )
    except KeyboardInterrupt:
        assert stop[1] is KeyboardInterrupt
    late = full(2, data(seed=seeds[1]), opt_func)
    late.fit(4, cbs=[CheckpointCB(tmp_path, resume=True)])
    assert end == bits(late) and same(whole.cbs[4].model, late.cbs[4].model)
    assert whole.history == late.history and whole.lrs == late.lrs
    assert whole.n_steps == late.n_steps == 20 and whole.cbs[7].losses == late.cbs[7].losses
    assert repr(whole.opt.state_dict()) == repr(late.opt.state_dict())


def test_resume_with_torch_loader(tmp_path):
    def make(seed):
        rows = TensorDataset(*data().train.tensors)
        order = torch.Generator().manual_seed(seed)
        train = DataLoader(rows, batch_size=8, shuffle=True, generator=order)
        return learner([MetricsCB()], seed, SimpleNamespace(train=train, valid=data().valid))

    end = bits(make(1).fit(3))
    make(1).fit(3, cbs=[CheckpointCB(tmp_path), StopAfter(1)])
    assert end == bits(make(2).fit(3, cbs=[CheckpointCB(tmp_path, resume=True)]))


SCHEDULERS = dict(
    one_cycle=lambda: SchedulerCB(partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=30)),
    steps=lambda: SchedulerCB(partial(lr_scheduler.StepLR, step_size=2), per='epoch'),
    plateau=lambda: SchedulerCB(
        partial(lr_scheduler.ReduceLROnPlateau, patience=1, mode='max'), per='epoch'
    ),
    sequence=lambda: SchedulerCB(
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 20)], [7]
        )
    ),
)


@pytest.mark.parametrize('name', SCHEDULERS)
@pytest.mark.filterwarnings('ignore:Detected call of')
def test_torch_schedulers_resume(tmp_path, name):
    def make(seed):
        return learner([MetricsCB(), RecorderCB(), SCHEDULERS[name]()], seed)

    whole = make(1).fit(6)
    make(1).fit(6, cbs=[CheckpointCB(tmp_path), StopAfter(3)])
    late = make(2).fit(6, cbs=[CheckpointCB(tmp_path, resume=True)])
    assert whole.cbs[2].lrs == late.cbs[2].lrs and len(set(whole.cbs[2].lrs)) > 1
    assert same(whole.model, late.model)


KILLED = '''
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
from test_checkpoint import CheckpointCB, checkpoints, full, load_state
folder, rng, loads, newest = sys.argv[1], random.Random(0), 0, 0
full(0).fit(1, cbs=[CheckpointCB(folder + '-warm')])    # imports are done before the first fork
for kill in range(50):
    pid = os.fork()
    if pid == 0:
        full(os.getpid()).fit(10**6, cbs=[CheckpointCB(folder, resume=True)])
        os._exit(3)
    time.sleep(rng.uniform(0.02, 0.2))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    there = checkpoints(folder) if os.path.isdir(folder) else []
    assert len(there) <= 3
    if there:
        loads += 1
        done = load_state(there[-1])['epochs_done']
        assert done >= newest, (done, newest)
        newest = done
print(loads, newest)
'''


def test_killed_fifty_times(tmp_path):
    "Killed again and again and carried on each time, it is still the run that never stopped."
    folder = tmp_path / 'ck'
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(sys.path))
    words = [sys.executable, '-c', KILLED, folder, Path(__file__).parent]
    out = subprocess.run(words, env=env, capture_output=True, text=True, timeout=200)
    assert out.returncode == 0, out.stderr[-3000:]
    loads, newest = map(int, out.stdout.split())
    assert loads >= 20 and newest >= 3
    state = load_state(checkpoints(folder)[-1])
    assert state['n_steps'] == 5 * newest and len(state['cbs']['MetricsCB']['history']) == newest
    # what the kills left is swept, and nothing else
    parts = list(folder.glob('.*.part'))
    foreign = folder / '.epoch-000001.ckpt.1.part'
    foreign.write_bytes(b'not ours')
    for p in [*parts, foreign]:
        os.utime(p, (time.time() - 100,) * 2)
    with pytest.raises(ValueError, match='epochs'):
        full(3).fit(4, cbs=[CheckpointCB(folder, resume=True)])
    assert list(folder.glob('.*.part')) == [foreign]


def test_every_and_keep(tmp_path):
    def names():
        return [p.name for p in checkpoints(tmp_path)]

    cb = CheckpointCB(tmp_path, every=3, keep=3)
    learn = learner([cb]).fit(7)
    assert names() == [f'epoch-00000{i}.ckpt' for i in (3, 6, 7)]
    for again in learn, learner([cb]):
        with pytest.raises(ValueError, match='of an earlier fit'):
            again.fit(7)  # it would replace them one by one
    assert learner([CheckpointCB(tmp_path, resume=True)]).fit(7).n_steps == 35  # nothing left to do
    for bad in (dict(every=0), dict(keep=0)):
        with pytest.raises(ValueError, match='is 0, expected'):
            CheckpointCB(tmp_path, **bad)


def test_only_our_own_files_are_ever_removed(tmp_path):
    decoys = {
        'epoch-000000.ckpt': b'somebody else',
        'state.json': b'{}',
        'data/state.json': b'{}',
        '.epoch-000001.ckpt.7.part': b'hello',
    }
    for name, content in decoys.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match='resume=True'):
        learner().fit(3, cbs=[CheckpointCB(tmp_path, keep=1)])
    (tmp_path / 'epoch-000000.ckpt').rename(tmp_path / 'epoch-zero')
    learner().fit(3, cbs=[CheckpointCB(tmp_path, keep=1)])
    assert len(checkpoints(tmp_path)) == 1
    # another run in the same folder is refused, and changes nothing
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(ValueError, match='an earlier fit'):
        learner().fit(3, cbs=[CheckpointCB(tmp_path)])
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before
    for name, content in decoys.items():
        name = name.replace('epoch-000000.ckpt', 'epoch-zero')
        assert (tmp_path / name).read_bytes() == content


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ck')
    learner([MetricsCB(accuracy), EMACB()]).fit(4, cbs=[CheckpointCB(folder), StopAfter(2)])
    return folder


def refused(folder, word, learn=None):
    learn = learn or learner([MetricsCB(accuracy), EMACB()], seed=7)
    before = bits(learn)
    with pytest.raises(ValueError) as e:
        learn.fit(4, cbs=[CheckpointCB(folder, resume=True)])
    for w in [word] if isinstance(word, str) else word:
        assert w in str(e.value), (w, str(e.value))
    assert bits(learn) == before


def test_every_flipped_bit_and_every_cut_is_noticed(saved, tmp_path):
    whole, rng = checkpoints(saved)[-1].read_bytes(), random.Random(0)
    bad = [whole[: rng.randrange(len(whole))] for _ in range(100)] + [b'', whole[:-1]]
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        bad.append(bytes(flipped))
    for content in bad:
        (tmp_path / 'x').write_bytes(content)
        with pytest.raises(ValueError, match='damaged|cut short'):
            load_state(tmp_path / 'x')
    (tmp_path / 'epoch-000002.ckpt').write_bytes(bad[-1])
    refused(
        tmp_path, 'Remove it to use an older one' if bad[-1][:20] == whole[:20] else 'cut short'
    )


def test_other_fits_are_refused_and_the_first_difference_is_named(saved):
    def other(**kw):
        return learner([MetricsCB(accuracy), EMACB()], seed=7, **kw)

    deeper, half = other(), other()
    deeper.model.append(nn.Linear(3, 3))
    half.model.double()
    refused(saved, ["'1.weight'", '(12, 16)', '(13, 16)'], other(width=13))
    refused(saved, ["'6.weight'", 'None'], deeper)
    refused(saved, ["'1.weight'", 'float64'], half)
    refused(saved, ['AdamW', 'SGD'], other(opt_func=torch.optim.SGD))
    refused(saved, ['batches in an epoch: 5 there, 4 here'], other(dls=data(bs=10)))
    refused(saved, ['random generators', '0 there, 1 here'], other(dls=data(seed=1)))
    refused(saved, ['data'], other(dls=data(shift=1.0)))
    refused(saved, ['optimiser, lr: 0.01 there, 0.1 here'], other(lr=0.1))
    refused(saved, ['callbacks', 'EMACB'], learner([MetricsCB(accuracy)], seed=7))


def test_state_goes_round(tmp_path):
    state = {
        'a': torch.randn(2, 3, dtype=torch.float64),
        'b': {1: (2, [3.0, None, 'x'])},
        'h': torch.ones(2, dtype=torch.bfloat16),
        'inf': float('inf'),
    }
    save_state(tmp_path / 's', state)
    out = load_state(tmp_path / 's')
    assert torch.equal(out['a'], state['a']) and torch.equal(out['h'], state['h'])
    assert out['b'] == state['b'] and out['inf'] == state['inf']
    with pytest.raises(TypeError, match='a checkpoint holds tensors'):
        save_state(tmp_path / 's', {'f': Path('x')})
    assert load_state(tmp_path / 's')['inf'] == state['inf']  # the old one is whole
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / 'none')


def test_loading_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/owned',)

    save_state(tmp_path / 's', {'a': 1})
    head = (tmp_path / 's').read_bytes()[:20]
    evil = pickle.dumps(Evil())
    import hashlib

    for content in (evil, head + evil, head + hashlib.sha256(evil).digest() + evil):
        (tmp_path / 's').write_bytes(content)
        with pytest.raises((ValueError, pickle.UnpicklingError)):
            load_state(tmp_path / 's')
    assert not (tmp_path / 'owned').exists()


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as f:
            f.write(b'half')
            raise KeyboardInterrupt
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    with pytest.raises(IsADirectoryError, match='is a folder'):
        with atomic_write(tmp_path):
            pass
    with pytest.raises(OSError):
        learner().fit(1, cbs=[CheckpointCB(path)])  # a file where a folder should be


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    "The size of files is limited in a process of its own: the third checkpoint can't be written."
    code = '''if True:
        import resource, signal, sys
        sys.path.insert(0, sys.argv[2])
        from test_checkpoint import *
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        class Full(Callback):
            def before_epoch(self, learn):
                if learn.epoch == 2:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        learn = learner([MetricsCB(), EMACB()])
        try: learn.fit(4, cbs=[CheckpointCB(sys.argv[1]), Full()])
        except OSError as e: print(e, [p.name for p in checkpoints(sys.argv[1])])
    '''
    words = [sys.executable, '-c', code, tmp_path / 'ck', Path(__file__).parent]
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    out = subprocess.run(words, capture_output=True, text=True, env=env, timeout=100)
    kept = "File too large): it is as it was ['epoch-000001.ckpt', 'epoch-000002.ckpt']"
    assert kept in out.stdout, out.stderr
    for p in checkpoints(tmp_path / 'ck'):
        load_state(p)
    assert not list((tmp_path / 'ck').glob('.*'))


def test_persistent_workers_are_refused(tmp_path):
    rows = TensorDataset(*data().train.tensors)
    train = DataLoader(rows, batch_size=8, num_workers=1, persistent_workers=True)
    learn = learner(dls=SimpleNamespace(train=train, valid=None))
    with pytest.raises(ValueError, match='persistent_workers'):
        learn.fit(1, cbs=[CheckpointCB(tmp_path)])


def test_a_folder_that_cant_be_written_is_noticed_before_training(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    def fit(folder):
        learn = learner([CheckpointCB(folder)])
        with pytest.raises(OSError, match="can't write checkpoints to the folder .*give another"):
            learn.fit(1)
        assert learn.n_steps == 0

    (tmp_path / 'file').write_text('mine')
    fit(tmp_path / 'file')
    fit(tmp_path / 'file' / 'below')
    assert (tmp_path / 'file').read_text() == 'mine'
    monkeypatch.setattr('tempfile.TemporaryFile', fail)
    fit(tmp_path / 'read-only')


@pytest.mark.parametrize('how', [dict(every=2.5), dict(keep=float('nan')), dict(every=True)])
def test_whole_epochs(how, tmp_path):
    with pytest.raises(ValueError, match='whole number'):
        CheckpointCB(tmp_path, **how)
