"""What the Learner costs: images per second of a hand-written loop and of the Learner; the loaders against torch's; the import.

    python tests/bench/learner_overhead.py --seconds 2 --repeats 7

"usual" callbacks are DeviceCB, MetricsCB, ScheduleCB and ProgressCB. The hand-written loop trains, sets the same schedule and averages the
loss over the epoch; "bare" against "bare" has neither schedule nor average. Loops take turns, and the median of the ratios is printed.
"""
import argparse, statistics, subprocess, sys, time
import torch
from torch import nn
from torch.nn import functional as F
from miniai.data import DataLoaders, TensorLoader
from miniai.learner import DeviceCB, Learner, MetricsCB, ProgressCB, ScheduleCB, warmup_cosine

def tiny(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))

def unet():
    from miniai.unet import UNet
    class Denoise(nn.Module):
        def __init__(self): super().__init__(); self.net = UNet()
        def forward(self, x): return self.net(x, torch.zeros(len(x)))
    return Denoise()

def by_hand(model, dls, loss_func, n_epochs, full):
    opt, step, total = torch.optim.AdamW(model.parameters(), lr=1e-3), 0, n_epochs*len(dls.train)
    model.train()
    for epoch in range(n_epochs):
        sums, n = 0., 0
        for x, y in dls.train:
            loss = loss_func(model(x), y)
            loss.backward()
            if full:
                for g in opt.param_groups: g['lr'] = 1e-3*warmup_cosine(step/total)
            opt.step(); opt.zero_grad(); step += 1
            if full: sums, n = sums + loss.detach()*len(x), n + len(x)
        if full: (sums/n).item()

def by_learner(model, dls, loss_func, n_epochs, full):
    # printing is part of the price; the lines go nowhere
    cbs = [DeviceCB('cpu'), MetricsCB(), ScheduleCB(), ProgressCB(n_lines=1)] if full else []
    Learner(model, dls, loss_func, 1e-3, cbs).fit(n_epochs, valid=False)

def seconds(f, *args):
    start = time.perf_counter(); f(*args); return time.perf_counter() - start

def loops(name, make, loss_func, y, a):
    x = torch.randn(1437, 1, 8, 8)
    dls = DataLoaders(TensorLoader(x, y(x), batch_size=64, shuffle=True), None)
    n = max(1, round(a.seconds/seconds(by_hand, make(), dls, loss_func, 1, True)))
    for full in (False, True):
        times = [(seconds(by_hand, make(), dls, loss_func, n, full), seconds(by_learner, make(), dls, loss_func, n, full)) for _ in range(a.repeats)]
        lost = statistics.median(1 - h/l for h, l in times)
        h, l = (1437*n/min(t[i] for t in times) for i in (0, 1))
        print(f"{name:6} {'usual' if full else 'bare':6} {h:12,.0f} {l:12,.0f} {lost:9.1%}")

def loaders(a):
    x, y = torch.randn(1437, 1, 8, 8), torch.zeros(1437).long()
    def rate(dl):
        for _ in dl: pass
        n, start = 0, time.perf_counter()
        while time.perf_counter() - start < a.seconds: n += sum(len(b[1]) for b in dl)
        return n/(time.perf_counter() - start)
    ours, data = rate(TensorLoader(x, y, batch_size=64, shuffle=True)), torch.utils.data.TensorDataset(x, y)
    for workers in (0, 2):
        theirs = rate(torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, num_workers=workers, persistent_workers=workers > 0))
        print(f'loader, {workers} workers: ours {ours:12,.0f} images/s, torch {theirs:12,.0f}, {ours/theirs:.1f} times')

def imports(a):
    def once(code): return seconds(subprocess.run, [sys.executable, '-c', code])
    for c in ('import torch', 'import miniai.learner'): once(c)
    pairs = [(once('import torch'), once('import miniai.learner')) for _ in range(a.repeats)]
    t, l = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    print(f'import torch {t:.2f} s, miniai.learner {l:.2f} s, {l/t:.2f} times')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seconds', type=float, default=2., help='of each timed run')
    p.add_argument('--repeats', type=int, default=7)
    a = p.parse_args()
    torch.set_num_threads(1); torch.manual_seed(0)
    print(f"{'model':6} {'loop':6} {'by hand im/s':>12} {'Learner im/s':>12} {'lost':>9}")
    loops('tiny', tiny, F.cross_entropy, lambda x: torch.randint(0, 10, (len(x),)), a)
    loops('U-Net', unet, F.mse_loss, torch.randn_like, a)
    loaders(a); imports(a)

if __name__ == '__main__': main()
