"""What 48x buys: quality against calculation, for diffusion on pixels and on the VAE's latents.

    python tests/bench/latents.py                       # the curves: about 10 processor minutes
    python tests/bench/latents.py --budgets 10 30       # shorter ones, in processor seconds
    python tests/bench/latents.py --tune                # networks and rates: 6 minutes

Each side has its own network and learning rate, chosen by `--tune` on the `valid` handwriting (cut
from `train`) and kept in `CHOSEN`. Each budget is a training of its own, of so many seconds of the
processor (one thread), encoding the training pictures included; multiply-adds are those of all its
forward and backward passes. FID is of `--n` drawings through the judge's features of the digit (of
the ink map) and the mean colours of a 4x4 grid, against `test` pictures. The floor is as many real
pictures of the training handwriting that were not trained on, as they are and, in the row `there
and back`, through the autoencoder. What the autoencoder's own training cost stands in `VAE_CPU_S`
(from its model card) and is counted anew in multiply-adds.
"""

import argparse
import time

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from miniai.autoencoder import VAE, RandomBatches, VAELoss, encode_all
from miniai.callbacks import TimeBudgetCB
from miniai.captions import captioned_digits, ink_map, train_judge
from miniai.data import DataLoaders, load_digits
from miniai.diffusion import diffusion_learner, sample
from miniai.metrics import fid
from miniai.schedulers import DDPMScheduler
from miniai.tensors import set_seed
from miniai.unet import UNet

VAE_STEPS, VAE_BATCH, VAE_CPU_S = 5_200, 48, 466
CHOSEN = {
    'pixels': dict(widths=(16, 32, 48), patch_size=1, lr=8e-3, batch_size=32),
    'latents': dict(widths=(32, 64), patch_size=1, lr=4e-3, batch_size=32),
}
BUDGETS = dict(pixels=(20, 80, 240), latents=(5, 20, 80))
# (widths, patch_size, batch_size), each at lr 4e-3; the best of them at the other rates
TRIED = {
    'pixels': [
        ((16, 32, 48), 1, 32),
        ((32, 64), 2, 32),
        ((32, 64, 96), 2, 32),
        ((32, 64), 4, 32),
        ((64, 128), 4, 32),
    ],
    'latents': [((32, 64), 1, 32), ((64, 128), 1, 32), ((96, 192), 1, 32)],
}
RATES = 2e-3, 8e-3


def multiply_adds(call):
    "How many multiplications with an addition `call()` makes: half its FLOPs."
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


def of_one_step(net, batch):
    "Multiply-adds of a forward and a backward pass."
    times = torch.zeros(len(batch), dtype=torch.long)
    return multiply_adds(lambda: net(batch, times).square().mean().backward())


def of_the_vae(x):
    "Multiply-adds of the VAE's whole training."
    vae, batch = VAE(), x[:VAE_BATCH]
    return VAE_STEPS * multiply_adds(lambda: VAELoss()(vae(batch), batch).backward())


def looker(judge):
    "A function from pictures to features, `(n, 64 + 48)`."

    @torch.no_grad()
    def look(x):
        ink = F.adaptive_avg_pool2d(ink_map(x)[:, None] * 2 - 1, 16)
        colours = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return torch.cat([judge.digits.features(ink), colours], 1)

    return lambda x: torch.cat([look(o) for o in x.split(500)])


def scheduler(on_latents):
    "Pixels end at -1 and 1, where guesses may be clipped; latents don't."
    return DDPMScheduler(
        beta_schedule='squaredcos_cap_v2',
        prediction_type='v_prediction',
        timestep_spacing='trailing',
        clip_sample=not on_latents,
    )


def train(x, vae, how, seconds, seed):
    "Trains on `x`, through `vae` if given. Returns the averaged network, steps, multiply-adds."
    start, work = time.process_time(), 0
    set_seed(seed)
    if vae is not None:
        work = len(x) * multiply_adds(lambda: vae.encode(x[:1]))
        x = encode_all(vae, x) * vae.scaling_factor
    net = UNet(x.shape[1], how['widths'], patch_size=how['patch_size'])
    generator = torch.Generator().manual_seed(seed)
    batches = RandomBatches(x, torch.zeros(len(x)), how['batch_size'], 10**6, generator)
    left = seconds - (time.process_time() - start)
    cbs = [TimeBudgetCB(left, time.process_time)]
    learn = diffusion_learner(
        net,
        DataLoaders(batches),
        scheduler(vae is not None),
        how['lr'],
        cbs=cbs,
        device='cpu',
    ).fit(1, valid=False)
    work += learn.n_steps * of_one_step(net, x[: how['batch_size']])
    return learn.ema.model, learn.n_steps, work


@torch.no_grad()
def draw(net, vae, shape, n, steps):
    "`n` drawings, and processor milliseconds for each, decoding included."
    start, parts = time.process_time(), []
    for i in range(0, n, 100):
        generator = torch.Generator().manual_seed(i)
        z = sample(net, scheduler(vae is not None), (min(100, n - i), *shape), steps, generator)
        parts.append((z if vae is None else vae.decode(z / vae.scaling_factor)).clamp(-1, 1))
    return torch.cat(parts), 1000 * (time.process_time() - start) / n


def run(name, x, vae, how, seconds, args, judged, seed):
    "Trains, draws, prints a row. Returns its FID."
    vae, shape = (vae, (4, 4, 4)) if name == 'latents' else (None, x.shape[1:])
    net, n_steps, work = train(x, vae, how, seconds, seed)
    drawn, ms = draw(net, vae, shape, args.n, args.steps)
    score = judged(drawn)
    what = f"{how['widths']} patch {how['patch_size']} batch {how['batch_size']}"
    print(
        f"{name:9}{what:31}{how['lr']:8g}{seconds:9g}{n_steps:8,}{work / 1e12:10.2f}"
        f"{score:9.2f}{ms:8.1f}",
        flush=True,
    )
    return score


def tune(args, x, vae, judged):
    "The best of each side's networks, then the best of its rates."
    seconds = args.budgets[0] if args.budgets else 20
    for name in args.sides:
        first = [dict(zip(('widths', 'patch_size', 'batch_size'), o), lr=4e-3) for o in TRIED[name]]
        scores = {}
        for how in first:
            scores[run(name, x, vae, how, seconds, args, judged, args.seeds[0])] = how
        best = scores[min(scores)]
        for lr in RATES:
            how = best | dict(lr=lr)
            scores[run(name, x, vae, how, seconds, args, judged, args.seeds[0])] = how
        print(f'best on {name}: {scores[min(scores)]}', flush=True)


def pictures(args):
    "Training pictures, others of the same handwriting, and those to judge against."
    source = None
    if args.tune:  # no test digit takes part
        parts = load_digits()['train'].train_test_split(0.2, seed=0)
        source = dict(train=parts['train'], test=parts['test'])
    data = captioned_digits(source, n_train=args.pictures + args.n, n_test=args.reference)
    x = data['train'].x
    return x[: args.pictures], x[args.pictures :], data['test'].x[:]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--budgets', type=float, nargs='+', help='the same for both sides')
    p.add_argument('--sides', nargs='+', choices=list(CHOSEN), default=list(CHOSEN))
    p.add_argument('--tune', action='store_true', help='choose networks and rates, on valid')
    p.add_argument('--vae', help="a folder; the library's own weights if not given")
    p.add_argument('--n', type=int, default=400, help='drawings')
    p.add_argument('--steps', type=int, default=20, help='denoising steps')
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--pictures', type=int, default=10_000, help='to train on')
    p.add_argument('--reference', type=int, default=2_000, help='to judge against')
    p.add_argument('--judge-pictures', type=int, default=10_000, help='that the judge sees')
    args = p.parse_args()
    torch.set_num_threads(1)
    vae = VAE.from_pretrained(args.vae)
    x, others, reference = pictures(args)
    look = looker(train_judge(n_pictures=args.judge_pictures))
    wanted = look(reference)

    def judged(pictures):
        return fid(look(pictures), wanted)

    with torch.no_grad():
        back = torch.cat([vae.decode(vae.encode(o)) for o in others.split(100)])
    print(
        f"{len(x):,} training pictures; FID of {args.n} drawings in {args.steps} steps against "
        f"{len(reference):,} held-out pictures.\nfloor {judged(others):.2f}, there and back "
        f"{judged(back):.2f}; the VAE's training: {of_the_vae(x) / 1e12:.1f} T multiply-adds, "
        f"{VAE_CPU_S} processor seconds; a decoding "
        f"{multiply_adds(lambda: vae.decode(torch.zeros(1, 4, 4, 4))) / 1e6:.0f} M"
    )
    print(
        f"{'':9}{'network':31}{'lr':>8}{'seconds':>9}{'steps':>8}{'T m-adds':>10}{'FID':>9}"
        f"{'ms each':>8}"
    )
    if args.tune:
        tune(args, x, vae, judged)
    else:
        for name in args.sides:
            for seconds in args.budgets or BUDGETS[name]:
                for seed in args.seeds:
                    run(name, x, vae, CHOSEN[name], seconds, args, judged, seed)


if __name__ == '__main__':
    main()
