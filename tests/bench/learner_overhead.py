"""What the Learner costs: images per second of a hand-written loop and of the Learner; the loaders
against torch's; the import.

    python tests/bench/learner_overhead.py --seconds 0.1 --pairs 101

Both loops train the same network with AdamW, from the same in-memory loader, on one thread:
- same: the hand-written loop against itself, which shows what the measurement can tell apart;
- bare: the five lines, against a Learner without callbacks;
- usual: the loop with the same schedule and the loss averaged over each epoch, against a Learner
  with DeviceCB, MetricsCB, ScheduleCB and ProgressCB (the loop moves no batch and reports nothing
  as it goes, so these two are all the Learner's cost);
- equal: as usual, but the loop too moves its batches and prints the smoothed loss ten times.
They take turns in short blocks, so that whatever else the machine does meets both, and the clock
counts this process's work only. "lost" is the median over the pairs of blocks, with its quartiles;
"quiet" compares the fastest twentieth of each loop's blocks, where the machine did least besides.
What the Learner does for a batch is the same whatever the model, so its cost in microseconds,
measured on the tiny one where it shows, is also given as a share of the U-Net's batch: there it is
far below what the clock can tell apart. Goals, for usual: tiny at most 5%, U-Net at most 1%.
"""

import argparse
import contextlib
import io
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from miniai.callbacks import MetricsCB, ProgressCB, ScheduleCB, warmup_cosine
from miniai.data import DataLoaders, TensorLoader
from miniai.learner import DeviceCB, Learner


def tiny():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))


def unet():
    from miniai.unet import UNet

    class Denoise(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = UNet()

        def forward(self, x):
            return self.net(x, torch.zeros(len(x)))

    return Denoise()


def by_hand(model, dls, loss_func, n_epochs, book=False, report=False):
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step, total, avg = 0, n_epochs * len(dls.train), None
    model.train()
    for epoch in range(n_epochs):
        sums, n = 0.0, 0
        for x, y in dls.train:
            if report:
                x, y = x.to('cpu'), y.to('cpu')
            loss = loss_func(model(x), y)
            loss.backward()
            if book:
                for g in opt.param_groups:
                    g['lr'] = 1e-3 * warmup_cosine(step / total)
            opt.step()
            opt.zero_grad()
            step += 1
            if book:
                sums, n = sums + loss.detach() * len(x), n + len(x)
            if report:
                avg = (
                    loss.detach()
                    if avg is None
                    else avg + (loss.detach() - avg) * max(0.02, 1 / step)
                )
                if step % max(1, total // 10) == 0:
                    print(f'{step / total:4.0%} loss {avg.item():.4f}', flush=True)
        if book:
            (sums / n).item()


def by_learner(model, dls, loss_func, n_epochs, book=False, report=False):
    cbs = [DeviceCB('cpu'), MetricsCB(), ScheduleCB(), ProgressCB()] if book else []
    Learner(model, dls, loss_func, 1e-3, cbs).fit(n_epochs, valid=False)


ROWS = dict(
    same=(by_hand, {}),
    bare=(by_learner, {}),
    usual=(by_learner, dict(book=True)),
    equal=(by_learner, dict(book=True, report=True)),
)


def seconds(clock, f, *args, **kw):
    start = clock()
    # printing is part of the price; the lines go nowhere
    with contextlib.redirect_stdout(io.StringIO()):
        f(*args, **kw)
    return clock() - start


def loops(name, make, loss_func, y, a):
    x = torch.randn(1437, 1, 8, 8)
    dls = DataLoaders(TensorLoader(x, y(x), batch_size=64, shuffle=True), None)

    def took(f, n, kw):
        return seconds(time.process_time, f, make(), dls, loss_func, n, **kw)

    n = max(1, round(a.seconds / min(took(by_hand, 1, {}) for _ in range(3))))
    batches, extra = n * len(dls.train), {}
    for row, (other, kw) in ROWS.items():
        if row not in a.rows:
            continue
        hand, ours = [], []
        for i in range(a.pairs):
            # each goes first every other time
            for times, f in ((hand, by_hand), (ours, other))[:: 1 if i % 2 else -1]:
                times.append(took(f, n, kw))
        low, lost, high = statistics.quantiles([1 - h / o for h, o in zip(hand, ours)], n=4)
        h, o = (1437 * n / sorted(t)[len(t) // 20] for t in (hand, ours))
        extra[row] = 1e6 * statistics.median(o - h for h, o in zip(hand, ours)) / batches
        batch = 1e6 * statistics.median(hand) / batches
        quartiles = f'({low:.1%} to {high:.1%})'
        print(
            f'{name:6} {row:6} {h:12,.0f} {o:12,.0f} {1 - o / h:7.1%} {lost:7.1%}  '
            f'{quartiles:18} {extra[row]:8.1f} {batch:9.1f}',
            flush=True,
        )
    return extra, batch


def loaders(a):
    x, y = torch.randn(1437, 1, 8, 8), torch.zeros(1437).long()

    # by the clock on the wall: with workers the work is done in other processes
    def rate(dl):
        for _ in dl:
            pass
        n, start = 0, time.perf_counter()
        while time.perf_counter() - start < 2:
            n += sum(len(b[1]) for b in dl)
        return n / (time.perf_counter() - start)

    ours = rate(TensorLoader(x, y, batch_size=64, shuffle=True))
    data = torch.utils.data.TensorDataset(x, y)
    for workers in (0, 2):
        kw = dict(num_workers=workers, persistent_workers=workers > 0)
        theirs = rate(torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, **kw))
        print(
            f'loader, {workers} workers: ours {ours:12,.0f} images/s, torch {theirs:12,.0f}, '
            f'{ours / theirs:.1f} times'
        )


def imports(repeats=9):
    def children():
        r = resource.getrusage(resource.RUSAGE_CHILDREN)
        return r.ru_utime + r.ru_stime

    def once(code):
        return seconds(children, subprocess.run, [sys.executable, '-c', code])

    codes = 'import torch', 'import miniai.learner'
    for code in codes:
        once(code)
    pairs = [[once(code) for code in codes] for _ in range(repeats)]
    torch_s, ours_s = (statistics.median(column) for column in zip(*pairs))
    print(
        f'import torch {torch_s:.2f} s of processor, miniai.learner {ours_s:.2f} s, '
        f'{statistics.median(o / t for t, o in pairs):.2f} times'
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--seconds', type=float, default=0.1, help='of processor time in each block')
    p.add_argument('--pairs', type=int, default=101, help='of blocks')
    p.add_argument('--models', nargs='+', default=['tiny', 'U-Net'], choices=['tiny', 'U-Net'])
    p.add_argument('--rows', nargs='+', default=list(ROWS), choices=list(ROWS))
    p.add_argument('--only-loops', action='store_true')
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{'model':6} {'loop':6} {'by hand im/s':>12} {'Learner im/s':>12} {'quiet':>7} "
        f"{'lost':>7}  {'quartiles':18} {'extra us':>8} {'batch us':>9}"
    )
    if 'tiny' in a.models:
        extra, _ = loops(
            'tiny', tiny, F.cross_entropy, lambda x: torch.randint(0, 10, (len(x),)), a
        )
    if 'U-Net' in a.models:
        _, batch = loops('U-Net', unet, F.mse_loss, torch.randn_like, a)
    if len(a.models) == 2:
        for row, us in extra.items():
            print(
                f'{row}: {us:.1f} us a batch on the tiny model, '
                f"{us / batch:.2%} of the U-Net's {batch:,.0f} us"
            )
    if not a.only_loops:
        loaders(a)
        imports()


if __name__ == '__main__':
    main()
