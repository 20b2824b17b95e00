"""`miniai generate`, and the weights it draws with: made from nothing, on captions of one's own."""
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file

from miniai import cli
from miniai.autoencoder import VAE, encode_all, psnr
from miniai.captions import captioned_digits
from miniai.clip import CLIP, CaptionedBatches, retrieval, train_clip
from miniai.data import DataLoaders
from miniai.generate import generate
from miniai.pipeline import TextToImagePipeline
from miniai.plot import image_grid, to_pil
from miniai.results import check_picture, write_picture
from miniai.tensors import set_seed
from miniai.text_to_image import TextUNet, text_to_image_learner
from miniai.weights import captioned
from miniai.weights import train_text_to_image as T
from miniai.weights import train_vae as V

ENV = {**os.environ, 'PYTHONUNBUFFERED': '1'}


def command(words):
    "The exit code of a command line."
    try:
        return cli.main(words if isinstance(words, list) else words.split())
    except SystemExit as e:
        return e.code


def texts(**told):
    mark = PngInfo()
    for name, text in told.items():
        mark.add_text(name, text)
    return mark


@pytest.fixture(scope='module')
def top(tmp_path_factory):
    "A folder with an untrained model, pictures, and somebody's files."
    top = tmp_path_factory.mktemp('generate')
    set_seed(0)
    pipe = TextToImagePipeline(VAE(widths=(8, 16), n_blocks=(1, 1)), CLIP(), TextUNet(width=32))
    torch.nn.init.normal_(pipe.unet.out[2].weight, std=0.1)
    pipe.save_pretrained(top/'model')
    for name, size in (('start', 32), ('mask', 32), ('large', 64), ('large mask', 64)):
        Image.new('RGB', (size, size), 'red').save(top/f'{name}.png')
    half = Image.new('L', (64, 64))
    half.paste(255, (0, 32, 64, 64))
    half.save(top/'large mask.png')
    clear = Image.new('RGBA', (64, 64), (255, 255, 255, 0))          # white, but half of it unseen
    clear.paste('white', (0, 32, 64, 64))
    clear.save(top/'clear mask.png')
    Image.new('L', (32, 32), 1).save(top/'ones.png')
    old = texts(Software='miniai', Checksum='0')
    Image.new('RGB', (32, 32), 'red').save(top/'edited.png', pnginfo=old)
    (top/'broken.png').write_bytes((top/'start.png').read_bytes()[:60])
    (top/'text.png').write_text('precious')
    Image.new('L', (8, 8)).save(top/'theirs.gif')
    (top/'half').mkdir()
    pipe.vae.save_pretrained(top/'half'/'vae')
    (top/'empty').mkdir()
    return top


@pytest.fixture
def at(top, monkeypatch):
    monkeypatch.chdir(top)
    return top


def test_a_file_tells_how_it_was_made(at, capsys):
    words = 'generate --model model -n 3 --steps 3 --seed 7 --negative thick --guidance-scale 2.5'
    assert command([*words.split(), '--out', 'a.png', 'a', 'red', 'seven']) == 0
    assert '3 new in a.png' in capsys.readouterr().out
    told = Image.open('a.png').info
    wanted = dict(prompt='a red seven', negative='thick', guidance_scale='2.5', steps='3', seed='7',
                  n='3', model='model', pixels='32x32', Software='miniai')
    assert {k: told[k] for k in wanted} == wanted
    pipe = TextToImagePipeline.from_pretrained('model')
    x = pipe('a red seven', 'thick', 2.5, 3, torch.Generator().manual_seed(7), 3,
             output_type='pt').images
    blocks = x.repeat_interleave(8, 2).repeat_interleave(8, 3)*2 - 1
    wanted = image_grid(blocks, size=None)
    assert Image.open('a.png').tobytes() == wanted.tobytes()           # each pixel a block
    before = (at/'a.png').read_bytes()
    assert command([*words.split(), '--out', 'a.png', 'a red seven']) == 0       # ours: replaced
    assert (at/'a.png').read_bytes() == before


def test_steps_as_an_animation(at):
    for _ in range(2):                                                # ours: replaced
        x = generate('six', steps=4, model='model', out='b.png', steps_gif='b.gif')
    gif = Image.open('b.gif')
    assert gif.n_frames == 4 and gif.info['comment'] == b'miniai'
    gif.seek(3)
    last, first = gif.convert('RGB'), to_pil(x[0]).resize((256, 256), Image.Resampling.NEAREST)
    a, b = (torch.tensor(list(im.tobytes())).float() for im in (last.crop((6, 6, 262, 262)), first))
    assert (a - b).abs().mean() < 16                                  # of 64 colours
    generate('six', image='start.png', strength=0, model='model', out='b.png', steps_gif='b.gif')
    assert Image.open('b.gif').n_frames == 1


def test_a_picture_to_start_from(at):
    "Of any size; what we enlarged is what it was before; outside of the mask nothing changes."
    x = generate('six', steps=2, model='model', out='c.png')
    y = generate('six', image='c.png', strength=0, steps=2, model='model', out='d.png')
    pipe = TextToImagePipeline.from_pretrained('model')
    with torch.no_grad():
        back = pipe.vae.decode(pipe.vae.encode((x*127.5).round()/127.5))
    assert (y - back).abs().max() < 0.1
    for strength, mask in ((None, 'clear mask.png'), (0.5, 'large mask.png')):
        z, some = generate('six', image='large.png', mask=mask, strength=strength, steps=4,
                           model='model', out='d.png'), 16
        red = torch.tensor([1., -1, -1]).view(3, 1, 1)
        assert (z[0, :, :some] == red).all() and (z[0, :, some:] != red).any()
    assert Image.open('d.png').info['mask'] == 'large mask.png'


MISTAKES = {
    'hugee blu seven': 'unknown words: hugee, blu (nearest: ',
    'seven --negative rde': 'unknown words: rde (nearest: red',
    "''": 'the prompt is empty',
    'the': 'the prompt is empty',
    ' '.join(['red']*30): 'over 19 words',
    'seven --image nowhere.png': "'nowhere.png' can't be read: there's none",
    'seven --image broken.png': "'broken.png' can't be read: no picture",
    'seven --image empty': "can't be read",
    'seven --image start.png --mask text.png': "the mask 'text.png' can't be read",
    'seven --image large.png --mask mask.png': 'the mask is 32x32, but the picture 64x64',
    'seven --image start.png --mask ones.png': 'the mask has no white',
    'seven --out edited.png': 'was changed since miniai wrote it',
    'seven --mask mask.png': 'give an image too',
    'seven --strength 0.5': 'give an image too',
    'seven --image start.png --strength 1.1': 'not from 0 to 1',
    'seven --image start.png --strength nan': 'not from 0 to 1',
    'seven --guidance-scale -1': 'not from 0 to 100',
    'seven --guidance-scale inf': 'not from 0 to 100',
    'seven --guidance-scale much': 'invalid float',
    'seven --steps 0': 'not from 1 to 1000',
    'seven --steps 1001': 'not from 1 to 1000',
    'seven -n 0': 'not from 1 to 1000',
    'seven --seed -1': 'not from 0',
    'seven --device abacus': 'abacus',
    'seven --out nowhere/a.png': "there's no folder 'nowhere'",
    'seven --out /proc/a.png': "can't write to the folder '/proc'",
    'seven --out a.jpg': 'end it in .png',
    'seven --out text.png': "isn't a picture of miniai's making",
    'seven --out empty': 'end it in .png',
    'seven --steps-gif start.png': 'end it in .gif',
    'seven --steps-gif theirs.gif': "isn't a picture of miniai's making",
    'seven --model empty': 'holds no text-to-image model: vae/config.json and clip',
    'seven --model half': 'holds no text-to-image model: clip/config.json and unet',
    'seven --model nowhere': 'is no folder',
}


@pytest.mark.parametrize('words', MISTAKES)
def test_a_mistake_costs_one_line_and_no_file(at, capsys, words):
    before = {p: p.read_bytes() for p in at.rglob('*') if p.is_file()}
    words = [word.replace("''", '') for word in words.split()]
    model = [] if '--model' in words else ['--model', 'model']
    assert command(['generate', *words, *model]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert MISTAKES[' '.join(words) or "''"] in err[-1] and 'Traceback' not in ''.join(err)
    assert sum(line.startswith('miniai') for line in err) == 1
    assert {p: p.read_bytes() for p in at.rglob('*') if p.is_file()} == before


def test_marks_in_pictures(tmp_path):
    from miniai.plot import animate
    for frames in (torch.rand(3, 1, 8, 8), torch.rand(2, 3, 40, 40)):
        write_picture(tmp_path/'a.gif', animate([f[None] for f in frames]))
        im = Image.open(tmp_path/'a.gif')
        assert im.info['comment'] == b'miniai' and im.n_frames == len(frames)
        check_picture(tmp_path/'a.gif', 'GIF')
    write_picture(tmp_path/'a.png', Image.new('L', (4, 4)), prompt='grün', Software='other')
    info = Image.open(tmp_path/'a.png').info
    assert info.pop('Checksum') and info == dict(prompt='grün', Software='miniai')
    check_picture(tmp_path/'a.png')


# training


SHAPES = [(a, b) for a in ('dark', 'light') for b in ('left', 'right')]


@pytest.fixture
def own(tmp_path):
    "Forty pictures with captions, by the Hub's convention."
    rows = []
    for i in range(40):
        shade, side = SHAPES[i % 4]
        im = Image.new('RGB', (40, 40), 'white')
        im.paste('black' if shade == 'dark' else 'cyan', (0, i//4, 16, 40) if side == 'left'
                 else (24, i//4, 40, 40))
        (tmp_path/'own').mkdir(exist_ok=True)
        im.save(tmp_path/'own'/f'{i}.png')
        rows.append(dict(file_name=f'{i}.png', text=f'A {shade} bar, {side}.'))
    (tmp_path/'own'/'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return tmp_path


TINY = '''if True:
    import gc, os, signal, sys
    from miniai import cli
    from miniai.weights import captioned as C, train_text_to_image as T, train_vae as V
    signal.signal(signal.SIGINT, signal.default_int_handler)
    V.STEPS_PER_EPOCH = T.STEPS_PER_EPOCH = T.CLIP_STEPS_PER_EPOCH = 2
    T.STEPS = dict(vae=6, clip=6, unet=6)
    V.BATCH_SIZE, T.BATCH_SIZES = 8, dict(vae=8, clip=8, unet=8)
    vae, unet = V.VAE, T.TextUNet
    V.VAE = lambda: vae(widths=(8, 16), n_blocks=(1, 1))
    T.TextUNet = lambda: unet(width=32, n_blocks=1)

    class Stop(V.Callback):
        order = 2000

        def before_step(self, learn):
            if type(learn.model).__name__ == stop and learn.n_steps == 3:
                os.kill(os.getpid(), signal.SIGINT)

    V.ProgressCB = T.ProgressCB = lambda plot: Stop()
    for stop, out in zip(('VAE', 'CLIP', 'TextUNet', '', ''), ('parts',)*4 + ('whole',)):
        code = cli.main(['train', 'text-to-image', *'--data own --steps 6 --out'.split(), out])
        print('code', code, os.listdir(out), flush=True)
        gc.collect()
'''


def test_interrupted_in_each_part_it_carries_on_to_the_same_weights(own):
    run = subprocess.run([sys.executable, '-c', TINY], cwd=own, env=ENV, capture_output=True,
                         text=True, timeout=200)
    codes = [line for line in run.stdout.splitlines() if line.startswith('code')]
    assert [line.split()[1] for line in codes] == ['130']*3 + ['0']*2, run.stdout + run.stderr
    for stopped in codes[:3]:
        assert 'checkpoint-own' in stopped and "'clip'" not in stopped, stopped
    assert run.stdout.count('the same command carries on') == run.stdout.count('carrying on') == 3
    for part in ('vae', 'clip', 'unet'):
        a, b = (load_file(own/k/part/'model.safetensors') for k in ('whole', 'parts'))
        assert all(torch.equal(a[k], b[k]) for k in a), part
        card = (own/'parts'/part/'README.md').read_text()
        assert '36 pictures with captions' in card and 'bar, dark, left, light, right' in card
    assert not [*(own/'parts').glob('checkpoint*')]
    pipe = TextToImagePipeline.from_pretrained(own/'parts')
    assert pipe('a dark bar').images[0].size == (32, 32)


@pytest.mark.parametrize('text,words', [
    ('', '1 of them without a text'), (None, "without a text"), ('the', None)])
def test_own_captions_that_say_nothing(own, text, words):
    table = own/'own'/'metadata.jsonl'
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows[3]['text'] = text
    table.write_text('\n'.join(map(json.dumps, rows)))
    if words is None:
        assert captioned.load(str(own/'own'), 'cpu').n_train == 36
    else:
        with pytest.raises(ValueError, match=words):
            captioned.load(str(own/'own'), 'cpu')


def test_own_pictures_without_captions(tiny_pictures, tmp_path):
    for p in tiny_pictures.rglob('*.png'):
        p.rename(tmp_path/p.name)
    with pytest.raises(ValueError, match='neither captions nor labels'):
        captioned.load(str(tmp_path), 'cpu')


@pytest.mark.parametrize('words,said', {
    '--data mnits': "no data set called 'mnits'", '--steps 0': 'not more than 0',
    '--seconds 5': 'unrecognized', '--out file/below': "can't", '--device abacus': 'abacus',
}.items())
def test_train_refuses_in_one_line(words, said, tmp_path, monkeypatch, capsys):
    (tmp_path/'file').write_text('')
    monkeypatch.chdir(tmp_path)
    assert command(f'train text-to-image {words}') == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_steps_are_in_proportion_and_whole_epochs():
    assert {k: T.steps_of(k, 5000) for k in T.STEPS} == T.STEPS
    assert [T.steps_of(k, 2000) for k in T.STEPS] == [2100, 200, 2000]
    assert [T.steps_of(k, 1) for k in T.STEPS] == [100, 50, 100]


def test_help_tells_the_default_steps(capsys):
    "The parser doesn't import the script, so it can't ask."
    assert command(['train', 'text-to-image', '--help']) == 0
    assert f"(default: {T.STEPS['unet']})" in ' '.join(capsys.readouterr().out.split())


@pytest.fixture(scope='module')
def digits(): return captioned_digits(n_train=1500, n_test=256)


def test_each_part_improves_on_held_out_pictures(digits, tmp_path):
    "Some seconds of each, as the command trains it: the beginning of what the weights become."
    train, test = digits['train'], digits['test']
    held = test.x[:]

    @torch.no_grad()
    def back(vae): return psnr(vae.decode(vae.encode(held)), held)

    learn, _ = V.make_learner(train.x, tmp_path/'vae', None, 100, 0, 'cpu')
    before = back(learn.model.eval())
    learn.fit(1, valid=False)
    assert back(learn.ema.model) > before + 3                                        # dB
    found = retrieval(CLIP().eval(), held, test.captions.tolist(), attributes=test.attributes)
    clip = train_clip(train, 60, 128, device='cpu', random_share=0., full=1.).model.eval()
    better = retrieval(clip, held, test.captions.tolist(), attributes=test.attributes)
    assert min(better) > 2*max(found) and min(better) > 0.05, (found, better)
    vae = VAE.from_pretrained()
    z = encode_all(vae, train.x)*vae.scaling_factor
    loaders = DataLoaders(*(CaptionedBatches(x, y.attributes, clip.tokenizer, 64, 60)
                            for x, y in ((z, train), (encode_all(vae, held)*vae.scaling_factor,
                                                      test))))
    learn = text_to_image_learner(TextUNet(), clip, loaders, device='cpu')
    learn.fit(2)
    losses = [row['valid_loss'] for row in learn.history]
    assert losses[-1] < 0.6 < 1, losses
