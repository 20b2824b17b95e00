"""Printed letters, a data set that no setting of this library was chosen on.

    python tests/bench/letters.py FOLDER && pip install -e '.[bench]' && OMP_NUM_THREADS=1 \\
        python tests/bench/time_to_quality.py --data FOLDER --cpu-seconds --seconds 60

Writes grey pictures of the letters a to z in the fonts that matplotlib brings, a little turned,
scaled and moved, each in FOLDER/train/LETTER/ or FOLDER/test/LETTER/.
"""

import argparse
import math
import random
from pathlib import Path
from string import ascii_lowercase

import matplotlib
from PIL import Image, ImageDraw, ImageFont


def fonts():
    "Fonts with letters in them, at 40 pixels."
    folder = Path(matplotlib.get_data_path())/'fonts'/'ttf'
    names = 'DejaVuS*.ttf', 'STIXGeneral*.ttf', 'cmr10.ttf', 'cmb10.ttf', 'cmss10.ttf', 'cmtt10.ttf'
    paths = sorted(path for name in names for path in folder.glob(name))
    return [ImageFont.truetype(path, 40) for path in paths if 'Display' not in path.name]


def letter(text, font, size, rng):
    "A grey picture, white on black."
    page = Image.new('L', (96, 96))
    ImageDraw.Draw(page).text((48, 48), text, 255, font, anchor='mm')
    left, top, right, bottom = page.getbbox()
    angle, scale = math.radians(rng.uniform(-8, 8)), rng.uniform(0.9, 1.1)*64/48
    a, b = math.cos(angle)/scale, math.sin(angle)/scale
    x, y = (left + right)/2 + rng.uniform(-2, 2), (top + bottom)/2 + rng.uniform(-2, 2)
    where = (a, b, x - 32*(a + b), -b, a, y - 32*(a - b))
    page = page.transform((64, 64), Image.Transform.AFFINE, where, Image.Resampling.BICUBIC)
    return page.resize((size, size), Image.Resampling.BOX)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('folder', type=Path)
    p.add_argument('--size', type=int, default=16, help='pixels of a side')
    p.add_argument('--n', type=int, default=5200, help='pictures; a fifth of them held out')
    args = p.parse_args()
    rng, typefaces = random.Random(0), fonts()
    for i in range(args.n):
        text = ascii_lowercase[i % 26]
        folder = args.folder/('test' if i//26 % 5 == 4 else 'train')/text
        folder.mkdir(parents=True, exist_ok=True)
        letter(text, rng.choice(typefaces), args.size, rng).save(folder/f'{i:05}.png')
    print(f'{args.n:,} letters of {len(typefaces)} fonts, {args.size} pixels a side: {args.folder}')


if __name__ == '__main__':
    main()
