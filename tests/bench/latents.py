"""What 48x buys: the same U-Net trained for the same seconds on pixels and on latents, FID and seconds per picture side by side.

    python tests/bench/latents.py --seconds 60                       # the weights that come with the library
    python tests/bench/latents.py --seconds 60 --vae my/vae --n 500  # others, and fewer drawings

Seconds are of the processor by default (`--clock wall` for others): with one thread they hardly depend on what else the machine does. Encoding
the training pictures counts as training; training the autoencoder doesn't, and is stated in its model card. FID is of all drawings against the training
pictures, through a digit reader's features of the ink map and the mean colours of a 4x4 grid; `there and back` is what the autoencoder alone costs.
"""

import argparse
import time

import torch
from torch.nn import functional as F

from miniai.autoencoder import VAE, RandomBatches, encode_all
from miniai.callbacks import TimeBudgetCB
from miniai.captions import captioned_digits, ink_map, train_judge
from miniai.data import DataLoaders
from miniai.diffusion import diffusion_learner, sample
from miniai.metrics import ImageEval
from miniai.schedulers import DDPMScheduler
from miniai.tensors import set_seed
from miniai.unet import UNet


def run(name, x, widths, vae, scheduler, args, clock):
    "Train on `x` (through `vae` if given) and draw. Returns drawings and figures."
    set_seed(args.seed)
    start = clock()
    z = x if vae is None else encode_all(vae, x) * vae.scaling_factor
    net = UNet(z.shape[1], widths)
    batches = RandomBatches(
        z, torch.zeros(len(z)), args.batch_size, 10**6, torch.Generator().manual_seed(args.seed)
    )
    budget = TimeBudgetCB(
        args.seconds - (clock() - start), clock
    )  # what the encoding has left of it
    learn = diffusion_learner(
        net, DataLoaders(batches, None), scheduler, cbs=[budget], device='cpu'
    ).fit(1, valid=False)
    took, start = clock() - start, clock()
    parts = []
    for i in range(0, args.n, 100):
        out = sample(
            learn.ema.model,
            scheduler,
            (min(100, args.n - i), *z.shape[1:]),
            args.steps,
            torch.Generator().manual_seed(i),
        )
        with torch.no_grad():
            parts.append(
                (out if vae is None else vae.decode(out / vae.scaling_factor)).clamp(-1, 1)
            )
    return torch.cat(parts), dict(
        name=name,
        params=sum(p.numel() for p in net.parameters()),
        train=took,
        n_steps=learn.n_steps,
        each=(clock() - start) / args.n * 1000,
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--seconds', type=float, default=60.0, help='of training, each')
    p.add_argument('--vae', help="a folder; the library's own weights if not given")
    p.add_argument('--n', type=int, default=500, help='drawings')
    p.add_argument('--steps', type=int, default=25, help='denoising steps')
    p.add_argument('--batch-size', type=int, default=64)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--widths', type=int, nargs='+', default=[32, 64], help='of both U-Nets')
    p.add_argument('--clock', choices=('cpu', 'wall'), default='cpu')
    p.add_argument('--pictures', type=int, default=10_000, help='to train on')
    args = p.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if args.clock == 'cpu' else time.perf_counter
    data = captioned_digits(n_train=args.pictures, n_test=500)
    x, held, vae = data['train'].x[:], data['test'].x[:], VAE.from_pretrained(args.vae)
    scheduler = DDPMScheduler(
        beta_schedule='squaredcos_cap_v2',
        prediction_type='v_prediction',
        timestep_spacing='trailing',
    )
    judge = train_judge()

    def look(x):
        m = ink_map(x)[:, None] * 2 - 1
        return torch.cat(
            [
                judge.digits.features(F.adaptive_avg_pool2d(m, 16)),
                F.adaptive_avg_pool2d(x, 4).flatten(1),
            ],
            1,
        )

    ev = ImageEval(look, x, held, 'a digit reader and mean colours (64 + 48 features)')
    with torch.no_grad():
        back = torch.cat([vae(o)[0] for o in held.split(100)])
    print(
        f"{len(x):,} training pictures, {args.n} drawings in {args.steps} steps, {args.clock} seconds; real against real {ev.real['fid']:.2f} +- {ev.real['fid_std']:.2f} ({len(held)} each); "
        f"held-out against train {ev.real['split']:.2f}, there and back {ev.measure(back)['fid_train']:.2f}",
        flush=True,
    )
    print(f"{'':22}{'parameters':>12}{'seconds':>9}{'steps':>8}{'FID':>9}{'ms a picture':>14}")
    for name, widths, through in (
        ('pixels', args.widths, None),
        ('pixels, three levels', [16, 32, 48], None),
        ('latents', args.widths, vae),
    ):
        new, f = run(name, x, widths, through, scheduler, args, clock)
        print(
            f"{f['name']:22}{f['params']:12,}{f['train']:9.1f}{f['n_steps']:8,}{ev.measure(new)['fid_train']:9.2f}{f['each']:14.2f}",
            flush=True,
        )


if __name__ == '__main__':
    main()
