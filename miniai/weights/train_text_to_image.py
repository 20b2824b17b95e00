"""Makes the weights of text to image again, all parts from nothing: `miniai train text-to-image`.

Lesson 31 explains the VAE, 34 CLIP, 35 the U-Net. Interrupted, the same command carries on.
"""
import copy
from pathlib import Path

import torch

from miniai.callbacks import ProgressCB
from miniai.checkpoint import CheckpointCB, checkpoints
from miniai.clip import CaptionedBatches, train_clip
from miniai.data import DataLoaders
from miniai.demo import pick_device
from miniai.pipeline import TextToImagePipeline
from miniai.results import Results
from miniai.tensors import set_seed, to_cpu
from miniai.text_to_image import TextUNet, text_to_image_learner
from miniai.weights import captioned, train_vae
from miniai.weights.train_vae import STEPS_PER_EPOCH, Clock, make_learner

STEPS = dict(vae=5_200, clip=450, unet=5_000)          # of each part; --steps is the U-Net's
BATCH_SIZES = dict(vae=train_vae.BATCH_SIZE, clip=256, unet=64)
CLIP_STEPS_PER_EPOCH = 50
N_BYTES = 30_000_000                                    # room on the disk that it needs


def steps_of(part, unet_steps):
    "How many steps a part gets, in proportion, in whole epochs."
    n = CLIP_STEPS_PER_EPOCH if part == 'clip' else STEPS_PER_EPOCH
    return n*max(1, -(-STEPS[part]*unet_steps//(STEPS['unet']*n)))


def fit_vae(pictures, folder, steps, seed, device):
    "Returns the VAE as it's stored, and the clock of its training."
    learn, clock = make_learner(pictures.x, folder, None, steps, seed, device)
    learn.fit(steps//STEPS_PER_EPOCH, valid=False)
    return _stored(learn.ema.model).calibrate(pictures.x[:5000]), clock


def fit_clip(pictures, folder, steps, seed, device):
    "Returns CLIP as it's stored, and the clock of its training."
    set_seed(seed)
    (data, share), clock = pictures.for_clip(), Clock()
    cbs = [ProgressCB(plot=False), clock, CheckpointCB(folder, resume=True)]
    learn = train_clip(data, steps, BATCH_SIZES['clip'], seed=seed, random_share=share, cbs=cbs,
                       device=device, model=pictures.clip())
    return _stored(learn.model), clock


def fit_unet(pictures, vae, clip, folder, steps, seed, device):
    "Returns the U-Net as it's stored, and the clock of its training."
    print('encoding the pictures ...', flush=True)
    vae, clip = copy.deepcopy(vae).to(device), copy.deepcopy(clip).to(device)
    z, captions = pictures.latents(vae, torch.Generator().manual_seed(seed))
    batches = CaptionedBatches(z, captions, clip.tokenizer, BATCH_SIZES['unet'], STEPS_PER_EPOCH,
                               torch.Generator().manual_seed(seed), full=0.85)
    set_seed(seed)
    clock = Clock()
    cbs = [ProgressCB(plot=False), clock, CheckpointCB(folder, resume=True)]
    learn = text_to_image_learner(TextUNet(), clip, DataLoaders(batches), cbs=cbs, device=device)
    learn.fit(steps//STEPS_PER_EPOCH, valid=False)
    return _stored(learn.ema.model), clock


def _stored(model):
    "The model as it will be loaded: rounded to half precision."
    return copy.deepcopy(to_cpu(model)).half().float().eval().requires_grad_(True)


def train_text_to_image(steps=None, data='digits', out='model', seed=0, device=None,
                        vae=None) -> dict:
    """Trains VAE, CLIP and U-Net from nothing, writes them to `out` with their cards.

    `steps`: of the U-Net, rounded up to hundreds (default: that of `STEPS`); the others have theirs
    in proportion. `data`, as for `load_images`: handwritten digits, of which captioned pictures are
    drawn, or pictures with captions (`text`). `vae`: one that's trained already. Returns held-out
    figures by name of the part."""
    results = Results(out, ['vae', 'clip', 'unet', 'scheduler'])
    device = pick_device(device)
    results.reserve(N_BYTES)
    print('getting the pictures ...', flush=True)
    pictures = captioned.load(str(data), device)
    todo = {part: steps_of(part, steps or STEPS['unet']) for part in STEPS}
    kept = Path(out)/f"checkpoint-{pictures.key}-{seed}-{todo['unet']}"
    if kept.is_dir() and any(kept.iterdir()):
        print(f'carrying on (to begin anew, remove {kept})', flush=True)
    try:
        pipe, clocks = _train(pictures, vae, kept, todo, seed, device)
        print('now the held-out pictures ...', flush=True)
        figures = pictures.measure(pipe)
    except KeyboardInterrupt:
        print('\nInterrupted: the same command carries on.', flush=True)
        raise
    command = f"miniai train text-to-image --data {data} --seed {seed} --steps {todo['unet']}"
    with results as new:
        write(new, pipe, pictures, figures, clocks, todo, dict(seed=seed, command=command))
    _forget(kept)
    print(f'Written to {results.folder}: vae, clip, unet, scheduler. Try: miniai generate ... '
          f'--model {out}')
    return figures


def _train(pictures, vae, kept, todo, seed, device):
    "The pipeline, and clocks of the parts that were trained."
    clocks, given = {}, (seed, device)
    if vae is None:
        print(f"1 of 3: VAE, {todo['vae']:,} steps", flush=True)
        vae, clocks['vae'] = fit_vae(pictures, kept/'vae', todo['vae'], *given)
    print(f"2 of 3: CLIP, {todo['clip']:,} steps", flush=True)
    clip, clocks['clip'] = fit_clip(pictures, kept/'clip', todo['clip'], *given)
    print(f"3 of 3: U-Net, {todo['unet']:,} steps", flush=True)
    unet, clocks['unet'] = fit_unet(pictures, vae, clip, kept/'unet', todo['unet'], *given)
    pipe = TextToImagePipeline(vae, clip, unet).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, clocks


def write(folder, pipe, pictures, figures, clocks, steps, told):
    "Writes all parts, in half precision, and cards of those that were trained here."
    small = copy.deepcopy(pipe)
    for part in (small.vae, small.clip, small.unet):
        part.half()
    small.save_pretrained(folder)
    told |= dict(
        data=pictures.name, n_train=pictures.n_train, n_test=pictures.n_test,
        dim=pipe.clip.text_out.out_features, words=', '.join(pipe.clip.tokenizer.words),
        n_drawn=captioned.N_DRAWN, scale=captioned.SCALE)
    for part, clock in clocks.items():
        n = sum(p.numel() for p in getattr(pipe, part).parameters())
        card = pictures.card(part, figures[part], steps=steps[part], batch_size=BATCH_SIZES[part],
                             seconds=clock.wall, cpu_seconds=clock.cpu, parameters=n, **told)
        (folder/part/'README.md').write_text(card)


def _forget(folder):
    "Removes the checkpoints of all parts, and folders that are empty then."
    parts = [folder/part for part in STEPS]
    for path in parts:
        for checkpoint in checkpoints(path):
            checkpoint.unlink()
    for path in (*parts, folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
