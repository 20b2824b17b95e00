"""Any picture in, words out: what's found on it, what's read, and what's refused."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from miniai import cli
from miniai.captions import PALETTE, captioned_digits, measure_colours
from miniai.clip import CLIP
from miniai.interrogator import PARTS, Interrogator, as_array, find_digit, sentence
from miniai.pipeline import TextToImagePipeline
from miniai.plot import to_pil
from miniai.tensors import set_seed

MINIAI = str(Path(sys.executable).parent/'miniai')


@pytest.fixture(scope='module')
def held_out():
    return captioned_digits(n_train=200, n_test=200)


@pytest.fixture(scope='module')
def reader(): return Interrogator()


@pytest.fixture(scope='module')
def mask(held_out):
    "How much ink a held-out seven has, as an array (160, 160)."
    ds = held_out['test']
    row = next(i for i, y in enumerate(ds.attributes.tolist()) if y[0] == 7 and y[3] == 1)
    shape = ds.x.shapes[ds.x.which[row]].numpy()
    return np.asarray(Image.fromarray(shape).resize((160, 160), Image.Resampling.BICUBIC))/255


def page(mask, ink=(20, 20, 140), paper=(230, 225, 215), size=(700, 1000), at=(120, 600)):
    "A seven on a large page, off the middle."
    a, (y, x), n = np.zeros(size), at, len(mask)
    a[y:y + n, x:x + n] = mask
    return Image.fromarray((paper + np.subtract(ink, paper)*a[..., None]).astype(np.uint8))


def transparent(mask, colour):
    a = np.full((*mask.shape, 4), [*colour, 0], np.uint8)
    a[..., 3] = mask*255
    return Image.fromarray(a, 'RGBA')


def turned(mask):
    "A page that lies on its side in the file, with EXIF data that say so."
    im = page(mask).transpose(Image.Transpose.ROTATE_90)
    im.getexif()[0x0112] = 6
    return im


KINDS = {
    'a large page': page,
    'in shadow': lambda m: Image.fromarray(
        (np.asarray(page(m))*np.linspace(0.5, 1, 1000)[:, None]).astype(np.uint8)),
    'with dust and an edge': lambda m: _spoiled(page(m)),
    'black on transparent': lambda m: transparent(m, (0, 0, 0)),
    'white on transparent': lambda m: transparent(m, (255, 255, 255)),
    'grey': lambda m: page(m).convert('L'),
    'CMYK': lambda m: page(m).convert('CMYK'),
    'palette': lambda m: page(m).convert('P'),
    'bits': lambda m: page(m).convert('1', dither=Image.Dither.NONE),
    '16 bits': lambda m: Image.fromarray((np.asarray(page(m).convert('L')).astype(np.uint16)*257)),
    'a small one': lambda m: page(m).crop((590, 110, 770, 290)).resize((24, 24)),
    'a huge one': lambda m: page(m).resize((5000, 3500)),
    'on its side': turned,
}


def _spoiled(im):
    im.paste((90, 90, 90), (0, 0, 30, 700))
    im.paste((60, 60, 60), (300, 500, 306, 506))
    return im


@pytest.mark.parametrize('kind', KINDS)
def test_the_digit_is_found_on_any_kind_of_picture(kind, mask, reader):
    im = KINDS[kind](mask)
    size = im.size
    x, reading = find_digit(im), reader.ask(im)
    assert im.size == size and x.shape == (3, 32, 32) and x.abs().max() <= 1
    assert reading.parts['label'][0] == 'seven', reading
    ink, paper = measure_colours(x[None])
    light = kind == 'white on transparent'
    assert (ink.mean() > paper.mean()) == light and (ink - paper).abs().max() > 1
    assert reading.digit > 0.5


def test_colours_are_kept(mask):
    x = find_digit(page(mask, ink=(200, 40, 30), paper=(220, 215, 80)))
    ink, paper = (torch.cdist(c, PALETTE).argmin(1).item() for c in measure_colours(x[None]))
    assert (ink, paper) == (2, 5)                                         # red on yellow


def test_a_captioned_digit_comes_back_almost_as_it_was(held_out):
    x = held_out['test'].x[:20]
    back = torch.stack([find_digit(to_pil(o)) for o in x])
    assert (back - x).abs().mean() < 0.1


def _noise(n): return np.random.default_rng(0).integers(0, 255, (n, n, 3), dtype=np.uint8)


@pytest.mark.parametrize('image', [
    Image.new('RGB', (300, 200), 'white'), Image.new('L', (1, 1)), Image.new('RGB', (3000, 2)),
    Image.new('RGBA', (50, 50)), Image.fromarray(_noise(100)),
    Image.fromarray(_noise(200)//40 + 200)],
    ids=['white', 'one pixel', 'a line', 'nothing seen', 'noise', 'grain'])
def test_where_nothing_is_written_there_is_no_digit(image, reader):
    reading = reader.ask(image)
    assert reading.digit < 0.5 and (reading.parts or reading.caption == '')


def test_memory_is_bounded():
    assert max(as_array(Image.new('RGB', (6000, 3000))).shape) == 1024


@pytest.mark.parametrize('split', ['test', 'unseen'])
def test_held_out_digits_are_read(split, held_out, reader):
    ds = held_out[split]
    logits, readings = reader.logits(ds.x[:]), reader.read(ds.x[:])
    right = [(logits[name].argmax(1) == y).float().mean()
             for name, y in zip(PARTS, ds.attributes.T)]
    assert right[0] > 0.8 and min(right[1:]) > 0.85
    for reading in readings[:20]:
        assert reading.caption == sentence({k: word for k, (word, _) in reading.parts.items()})
        assert all(0 < p <= 1 for _, p in reading.parts.values()) and 0 <= reading.digit <= 1
    assert sum(r.digit > 0.5 for r in readings) > 0.9*len(readings)


def test_an_answer_does_not_depend_on_what_was_asked_before(held_out, reader):
    x = held_out['test'].x[:4]
    fresh, used = Interrogator().logits(x), reader.logits(x)
    alone = reader.logits(x[2:3])
    for name, v in fresh.items():
        assert torch.allclose(v, used[name], atol=1e-3)
        assert torch.allclose(v[2:3], alone[name], atol=1e-3)


def test_its_words_are_those_that_the_pipeline_draws_by():
    texts = ['a thick red seven leaning left on cyan paper', '']
    with torch.no_grad():
        assert torch.equal(Interrogator().clip.states(texts), CLIP.from_pretrained().states(texts))


def test_another_clip(held_out):
    set_seed(0)
    reading, = Interrogator(CLIP()).read(held_out['test'].x[:1])
    assert set(reading.parts) == set(PARTS)


def test_every_caption_is_of_known_words(reader):
    for name, words in PARTS.items():
        for word in words:
            assert reader.clip.tokenizer([sentence({name: word})]).any()
    assert sentence({}) == 'a digit'


def test_the_command(tmp_path, mask):
    page(mask).save(tmp_path/'seven.jpg', quality=80)
    Image.new('RGB', (200, 100), 'white').save(tmp_path/'white.png')
    run = subprocess.run([MINIAI, 'interrogate', 'seven.jpg'], cwd=tmp_path, text=True,
                         capture_output=True)
    lines = [line for line in run.stdout.splitlines() if not line.startswith('...')]
    assert run.returncode == 0 and len(lines) == 7 and 'seven' in lines[0], run.stderr
    assert [line.split()[0] for line in lines[1:]] == ['digit', *PARTS]
    assert all(line.endswith('%') for line in lines[1:])


@pytest.mark.parametrize('name, says', [
    ('white.png', 'I see no digit'), ('nowhere.png', "there's none"), ('text.png', 'no picture'),
    ('half.png', 'damaged'), ('.', 'damaged')])
def test_the_command_says_what_it_cannot_read(name, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (200, 100), 'white').save('white.png')
    Path('text.png').write_text('precious')
    Path('half.png').write_bytes(Path('white.png').read_bytes()[:60])
    code = cli.main(['interrogate', name])
    said = capsys.readouterr()
    assert code == (0 if name == 'white.png' else 2) and says in said.out + said.err
    assert len((said.out + said.err).splitlines()) == 1


def test_a_tight_crop_and_the_larger_of_two(mask, reader):
    ys, xs = np.nonzero(mask > 0.4)
    tight = 1 - mask[ys.min():ys.max(), xs.min():xs.max()]
    assert reader.ask(to_pil(torch.tensor(tight)*2 - 1, size=200)).parts['label'][0] == 'seven'
    two = page(mask)
    two.paste(page(mask).resize((400, 280)), (100, 300))                 # and a smaller one
    assert (find_digit(two) - find_digit(page(mask))).abs().mean() < 0.1


def test_reads_back_what_was_drawn():
    "Strokes so thick that they cover much of the picture aren't taken for paper."
    pipe = TextToImagePipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipe('a thick red seven on a yellow background', generator=generator,
                 num_images_per_prompt=4).images  # fmt: skip
    asked = [Interrogator().ask(o.resize((256, 256), Image.Resampling.NEAREST)) for o in drawn]
    assert sum(o.caption.startswith('a thick red seven') and o.digit > 0.5 for o in asked) >= 3
