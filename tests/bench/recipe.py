"""Which target, which noise schedule? Six recipes, each with the learning rate that suits it.

    OMP_NUM_THREADS=1 python tests/bench/recipe.py

The same network, the same number of steps, the same pictures. For each target and schedule the
learning rate is the one of --rates with the lowest loss on the validation rows (at one seed: losses
of one target and schedule can be compared with each other, those of different ones can't). Then
each is trained with every one of --seeds, and draws --n pictures by lesson 21's ancestral steps.
FID is of these against the test rows, through the classifier of lesson 15; its floor is that of as
many training rows, real digits, against the same.
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional as F

from miniai.classifier import train_classifier
from miniai.data import DataLoaders, load_digits
from miniai.diffusion import diffusion_learner, sample
from miniai.metrics import fid
from miniai.schedulers import DDPMScheduler
from miniai.tensors import set_seed
from miniai.unet import UNet

TARGETS = 'epsilon', 'sample', 'v_prediction'
SCHEDULES = {'linear': 'linear', 'cosine': 'squaredcos_cap_v2'}


def train(dls, scheduler, lr, seed, epochs):
    "The averaged network after `epochs` of training, and its mean loss on the validation rows."
    set_seed(seed)
    learn = diffusion_learner(UNet(), dls, scheduler, lr=lr, device='cpu')
    learn.fit(epochs, valid=False)
    set_seed(0)  # the same noise and times for all
    model = learn.ema.model.eval()
    losses = []
    for _ in range(8):
        learn.model.load_state_dict(model.state_dict())
        losses.append(F.mse_loss(*learn.get_preds(dls.valid)).item())
    return model, statistics.fmean(losses)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--epochs', type=int, default=30, help='of training: 21 steps each')
    p.add_argument('--rates', type=float, nargs='+', default=[1e-3, 2e-3, 4e-3, 8e-3, 16e-3])
    p.add_argument('--targets', nargs='+', default=TARGETS, choices=TARGETS)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--n', type=int, default=1000, help='pictures per figure')
    p.add_argument('--steps', type=int, default=100, help='of drawing')
    args = p.parse_args()

    start = time.process_time()
    set_seed(42)
    dls = DataLoaders.from_dataset(load_digits(), batch_size=64, device='cpu')
    judge = train_classifier(dls, device='cpu').model.eval()
    test = judge.features(dls.test.tensors[0]).detach()

    def distance(x):
        with torch.no_grad():
            return fid(judge.features(x), test)

    train_rows = dls.train.tensors[0]
    print(
        f'{args.epochs*len(dls.train)} steps of 64 pictures, {torch.get_num_threads()} threads; '
        f'{len(train_rows[:args.n])} training digits against the {len(test)} test digits: FID '
        f'{distance(train_rows[:args.n]):.2f}\n'
        f"{'target':14}{'schedule':10}{'rate':>8}{'FID':>8}{'range':>16}   loss on valid at rates "
        + ', '.join(f'{rate:g}' for rate in args.rates)
    )
    for target in args.targets:
        for name, beta_schedule in SCHEDULES.items():
            scheduler = DDPMScheduler(
                beta_schedule=beta_schedule, prediction_type=target, timestep_spacing='trailing'
            )
            losses = [train(dls, scheduler, lr, 100, args.epochs)[1] for lr in args.rates]
            best = args.rates[losses.index(min(losses))]
            figures = []
            for seed in args.seeds:
                model, _ = train(dls, scheduler, best, seed, args.epochs)
                gen = torch.Generator().manual_seed(seed)
                drawn = sample(model, scheduler, (args.n, 1, 8, 8), args.steps, gen)
                figures.append(distance(drawn))
            print(
                f'{target:14}{name:10}{best:8.0e}{statistics.median(figures):8.2f}'
                f'{min(figures):8.2f} to {max(figures):.2f}   '
                + ' '.join(f'{v:.4f}' for v in losses),
                flush=True,
            )
    print(f'{time.process_time() - start:.0f} processor seconds')


if __name__ == '__main__':
    main()
