"""Images per second of the demo's network in training: with one thread, with two (or more), and
with the number that `miniai.threads` chooses; alone, and beside programs that keep cores busy.

    python tests/bench/threads.py                   # about ten minutes; wants a quiet machine
    python tests/bench/threads.py --kinds 1 2 chosen 2,passive chosen,passive --runs 3

Each kind is a process of its own, and they take turns: every run is a new fit of some seconds, from
fresh weights, whose choosing counts. ",passive" sets OMP_WAIT_POLICY=passive, so that threads sleep
where they would spin. "worst" is the slowest run.
Goals: alone, chosen makes at least 95% of the best fixed number's images; beside one busy program
for each core it makes in each run at least 40% of what it makes alone.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

BUSY = 'import time\nend = time.time() + 300\nwhile time.time() < end: pass'


def worker(kind):
    "Trains for as many seconds as each line from the parent says; answers with images a second."
    import torch

    from miniai.callbacks import TimeBudgetCB
    from miniai.data import DataLoaders, load_digits
    from miniai.demo import recipe
    from miniai.diffusion import diffusion_learner
    from miniai.samplers import DPMSolverScheduler
    from miniai.unet import UNet

    if kind != 'chosen':
        torch.set_num_threads(int(kind))
    dls = DataLoaders.from_dataset(load_digits(), valid_size=0, device='cpu')
    scheduler = DPMSolverScheduler(prediction_type='v_prediction')
    print('ready', flush=True)
    for line in sys.stdin:
        learn = diffusion_learner(UNet(**recipe(8)['unet']), dls, scheduler, device='cpu')
        start = time.perf_counter()
        learn.fit(10**9, cbs=[TimeBudgetCB(float(line))], valid=False)
        print(64 * learn.n_steps / (time.perf_counter() - start), flush=True)


def start_worker(kind):
    env = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'}
    number, _, policy = kind.partition(',')
    if policy:
        env['OMP_WAIT_POLICY'] = policy
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    return subprocess.Popen([sys.executable, __file__, '--worker', number], **pipes)


def run(p, seconds, n_busy=0):
    "Images a second of one fit beside `n_busy` busy programs."
    busy = [subprocess.Popen([sys.executable, '-c', BUSY]) for _ in range(n_busy)]
    try:
        time.sleep(0.3 if busy else 0)
        print(seconds, file=p.stdin, flush=True)
        return float(p.stdout.readline())
    finally:
        for b in busy:
            b.kill()
            b.wait()


def main():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--seconds', type=float, default=6.0, help='of training in each run')
    p.add_argument('--runs', type=int, default=10)
    p.add_argument('--kinds', nargs='+', default=['1', str(max(2, cores)), 'chosen'])
    p.add_argument('--busy', type=int, nargs='+', default=sorted({0, 1, cores}))
    p.add_argument('--worker', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        return worker(a.worker)
    workers = {kind: start_worker(kind) for kind in a.kinds}
    try:
        for w in workers.values():
            w.stdout.readline()
            run(w, 0.1)  # the first steps prepare what later ones use
        load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else float('nan')
        print(f'{cores} cores, {a.runs} runs of {a.seconds:g} s; load at the start: {load:.1f}\n')
        print(f"{'busy programs':14}" + ''.join(f'{k:>16} {"worst":>7}' for k in a.kinds))
        rates = {}
        for n in a.busy:
            turns = [[run(w, a.seconds, n) for w in workers.values()] for _ in range(a.runs)]
            rates[n] = dict(zip(a.kinds, zip(*turns)))
            ends = [(statistics.median(r), min(r)) for r in rates[n].values()]
            row = ''.join(f'{middle:16,.0f} {worst:7,.0f}' for middle, worst in ends)
            print(f'{n:<14}{row}', flush=True)
    finally:
        for w in workers.values():
            w.kill()
            w.wait()
    for kind in a.kinds:
        if kind.startswith('chosen') and 0 in rates:
            report(kind, rates)


def report(kind, rates):
    alone = statistics.median(rates[0][kind])
    fixed = {k: statistics.median(r) for k, r in rates[0].items() if not k.startswith('chosen')}
    if fixed:
        best = max(fixed, key=fixed.get)
        print(f'\n{kind}, alone: {alone / fixed[best]:.0%} of the best fixed number ({best})')
    for n, r in rates.items():
        if n:
            shares = ' '.join(f'{x / alone:.0%}' for x in sorted(r[kind]))
            print(f'{kind}, beside {n} busy: {shares} of its speed alone')


if __name__ == '__main__':
    main()
