"""Lesson 41 measured over seeds: a new symbol by DreamBooth, with and without its prior.

    OMP_NUM_THREADS=1 python tests/bench/finetune.py --seeds 0 1 2
    OMP_NUM_THREADS=1 python tests/bench/finetune.py --seeds 0 1 2 --no-prior --steps 150

Trains on the ten drawings in nbs/pictures/arrows, recoloured. The judge is trained on other
drawings and on digits. `arrows`: of --n prompts each, the share read as arrows in the ink and on
the paper asked for, in pairs of colours of the ten drawings, and with inks and papers that none of
them has. `digits`: share of captions of held-out digits read right (digit and both colours),
before and after.
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from miniai.captions import (
    ATTRIBUTES,
    SLANT,
    THICKNESS,
    CaptionJudge,
    Drawings,
    captioned_digits,
    ink_map,
    with_pen,
)
from miniai.classifier import AugmentCB, RandomAffines, train_classifier
from miniai.clip import describe, mention, random_colours
from miniai.data import DataLoaders, TensorLoader, images_to_tensor, load_images
from miniai.finetune import DreamBooth
from miniai.pipeline import TextToImagePipeline
from miniai.tensors import set_seed
from miniai.weights.captioned import drawn

FOLDER = Path(__file__).parents[2] / 'nbs' / 'pictures' / 'arrows'
NEW_INKS, NEW_PAPERS = (6, 7), (3, 6)
BEND = RandomAffines(degrees=7.0, shift=0.04, scale=0.12, shear=5.0)


def arrow_lines(slant, rng, side=64):
    "An arrow as a hand draws it, one pixel wide: uint8 `(side, side)`."
    bend, strokes = np.eye(2) + rng.normal(0, 0.1, (2, 2)), []
    for stroke in ([[0, 1], [0, -1]], [[-0.75, -0.25], [0, -1], [0.75, -0.25]]):
        u = np.linspace(0, 1, 60)
        p = np.stack([np.interp(u, np.linspace(0, 1, len(stroke)), v) for v in zip(*stroke)], 1)
        for k in (0.5, 1, 2):
            p = p + rng.normal(0, 0.06 / (k + 0.5), 2) * np.sin(
                2 * np.pi * (k * u[:, None] + rng.random(2))
            )
        p = p @ bend.T
        strokes.append(p - [slant, 0] * p[:, 1:])
    low, high = (f(np.concatenate(strokes), 0) for f in (np.min, np.max))
    image = Image.new('L', (side, side))
    for p in strokes:
        at = (p - (low + high) / 2) * 0.65 * side / (high - low).max() + side / 2
        ImageDraw.Draw(image).line([tuple(v) for v in at], fill=1)
    return np.array(image)


def arrows(attributes, seed):
    rng = np.random.default_rng(seed)
    lean, pen = (torch.tensor(list(d.values())) for d in (SLANT, THICKNESS))
    lines = [arrow_lines(lean[k].item(), rng) for k in attributes[:, 4]]
    shapes = with_pen(torch.from_numpy(np.stack(lines)), pen[attributes[:, 3]])
    return Drawings(shapes, torch.arange(len(attributes)), attributes)


def random_attributes(n, seed):
    rng = random.Random(seed)
    rows = [[rng.randrange(len(v)) for v in ATTRIBUTES.values()] for _ in range(3 * n)]
    return torch.tensor([row for row in rows if row[1] != row[2]][:n])


def train_arrow_judge(n_digits=6_000, n_arrows=800, seed=1):
    "A judge that knows an eleventh sign, number 10."
    set_seed(seed)
    ds = captioned_digits(n_train=n_digits, n_test=1, seed=seed, held_out=False)['train']
    new = arrows(random_attributes(n_arrows, seed), seed)
    x = torch.cat([ink_map(ds.x[:]), ink_map(new[:])])[:, None] * 2 - 1
    y = torch.cat([ds.attributes[:, 0], torch.full((n_arrows,), 10)])
    cbs = [AugmentCB(lambda m: F.adaptive_avg_pool2d(BEND(m), 16), batched=True)]
    judge = CaptionJudge()
    loaders = DataLoaders(TensorLoader(x, y, batch_size=64, shuffle=True))
    judge.digits = train_classifier(loaders, 11, n_epochs=1, cbs=cbs, device='cpu').model
    return judge.eval()


def said(rows, rng, full=1.0, p=0.75):
    "Captions with the word arrow in each, and maybe less of the rest."
    rest = [[0, *mention(row, rng, full, p)[1:]] for row in rows.tolist()]
    return [describe(row, rng).replace('zero', 'arrow') for row in rest]


def attributes_of(text):
    "Attributes of a caption 'a thick red arrow leaning left on yellow paper'."
    words = text.split()
    ink, paper = (ATTRIBUTES['ink'].index(w) for w in words if w in ATTRIBUTES['ink'])
    kinds = ATTRIBUTES['thickness'], ATTRIBUTES['slant']
    return [0, ink, paper, *(next(k for k, w in enumerate(o) if w in words) for o in kinds)]


def pictures():
    table = load_images(FOLDER)['train']
    return images_to_tensor(table['image']), torch.tensor([*map(attributes_of, table['text'])])


def recoloured(x, rows, unnamed, seed):
    "Drawings in all pairs of their own inks and papers, and `unnamed` in colours without a name."
    pairs = torch.cartesian_prod(rows[:, 1].unique(), rows[:, 2].unique())
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    which = torch.arange(len(x)).repeat_interleave(len(pairs))
    new = rows[which]
    new[:, 1:3] = pairs.repeat(len(x), 1)
    named = Drawings((ink_map(x) * 255).round().byte(), which, new)
    more, their = random_colours(named, unnamed, torch.Generator().manual_seed(seed))
    return torch.cat([named[:], more]), torch.cat([new, their])


def train(pipe, seed, steps, prior):
    x, rows = pictures()
    set_seed(seed)
    rng = random.Random(seed)
    more, their = recoloured(x, rows, 200, seed)
    booth = DreamBooth(pipe, 'arrow')
    captions = said(rows, rng) + said(their, rng, full=0.4, p=0.7)
    old = random_attributes(prior, seed)
    if prior:
        old[:, 1:] = their[torch.randint(len(their), (prior,)), 1:]  # the same colours, of digits
    old = [describe(row, rng, full=0.5, p=0.7) for row in old.tolist()]
    learn = booth.learner(torch.cat([x, more]), captions, old, steps=steps, device='cpu')
    learn.fit(1, valid=False)
    return booth.pipe


def read(judge, pipe, rows, captions, seed):
    x = drawn(pipe, captions, seed, 3.0)
    return x, judge(x)


def measure(judge, pipe, n, seed):
    _, rows = pictures()
    every, shares = random_attributes(50 * n, seed + 50), []
    every[:, 0] = 0
    fresh = [a in NEW_INKS and b in NEW_PAPERS for a, b in every[:, 1:3].tolist()]
    for asked in (rows.repeat(n, 1)[:n], every[torch.tensor(fresh)][:n]):
        _, found = read(judge, pipe, asked, said(asked, random.Random(seed)), seed)
        ok = (found[:, 0] == 10), (found[:, 1:3] == asked[:, 1:3]).all(1)
        shares += [ok[0].float().mean().item(), (ok[0] & ok[1]).float().mean().item()]
    return shares


def digits(judge, pipe, n, seed, sets):
    shares = []
    for ds in sets:
        asked = ds.attributes[:n]
        captions = [describe(row, random.Random(i)) for i, row in enumerate(asked.tolist())]
        _, found = read(judge, pipe, asked, captions, seed)
        shares.append((found == asked)[:, :3].all(1).float().mean().item())
    return shares


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--steps', type=int, default=400)
    p.add_argument('--n', type=int, default=64)
    p.add_argument('--prior', type=int, default=140)
    p.add_argument('--no-prior', action='store_true')
    args = p.parse_args()
    judge, pipe = train_arrow_judge(), TextToImagePipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    data = captioned_digits(n_train=10, n_test=200)
    sets = data['test'], data['unseen']
    print('seed  CPU s  arrows: of shown colours (with colours)  new colours (with colours)   '
          'digits before: test unseen   after: test unseen')
    for seed in args.seeds:
        start = time.process_time()
        new = train(pipe, seed, args.steps, 0 if args.no_prior else args.prior)
        spent = time.process_time() - start
        cells = measure(judge, new, args.n, seed)
        cells += digits(judge, pipe, args.n, seed, sets) + digits(judge, new, args.n, seed, sets)
        print(f'{seed:4} {spent:6.0f} ' + ''.join(f'{v:8.1%}' for v in cells), flush=True)


if __name__ == '__main__':
    main()
