"""What text to image is trained on, how it's measured, and what the cards of its parts tell.

`Digits`: captioned digits, with captions written anew in each step. `OwnPictures`: a folder of
pictures, each with a caption. `load(name)` finds out which.
"""
import hashlib
import random

import torch

from miniai.autoencoder import encode_all, psnr
from miniai.captions import captioned_digits, train_judge
from miniai.clip import CLIP, Tokenizer, describe, random_colours, retrieval
from miniai.data import DataLoaders, load_images
from miniai.tensors import to_cpu
from miniai.weights.train_vae import CARD, RandomColoursCB, figures_of

UNNAMED = 0.35                  # share of the digits in colours without a name
N_DRAWN, SCALE = 512, 3.        # pictures drawn for the figures, at which guidance scale

CLIP_CARD = """---
library_name: miniai
tags: [clip, digits]
---
# CLIP for captioned digits

Captions and pictures of 3x32x32 in one space of {dim} numbers. Lesson 34 of miniai explains it;
`CLIP.from_pretrained()` loads it. {parameters:,} parameters, stored in half precision.

- Data: `captioned_digits({data!r})`, {n_train:,} training pictures, {share:.0%} of each batch in
  random colours without a name; held-out handwriting for all figures.
- Training: `{command}`
- {steps:,} steps of {batch_size} pictures in {seconds:.0f} seconds ({cpu_seconds:.0f} processor
  seconds).

| pictures | caption of a picture first among 256 | picture of a caption |
|---|---|---|
| held out | {test[0]:.1%} | {test[1]:.1%} |
| combinations never shown | {unseen[0]:.1%} | {unseen[1]:.1%} |

Licence: Apache 2.0. It knows nothing but digits and these words: {words}.
"""

UNET_CARD = """---
library_name: miniai
tags: [text-to-image, digits]
---
# U-Net for text to image, captioned digits

Latents of 4x4x4, told the words of a caption. Lesson 35 of miniai explains it;
`TextToImagePipeline.from_pretrained()` loads it with the VAE and CLIP beside it. {parameters:,}
parameters, stored in half precision.

- Data: latents of `captioned_digits({data!r})`, {n_train:,} training pictures, {share:.0%} of them
  in random colours without a name; held-out handwriting has no part.
- Training: `{command}`
- {steps:,} steps of {batch_size} pictures in {seconds:.0f} seconds ({cpu_seconds:.0f} processor
  seconds).

Of {n_drawn} prompts, drawn in 16 steps at guidance scale {scale:g}, the judge of lesson 30 reads
right:

| prompts | digit | ink | paper | thickness | slant | digit and both colours | all five |
|---|---|---|---|---|---|---|---|
| combinations of the training | {test_row} |
| combinations never shown | {unseen_row} |

Licence: Apache 2.0. It draws nothing but digits.
"""

OWN_CARD = """---
library_name: miniai
tags: [text-to-image]
---
# The {part} of a text-to-image model

Of 32x32 pixels; `TextToImagePipeline.from_pretrained(folder)` loads all its parts, lessons 31 to 35
of miniai explain them. {parameters:,} parameters, stored in half precision.

- Data: {n_train:,} pictures with captions from {data!r}, {n_test:,} held out for all figures.
- Training: `{command}`
- {steps:,} steps of {batch_size} pictures in {seconds:.0f} seconds ({cpu_seconds:.0f} processor
  seconds).

| held out | |
|---|---|
| PSNR of the VAE | {psnr:.2f} dB |
| caption of a picture first among {among} | {retrieval[0]:.1%} |
| picture of a caption first among {among} | {retrieval[1]:.1%} |
| CLIP score, drawn at guidance scale {scale:g} | {clip_score:.3f} |
| the same of the real pictures | {clip_score_real:.3f} |
| the same of drawn pictures with each other's captions | {clip_score_others:.3f} |

It knows these words: {words}.
"""


def load(name, device):
    "The pictures that `name` stands for, as for `load_images`: `Digits` or `OwnPictures`."
    dd = load_images(name)
    if 'text' in dd['train'].column_names:
        return OwnPictures(name, dd)
    if 'label' not in dd['train'].column_names:
        raise ValueError(f"{name!r} has neither captions nor labels: give each picture a text, in "
                         "a metadata.jsonl with file_name and text")
    return Digits(name, None if name == 'digits' else dd, device)


class Digits:
    "Captioned digits, some in colours that have no name; figures come from the caption judge."
    def __init__(self, name, source, device):
        self.name, self.source, self.device = name, source, device
        self.splits = captioned_digits(source)
        train = self.splits['train']
        self.x, self.n_train, self.n_test = train.x, len(train), len(self.splits['test'])
        self.key = name.rstrip('/').rpartition('/')[2]

    def clip(self): return CLIP()

    def for_clip(self): return self.splits['train'], UNNAMED

    def latents(self, vae, generator): return latents_of(vae, self.splits['train'], generator)

    def measure(self, pipe) -> dict:
        "Held-out figures of all parts, by the part's name."
        judge = train_judge(self.source, device=self.device)
        found = dict(vae=figures_of(pipe.vae, self.splits, judge), clip={}, unet={})
        for name, words in (('test', 'held out'), ('unseen', 'unseen combinations')):
            ds, rng = self.splits[name], random.Random(0)
            captions = [describe(row, rng) for row in ds.attributes.tolist()]
            found['clip'][name] = retrieval(pipe.clip, ds.x[:], captions, attributes=ds.attributes)
            x, wanted = drawn(pipe, captions[:N_DRAWN]), ds.attributes[:N_DRAWN]
            found['unet'][name] = f = judge.score(x, wanted)
            print(f"{words:20} {found['vae'][f'{name}_psnr']:.2f} dB, caption found "
                  f"{found['clip'][name][0]:.1%}, digit and both colours {f['colours']:.1%}, all "
                  f"five {f['all']:.1%}", flush=True)
        return found

    def card(self, part, figures, **told):
        if part == 'unet':
            figures = {f'{k}_row': ' | '.join(f'{v:.1%}' for v in row.values())
                       for k, row in figures.items()}
        card = dict(vae=CARD, clip=CLIP_CARD, unet=UNET_CARD)[part]
        share = RandomColoursCB().share if part == 'vae' else UNNAMED
        return card.format(**told, **figures, share=share)


class OwnPictures:
    "Pictures of one's own, at 32x32 in colour, each with a caption of any words."
    def __init__(self, name, dd):
        self.name = name
        dls = DataLoaders.from_dataset(dd, size=32, channels=3, device='cpu', target='text',
                                       valid_size=0)
        (self.x, self.captions), (self.held, self.asked) = dls.train.tensors, dls.test.tensors
        self.n_train, self.n_test = len(self.x), len(self.held)
        captions = [*self.captions, *self.asked]
        blank = sum(not (isinstance(text, str) and text.strip()) for text in captions)
        if blank or self.n_train < 8 or self.n_test < 2:
            raise ValueError(f"{name!r} holds {self.n_train} pictures to train on and {self.n_test}"
                             f" held out, {blank} of them without a text: at least 8 and 2 are "
                             "needed, 20 in all, each with its text")
        longest = Tokenizer.from_texts(captions)
        self.words, self.length = longest.words, max(20, longest.length)
        seen = hashlib.sha256(self.x.numpy().tobytes() + repr(captions).encode()).hexdigest()
        self.key = f"{name.rstrip('/').rpartition('/')[2]}-{seen[:8]}"      # other data, other fit

    def clip(self): return CLIP(words=self.words, length=self.length)

    def for_clip(self): return (self.x, self.captions), 0.

    def latents(self, vae, generator):
        return encode_all(vae, self.x)*vae.scaling_factor, self.captions

    @torch.no_grad()
    def measure(self, pipe) -> dict:
        "The same held-out figures for each part."
        x, device = self.held, pipe.clip.logit_scale.device
        among, latents = min(256, len(x)), encode_all(pipe.vae, x).split(500)
        new, asked = drawn(pipe, self.asked[:N_DRAWN]), self.asked[:N_DRAWN]
        def score(x, captions): return pipe.clip.score(x.to(device), captions).mean().item()
        back = torch.cat([to_cpu(pipe.vae.decode(z)) for z in latents])
        found = dict(psnr=psnr(back, x), among=among,
                     retrieval=retrieval(pipe.clip, x, self.asked, among),
                     clip_score=score(new, asked), clip_score_real=score(x[:N_DRAWN], asked),
                     clip_score_others=score(new, asked[1:] + asked[:1]))
        print(f"held out: {found['psnr']:.2f} dB, caption found among {among} "
              f"{found['retrieval'][0]:.1%}, CLIP score {found['clip_score']:.3f} (real pictures "
              f"{found['clip_score_real']:.3f}, other captions {found['clip_score_others']:.3f})")
        return dict(vae=found, clip=found, unet=found)

    def card(self, part, figures, **told):
        part = dict(vae='VAE', clip='CLIP', unet='U-Net')[part]
        return OWN_CARD.format(part=part, **told, **figures)


@torch.no_grad()
def latents_of(vae, train, generator):
    "Latents of captioned digits, of unit standard deviation, and what can be said of each."
    n = round(len(train)*UNNAMED/(1 - UNNAMED))
    z, said = [encode_all(vae, train.x)], [train.attributes]
    for k in range(0, n, 500):
        x, attributes = random_colours(train.x, min(500, n - k), generator)
        z.append(encode_all(vae, x))
        said.append(attributes)
    return torch.cat(z)*vae.scaling_factor, torch.cat(said).to(z[0].device)


def drawn(pipe, captions, seed=1, scale=SCALE):
    "A picture of each caption, `(n, 3, h, w)` in [-1, 1]."
    generator = torch.Generator().manual_seed(seed)
    images = pipe(captions, guidance_scale=scale, generator=generator, output_type='pt').images
    return to_cpu(images)*2 - 1
