"""What sampling costs beyond the network: `sample` over the bare U-Net calls, and a step's price.

    python tests/bench/loop_overhead.py --batch 64 360 --repeats 15

Times are CPU seconds of this process with one thread. A U-Net call's seconds differ by a tenth
from run to run, so the calls are timed where they happen, inside `sample`: what is left of its
seconds is the overhead. `loop` is `sample` with a scheduler that does nothing, `sample` is with
DDPM; medians. Steps, ours and diffusers', take turns. `noise` is what drawing the noise of a step
costs by itself: the same numbers must be drawn in both libraries, so no step that needs them can
cost less, and `besides` compares what both do besides.
Goals: `sample` at most 3% over the bare calls; a step at most a third of diffusers' own.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import diffusers
import torch

from miniai.diffusion import sample
from miniai.samplers import (
    DDIMScheduler,
    DPMSolverScheduler,
    EulerAncestralScheduler,
    EulerScheduler,
    HeunScheduler,
)
from miniai.schedulers import DDPMScheduler
from miniai.unet import UNet

COMMON = dict(
    beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction', timestep_spacing='trailing'
)
# ours, the name of theirs, model calls as in a usual run
STEPS = [
    (DDPMScheduler, 'DDPMScheduler', 100),
    (DDIMScheduler, 'DDIMScheduler', 50),
    (EulerScheduler, 'EulerDiscreteScheduler', 50),
    (EulerAncestralScheduler, 'EulerAncestralDiscreteScheduler', 50),
    (HeunScheduler, 'HeunDiscreteScheduler', 25),
    (DPMSolverScheduler, 'DPMSolverMultistepScheduler', 20),
]
RANDOM = ('DDPMScheduler', 'EulerAncestralScheduler')


class NoScheduler:
    "As little as `sample` asks of a scheduler."

    init_noise_sigma = 1.0

    def set_timesteps(self, n):
        self.timesteps = torch.arange(n).flip(0)

    def scale_model_input(self, x, t):
        return x

    def step(self, out, t, x):
        return SimpleNamespace(prev_sample=x)


def seconds(f, *args):
    "CPU seconds of one call."
    start = time.process_time()
    f(*args)
    return time.process_time() - start


class Timed(torch.nn.Module):
    "A model that adds up the seconds spent inside it."

    def __init__(self, model):
        super().__init__()
        self.model, self.inside = model, 0.0

    def forward(self, x, t):
        start = time.process_time()
        out = self.model(x, t)
        self.inside += time.process_time() - start
        return out


def loops(batch, size, calls, repeats):
    "Median share that the empty loop and DDPM sampling cost over the U-Net calls inside them."
    model, x = UNet().eval(), torch.randn(batch, 1, size, size)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)  # as a trained one: no zeros to multiply by

    def share(scheduler):
        timed = Timed(model).eval()
        total = seconds(sample, timed, scheduler, x, calls)
        return total / timed.inside - 1, timed.inside

    share(NoScheduler())  # warms up
    rounds = [(share(NoScheduler()), share(DDPMScheduler(**COMMON))) for _ in range(repeats)]
    (empty, inside), (full, _) = ([statistics.median(v) for v in zip(*r)] for r in zip(*rounds))
    print(f"{batch:>6}{1e3 * inside / calls:>16.3f}{empty:>12.1%}{full:>12.1%}", flush=True)


def steps(ours, theirs, batch, size, calls, repeats, random):
    "Median CPU microseconds of a step: ours, theirs, our share, and of the noise alone."
    gen = torch.Generator().manual_seed(0)
    x, out = torch.randn(2, batch, 1, size, size, generator=gen)

    def walk(scheduler, kwargs):
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)  # part of the protocol, so part of the price
            scheduler.step(out, t, x, **kwargs)

    def noise():
        for _ in range(len(ours.timesteps)):
            torch.randn(x.shape, generator=gen)

    def timed(scheduler):
        scheduler.set_timesteps(calls)
        return seconds(walk, scheduler, {'generator': gen} if random else {})

    timed(ours), timed(theirs)  # these warm up
    rounds = [(timed(ours), timed(theirs), seconds(noise)) for _ in range(repeats)]
    per = [1e6 * statistics.median(r) / len(ours.timesteps) for r in zip(*rounds)]
    return *per, statistics.median(a / b for a, b, _ in rounds)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--batch', type=int, nargs='+', default=[64, 360])
    p.add_argument('--size', type=int, default=8, help='height and width of the pictures')
    p.add_argument('--calls', type=int, default=20, help='of the U-Net in each round')
    p.add_argument('--repeats', type=int, default=15)
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n = sum(q.numel() for q in UNet().parameters())
    print(f"one thread, U-Net of {n:,} parameters, pictures {a.size}x{a.size}\n")
    print(f"{'batch':>6}{'a bare call, ms':>16}{'loop':>12}{'sample':>12}")
    for batch in a.batch:
        loops(batch, a.size, a.calls, a.repeats)
    print(
        f"\n{'scheduler':26}{'batch':>6}{'ours, us':>10}{'diffusers, us':>15}{'ours/theirs':>13}"
        f"{'noise, us':>11}{'besides':>9}"
    )
    for ours, their_name, calls in STEPS:
        theirs, name = getattr(diffusers, their_name), ours.__name__
        for batch in a.batch:
            us, them, noise, ratio = steps(
                ours(**COMMON), theirs(**COMMON), batch, a.size, calls, a.repeats, name in RANDOM
            )
            line = f"{name:26}{batch:>6}{us:>10.0f}{them:>15.0f}{ratio:>13.2f}"
            if name in RANDOM:
                line += f"{noise:>11.0f}{(us - noise) / (them - noise):>9.2f}"
            print(line, flush=True)


if __name__ == '__main__':
    main()
