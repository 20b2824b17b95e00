"""The command as a user meets it: whole files, one line for a mistake, nothing lost."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from miniai import cli
from miniai import demo as D
from miniai.data import images_to_tensor, load_digits
from miniai.diffusion import sample
from miniai.guidance import AutoGuidance, Guidance
from miniai.plot import to_pil
from miniai.unet import UNet

MINIAI = str(Path(sys.executable).parent/'miniai')
FILES = ['denoise.gif', 'digits.png', 'model']
ENV = {**os.environ, 'PYTHONUNBUFFERED': '1'}


def start(*args, cwd):
    "The command in a process of its own, where signals arrive even in a background job."
    def hear():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)              # `nohup` would have it ignored

    return subprocess.Popen(
        [MINIAI, *map(str, args)], cwd=cwd, env=ENV, text=True, preexec_fn=hear,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(*args, cwd):
    p = start(*args, cwd=cwd)
    text = p.communicate(timeout=200)[0]
    return p.returncode, text


def shown(folder): return sorted(p.name for p in folder.iterdir() if not p.name.startswith('.'))


def pictures(folder, x):
    "The rows of `x` (n, c, h, w) as picture files."
    folder.mkdir(parents=True)
    for i, o in enumerate(x):
        to_pil(o).save(folder/f'{i:03}.png')
    return folder


@pytest.fixture(scope='module')
def digits(): return images_to_tensor(load_digits()['test']['image'])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A folder in which `miniai demo --seconds 3` was run."
    folder = tmp_path_factory.mktemp('demo')
    code, text = run('demo', '--seconds', 3, '--out', 'demo', cwd=folder)
    assert code == 0, text
    return folder, text


def test_demo_writes_what_it_promises(trained):
    folder, text = trained
    out = folder/'demo'
    assert shown(out) == FILES and Image.open(out/'digits.png').size[0] > 800
    assert Image.open(out/'denoise.gif').n_frames > 10
    model = UNet.from_pretrained(out/'model')
    assert model(torch.zeros(1, 1, 8, 8), torch.zeros(1)).shape == (1, 1, 8, 8)
    # no bar where there's no terminal; beside it, a line for every two seconds without another
    lines = [line for line in text.splitlines() if not line.startswith('...')]
    assert '\r' not in text and len(lines) < 40
    assert model.class_names == {str(i): i for i in range(10)} and model.num_classes == 10
    drawing, head, *rows, last = lines[-7:]
    assert '1,440 new' in drawing and head.split()[-2:] == ['new', 'real'] and len(rows) == 4
    assert 'miniai sample demo/model' in last and max(map(len, lines[-6:])) <= 80
    assert 'images/s' in text and 'floor' not in text


def test_verbose_shows_all_figures(monkeypatch, tmp_path, capsys, digits):
    folder, out = pictures(tmp_path/'pics', digits[:90]), tmp_path/'out'
    words = f'demo --verbose --seconds 0.5 --data {folder} --out {out}'
    monkeypatch.setattr(D, 'demo', partial(D.demo, n=80))
    assert cli.main(words.split()) == 0
    text = capsys.readouterr().out
    for word in ('FID', 'floor', 'copy check', 'KID', '80 new', 'seen through their own pixels'):
        assert word in text


def test_sample_draws_the_same_for_the_same_seed(trained):
    folder, _ = trained
    for name, seed in (('a', 1), ('b', 1), ('c', 2), ('a', 1)):       # ours may be replaced
        words = f'sample demo/model --n 4 --steps 5 --seed {seed} --out {name}.png'.split()
        code, text = run(*words, cwd=folder)
        assert code == 0, text
    a, b, c = ((folder/f'{n}.png').read_bytes() for n in 'abc')
    assert a == b != c


def test_sample_draws_the_classes_asked_for_by_name(trained, tmp_path, capsys):
    model, scheduler, guide = D.load_model(trained[0]/'demo'/'model')
    out, names = tmp_path/'a.png', ['7', '0']
    words = f"sample {trained[0]/'demo'/'model'} --n 5 --steps 4 --class 7 --class 0 --out {out}"
    assert cli.main(words.split()) == 0 and out.exists()
    new = D.sample_cmd(trained[0]/'demo'/'model', n=5, steps=4, classes=names, out=out)
    wanted = D.asked(model, names, 5)
    assert wanted.tolist() == [7, 7, 7, 0, 0]
    settings = D.recipe(8, told=True)['guidance']
    told = Guidance(AutoGuidance(model, guide, **settings), wanted, 10, scale=1)
    gen = torch.Generator().manual_seed(0)
    assert torch.allclose(new, sample(told, scheduler, (5, 1, 8, 8), 4, gen), atol=1e-4)
    assert D.asked(model, None, 20).tolist() == [i//2 for i in range(20)]


def test_demo_learns_the_classes_of_a_folder(tmp_path, capsys, digits):
    for i, (x, y) in enumerate(zip(digits, load_digits()['test']['label'])):
        if y < 4:
            name = ('none', 'a one', 'Zwei ü', '3')[y]
            (tmp_path/'pics'/name).mkdir(parents=True, exist_ok=True)
            to_pil(x).save(tmp_path/'pics'/name/f'{i}.png')
    out = tmp_path/'out'
    words = dict(seconds=0.5, data=str(tmp_path/'pics'), n=80)
    figures = D.demo(**words, out=str(out), verbose=True, classes=['a one'])
    assert figures['n'] == 80 and 'a classifier of these' in capsys.readouterr().out
    model = D.load_model(out/'model')[0]
    assert model.class_names == {'3': 0, 'Zwei ü': 1, 'a one': 2, 'none': 3}
    sheet = Image.open(out/'digits.png')
    assert sheet.crop((0, 28, 118, sheet.height)).getextrema()[0][0] < 99     # names of the rows
    # too few of one class to learn it: drawn without classes, and said so by the judge
    for path in sorted((tmp_path/'pics'/'none').iterdir())[7:]:
        path.unlink()
    D.demo(**words, out=str(out), verbose=True)
    assert 'their own pixels' in capsys.readouterr().out
    assert D.load_model(out/'model')[0].class_names is None
    with pytest.raises(ValueError, match='trained without classes'):
        D.demo(**words, out=str(out), classes=['a one'])


@pytest.mark.parametrize('y,enough', [
    ([0, 1]*8, True), ([0, 1]*7, False), ([0]*16, False), ([0, 1]*8 + [-1], False),
    ([0, 2]*8, False), ([*range(100)]*8, True), ([*range(101)]*8, False)])
def test_what_counts_as_classes(y, enough):
    assert D.has_classes(torch.tensor(y)) is enough


def test_large_pictures_are_judged_small(monkeypatch):
    seen, train = [], D.train_classifier

    def quick(dls, *args, **kwargs):
        seen.append(dls.train.tensors[0].shape)
        return train(dls, *args, n_epochs=1, **kwargs)

    monkeypatch.setattr(D, 'train_classifier', quick)
    x, y = torch.rand(80, 3, 64, 48)*2 - 1, torch.arange(80) % 2
    train_rows, test = (D.TensorLoader(x[k], y[k]) for k in (slice(64), slice(64, 80)))
    ev = D.make_eval(D.DataLoaders(train_rows, test=test), 'cpu')
    assert seen == [(64, 3, 32, 32)] and ev.train.shape == (64, 3, 64, 48)
    assert ev.f_train.shape == (64, 64) and ev.f_held.shape == (16, 64)


MISTAKES = {
    'demo --data mnits': "no data set called 'mnits'",
    'demo --data nobody-here/no-such-set': 'MINIAI_DATA',
    'demo --data ./empty': 'empty',
    'demo --data ./unequal': 'different sizes',
    'demo --data ./oblong': 'multiples of',
    'demo --size 6': 'from 8 to 256',
    'demo --out file/below': "can't write",
    'demo --out /proc/no/such': "can't write to the folder '/proc/no/such'",
    'demo --seconds 0': 'not more than 0',
    'demo --seconds nan': 'not more than 0',
    'demo --device abacus': 'abacus',
    'sample empty': 'no saved model',
    'sample nowhere': 'no saved model',
    'sample damaged': "can't be read as a model",
    'sample foreign': "can't be read as a model",
    'sample nan': 'hold NaN',
    'sample sizeless': 'no sample_size',
    'sample guide-damaged': "can't be read as a model",
    'sample guide-foreign': "can't be read as a model",
    'sample guide-empty': "can't be read as a model",
    'sample guide-half': "can't be read as a model",
    'sample guide-file': "can't be read as a model",
    'sample guide-nan': 'hold NaN',
    'sample guide-colour': 'takes pictures (n, 3, h, w)',
    'sample flow': "can't be read as a model",
    'sample MODEL --steps 0': '1 to 1,000',
    'sample MODEL --steps 1001': '1 to 1,000',
    'sample MODEL --n 0': 'not more than 0',
    'sample MODEL --class seven': "no class 'seven': this model was trained on 0, 1, 2, 3",
    'sample MODEL --class 3 --class 11': "no class '11'",
    'sample MODEL --class=': 'it is empty',
    'sample classless --class 3': 'trained without classes',
    'sample classes-damaged': "can't be read as a model",
    'demo --class seven': "no class 'seven'",
    'sample MODEL --out x.txt': 'picture file',
    'sample MODEL --out folder.png': "isn't a picture of miniai's making",
    'sample MODEL --out mine.png': 'miniai',
    'demo --out theirs': "isn't as miniai wrote it",
    'demo --out theirs2': "isn't as miniai wrote it",
    'train vae --out theirs/model': "isn't as miniai wrote it",
    'paint': 'invalid choice',
}


@pytest.fixture(scope='module')
def decoys(trained, tmp_path_factory):
    "A folder full of somebody's files, and their checksums."
    top = tmp_path_factory.mktemp('decoys')
    for name in ('empty', 'folder.png', 'theirs/model', 'theirs2', 'unequal', 'oblong'):
        (top/name).mkdir(parents=True)
    for name in ('file', 'folder.png/holiday.txt', 'theirs/model/config.json', 'theirs2/digits.png',
                 'theirs/model/README.md', 'theirs/notes.txt'):
        (top/name).write_text(f'precious {name}')
    Image.new('L', (8, 8)).save(top/'mine.png')
    for name, sizes in (('unequal', ((8, 8), (9, 9))), ('oblong', ((8, 27), (8, 27)))):
        for i in range(30):
            Image.new('L', sizes[i % 2]).save(top/name/f'{i}.png')
    import shutil
    for name in ('damaged', 'foreign'):
        shutil.copytree(trained[0]/'demo'/'model', top/name)
    (top/'damaged'/'model.safetensors').write_bytes(b'not a model')
    from safetensors.torch import save_file
    save_file({'weight': torch.zeros(3)}, top/'foreign'/'model.safetensors')
    model = trained[0]/'demo'/'model'
    def copy(name): return Path(shutil.copytree(model, top/name))

    for folder in (copy('nan'), copy('guide-nan')/'guide'):
        net = UNet.from_pretrained(folder)
        torch.nn.init.constant_(net.stem.weight, torch.nan)
        net.save_pretrained(folder)
    sizeless = copy('sizeless')/'config.json'
    sizeless.write_text(json.dumps(json.loads(sizeless.read_text()) | dict(sample_size=None)))
    for name, names in (('classless', None), ('classes-damaged', {'0': 'zero'})):
        config = copy(name)/'config.json'
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(class_names=names)))
    UNet(3).save_pretrained(copy('guide-colour')/'guide')
    (copy('guide-damaged')/'guide'/'model.safetensors').write_bytes(b'not a model')
    save_file({'weight': torch.zeros(3)}, copy('guide-foreign')/'guide'/'model.safetensors')
    (copy('guide-half')/'guide'/'model.safetensors').unlink()
    for name in ('guide-empty', 'guide-file'):
        shutil.rmtree(copy(name)/'guide')
    (top/'guide-empty'/'guide').mkdir()
    (top/'guide-file'/'guide').write_text('a file')
    (copy('flow')/'scheduler_config.json').write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}')
    return top


def checksums(top):
    files = [p for p in sorted(top.rglob('*')) if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize('words', MISTAKES)
def test_a_mistake_costs_one_line_and_no_file(trained, decoys, monkeypatch, capsys, words):
    monkeypatch.chdir(decoys)
    before = checksums(decoys)
    try:
        code = cli.main(words.replace('MODEL', str(trained[0]/'demo'/'model')).split())
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and MISTAKES[words] in err.splitlines()[-1] and 'Traceback' not in err, err
    # beside it only argparse's usage, and the progress bar of the data sets' library
    lines = err.replace('\r', '\n').splitlines()
    assert sum(line.startswith('miniai') for line in lines) == 1
    after = checksums(decoys)
    assert {k: v for k, v in after.items() if k in before} == before


def test_an_error_nobody_foresaw_costs_one_line_too(monkeypatch, capsys):
    def broken(**kwargs): raise KeyError('what')

    monkeypatch.setattr(D, 'demo', broken)
    assert cli.main(['demo']) == 2
    assert capsys.readouterr().err == "miniai: KeyError: 'what' (--debug shows more)\n"
    with pytest.raises(KeyError):
        cli.main(['demo', '--debug'])


def test_many_pictures_are_drawn_in_batches_with_a_word_on_each(trained, tmp_path):
    code, text = run('sample', trained[0]/'demo'/'model', '--n', 9000, '--steps', 1, cwd=tmp_path)
    assert code == 0 and '4,096 of 9,000 drawn' in text and '9,000 of 9,000 drawn' in text, text
    sheet = Image.open(tmp_path/'samples.png')                    # no larger than others can open
    assert 9000*64 < sheet.size[0]*sheet.size[1] < 2**26*1.1


def test_a_reader_that_goes_loses_nothing(trained, tmp_path):
    p = start('sample', trained[0]/'demo'/'model', '--n', 2, '--steps', 3, cwd=tmp_path)
    p.stdout.close()                                              # as `| head -1` does
    assert p.wait(100) == 0 and shown(tmp_path) == ['samples.png']


def test_work_without_a_word_says_that_it_goes_on(monkeypatch, capsys):
    def silent(**kwargs): time.sleep(5)

    monkeypatch.setattr(D, 'demo', silent)
    before = sys.stdout
    assert cli.main(['demo']) == 0 and sys.stdout is before
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith('... ') and line.endswith(' s') for line in lines)

    def talking(**kwargs):
        for _ in range(10):
            print('word')
            time.sleep(0.3)

    monkeypatch.setattr(D, 'demo', talking)
    assert cli.main(['demo']) == 0
    assert capsys.readouterr().out.split().count('word') == 10


def test_help_imports_nothing_heavy():
    code = "import sys; from miniai.cli import build_parser; build_parser().format_help(); " \
        "print([m for m in ('torch', 'numpy', 'PIL', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stdout + done.stderr


def test_demo_on_pictures_without_labels_grey_and_in_colour(tmp_path, capsys, digits):
    colour = torch.tensor([1., 0, -1]).view(3, 1, 1)
    for name, x in (('grey', F.interpolate(digits[:90], 28)),
                    ('colour', F.interpolate(digits[:90], 16).repeat(1, 3, 1, 1)*colour)):
        folder = pictures(tmp_path/name, x)
        figures = D.demo(seconds=0.5, data=str(folder), out=str(tmp_path/f'{name}-out'), n=80,
                         verbose=True)
        assert figures['n'] == 80 and 'their own pixels' in capsys.readouterr().out
        model = UNet.from_pretrained(tmp_path/f'{name}-out'/'model')
        assert model.sample_size == list(x.shape[2:])


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_a_signal_while_training_still_draws(tmp_path, digits, name):
    pictures(tmp_path/'pics', digits[:90])
    p = start('demo', '--data', './pics', '--seconds', 300, '--out', 'demo', cwd=tmp_path)
    seen = ''
    for line in p.stdout:
        seen += line
        if '%' in line and 'loss' in line:
            break
    p.send_signal(getattr(signal, name))
    seen += p.communicate(timeout=120)[0]
    assert p.returncode == 0 and 'Interrupted' in seen and 'FID' in seen, seen
    assert 'Traceback' not in seen and shown(tmp_path/'demo') == FILES


def test_an_interrupt_while_drawing_keeps_the_model(tmp_path, monkeypatch, digits):
    def interrupted(*args): raise KeyboardInterrupt

    folder, out = pictures(tmp_path / 'pics', digits[:90]), tmp_path / 'out'
    monkeypatch.setattr(D, '_draw', interrupted)
    with pytest.raises(KeyboardInterrupt):
        D.demo(seconds=0.5, data=str(folder), out=str(out), n=80)
    assert shown(out) == ['model'] and D.load_model(out / 'model')[0].sample_size == [8, 8]
    monkeypatch.undo()
    D.demo(seconds=0.5, data=str(folder), out=str(out), n=80)       # ours, so it may be replaced
    assert shown(out) == FILES


def test_ctrl_c_at_once_is_one_line(tmp_path):
    p = start('demo', cwd=tmp_path)
    time.sleep(0.6)
    p.send_signal(signal.SIGINT)
    text = p.communicate(timeout=60)[0]
    assert p.returncode in (130, -2) and len(text.strip().splitlines()) <= 1, text


def test_two_processes_in_one_folder(tmp_path, digits):
    pictures(tmp_path/'pics', digits[:90])
    words = 'demo --data ./pics --seconds 10 --out demo'.split()
    first = start(*words, cwd=tmp_path)
    for line in first.stdout:
        if 'learn to see noise' in line:
            break
    code, text = run(*words, cwd=tmp_path)
    assert code == 2 and 'another miniai is writing' in text, text
    first.communicate(timeout=100)
    assert first.returncode == 0 and shown(tmp_path/'demo') == FILES


def test_a_full_disk_is_noticed_before_training(tmp_path, digits):
    pictures(tmp_path/'pics', digits[:90])
    code = '''if True:
        import resource, signal, sys
        from miniai import cli, demo
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        import miniai.results as R
        reserve = R.Results.reserve
        def limited(self, n):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
            reserve(self, n)
        R.Results.reserve = limited
        sys.exit(cli.main(['demo', '--data', './pics', '--out', 'demo']))
    '''
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=ENV, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 2 and 'no room for' in done.stderr, done.stderr
    assert 'learn to see' not in done.stdout and not (tmp_path/'demo').exists()


def test_nan_loss_stops_and_leaves_good_weights(tmp_path, capsys, monkeypatch, digits):
    "A loss that turns NaN at step 60: the demo says so, and the model it saves is finite."
    make = D.diffusion_learner

    def exploding(*args, **kwargs):
        learn = make(*args, **kwargs)

        def loss(p, y): return F.mse_loss(p, y)*(torch.nan if learn.n_steps == 60 else 1)
        learn.loss_func = loss
        return learn

    monkeypatch.setattr(D, 'diffusion_learner', exploding)
    folder = pictures(tmp_path/'pics', digits[:90])
    D.demo(seconds=20, data=str(folder), out=str(tmp_path/'out'), n=80)
    assert 'stopped, and put back the last good weights' in capsys.readouterr().out
    model = UNet.from_pretrained(tmp_path/'out'/'model')
    assert all(p.isfinite().all() for p in model.parameters())
