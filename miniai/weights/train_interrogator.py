"""Makes the interrogator's weights again: `python -m miniai.weights.train_interrogator FOLDER`.

Lesson 42 explains it. The text encoder is that of the CLIP beside it, and stays as it is.
"""
import math
import random
import sys
from functools import partial
from pathlib import Path
from string import ascii_letters

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from miniai.autoencoder import RandomBatches
from miniai.callbacks import GradClipCB, MetricsCB, ScheduleCB
from miniai.captions import PALETTE, captioned_digits
from miniai.clip import CLIP, clip_loss, describe, mention, random_colours
from miniai.data import DataLoaders, images_to_tensor
from miniai.interrogator import PARTS, Interrogator
from miniai.learner import Learner
from miniai.tensors import set_seed

STEPS, BATCH_SIZE, LR = 900, 256, 2e-3
UNNAMED, NOTHING = 0.25, 0.15      # shares of a batch: colours without a name, what is no digit
LIKE_DIGITS = 'oOQDlIisSzZbgqBGJjt'                   # nobody could tell these from digits
LETTERS = [c for c in ascii_letters if c not in LIKE_DIGITS]
FONTS = ('DejaVuSans', 'DejaVuSans-Oblique', 'DejaVuSerif', 'STIXGeneral', 'STIXGeneralItalic')


CARD = '''---
library_name: miniai
tags: [clip, digits]
---
# CLIP of the interrogator

The CLIP beside it, with a picture encoder that has practised on bent digits, and on what is no
digit; its text encoder is the same. Lesson 42 of miniai explains it; `Interrogator()` loads it.
{parameters:,} parameters, stored in half precision.

- Data: `captioned_digits()`, training pictures, bent at random; letters that matplotlib's fonts
  have, mirrored digits, pieces, noise. Held-out handwriting for all figures.
- Training: `python -m miniai.weights.train_interrogator`, {steps} steps of {batch_size} pictures.

Read right, of 1,000 pictures each:

| pictures | digit | ink | paper | thickness | slant | all five |
|---|---|---|---|---|---|---|
| held out | {test} |
| combinations never shown | {unseen} |

Licence: Apache 2.0. It knows nothing but digits, and the words of the CLIP beside it.
'''


def letters(words, fonts, size=32):
    "How much ink there is in printed letters, `(n, size, size)`, 1 is ink."
    folder, pages = Path(matplotlib.get_data_path())/'fonts'/'ttf', []
    for name in fonts:
        font = ImageFont.truetype(folder/f'{name}.ttf', 200)
        for word in words:
            page = Image.new('L', (400, 400))
            ImageDraw.Draw(page).text((200, 200), word, 255, font, anchor='mm')
            x0, y0, x1, y1 = page.getbbox()
            half = max(x1 - x0, y1 - y0)/1.3
            x, y = (x0 + x1)/2, (y0 + y1)/2
            pages.append(page.crop([round(v) for v in (x - half, y - half, x + half, y + half)]))
    return images_to_tensor(pages, size, 1)[:, 0]/2 + 0.5


def bend(x, strong, generator=None):
    """Pictures `(n, c, h, w)`, each turned, slanted, stretched and bent at random.

    `strong`: bools `(n,)`, which ones much. What comes in from outside is as the edge."""
    def number(*shape): return torch.rand(len(x), *shape, generator=generator)*2 - 1

    k = torch.where(strong, 1., 0.35)
    angle, slant, scale = 0.3*k*number(), 0.35*k*number(), 1 + 0.12*number()
    wide, cos, sin = (0.35*k*number()).exp(), angle.cos(), angle.sin()
    rows = torch.stack([cos*wide, slant - sin]), torch.stack([sin, cos])
    turn = (torch.stack(rows)*scale).permute(2, 0, 1)
    grid = F.affine_grid(torch.cat([turn, 0.08*number(2, 1)], 2), x.shape, align_corners=False)
    waves = torch.randn(len(x), 2, 6, 6, generator=generator)*0.05*k[:, None, None, None]
    waves = F.interpolate(waves, x.shape[2:], mode='bicubic')
    return F.grid_sample(x, grid + waves.permute(0, 2, 3, 1), padding_mode='border',
                         align_corners=False)


class Practice(RandomBatches):
    """Batches as `CaptionedBatches`, of bent digits and of what is no digit, whose caption is ''.

    Attributes that bending may have changed aren't said. No digit are: mirrored digits, two halves
    of different digits, printed letters, blots of noise, and nothing at all."""
    def __init__(self, drawings, tokenizer, generator, batch_size=BATCH_SIZE, n_batches=50):
        super().__init__(drawings, drawings.attributes, batch_size, n_batches, generator)
        self.tokenizer, self.letters = tokenizer, letters(LETTERS[::2], FONTS)
        digits = torch.tensor([3, 4, 6, 7, 9])            # the others, mirrored, may be digits
        self.can_mirror = torch.where(torch.isin(drawings.attributes[:, 0], digits))[0]

    def rows(self, n, among):
        return torch.randint(among, (n,), generator=self.generator)

    def no_digits(self, n):
        "`n` pictures that are no digits, in the colours of digits and in random ones."
        k = torch.arange(n) % 5
        shape = self.x.shapes[self.x.which]
        flipped = shape[self.can_mirror[self.rows(n, len(self.can_mirror))]].flip(2)/255
        upper, lower = (shape[self.rows(n, len(shape))]/255 for _ in range(2))
        glued = torch.cat([upper[:, 16:], lower[:, :16]], 1)
        noise = torch.randn(n, 1, 32, 32, generator=self.generator)
        coarse = torch.randn(n, 1, 7, 7, generator=self.generator)
        blots = (F.interpolate(coarse, (32, 32), mode='bicubic') + 0.4*noise)[:, 0].clamp(0, 1)
        letter = self.letters[self.rows(n, len(self.letters))]
        kinds = torch.stack([flipped, glued, letter, blots*(self.rows(n, 4) > 0)[:, None, None],
                             letter])
        colours = PALETTE[self.x.attributes[self.rows(n, len(self.x)), 1:3]]
        other = torch.rand(n, 2, 3, generator=self.generator)*2 - 1
        colours = torch.where((k[:, None, None] + torch.arange(n)[:, None, None]//5) % 3 > 0,
                              colours, other)[..., None, None]
        return torch.lerp(colours[:, 1], colours[:, 0], kinds[k, torch.arange(n)][:, None])

    def __iter__(self):
        n, g = self.batch_size, self.generator
        a, b = round(n*UNNAMED), round(n*NOTHING)
        for x, y in super().__iter__():
            y = y.clone()
            x[:a], y[:a] = random_colours(self.x, a, g)
            x[-b:], y[-b:] = self.no_digits(b), -9
            strong = torch.rand(n, generator=g) < 0.6
            x = bend(x, strong, g)
            x = x*(1 - 0.15*torch.rand(n, 3, 1, 1, generator=g)) \
                + 0.03*torch.randn(x.shape, generator=g)
            y[strong & (y[:, 0] >= 0), 4] = -1
            rng = random.Random(int(torch.randint(2**60, (1,), generator=g)))
            said = y.new_tensor([mention(row, rng) if row[0] >= 0 else row for row in y.tolist()])
            texts = [describe(row, rng) if row[0] != -9 else '' for row in said.tolist()]
            ids = self.tokenizer(texts)
            yield (x, ids[:, :int((ids > 0).sum(1).max())]), \
                ((said == -1) | (said == y[:, None])).all(-1)


def train_interrogator(steps=STEPS, seed=0, drawings=None):
    "A `Learner` that has trained the picture encoder of a `CLIP`; the words stay as they are."
    set_seed(seed)
    clip, g = CLIP.from_pretrained(), torch.Generator().manual_seed(seed)
    clip.requires_grad_(False)
    clip.picture.requires_grad_(True)
    drawings = drawings or captioned_digits()['train'].x
    loader = Practice(drawings, clip.tokenizer, g)
    opt_func = partial(torch.optim.AdamW, betas=(0.9, 0.98), weight_decay=0.05)
    cbs = [GradClipCB(1.), ScheduleCB(), MetricsCB()]
    learn = Learner(clip.train(), DataLoaders(loader), clip_loss, LR, cbs, opt_func)
    return learn.fit(max(1, steps//50), valid=False)


def calibrate(interrogator, x, attributes, others):
    """Fits an `Interrogator`'s temperatures to pictures of attributes `(n, 5)`, -1: not known.

    `others`: pictures of no digits, for how probable a digit is."""
    logits, times = interrogator.logits(x), torch.logspace(-1, 1, 200).tolist()
    for name, y in zip(PARTS, attributes.T):
        v, y = logits[name][y >= 0], y[y >= 0]
        losses = [F.cross_entropy(v/t, y).item() for t in times]
        interrogator.temperature[name] = times[losses.index(min(losses))]
    margin = torch.cat([logits['digit'], interrogator.logits(others)['digit']])[:, None]
    right = [1]*len(x) + [0]*len(others)
    fitted = LogisticRegression().fit(margin.numpy(), right)
    # of pictures that people hand in, nine of ten are taken to be digits
    odds = math.log(9*len(others)/len(x))
    interrogator.digit = fitted.coef_.item(), fitted.intercept_.item() + odds
    return interrogator


def practice_of(drawings, tokenizer, n=1_500, seed=1):
    "What to calibrate on: bent training digits, their attributes, and pictures of no digits."
    g = torch.Generator().manual_seed(seed)
    practice = Practice(drawings, tokenizer, g)
    rows = torch.randint(len(drawings), (n,), generator=g)
    y, strong = drawings.attributes[rows].clone(), torch.arange(n) % 2 > 0
    y[strong, 4] = -1
    others = torch.cat([bend(practice.no_digits(250), torch.ones(250) > 0, g) for _ in range(4)])
    return bend(drawings[rows], strong, g), y, others


@torch.no_grad()
def write(clip, data, folder):
    "Writes weights and card to `folder`, prints the numbers that `miniai.interrogator` keeps."
    clip.half().save_pretrained(folder)
    reader = Interrogator(CLIP.from_pretrained(folder))
    calibrate(reader, *practice_of(data['train'].x, clip.tokenizer))
    print({k: round(t, 3) for k, t in reader.temperature.items()}, reader.digit, flush=True)
    rows = {}
    for name in ('test', 'unseen'):
        ds = data[name].select(range(1_000))
        logits = reader.logits(ds.x[:])
        right = torch.stack([logits[k].argmax(1) for k in PARTS], 1) == ds.attributes
        shares = [*right.float().mean(0).tolist(), right.all(1).float().mean().item()]
        rows[name] = ' | '.join(f'{v:.1%}' for v in shares)
        print(name, rows[name], flush=True)
    (Path(folder)/'README.md').write_text(CARD.format(
        **rows, steps=STEPS, batch_size=BATCH_SIZE,
        parameters=sum(p.numel() for p in clip.parameters())))


if __name__ == '__main__':
    pictures = captioned_digits()
    learn = train_interrogator(drawings=pictures['train'].x)
    write(learn.model, pictures, sys.argv[1] if sys.argv[1:] else 'interrogator')
