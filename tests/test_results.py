"""Results: only files of our own are replaced, all together, whatever happens in between."""
import json
import os
from pathlib import Path

import pytest

from miniai.results import Results, _checksum

NAMES = ['a.txt', 'model']
INSIDE = ['a.txt', 'model/b.txt', 'model/guide/c.txt']


def put(folder, word, names=INSIDE):
    with Results(folder, NAMES) as new:
        for name in names:
            (new/name).parent.mkdir(parents=True, exist_ok=True)
            (new/name).write_text(f'{word} {name}')


def shown(folder):
    files = [p for p in folder.rglob('*') if p.is_file() and p.name != '.miniai.json']
    return {p.relative_to(folder).as_posix(): p.read_text().split()[0] for p in files}


def test_ours_are_replaced_and_what_is_left_over_goes(tmp_path):
    put(tmp_path/'o', 'old')
    assert shown(tmp_path/'o') == dict.fromkeys(INSIDE, 'old')
    (tmp_path/'o'/'notes.txt').write_text('mine')
    put(tmp_path/'o', 'new', INSIDE[:2])
    assert shown(tmp_path/'o') == {'a.txt': 'new', 'model/b.txt': 'new', 'notes.txt': 'mine'}


@pytest.mark.parametrize('name', INSIDE + ['model/theirs.bin'])
@pytest.mark.parametrize('ours_before', [True, False])
def test_somebody_elses_are_refused_and_untouched(tmp_path, name, ours_before):
    if ours_before:
        put(tmp_path, 'old')
    (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path/name).write_text('changed by hand')
    before = shown(tmp_path)
    with pytest.raises(FileExistsError, match='already'):
        put(tmp_path, 'new')
    assert shown(tmp_path) == before


def test_a_folder_where_a_file_should_be(tmp_path):
    (tmp_path/'a.txt').mkdir()
    with pytest.raises(FileExistsError, match='is a folder'):
        put(tmp_path, 'new')
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match="can't write"):
        put(tmp_path/'file', 'new')


def test_a_failure_while_writing_changes_nothing(tmp_path):
    put(tmp_path, 'old')
    with pytest.raises(KeyboardInterrupt):
        with Results(tmp_path, NAMES) as new:
            (new/'a.txt').write_text('half')
            raise KeyboardInterrupt
    assert shown(tmp_path) == dict.fromkeys(INSIDE, 'old')
    put(tmp_path, 'new')
    assert shown(tmp_path) == dict.fromkeys(INSIDE, 'new')


@pytest.mark.parametrize('moved', range(len(INSIDE) + 1))
@pytest.mark.parametrize('listed', [True, False])
def test_a_crash_in_between_is_finished_or_undone(tmp_path, capsys, moved, listed):
    put(tmp_path, 'old')
    new = tmp_path/'.miniai-new'
    for name in INSIDE:
        (new/name).parent.mkdir(parents=True, exist_ok=True)
        (new/name).write_text(f'new {name}')
    if listed:
        whole = {name: _checksum(new/name) for name in INSIDE}
        (new/'whole.json').write_text(json.dumps(whole))
        for name in INSIDE[:moved]:
            os.replace(new/name, tmp_path/name)
    Results(tmp_path, NAMES)
    assert shown(tmp_path) == dict.fromkeys(INSIDE, 'new' if listed else 'old')
    assert ('finished' in capsys.readouterr().out) == listed
    put(tmp_path, 'later')
    assert shown(tmp_path) == dict.fromkeys(INSIDE, 'later')


def test_reserving_room(tmp_path):
    results = Results(tmp_path, NAMES)
    results.reserve(1000)
    assert (tmp_path/'.miniai-new'/'room').stat().st_size == 1000
    with pytest.raises(ValueError, match='another miniai'):
        Results(tmp_path, NAMES)
    del results
    put(tmp_path, 'new')
    assert shown(tmp_path) == dict.fromkeys(INSIDE, 'new')


def test_a_file_of_yours_that_comes_in_the_meantime_stays(tmp_path):
    results = Results(tmp_path, ['a.txt'])
    with pytest.raises(FileExistsError, match='The new results are in') as e:
        with results as new:
            (new / 'a.txt').write_text('ours')
            (tmp_path / 'a.txt').write_text('yours')
    assert (tmp_path / 'a.txt').read_text() == 'yours'
    kept = str(e.value).split("'")[-2]
    assert (Path(kept) / 'a.txt').read_text() == 'ours'


def test_a_file_that_was_not_announced_replaces_nothing(tmp_path):
    (tmp_path / 'z.txt').write_text('yours')
    with pytest.raises(FileExistsError, match="isn't among the names"):
        with Results(tmp_path, ['a.txt']) as new:
            (new / 'z.txt').write_text('ours')
    assert (tmp_path / 'z.txt').read_text() == 'yours'


@pytest.mark.parametrize('names', ['a.txt', ['../a.txt'], ['/tmp/a.txt']])
def test_names_are_a_list_of_what_lies_within(tmp_path, names):
    with pytest.raises(ValueError, match='a list of names within the folder'):
        Results(tmp_path, names)
