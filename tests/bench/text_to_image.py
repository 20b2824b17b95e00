"""Text to image measured: what prompts get, what 48x buys, and the same with diffusers.

    OMP_NUM_THREADS=1 python tests/bench/text_to_image.py                 # the weights that ship
    OMP_NUM_THREADS=1 python tests/bench/text_to_image.py --cost          # latents against pixels
    pip install -e '.[bench]' && OMP_NUM_THREADS=1 python tests/bench/text_to_image.py \\
        --peers --seconds 600 --seeds 0 1 2    # all from nothing, in equal processor seconds

Fidelity: the share of --n captions of held-out pictures whose drawing the judge of lesson 30 reads
as said; `seen` are combinations of the training, `unseen` never shown ones. FID is of features of
CLIP's picture encoder (lesson 34), with its floor from held-out pictures, n alike.
"""

import argparse
import random
import statistics
import time
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from miniai.autoencoder import VAE, RandomBatches, VAELoss, autoencoder_learner
from miniai.callbacks import TimeBudgetCB
from miniai.captions import captioned_digits, train_judge
from miniai.clip import CLIP, CaptionedBatches, describe, train_clip
from miniai.data import DataLoaders
from miniai.metrics import fid, with_floor
from miniai.muon import Muon
from miniai.pipeline import TextToImagePipeline
from miniai.tensors import set_seed
from miniai.text_to_image import TextUNet, text_to_image_learner
from miniai.weights.captioned import drawn, latents_of
from miniai.weights.train_vae import RandomColoursCB

SHARES = dict(vae=0.42, clip=0.08, unet=0.5)  # of the seconds
NAMES = 'label', 'ink', 'paper', 'thickness', 'slant', 'colours', 'all'


FIRST = 1_000  # the rows before were used to choose guidance's settings


def asked_of(ds, n):
    return ds.attributes[FIRST : FIRST + n]


def prompts_of(ds, n, seed=1):
    rng = random.Random(seed)
    return [describe(row, rng) for row in asked_of(ds, n).tolist()]


def fidelity(pipe, pictures, judge, n, scales, noises):
    "Prints a table: each attribute at each guidance scale, mean and spread over starting noises."
    print(f'\n{n} prompts, {len(noises)} starting noises; FID and variety: see below')
    print(
        'scale prompts ' + ''.join(f'{name:>14}' for name in NAMES) + '          FID  CLIP  variety'
    )
    for scale in scales:
        for split in ('test', 'unseen'):
            ds, rows = pictures[split], []
            prompts = prompts_of(ds, n)
            for noise in noises:
                x = drawn(pipe, prompts, noise, scale)
                rows.append(
                    [
                        *judge.score(x, asked_of(ds, n)).values(),
                        *looks(pipe, x, ds, prompts),
                    ]
                )
            mean, std = torch.tensor(rows).mean(0), torch.tensor(rows).std(0)
            cells = [f'{m:8.1%} ±{s:4.1%}' for m, s in zip(mean[:7], std[:7])]
            print(
                f'{scale:5g} {dict(test="seen").get(split, split):7}'
                + ''.join(cells)
                + f'  {mean[7]:.4f} ({mean[8]:.4f}) {mean[9]:.3f} {mean[10]:.2f}',
                flush=True,
            )
    print(
        'FID: of the drawings (of real pictures in their place), both to the same held-out ones; '
        'CLIP: mean cosine with the prompt; variety: how far apart drawings are, 1 as real ones'
    )


@torch.no_grad()
def looks(pipe, x, ds, prompts):
    "FID, its floor, CLIP score and variety of drawings of the captions of `ds`."
    real, new = (torch.cat([pipe.clip.encode_image(o) for o in v.split(500)]) for v in (ds.x[:], x))
    value, floor = with_floor(fid, new, real, len(new), draws=5)

    def apart(v):
        return torch.pdist(v[:300].flatten(1)).mean().item()

    return (
        value.mean().item(),
        floor.mean().item(),
        pipe.clip.score(x, prompts).mean().item(),
        apart(x) / apart(ds.x[: len(x)]),
    )


def cost():
    "Seconds and memory of one training step and of drawing: on latents, and on pixels."
    clip = CLIP()
    words = clip.states(['a thick red seven on a yellow background'] * 64).detach()
    cases = dict(latents=(TextUNet(), (4, 4, 4)), pixels=(TextUNet(3), (3, 32, 32)))
    seconds = {name: [] for name in cases}
    kept = {}
    for _ in range(3):  # they take turns
        for name, (net, shape) in cases.items():
            x, t = torch.randn(64, *shape), torch.randint(1000, (64,))
            held = []

            def pack(tensor, held=held):
                held.append(tensor.nbytes)
                return tensor

            start = time.process_time()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda o: o):
                F.mse_loss(net(x, t, words), x).backward()
            step = time.process_time() - start
            start = time.process_time()
            with torch.no_grad():
                net(x, t, words)
            seconds[name].append((step, time.process_time() - start))
            kept[name] = sum(held)
    for k, what in enumerate(('a training step of 64', 'one look at 64 pictures')):
        a, b = (statistics.median(s[k] for s in seconds[name]) for name in cases)
        print(f'{what}: {a:.3f} s on latents, {b:.2f} s on pixels, {b / a:.0f} times')
    a, b = (kept[name] / 1e6 for name in cases)
    print(
        f'kept for the backward pass: {a:.0f} MB on latents, {b:.0f} MB on pixels, {b / a:.0f}x'
    )


# --- ours, from nothing, in so many processor seconds ---
def budget(seconds):
    return TimeBudgetCB(seconds, time.process_time)


def ours(pictures, seconds, seed):
    "A function (prompts, scale, seed) -> pictures, made in `seconds`."
    set_seed(seed)
    part = {k: share * seconds for k, share in SHARES.items()}
    train, generator = pictures['train'], torch.Generator().manual_seed(seed)
    start = time.process_time()
    batches = RandomBatches(train.x, train.attributes[:, 0], 48, 100, generator)
    learn = autoencoder_learner(
        VAE(),
        DataLoaders(batches),
        VAELoss(),
        lr=5e-3,
        ema_decay=0.999,
        cbs=[RandomColoursCB(), budget(part['vae'])],
        opt_func=Muon,
        device='cpu',
    )
    learn.fit(10**9, valid=False)
    vae = learn.ema.model.eval().calibrate(train.x[:5000])
    clip = train_clip(
        train, 10**6, seed=seed, cbs=[budget(part['clip'])], device='cpu'
    ).model.eval()
    z, said = latents_of(vae, train, generator)
    batches = CaptionedBatches(z, said, clip.tokenizer, 64, 100, generator, full=0.9)
    unet, left = TextUNet(), seconds - (time.process_time() - start)
    learn = text_to_image_learner(
        unet, clip, DataLoaders(batches), device='cpu', cbs=[budget(left)]
    )
    learn.fit(10**9, valid=False)
    pipe = TextToImagePipeline(vae, clip, learn.ema.model)
    pipe.set_progress_bar_config(disable=True)
    return lambda prompts, scale, noise: drawn(pipe, prompts, noise, scale)


# --- the same parts of diffusers and transformers ---
def fit(params, loss, seconds, lr):
    "AdamW with warm-up and cosine for so many processor seconds."
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    start = time.process_time()
    while (done := (time.process_time() - start) / seconds) < 1:
        for group in opt.param_groups:
            group['lr'] = (
                lr
                * min(1, done / 0.05 + 0.01)
                * 0.5
                * (1 + torch.tensor(done * 3.1416).cos().item())
            )
        value = loss()
        opt.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()


def peer_parts():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    down, up = ['DownEncoderBlock2D'] * 4, ['UpDecoderBlock2D'] * 4
    vae = AutoencoderKL(
        3,
        3,
        down,
        up,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    unet = UNet2DConditionModel(
        4,
        4,
        4,
        down_block_types=('CrossAttnDownBlock2D',),
        up_block_types=('CrossAttnUpBlock2D',),
        mid_block_type='UNetMidBlock2DCrossAttn',
        block_out_channels=(96,),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=24,
        norm_num_groups=8,
    )
    n_words = len(CLIP().tokenizer)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=n_words,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=20,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    return vae, unet, text


def diffusers_parts(pictures, seconds, seed, lr):
    "As `ours`, with AutoencoderKL, UNet2DConditionModel and CLIPTextModel, which learns along."
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    set_seed(seed)
    vae, unet, text = peer_parts()
    train, tokenizer = pictures['train'], CLIP().tokenizer

    def vae_loss():
        x = train.x[torch.randint(len(train), (48,))]
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        d = y - x
        return d.square().mean() + 0.1 * d.abs().mean() + 2e-6 * posterior.kl().mean()

    start = time.process_time()
    fit([*vae.parameters()], vae_loss, SHARES['vae'] * seconds, lr)
    with torch.no_grad():
        z = torch.cat(
            [vae.encode(train.x[i : i + 500]).latent_dist.mean for i in range(0, len(train), 500)]
        )
    scale = 1 / z.std()
    batches = iter(
        CaptionedBatches(
            z * scale,
            train.attributes,
            tokenizer,
            64,
            10**9,
            torch.Generator().manual_seed(seed),
            full=0.9,
        )
    )
    noisy = DDPMScheduler(beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction')

    def words_of(ids):
        return text(ids, attention_mask=(ids > 0).long())[0], (ids > 0).long()

    def unet_loss():
        (x, ids), _ = next(batches)
        ids = F.pad(ids, (0, 20 - ids.shape[1]))
        empty = tokenizer([''])
        ids = torch.where(torch.rand(len(ids), 1) < 0.1, empty, ids)
        t, noise = torch.randint(1000, (len(x),)), torch.randn_like(x)
        words, mask = words_of(ids)
        y = unet(noisy.add_noise(x, noise, t), t, words, encoder_attention_mask=mask).sample
        return F.mse_loss(y, noisy.get_velocity(x, noise, t))

    left = seconds - (time.process_time() - start)
    fit([*unet.parameters(), *text.parameters()], unet_loss, left, lr)
    solver = DPMSolverMultistepScheduler.from_config(noisy.config, timestep_spacing='trailing')

    @torch.no_grad()
    def draw(prompts, guidance, noise):
        x = torch.randn(len(prompts), 4, 4, 4, generator=torch.Generator().manual_seed(noise))
        words, mask = words_of(torch.cat([tokenizer(prompts), tokenizer([''] * len(prompts))]))
        solver.set_timesteps(16)
        for t in solver.timesteps:
            y = unet(torch.cat([x, x]), t, words, encoder_attention_mask=mask).sample
            cond, uncond = y.chunk(2)
            x = solver.step(uncond + guidance * (cond - uncond), t, x).prev_sample
        return vae.decode(x / scale).sample.clamp(-1, 1)

    return draw


def best_scale(draw, ds, judge, n=256):
    "The guidance scale with most digits and colours right, of prompts that aren't reported on."
    wanted, rng = ds.attributes[:n], random.Random(1)
    prompts = [describe(row, rng) for row in wanted.tolist()]
    return max((2.0, 3.0, 5.0), key=lambda s: judge.score(draw(prompts, s, 9), wanted)['colours'])


def compare(pictures, judge, args):
    "Prints fidelity of ours and of diffusers' parts, each at its best scale on other prompts."
    import transformers

    transformers.logging.set_verbosity_error()
    sizes = [sum(p.numel() for p in part.parameters()) for part in peer_parts()]
    mine = [sum(p.numel() for p in part.parameters()) for part in (VAE(), TextUNet(), CLIP().text)]
    print(f'parameters of VAE, U-Net, text encoder: ours {mine}, diffusers {sizes}')
    makers = {'miniai': ours} | {
        f'diffusers, lr {lr:g}': partial(diffusers_parts, lr=lr) for lr in args.rates
    }
    found = {}
    for seed in args.seeds:
        for name, make in makers.items():
            draw = make(pictures, args.seconds, seed)
            best = best_scale(draw, pictures['test'], judge)
            for split in ('test', 'unseen'):
                ds = pictures[split]
                score = judge.score(draw(prompts_of(ds, args.n), best, 1), asked_of(ds, args.n))
                found.setdefault((name, split), []).append((score['colours'], score['all']))
                print(
                    f"{name:22} seed {seed} {split:7} scale {best:g}: digit and both colours "
                    f"{score['colours']:.1%}, all five {score['all']:.1%}",
                    flush=True,
                )
    for (name, split), rows in found.items():
        cells = ', '.join(
            f'{statistics.mean(c):.1%} ({min(c):.1%} to {max(c):.1%})' for c in zip(*rows)
        )
        print(f'{name:22} {split:7} {cells}')


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--n', type=int, default=512, help='prompts')
    p.add_argument('--scales', type=float, nargs='+', default=[1, 2, 3, 5, 7.5])
    p.add_argument('--noises', type=int, nargs='+', default=[1, 2, 3])
    p.add_argument('--model', help='folder of a pipeline (default: the weights that ship)')
    p.add_argument('--cost', action='store_true')
    p.add_argument('--peers', action='store_true')
    p.add_argument('--seconds', type=float, default=600.0, help="of the processor, for all parts")
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument(
        '--rates', type=float, nargs='+', default=[1e-3, 2e-3], help="diffusers' learning rates"
    )
    p.add_argument('--pictures', type=int, default=60_000, help='training pictures')
    p.add_argument('--judge-pictures', type=int, default=39_000, help='that the judge learns from')
    args = p.parse_args()
    if args.cost:
        return cost()
    pictures = captioned_digits(n_train=args.pictures if args.peers else 2_000)
    judge = train_judge(n_pictures=args.judge_pictures)
    if args.peers:
        return compare(pictures, judge, args)
    pipe = TextToImagePipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    fidelity(pipe, pictures, judge, args.n, args.scales, args.noises)


if __name__ == '__main__':
    main()
