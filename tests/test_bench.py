"Every benchmark still runs, on next to nothing: its figures are for whoever starts it in earnest."

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from miniai.unet import UNet

BENCH = Path(__file__).parent / 'bench'
SMALL = dict(
    autograd='--sides 4 --repeats 1',
    einsum='--repeat 1',
    meanshift='--points 1500 --dims 2 --methods ours "ours, exact" --repeat 1',
    learner_overhead='--seconds 0.001 --pairs 2 --only-loops',
    loop_overhead='--batch 4 --calls 2 --repeats 1',
    unet_speed='--batch 2 --n 1',
    classifier='--epochs 1 --seeds 0 --threads 1 --plain',
    recipe='--targets epsilon --epochs 1 --rates 4e-3 --seeds 0 --n 80 --steps 2',
    samplers='--model MODEL --calls 5 --n 80 --no-1000',
    latents='--budgets 1 --n 20 --pictures 300 --steps 2 --reference 150 --judge-pictures 1500',
    captioned='--n-train 600 --n-test 300 --judge-pictures 1500',
    text_to_image='--n 70 --scales 2 --noises 1 2 --judge-pictures 1500',
    finetune='--steps 2 --n 4 --prior 4',
    threads='--kinds 1 chosen --seconds 0.2 --runs 1 --busy 0 1',
    time_to_quality='--seconds 1 --n 80 --only miniai',
)


def test_none_is_forgotten():
    assert set(SMALL) == {f.stem for f in BENCH.glob('*.py')} - {'peers', 'letters'}


@pytest.mark.parametrize('name', SMALL)
def test_it_runs(name, tmp_path):
    if name == 'time_to_quality' and not importlib.util.find_spec('smalldiffusion'):
        pytest.skip("needs the peers: pip install -e '.[bench]'")
    words = shlex.split(SMALL[name])
    if 'MODEL' in words:
        UNet(1, (16, 32)).save_pretrained(tmp_path / 'MODEL')  # where the benchmark runs
    done = subprocess.run(
        [sys.executable, BENCH / f'{name}.py', *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0 and re.search(r'\d', done.stdout.partition('\n')[2]), (
        done.stderr[-2000:] or done.stdout
    )
