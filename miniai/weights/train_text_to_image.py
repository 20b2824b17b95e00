"""Makes the weights of text to image again, all parts from nothing: `miniai train text-to-image`.

Lesson 31 explains the VAE, 34 CLIP, 35 the U-Net. Interrupted, the same command carries on.
"""

import copy
import random
from pathlib import Path

import torch

from miniai.autoencoder import encode_all
from miniai.callbacks import ProgressCB
from miniai.captions import captioned_digits, train_judge
from miniai.checkpoint import CheckpointCB, checkpoints
from miniai.clip import CaptionedBatches, describe, random_colours, retrieval, train_clip
from miniai.data import DataLoaders
from miniai.demo import pick_device
from miniai.pipeline import TextToImagePipeline
from miniai.results import Results
from miniai.tensors import set_seed, to_cpu
from miniai.text_to_image import TextUNet, text_to_image_learner
from miniai.weights.train_vae import CARD, Clock, figures_of, make_learner

# of pictures that are shown in each step, and how many steps each part takes
BATCH_SIZE, STEPS_PER_EPOCH = 64, 100
STEPS = dict(vae=5_200, clip=450, unet=4_000)
UNNAMED, SCALE = 0.35, 3.                 # share of pictures in colours without a name; guidance

CARDS = dict(
    clip="""---
library_name: miniai
tags: [clip, digits]
---
# CLIP for captioned digits

Captions and pictures of 3x32x32 in one space of {dim} numbers. Lesson 34 of miniai explains it;
`CLIP.from_pretrained()` loads it. {parameters:,} parameters, stored in half precision.

- Data: `captioned_digits({data!r})`, {n_train:,} training pictures, {share:.0%} of each batch in
  random colours without a name; held-out handwriting for all figures.
- Training: {steps:,} steps of 256 pictures, {cpu_seconds:.0f} processor seconds; `{command}`

| pictures | caption of a picture first among 256 | picture of a caption |
|---|---|---|
| held out | {test[0]:.1%} | {test[1]:.1%} |
| combinations never shown | {unseen[0]:.1%} | {unseen[1]:.1%} |

Licence: Apache 2.0. It knows nothing but digits and these words: {words}.
""",
    unet="""---
library_name: miniai
tags: [text-to-image, digits]
---
# U-Net for text to image, captioned digits

Latents of 4x4x4, told the words of a caption. Lesson 35 of miniai explains it;
`TextToImagePipeline.from_pretrained()` loads it with the VAE and CLIP beside it. {parameters:,}
parameters, stored in half precision.

- Data: latents of `captioned_digits({data!r})`, {n_train:,} training pictures, {share:.0%} of them
  in random colours without a name; held-out handwriting has no part.
- Training: {steps:,} steps of 64, {cpu_seconds:.0f} processor seconds; `{command}`

Of {n} prompts, drawn in 16 steps at guidance scale {scale:g}, the judge of lesson 30 reads right:

| prompts | digit | ink | paper | thickness | slant | digit and both colours | all five |
|---|---|---|---|---|---|---|---|
| combinations of the training | {test_row} |
| combinations never shown | {unseen_row} |

Licence: Apache 2.0. It draws nothing but digits.
""")


def fit_vae(pictures, folder, steps, seed, device):
    "Returns the VAE as it's stored, and its processor seconds."
    learn, clock = make_learner(pictures, folder, None, steps, seed, device)
    learn.fit(-(-steps//STEPS_PER_EPOCH), valid=False)
    return _stored(learn.ema.model).calibrate(pictures['train'].x[:5000]), clock.cpu


def fit_clip(pictures, folder, steps, seed, device):
    clock, bar = Clock(), ProgressCB(plot=False)
    cbs = [bar, clock, CheckpointCB(folder, resume=True)]
    learn = train_clip(pictures['train'], steps, seed=seed, random_share=UNNAMED, cbs=cbs,
                       device=device)
    return _stored(learn.model), clock.cpu


@torch.no_grad()
def latents_of(vae, train, seed):
    "Latents of unit standard deviation, and the attributes that can be said of each."
    generator, n = torch.Generator().manual_seed(seed), round(len(train)*UNNAMED/(1 - UNNAMED))
    z, said = [encode_all(vae, train.x)], [train.attributes]
    for k in range(0, n, 500):
        x, attributes = random_colours(train.x, min(500, n - k), generator)
        z.append(encode_all(vae, x))
        said.append(attributes)
    return torch.cat(z)*vae.scaling_factor, torch.cat(said)


def fit_unet(pictures, vae, clip, folder, steps, seed, device):
    set_seed(seed)
    print('encoding the pictures ...', flush=True)
    z, said = latents_of(vae, pictures['train'], seed)
    batches = CaptionedBatches(z, said, clip.tokenizer, BATCH_SIZE, STEPS_PER_EPOCH,
                               torch.Generator().manual_seed(seed), full=0.9)
    set_seed(seed)
    clock, bar = Clock(), ProgressCB(plot=False)
    cbs = [bar, clock, CheckpointCB(folder, resume=True)]
    learn = text_to_image_learner(TextUNet(), clip, DataLoaders(batches), cbs=cbs, device=device)
    learn.fit(-(-steps//STEPS_PER_EPOCH), valid=False)
    return _stored(learn.ema.model), clock.cpu


def _stored(model):
    "The model as it will be loaded: rounded to half precision."
    return copy.deepcopy(to_cpu(model)).half().float().eval()


def fidelity(pipe, pictures, judge, n=512, scale=SCALE, seed=1):
    "What the judge reads right of pictures drawn to the captions of held-out ones, by name."
    rng, wanted = random.Random(seed), pictures.attributes[:n]
    prompts = [describe(row, rng) for row in wanted.tolist()]
    generator = torch.Generator().manual_seed(seed)
    x = pipe(prompts, guidance_scale=scale, generator=generator, output_type='pt').images
    return judge.score(to_cpu(x)*2 - 1, wanted)


def train_text_to_image(steps=STEPS['unet'], data='digits', out='text-to-image', seed=0,
                        device=None, vae=None) -> dict:
    """Trains VAE, CLIP and U-Net from nothing, writes them to `out` with their cards.

    `steps`: of the U-Net; the others have theirs in proportion. `data`: the handwriting, as for
    `load_images`. `vae`: one that's trained already. Returns held-out figures by name of the part.
    """
    results = Results(out, ['vae', 'clip', 'unet', 'scheduler'])
    device, source = pick_device(device), None if data == 'digits' else data
    results.reserve(30_000_000)
    print('drawing the pictures ...', flush=True)
    pictures = captioned_digits(source)
    kept = Path(out)/f'checkpoint-{Path(data).name}-{seed}-{steps}'
    todo = {part: max(1, round(n*steps/STEPS['unet'])) for part, n in STEPS.items()}
    if kept.is_dir() and any(kept.iterdir()):
        print(f'carrying on (to begin anew, remove {kept})', flush=True)
    seconds = {}
    given = seed, device
    try:
        if vae is None:
            print(f"1 of 3: VAE, {todo['vae']:,} steps", flush=True)
            vae, seconds['vae'] = fit_vae(pictures, kept/'vae', todo['vae'], *given)
        print(f"2 of 3: CLIP, {todo['clip']:,} steps", flush=True)
        clip, seconds['clip'] = fit_clip(pictures, kept/'clip', todo['clip'], *given)
        print(f"3 of 3: U-Net, {todo['unet']:,} steps", flush=True)
        unet, seconds['unet'] = fit_unet(pictures, vae, clip, kept/'unet', todo['unet'], *given)
    except KeyboardInterrupt:
        print('\nInterrupted: the same command carries on.', flush=True)
        raise
    print('now the judge looks at what they draw ...', flush=True)
    pipe = TextToImagePipeline(vae, clip, unet)
    pipe.set_progress_bar_config(disable=True)
    figures = measure(pipe, pictures, train_judge(source, device=device))
    command = f'miniai train text-to-image --data {data} --seed {seed} --steps {steps}'
    told = dict(data=data, n_train=len(pictures['train']), seed=seed, command=command,
                share=UNNAMED)
    with results as new:
        write(new, pipe, figures, seconds, todo, told)
    _forget(kept)
    print(f'Written to {results.folder}: vae, clip, unet, scheduler')
    return figures


def measure(pipe, pictures, judge, n=512) -> dict:
    "Held-out figures of all parts, by the part's name."
    found = dict(vae=figures_of(pipe.vae, pictures, judge), clip={}, unet={})
    for name in ('test', 'unseen'):
        ds, rng = pictures[name], random.Random(0)
        captions = [describe(row, rng) for row in ds.attributes.tolist()]
        found['clip'][name] = retrieval(pipe.clip, ds.x[:], captions, attributes=ds.attributes)
        found['unet'][name] = fidelity(pipe, ds, judge, n)
        f = found['unet'][name]
        print(f"{dict(test='combinations of the training')[name] if name == 'test' else 'unseen'}: "
              f"digit and both colours {f['colours']:.1%}, all five {f['all']:.1%}", flush=True)
    return found


def write(folder, pipe, figures, seconds, steps, told):
    "Writes all parts, rounded to half precision, and their cards."
    pipe = copy.deepcopy(pipe)
    for part in (pipe.vae, pipe.clip, pipe.unet):
        part.half()
    pipe.save_pretrained(folder)
    for part, card in dict(CARDS, vae=CARD).items():
        if part not in seconds:
            continue
        more = dict(told, steps=steps[part], cpu_seconds=seconds[part], **figures[part],
                    parameters=sum(p.numel() for p in getattr(pipe, part).parameters()))
        if part == 'clip':
            more |= dict(dim=pipe.clip.text_out.out_features, words=', '.join(pipe.clip.tokenizer.words))
        if part == 'unet':
            rows = {f'{k}_row': ' | '.join(f'{v:.1%}' for v in figures['unet'][k].values())
                    for k in ('test', 'unseen')}
            more |= dict(rows, n=512, scale=SCALE)
        (folder/part/'README.md').write_text(card.format(**more))


def _forget(folder):
    "Removes the checkpoints of all parts."
    for part in ('vae', 'clip', 'unet'):
        for path in checkpoints(folder/part) if (folder/part).is_dir() else ():
            path.unlink()
    for path in (*(folder/part for part in ('vae', 'clip', 'unet')), folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
