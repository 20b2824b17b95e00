"The number of threads: chosen by the clock, respected where it is given, put back in any case."

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from miniai import threads
from miniai.data import DataLoaders, TensorLoader
from miniai.diffusion import sample
from miniai.learner import Callback, Learner
from miniai.metrics import ImageEval
from miniai.samplers import DDIMScheduler
from miniai.threads import Chooser, Threads, most_threads


def never(n, t=0):
    return False


def work(seconds, most, until, stalls=never):
    "The chooser's numbers and seconds, step by step, on a machine that needs `seconds(n, t)`."
    t, used = 0.0, []
    chooser = Chooser(most, lambda n: stalls(n, t))
    while t < until:
        used.append((chooser.n, seconds(chooser.n, t)))
        t += used[-1][1]
        chooser.tell(used[-1][1])
    return used


def fixed(seconds, n, until):
    t, count = 0.0, 0
    while t < until:
        t, count = t + seconds(n, t), count + 1
    return count


IDLE = {1: 0.025, 2: 0.017, 4: 0.012, 6: 0.02, 8: 0.03}


@pytest.mark.parametrize('most', [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize('fastest', [1, 2, 4, 8])
@pytest.mark.parametrize('unit', [2e-4, 0.02, 3.0])
def test_it_finds_the_quickest(most, fastest, unit):
    # a step is quickest with `fastest` threads, and half as quick with twice or half as many
    def seconds(n, t):
        return unit * max(n / fastest, fastest / n)

    tried = Chooser(most, never).numbers
    assert tried[0] == 1 and tried[-1] == most and tried == sorted(set(tried))
    best = min(fixed(seconds, 1, 1), 1) and min(seconds(n, 0) for n in tried)
    until = 300 * unit + 20
    used = work(seconds, most, until)
    assert min(n for n, _ in used) >= 1 and max(n for n, _ in used) <= most
    if unit < 1 or seconds(most, 0) == best:  # of slow steps only one and all are tried
        assert len(used) > 0.9 * until / best - 10


def test_idle_it_costs_next_to_nothing():
    def seconds(n, t):
        return IDLE[n]

    for most, best in ((2, 2), (4, 4), (8, 4)):
        assert len(work(seconds, most, 60)) > 0.98 * fixed(seconds, best, 60)


def test_a_number_that_spins_costs_one_step():
    def seconds(n, t):
        return 0.036 if n == 1 else 2.8

    for until in (10, 100, 1000):
        used = work(seconds, 8, until)
        slow = [s for n, s in used if n > 1]
        assert len(slow) <= 1 + until / 80 and {n for n, _ in used} == {1, 2}
    assert {n for n, _ in work(seconds, 8, 100, lambda n, t: True)} == {1}


def test_steps_that_are_slow_at_random():
    gen = torch.Generator().manual_seed(0)

    def seconds(n, t):
        slow = torch.rand(1, generator=gen).item() < 0.01
        return IDLE[n] * (10 if slow else 1)

    assert len(work(seconds, 2, 60)) > 0.9 * fixed(seconds, 2, 60)


def test_company_comes_and_goes():
    def busy(t):
        return int(t / 20) % 2 == 1

    def seconds(n, t):
        return (0.036 if n == 1 else 1.0) if busy(t) else IDLE[n]

    used = work(seconds, 4, 100, lambda n, t: busy(t))
    possible = 60 / IDLE[4] + 40 / 0.036
    assert len(used) > 0.85 * possible
    t, back = 0.0, {}
    for n, s in used:
        back.setdefault((int(t / 20), n), t % 20)  # when it first had n threads in this period
        t += s
    assert back[1, 1] < 2 and back[2, 4] < 4 and back[3, 1] < 2 and back[4, 4] < 4
    assert sum(n > 1 for n, s in used if s == 1.0) <= 2  # one step each time


def test_a_large_network_tries_only_one_and_all():
    used = work(lambda n, t: 8 / n, 16, 100)
    assert [n for n, _ in used[:4]] == [1, 16, 16, 16] and {n for n, _ in used[:30]} == {1, 16}


# --- in PyTorch


def clock(seconds):
    "A clock on which every second look is `seconds(number of threads)` later than the first."
    now = [0.0, 0]

    def read():
        now[1] += 1
        now[0] += seconds(torch.get_num_threads()) if now[1] % 2 == 0 else 0
        return now[0]

    return read


@pytest.fixture
def four(monkeypatch):
    "As on a machine with four cores, two of them best, where nobody gave a number of threads."
    before = torch.get_num_threads()
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(threads, '_DEFAULT', 4)
    monkeypatch.setattr(Chooser.__init__, '__defaults__', (never,))
    ticks = clock(lambda n: 0.01 * (n == 2) + 0.02 * (n != 2))
    monkeypatch.setattr(Threads.__init__, '__defaults__', ('cpu', ticks))
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize('best', [1, 2, 4])
def test_the_number_is_set_and_put_back(four, best):
    steps = []

    def note(x):
        steps.append(torch.get_num_threads())
        return x

    with Threads(clock=clock(lambda n: 0.01 * max(n / best, best / n))) as run:
        assert [run(note, i) for i in range(100)] == list(range(100))
    assert steps[-1] == best and steps[0] == 1 and torch.get_num_threads() == 4


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, GeneratorExit])
def test_put_back_after_an_error(four, error):
    def fail():
        assert torch.get_num_threads() == 1
        raise error

    def interrupted(n):
        raise error

    with pytest.raises(error), Threads() as run:
        run(fail)
    assert torch.get_num_threads() == 4
    run.clock()  # the look after the step that failed
    with pytest.raises(error), run:
        run.chooser.stalls = interrupted
        for _ in range(20):
            run(list)
    assert torch.get_num_threads() == 4
    with run:  # and usable again
        assert run(list) == []


def test_nothing_to_choose(four, monkeypatch):
    assert most_threads() == 4 and most_threads('cuda') == most_threads('mps') == 1
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    assert most_threads() == 1
    monkeypatch.delenv('OMP_NUM_THREADS')
    torch.set_num_threads(3)
    assert most_threads() == 1
    with Threads(clock=None) as run:  # the clock isn't even looked at
        assert run(torch.get_num_threads) == 3
    torch.set_num_threads(4)
    torch.use_deterministic_algorithms(True)
    try:
        assert most_threads() == 1
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(threads, '_DEFAULT', 1)
    torch.set_num_threads(1)
    assert most_threads() == 1


SCRIPT = """
import sys, torch
if sys.argv[2] == 'before': torch.set_num_threads(1)
from miniai.threads import Threads, most_threads
if sys.argv[2] == 'after': torch.set_num_threads(max(1, torch.get_num_threads() - 1))
def fail(*args): raise AssertionError('tried')
torch.set_num_threads, n = fail, torch.get_num_threads()
with Threads() as run:
    assert all(run(torch.get_num_threads) == n for _ in range(20))
assert n == int(sys.argv[1] or n), n
"""


@pytest.mark.parametrize('given', ['1', '2', 'before', 'after'])
def test_a_given_number_is_respected(given):
    env = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'}
    env = env | (dict(OMP_NUM_THREADS=given) if given.isdigit() else {})
    wanted = given if given.isdigit() else '1' if given == 'before' else ''
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, wanted, given],
        env=env | dict(PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


class Note(Callback):
    "Keeps the number of threads of each batch, for validation and for training; raises at one."

    def __init__(self, error=None, at=40):
        self.error, self.at, self.seen = error, at, ([], [])

    def after_predict(self, learn):
        self.seen[learn.training].append(torch.get_num_threads())
        if self.error and learn.n_steps == self.at:
            raise self.error


def small_learner():
    x, y = torch.randn(512, 8), torch.randn(512, 1)
    dls = DataLoaders(TensorLoader(x, y, batch_size=4), TensorLoader(x, y, batch_size=4))
    return Learner(nn.Linear(8, 1), dls)


def test_a_fit_chooses_and_puts_back(four):
    note = Note()
    small_learner().fit(2, cbs=[note])
    assert torch.get_num_threads() == 4
    for seen in note.seen:
        assert len(seen) == 256 and seen[0] == 1 and seen.count(2) > 200


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_a_fit_that_fails_puts_back(four, error):
    learn, note = small_learner(), Note(error)
    with pytest.raises(error):
        learn.fit(2, cbs=[note])
    assert torch.get_num_threads() == 4
    learn.get_preds()
    assert torch.get_num_threads() == 4


def test_random_numbers_are_left_alone(four):
    torch.manual_seed(0)
    a = torch.get_rng_state()
    with Threads() as run:
        for _ in range(50):
            run(lambda: None)
    threads.stalls(2)
    assert torch.equal(a, torch.get_rng_state())


def test_sampling_and_judging(four):
    seen = []

    def model(x, t):
        seen.append(torch.get_num_threads())
        return x * 0

    sample(model, DDIMScheduler(), (2, 1, 8, 8), 300)
    assert seen[0] == 1 and seen[-1] == 2 and torch.get_num_threads() == 4

    def features(x):
        seen.append(torch.get_num_threads())
        return x.flatten(1)[:, :4]

    seen.clear()
    x = torch.randn(40, 1, 8, 8)
    ev = ImageEval(features, x[:20], x[20:])
    ev.measure([x] * 100)
    assert seen[0] == 1 and seen[-1] == 2 and torch.get_num_threads() == 4
