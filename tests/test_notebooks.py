"""The notebooks are the source: the library is what they export; they are clean, run, and small."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').glob('*.ipynb'))


def cells(path, kind='code'):
    return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def copy_of_the_project(to):
    for name in ('nbs', 'miniai'):
        shutil.copytree(
            ROOT / name,
            to / name,
            ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'),
        )
    for name in ('settings.ini', 'setup.py', 'README.md'):
        shutil.copy(ROOT / name, to)


def nbdev(command, cwd):
    run = subprocess.run(
        [str(Path(sys.executable).parent / command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': ''},
    )
    assert run.returncode == 0, run.stderr


def test_an_export_would_change_nothing(tmp_path):
    copy_of_the_project(tmp_path)
    nbdev('nbdev_export', tmp_path / 'nbs')
    before, after = (
        {p.relative_to(r): p.read_text() for p in (r / 'miniai').rglob('*.py')}
        for r in (ROOT, tmp_path)
    )
    assert sorted(before) == sorted(after)
    changed = [str(k) for k in before if before[k] != after[k]]
    assert not changed, (
        f'the library is not what the notebooks export: run nbdev_export and commit {changed}'
    )


def test_notebooks_are_clean(tmp_path):
    copy_of_the_project(tmp_path)
    nbdev('nbdev_clean', tmp_path)
    dirty = [p.name for p in NOTEBOOKS if p.read_text() != (tmp_path / 'nbs' / p.name).read_text()]
    assert not dirty, f'run nbdev_clean and commit {dirty}'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_committed_run_and_small(path):
    code = cells(path)
    silent = [
        c
        for c in code
        if not c.get('outputs')
        and re.search(r'^(print|show_images?|animate)\(', ''.join(c['source']), re.M)
    ]
    assert not silent, (
        f'a cell that shows something carries no output: {"".join(silent[0]["source"])[:80]}'
    )
    text = json.dumps([c.get('outputs') for c in code])
    assert '"output_type": "error"' not in text, 'a committed output is an error'
    assert not re.search(r'/(home|root|tmp|work|Users)/', text), (
        'an output shows a path of some machine'
    )
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_lesson_asserts_and_keeps_the_house_rules(path):
    source = '\n'.join(''.join(c['source']) for c in cells(path))
    if path.stem != 'index':
        assert len(re.findall(r'^\s*assert ', source, re.M)) >= 5
    for pattern in (r'import \*', r'\.cuda\(\)', r'nbdev_export\(', r'CUDA_VISIBLE_DEVICES'):
        assert not re.search(pattern, source), pattern


def test_imports_point_to_earlier_lessons():
    floor = {}
    for p in NOTEBOOKS:
        for c in cells(p):
            m = re.match(r'#\| default_exp (\w+)', ''.join(c['source']))
            if m:
                floor[m[1]] = p.stem
    for p in NOTEBOOKS:
        source = '\n'.join(''.join(c['source']) for c in cells(p))
        for module in re.findall(r'^from miniai\.(\w+) import', source, re.M):
            assert floor[module] <= p.stem, (
                f'{p.stem} imports {module}, which a later lesson builds'
            )
