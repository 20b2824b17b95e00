"""The command as a user meets it: whole files, one line for a mistake, Ctrl-C without loss."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from miniai import cli
from miniai.diffusion import diffusion_learner
from miniai.unet import UNet

MINIAI = str(Path(sys.executable).parent / 'miniai')
FILES = ['denoise.gif', 'digits.png', 'model']


def run(*args, cwd, **kw):
    return subprocess.run([MINIAI, *map(str, args)], cwd=cwd, capture_output=True, text=True, **kw)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A folder in which `miniai demo --seconds 4` was run."
    folder = tmp_path_factory.mktemp('demo')
    out = run('demo', '--seconds', 4, '--out', 'demo', cwd=folder)
    assert out.returncode == 0, out.stderr
    return folder, out.stdout


def test_demo_writes_what_it_promises(trained):
    folder, text = trained
    assert sorted(os.listdir(folder / 'demo')) == FILES
    assert (
        Image.open(folder / 'demo' / 'digits.png').size[0] > 800
        and Image.open(folder / 'demo' / 'denoise.gif').n_frames > 10
    )
    model = UNet.from_pretrained(folder / 'demo' / 'model')
    assert model(torch.zeros(1, 1, 8, 8), torch.zeros(1)).shape == (1, 1, 8, 8)
    for word in (
        'FID against train',
        'FID against held-out',
        'floor',
        'copy check',
        'images/s',
        '1,440 new',
        'classifier',
    ):
        assert word in text
    assert '\r' not in text and len(text.splitlines()) < 40  # no bar where there is no terminal


def test_sample_draws_the_same_for_the_same_seed(trained):
    folder, _ = trained
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        assert (
            run(
                'sample',
                'demo/model',
                '--n',
                4,
                '--steps',
                5,
                '--seed',
                seed,
                '--out',
                f'{name}.png',
                cwd=folder,
            ).returncode
            == 0
        )
    a, b, c = ((folder / f'{n}.png').read_bytes() for n in 'abc')
    assert a == b != c


@pytest.mark.parametrize(
    'args,words',
    [
        (('demo', '--data', 'mnits'), "no data set called 'mnits'"),
        (('demo', '--data', 'nobody-here/no-such-set'), 'MINIAI_DATA'),
        (('demo', '--data', './empty'), 'empty'),
        (('demo', '--data', './unequal'), 'different sizes'),
        (('demo', '--data', './oblong'), 'multiples of'),
        (('demo', '--size', '6'), 'at least 8x8'),
        (('demo', '--out', 'file/below'), "can't write"),
        (('demo', '--seconds', '0'), 'not more than 0'),
        (('demo', '--seconds', 'nan'), 'not more than 0'),
        (('demo', '--device', 'abacus'), 'abacus'),
        (('sample', 'empty'), 'no saved model'),
        (('sample', 'nowhere'), 'no saved model'),
        (('sample', 'MODEL', '--steps', '0'), '1 to 1000'),
        (('sample', 'MODEL', '--steps', '1001'), '1 to 1000'),
        (('sample', 'MODEL', '--n', '0'), 'not more than 0'),
        (('sample', 'MODEL', '--out', 'x.txt'), 'picture file'),
    ],
)
def test_a_mistake_costs_one_line(trained, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir()
    Path('file').write_text('')
    for name, sizes in (('unequal', ((8, 8), (9, 9))), ('oblong', ((8, 27), (8, 27)))):
        Path(name).mkdir()
        for i in range(30):
            Image.new('L', sizes[i % 2]).save(f'{name}/{i}.png')
    try:
        code = cli.main([str(trained[0] / 'demo' / 'model') if a == 'MODEL' else a for a in args])
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and words in err.splitlines()[-1] and 'Traceback' not in err
    # beside it only argparse's usage, and the progress bar of the data sets' library
    assert sum(line.startswith('miniai') for line in err.replace('\r', '\n').splitlines()) == 1


@pytest.mark.skipif(
    os.name != 'posix' or os.geteuid() == 0 and not os.path.exists('/proc/version'),
    reason='needs a read-only folder',
)
def test_a_folder_that_cannot_be_written(capsys):
    assert cli.main(['demo', '--out', '/proc/no/such']) == 2
    assert "can't write to the folder '/proc/no/such'" in capsys.readouterr().err


@pytest.mark.skipif(not Path('/dev/full').is_char_device(), reason='no /dev/full here')
def test_a_full_disk_keeps_the_old_file(tmp_path):
    file = tmp_path / 'a.png'
    file.write_bytes(b'old')
    with pytest.raises(OSError), cli.replacing(file) as f:
        f.symlink_to('/dev/full')
        with open(f, 'wb') as g:
            g.write(b'new' * 100_000)
    assert file.read_bytes() == b'old' and os.listdir(tmp_path) == ['a.png']


def pictures(folder, x):
    "The rows of `x` (n, c, h, w) as picture files."
    from miniai.plot import to_pil

    folder.mkdir()
    for i, o in enumerate(x):
        to_pil(o).save(folder / f'{i}.png')


def test_demo_on_28x28_pictures_and_on_colour_ones_without_labels(tmp_path, capsys):
    from torch.nn import functional as F

    from miniai.data import images_to_tensor, load_digits

    x = images_to_tensor(load_digits(28)['test']['image'])
    pictures(tmp_path / 'grey', x[:200])
    pictures(
        tmp_path / 'colour',
        F.interpolate(x[:120], 16).repeat(1, 3, 1, 1) * torch.tensor([1.0, 0, -1]).view(3, 1, 1),
    )
    for name, shape in (('grey', (1, 28, 28)), ('colour', (3, 16, 16))):
        figures = cli.demo(seconds=1, data=str(tmp_path / name), out=str(tmp_path / f'{name}-out'))
        assert figures['n'] >= 360 and 'their own pixels' in capsys.readouterr().out
        assert UNet.from_pretrained(tmp_path / f'{name}-out' / 'model').sample_size == list(
            shape[1:]
        )


def test_a_damaged_model_is_refused(trained, tmp_path, capsys):
    import shutil

    shutil.copytree(trained[0] / 'demo' / 'model', tmp_path / 'model')
    (tmp_path / 'model' / 'model.safetensors').write_bytes(b'not a model')
    assert cli.main(['sample', str(tmp_path / 'model'), '--out', str(tmp_path / 'x.png')]) == 2
    assert "can't be read as a model" in capsys.readouterr().err


def test_a_folder_of_somebody_elses_is_kept(tmp_path, capsys):
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'mine.txt').write_text('precious')
    assert cli.main(['demo', '--out', str(tmp_path)]) == 2
    assert (
        'no model of ours' in capsys.readouterr().err and (tmp_path / 'model' / 'mine.txt').exists()
    )


def test_ctrl_c_while_training_still_draws(tmp_path):
    p = subprocess.Popen(
        [MINIAI, 'demo', '--seconds', '300', '--out', 'demo'],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, 'PYTHONUNBUFFERED': '1'},
    )
    seen = ''
    for line in p.stdout:
        seen += line
        if 'learn to see noise' in line:
            break
    time.sleep(6)
    p.send_signal(signal.SIGINT)
    seen += p.communicate(timeout=120)[0]
    assert (
        p.returncode == 0
        and 'Interrupted' in seen
        and 'FID against train' in seen
        and 'Traceback' not in seen
    ), seen
    assert sorted(os.listdir(tmp_path / 'demo')) == FILES


def test_nan_loss_stops_and_leaves_good_weights(tmp_path, capsys, monkeypatch):
    "A loss that turns NaN at step 60: the demo says so, and the model it saves is finite."

    def exploding(*args, **kw):
        learn = diffusion_learner(*args, **kw)
        learn.loss_func = lambda p, y: F.mse_loss(p, y) * (torch.nan if learn.n_steps == 60 else 1)
        return learn

    monkeypatch.setattr(cli, 'diffusion_learner', exploding)
    cli.demo(seconds=20, out=str(tmp_path / 'out'))
    assert 'stopped, and put back the last good weights' in capsys.readouterr().out
    assert all(
        p.isfinite().all() for p in UNet.from_pretrained(tmp_path / 'out' / 'model').parameters()
    )
