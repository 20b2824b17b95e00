"""Quality against calls of the network: every sampler, ours and diffusers', on one model.

    OMP_NUM_THREADS=1 python tests/bench/samplers.py

Trains the 8x8 model (or takes a saved one, --model), then draws --n pictures with each sampler
from the same noise. FID is of all of them against the training rows, through the classifier of
lesson 15, as `time_to_quality.py` has it, and the mean over --seeds. The line to beat is
ancestral sampling with 1000 calls. Seconds are processor seconds, which other work on the machine
hardly changes.
"""

import argparse
import time
import warnings

import diffusers
import torch

from miniai.classifier import train_classifier
from miniai.data import DataLoaders, load_digits
from miniai.diffusion import diffusion_learner, sample
from miniai.metrics import ImageEval, fid
from miniai.momentum import MomentumScheduler, power_times
from miniai.samplers import (
    DDIMScheduler,
    DPMSolverScheduler,
    EulerAncestralScheduler,
    EulerScheduler,
    HeunScheduler,
)
from miniai.schedulers import DDPMScheduler
from miniai.tensors import set_seed
from miniai.unet import UNet

KW = dict(
    beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction', timestep_spacing='trailing'
)


def contestants():
    """Name, scheduler, and a function from a number of calls to the times to visit.

    Times are a number, a list, or None where that number of calls can't be."""
    plain, power = int, power_times

    def heun(n):
        "Two calls a step, one for the last; not from the very top."
        steps = (n + 1) // 2
        return [940 * (1 - i / steps) for i in range(steps)] if n % 2 else None

    return [
        ('DDPM', DDPMScheduler(**KW), plain),
        ('DDIM', DDIMScheduler(**KW), plain),
        ('Euler', EulerScheduler(**KW), plain),
        ('Euler ancestral', EulerAncestralScheduler(**KW), plain),
        ('Heun, from t=940', HeunScheduler(**KW), heun),
        ('DPM-Solver++ 2M', DPMSolverScheduler(**KW), plain),
        ('2M, Karras', DPMSolverScheduler(**KW, use_karras_sigmas=True), plain),
        ('3M', DPMSolverScheduler(**KW, solver_order=3), plain),
        ('Momentum -0.85', MomentumScheduler(**KW, momentum=-0.85), plain),
        ('2M, power_times', DPMSolverScheduler(**KW), power),
        ('Momentum -0.85, power_times', MomentumScheduler(**KW, momentum=-0.85), power),
        ('diffusers DDPM', diffusers.DDPMScheduler(**KW), plain),
        ('diffusers DDIM', diffusers.DDIMScheduler(**KW), plain),
        ('diffusers Euler', diffusers.EulerDiscreteScheduler(**KW), plain),
        ('diffusers Euler ancestral', diffusers.EulerAncestralDiscreteScheduler(**KW), plain),
        ('diffusers DPM-Solver++ 2M', diffusers.DPMSolverMultistepScheduler(**KW), plain),
        ('diffusers 3M', diffusers.DPMSolverMultistepScheduler(**KW, solver_order=3), plain),
        (
            'diffusers UniPC',
            diffusers.UniPCMultistepScheduler(**KW, final_sigmas_type='zero'),
            plain,
        ),
    ]


def cell(figure):
    "A figure of the table: a FID, or what there is instead."
    if figure is None:
        return f'{"-":>8}'
    return f'{figure[0]:8.3f}' if figure[0] < 1e4 else f'{"fails":>8}'


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--model', help='a folder with a trained UNet; one is trained if not given')
    p.add_argument('--epochs', type=int, default=130, help='of training: 23 steps each')
    p.add_argument('--calls', type=int, nargs='+', default=[4, 5, 6, 7, 8, 10, 16, 32])
    p.add_argument('--n', type=int, default=1440, help='pictures per figure')
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--only', nargs='*', help='names of samplers to run')
    p.add_argument(
        '--no-1000',
        action='store_true',
        help='leave out the thousand ancestral calls, which take minutes',
    )
    args = p.parse_args()
    warnings.filterwarnings('ignore')

    set_seed(42)
    dls = DataLoaders.from_dataset(load_digits(), batch_size=64, device='cpu', valid_size=0)
    train, held_out = dls.train.tensors[0], dls.test.tensors[0]
    judge = train_classifier(dls, device='cpu').model.eval()
    ev = ImageEval(judge.features, train, held_out, 'our digit classifier, 64 features')
    start = time.process_time()
    if args.model:
        model = UNet.from_pretrained(args.model)
    else:
        set_seed(0)
        learn = diffusion_learner(UNet(1, (16, 32)), dls, DDPMScheduler(**KW), device='cpu')
        learn.fit(args.epochs, valid=False)
        model = learn.ema.model
    took, size = time.process_time() - start, sum(q.numel() for q in model.parameters())
    print(
        f"{size:,} parameters, {took:.0f} s of training; {args.n} pictures per figure, "
        f"seeds {args.seeds}; judge: {ev.name}\n"
        f"real against real, {len(ev.held_out)} at a time: "
        f"{ev.real['fid']:.2f} +- {ev.real['fid_std']:.2f}",
        flush=True,
    )

    def measure(scheduler, times):
        values, start = [], time.process_time()
        for seed in args.seeds:
            gen = torch.Generator().manual_seed(seed)
            x = sample(model, scheduler, (args.n, 1, 8, 8), times, gen)
            with torch.no_grad():
                values.append(fid(ev.features(x).double(), ev.f_train))
        return sum(values) / len(values), (time.process_time() - start) / len(args.seeds)

    rows = [c for c in contestants() if not args.only or c[0] in args.only]
    print(
        f"\n{'calls of the network':30}"
        + ''.join(f'{n:>8}' for n in args.calls)
        + f"{'seconds':>10}"
    )
    for name, scheduler, times in rows:
        figures = [
            measure(scheduler, times(n)) if times(n) is not None else None for n in args.calls
        ]
        print(f'{name:30}' + ''.join(map(cell, figures)), end='')
        print(f'{sum(f[1] for f in figures if f):10.1f}', flush=True)
    if not args.no_1000:
        print(
            'DDPM, 1000 calls: FID {:.3f}, {:.0f} s'.format(*measure(DDPMScheduler(**KW), 1000)),
            flush=True,
        )


if __name__ == '__main__':
    main()
