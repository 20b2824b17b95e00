"""Training and drawing speed of the U-Net at four sizes: pixels or patches, float32 or bfloat16,
channels first or last.

    OMP_NUM_THREADS=1 python tests/bench/unet_speed.py            # one core

`--compile` adds torch.compile and what it costs. Pictures per second of processor time for one
training step (forward, backward, AdamW) and one model call of a sampler, batches of 64, the best of
several. All variants of a size take turns in one run; ratios are to the first row of the size.
"""

import argparse
import time

import torch
from torch.nn import functional as F

from miniai.demo import default_widths
from miniai.unet import UNet

SIZES = ((1, 8), (1, 16), (1, 28), (3, 32))
# bfloat16, channels last, compiled
VARIANTS = [(False, False, False), (False, True, False), (True, False, False), (True, True, False)]


def speed(step, batch, clock, n):
    step()  # the first call sets things up
    best = float('inf')
    for _ in range(n):
        start = clock()
        step()
        best = min(best, clock() - start)
    return batch/best


def variant(c, size, patch, bf16, last, compiled, args, clock):
    torch.manual_seed(0)
    model = UNet(c, default_widths(size//patch), patch_size=patch)
    x, t = torch.randn(args.batch, c, size, size), torch.randint(0, 1000, (args.batch,))
    if last:
        model, x = (o.to(memory_format=torch.channels_last) for o in (model, x))
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    run = torch.compile(model) if compiled else model

    def train():
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            loss = F.mse_loss(run(x, t).float(), x)
        loss.backward()
        opt.step()
        opt.zero_grad()

    def draw():
        with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            run(x, t)

    start = time.perf_counter()
    train()
    first = time.perf_counter() - start
    return speed(train, args.batch, clock, args.n), speed(draw, args.batch, clock, args.n), first


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--n', type=int, default=8, help='timings, of which the best counts')
    p.add_argument('--compile', action='store_true')
    args = p.parse_args()
    # with one thread the processor's seconds are right on a busy machine too
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    print(f'{torch.get_num_threads()} threads')
    print(f"{'pictures':10}{'patch':>6}{'dtype':>10}{'channels':>10}{'train/s':>9}{'ratio':>7}"
          f"{'calls/s':>9}{'ratio':>7}", flush=True)
    for c, size in SIZES:
        base = None
        for patch in (1, 2) if size > 8 else (1,):
            for kind in VARIANTS + [(False, False, True)]*args.compile:
                train, draw, first = variant(c, size, patch, *kind, args, clock)
                base = base or (train, draw)
                bf16, last, compiled = kind
                note = f'   compiled in {first:.0f} s' if compiled else ''
                print(f"{f'{size}x{size}x{c}':10}{patch:>6}{'bfloat16' if bf16 else 'float32':>10}"
                      f"{'last' if last else 'first':>10}{train:>9,.0f}{train/base[0]:>7.2f}"
                      f"{draw:>9,.0f}{draw/base[1]:>7.2f}{note}", flush=True)


if __name__ == '__main__':
    main()
