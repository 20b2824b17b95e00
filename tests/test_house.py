"""The plan of the house: short functions, short modules, a number for each lesson."""
import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(p for p in (ROOT/'miniai').glob('*.py') if not p.name.startswith('_'))
LONGEST_FUNCTION, LONGEST_MODULE = 25, 200
# what may be longer, and how long it is; each is to become shorter, none longer
LONG_FUNCTIONS = {}
LONG_MODULES = {'callbacks': 261, 'data': 308, 'samplers': 225}


def code_lines(tree, source):
    "Numbers of the lines that hold code: no blank ones, no comments, no docstrings."
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = set()
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in no_code:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docs


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_functions_and_modules_are_short(path):
    source = path.read_text()
    tree = ast.parse(source)
    lines = code_lines(tree, source)
    assert len(lines) <= LONG_MODULES.get(path.stem, LONGEST_MODULE)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            n = len(lines & set(range(node.lineno, node.end_lineno + 1)))
            most = LONG_FUNCTIONS.get(f'{path.stem}.{node.name}', LONGEST_FUNCTION)
            assert n <= most, f'{path.stem}.{node.name} has {n} lines'


def test_exceptions_are_still_needed():
    for name, lines in LONG_MODULES.items():
        source = (ROOT/'miniai'/f'{name}.py').read_text()
        assert len(code_lines(ast.parse(source), source)) > LONGEST_MODULE, name


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_lines_are_at_most_100_wide(path):
    source = path.read_text().partition('# %% ')[2].partition('\n# %% ')[2]
    assert not [line for line in source.split('\n') if len(line) > 100]


def test_every_lesson_has_a_number_of_its_own():
    lessons = [p.stem[:2] for p in (ROOT/'nbs').glob('[0-9]*.ipynb')]
    assert len(lessons) == len(set(lessons)), sorted(lessons)
