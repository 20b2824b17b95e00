"""The same digits, the same seconds of training, the same judge: miniai and its peers, in one run.

    pip install -e '.[bench]' && python tests/bench/time_to_quality.py --seconds 15 30 60

Every library starts anew for each budget, so that its learning-rate schedule fits it. The machine
should be otherwise idle: the load is printed, and images per second say whether it was. FID is of
all samples against the training rows, through the classifier of lesson 15; `matched` is of groups
as large as the held-out set, to be compared with the real-against-real floor of the first line.
"""

import argparse
import os
import time

import torch

from miniai.callbacks import TimeBudgetCB
from miniai.data import DataLoaders, TensorLoader, load_images
from miniai.demo import guided, make_eval, recipe
from miniai.diffusion import diffusion_learner, sample
from miniai.guidance import GuideModelCB
from miniai.samplers import DPMSolverScheduler
from miniai.tensors import set_seed
from miniai.unet import UNet


class Miniai:
    "This library, as `miniai demo` uses it, and without its guide model."

    name = 'miniai'

    def __init__(self, size, seed, budget=60.0, clock=time.perf_counter):
        set_seed(seed)
        self.suited = recipe(size)
        self.model = UNet(1, **self.suited['unet'], sample_size=[size, size])
        self.size, self.clock = size, clock
        self.ways = {'miniai': self.sample, 'miniai, unguided': self.plain}
        self.scheduler = DPMSolverScheduler(
            beta_schedule='squaredcos_cap_v2',
            prediction_type='v_prediction',
            timestep_spacing='trailing',
        )

    def n_params(self):
        return sum(p.numel() for p in self.model.parameters())

    def train(self, images, seconds):
        loader = TensorLoader(images, torch.zeros(len(images)), batch_size=64, shuffle=True)
        dls = DataLoaders(loader)
        self.learn = diffusion_learner(
            self.model, dls, self.scheduler, device='cpu', **self.suited['learner']
        )
        self.guide = GuideModelCB(self.learn.ema)
        self.learn.fit(10**9, cbs=[TimeBudgetCB(seconds, self.clock), self.guide], valid=False)
        # the last batch of an epoch is smaller
        return self.learn.n_steps*len(images)/len(loader)

    def draw(self, model, n, seed, chunk=360):
        gen, steps = torch.Generator().manual_seed(seed), self.suited['steps']
        shapes = [(min(chunk, n - i), 1, self.size, self.size) for i in range(0, n, chunk)]
        drawn = [sample(model, self.scheduler, shape, steps, gen) for shape in shapes]
        return torch.cat(drawn).clamp(-1, 1)

    def sample(self, n, seed):
        return self.draw(guided(self.learn.ema.model, self.guide.model), n, seed)

    def plain(self, n, seed):
        return self.draw(self.learn.ema.model, n, seed)


def arguments():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--seconds', type=float, nargs='+', default=[15, 30, 60])
    p.add_argument('--data', default='digits',
                   help="'digits' or a data set of grey pictures, as for `miniai demo`")
    p.add_argument('--only', nargs='*', help='names of libraries to run')
    p.add_argument('--n', type=int, default=1800, help='samples per figure')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--steps', type=int, help="the peers' sampling steps, instead of the 50 to 150 "
                   'that suit each: for larger pictures')
    p.add_argument('--cpu-seconds', action='store_true', help='count the seconds in which this '
                   "process had a core, not the clock's: for a busy machine, with one thread")
    p.add_argument('--adamw', action='store_true', help='train miniai with AdamW at any size, to '
                   'see what Muon is worth at the larger ones')
    args = p.parse_args()
    if args.cpu_seconds and torch.get_num_threads() > 1:
        p.error('--cpu-seconds counts the seconds of all threads together: set OMP_NUM_THREADS=1')
    return args


def measured(peer, name, images, seconds, args, ev, clock):
    "Trains for `seconds` and prints a line for each way to draw."
    start = clock()
    seen = peer.train(images, seconds)
    took = clock() - start
    for way, draw in getattr(peer, 'ways', {name: peer.sample}).items():
        start = clock()
        new = draw(args.n, args.seed)
        drew, m = clock() - start, ev.measure(new)
        kid = f"{1000*m['kid'][0]:.1f} +- {1000*m['kid'][1]:.1f}"
        print(f"{way:28}{peer.n_params():>11,}{took:>9.1f}{seen/took:>10,.0f}{m['fid_train']:>8.2f}"
              f"{m['fid']:>9.2f}{m['fid_held_out']:>10.2f}{kid:>16}{m['copy']:>7.2f}{drew:>9.1f}s",
              flush=True)


def main():
    args = arguments()
    from peers import PEERS

    clock = time.process_time if args.cpu_seconds else time.perf_counter
    set_seed(42)
    # all training rows are trained on; the test rows only judge
    dls = DataLoaders.from_dataset(
        load_images(args.data), batch_size=64, device='cpu', valid_size=0
    )
    images, size = dls.train.tensors[0], dls.train.tensors[0].shape[-1]
    ev = make_eval(dls, 'cpu')
    real = ev.real
    print(f"{len(images):,} training pictures {size}x{size}; judge: {ev.name}; "
          f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n"
          f"real against real, {len(ev.held_out)} at a time: {real['fid']:.2f} +- "
          f"{real['fid_std']:.2f}; the held-out rows themselves: {real['split']:.2f}; "
          f"copy check {real['copy']:.2f}")
    print(f"{'library':28}{'parameters':>11}{'seconds':>9}{'images/s':>10}{'FID':>8}{'matched':>9}"
          f"{'held-out':>10}{'KID x1000':>16}{'copy':>7}{'sampling':>10}", flush=True)
    for seconds in args.seconds:
        for cls in (Miniai, *PEERS):
            if args.only and cls.name not in args.only:
                continue
            peer = cls(size, args.seed, budget=seconds, clock=clock)
            if args.adamw and cls is Miniai:
                peer.suited['learner'] = {}
            if args.steps and cls is not Miniai:
                peer.steps = args.steps
            measured(peer, cls.name, images, seconds, args, ev, clock)


if __name__ == '__main__':
    main()
