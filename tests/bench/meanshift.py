"""Mean shift side by side: ours, the loop over points, scikit-learn with and without bin_seeding.

    python tests/bench/meanshift.py                      # every size
    python tests/bench/meanshift.py --cap 60             # stops a run after 60 s, and says so
    python tests/bench/meanshift.py --points 1500 --repeat 5

Six Gaussian blobs of standard deviation sqrt(5), the same points and bandwidth for all. It's 2.5 in
2-D; in 16-D it's 5: there the points of a blob are 12 apart. Each run has a process of its own: the
seconds are of `fit` alone (the fastest of --repeat), the memory is the most that `fit` added to the
process, and the most of the whole process. `rand` is the adjusted Rand index against the blobs.
scikit-learn's kernel is flat, ours a Gaussian unless it says flat. Where both ran, the centres of
`ours` are compared with those of `ours, exact`."""

import argparse
import json
import multiprocessing
import os
import resource
import time

import numpy as np

SIZES = [(1_500, 2), (10_000, 2), (50_000, 2), (200_000, 2), (10_000, 16), (1_000_000, 2)]
METHODS = [
    'ours',
    'ours, exact',
    'ours, flat',
    'per-point loop, 5 steps',
    'scikit-learn',
    'scikit-learn, bin_seeding',
]


def blobs(n, d, seed=0):
    r = np.random.default_rng(seed)
    centres, label = r.uniform(-35, 35, (6, d)), np.arange(n) % 6
    return centres[label] + 5**0.5 * r.standard_normal((n, d)), label


def loop(x, h):
    "Five steps of one point at a time, as the lesson's loop: no clusters, only the moved points."
    import torch

    from miniai.meanshift import gaussian_kernel

    x = torch.from_numpy(x)
    data = x
    for _ in range(5):
        x = torch.stack(
            [(w := gaussian_kernel((q - data).norm(dim=1), h)) @ data / w.sum() for q in x]
        )


def worker(method, n, d, h, threads, repeat, pipe):
    import torch
    from sklearn.cluster import MeanShift as Theirs
    from sklearn.metrics import adjusted_rand_score

    from miniai.meanshift import MeanShift as Ours

    torch.set_num_threads(threads)
    x, label = blobs(n, d)
    make = {
        'ours': lambda: Ours(h),
        'ours, exact': lambda: Ours(h, approx=False),
        'ours, flat': lambda: Ours(h, kernel='flat'),
        'scikit-learn': lambda: Theirs(bandwidth=h),
        'scikit-learn, bin_seeding': lambda: Theirs(bandwidth=h, bin_seeding=True),
    }.get(method)
    fit = (lambda x: make().fit(x)) if make else (lambda x: loop(x, h))
    fit(x[:100])  # load what loads on first use
    start, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(repeat):
        t = time.perf_counter()
        m = fit(x)
        seconds.append(time.perf_counter() - t)
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    centres = m.cluster_centers_.tolist() if m is not None else None
    pipe.send(
        (
            min(seconds),
            mib,
            total,
            centres,
            adjusted_rand_score(label, m.labels_) if m is not None else None,
        )
    )


def run(method, n, d, h, args):
    "The worker's answer, or None if it was stopped at the cap."
    ctx = multiprocessing.get_context('spawn')
    here, there = ctx.Pipe(duplex=False)
    p = ctx.Process(
        target=worker,
        args=(method, n, d, h, args.threads, args.repeat if n <= 50_000 else 1, there),
    )
    p.start()
    there.close()
    try:
        return here.recv() if here.poll(args.cap * (args.repeat if n <= 1500 else 1) + 10) else None
    except EOFError:
        raise SystemExit(f'{method} failed')
    finally:
        p.kill()
        p.join()


def off(a, b, h):
    "The farthest that a centre of one set is from the nearest of the other, in bandwidths."
    dist = np.linalg.norm(np.array(a)[:, None] - np.array(b)[None], axis=2)
    return max(dist.min(0).max(), dist.min(1).max()) / h


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--points', type=int, nargs='*', help='only these numbers of points')
    p.add_argument('--dims', type=int, nargs='*', help='only these numbers of dimensions')
    p.add_argument('--methods', nargs='*', default=METHODS, help=f'some of {METHODS}')
    p.add_argument(
        '--cap',
        type=float,
        default=60,
        help='stop a method after so many seconds (and 10 to start)',
    )
    p.add_argument(
        '--repeat', type=int, default=3, help='runs up to 50,000 points; the fastest counts'
    )
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--json', help='also write the figures here')
    args = p.parse_args()
    if unknown := set(args.methods) - set(METHODS):
        p.error(f'no such methods: {unknown}; there are {METHODS}')
    for v in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
        os.environ[v] = str(args.threads)
    rows = []
    print(f'{args.threads} thread(s); a method is stopped after {args.cap:g} s\n')
    print(
        f'{"points":>9} {"dims":>4}  {"method":26} {"seconds":>8} {"fit MiB":>8} {"all MiB":>8} '
        f'{"groups":>6} {"rand":>7}'
    )
    for n, d in SIZES:
        if (args.points and n not in args.points) or (args.dims and d not in args.dims):
            continue
        h, done = 2.5 if d == 2 else 5.0, {}
        for method in args.methods:
            if n == 1_000_000 and method != 'ours':
                continue
            # what was stopped with fewer points would take at least as long with more
            if any(
                r['method'] == method
                and r['dims'] == d
                and r['seconds'] is None
                and r['points'] < n
                for r in rows
            ):
                got = None
            else:
                got = run(method, n, d, h, args)
            row = dict(points=n, dims=d, method=method, seconds=got and got[0])
            if got is None:
                print(
                    f'{n:9,} {d:4}  {method:26} {f"> {args.cap:g}":>8}   stopped or not started',
                    flush=True,
                )
            else:
                s, mib, total, centres, rand = got
                done[method] = centres
                row.update(fit_mib=mib, all_mib=total, groups=centres and len(centres), rand=rand)
                print(
                    f'{n:9,} {d:4}  {method:26} {s:8.3f} {mib:8.0f} {total:8.0f} '
                    + (f'{len(centres):6} {rand:7.4f}' if centres else ''),
                    flush=True,
                )
            rows.append(row)
        if done.get('ours') and done.get('ours, exact'):
            worst = off(done['ours'], done['ours, exact'], h)
            print(f'{n:9,} {d:4}  centres of ours: within {worst:.1e} bandwidths of the exact ones')
    seconds = {(r['points'], r['dims'], r['method']): r['seconds'] for r in rows}
    print()
    for n, d, other in [
        (1500, 2, 'scikit-learn'),
        (1500, 2, 'per-point loop, 5 steps'),
        (50_000, 2, 'scikit-learn, bin_seeding'),
    ]:
        a, b = seconds.get((n, d, 'ours')), seconds.get((n, d, other))
        if a and b:
            print(f'{n:,} points: ours is {b / a:.0f} times as fast as {other}')
    a, b = (seconds.get((n, 2, 'ours')) for n in (50_000, 200_000))
    if a and b:
        print(f'50,000 to 200,000 points: {b / a:.2f} times as long')
    if args.json:
        with open(args.json, 'w') as f:
            json.dump(rows, f, indent=1)


if __name__ == '__main__':
    main()
