"""miniai's einsum beside torch.einsum: seconds and peak memory, on the CPU or on a GPU.

    python tests/bench/einsum.py                     # this machine's default device, one thread
    python tests/bench/einsum.py --threads 2 --repeat 15

Goals: at most 1.15x the time and 1.2x the memory. Time: the two take turns, and each is the best of
`--repeat` calls. Memory: the growth of the process's peak while one call runs, in a fresh process
for each (on a GPU, torch's own count)."""

import argparse
import os
import resource
import subprocess
import sys
import time

SPECS = {  # at sizes that take 5 ms or more on one CPU core; a GPU gets more of each
    'ik,kj->ij': [(1000, 1000), (1000, 1000)],
    'bik,bkj->bij': [(32, 256, 256), (32, 256, 256)],
    'bhqd,bhkd->bhqk': [(4, 8, 512, 64), (4, 8, 512, 64)],
    'ij,jk,kl->il': [(800, 800), (800, 800), (800, 800)],
}


def operands(spec, device):
    import torch

    g = torch.Generator().manual_seed(0)
    scale = 8 if device == 'cuda' else 1  # the batch where there is one, else the matrices
    shapes = [
        (s[0] * scale, *s[1:]) if len(s) > 2 else tuple(n * scale for n in s) for s in SPECS[spec]
    ]
    return [torch.randn(s, generator=g).to(device) for s in shapes]


def contestants():
    import torch

    from miniai.einsum import einsum

    return {'miniai': einsum, 'torch': torch.einsum}


def measure_time(spec, repeat, device):
    "Best seconds of each, called in turns so that a busy moment hits both."
    import torch

    fs, xs, best = contestants(), operands(spec, device), {}
    torch.testing.assert_close(
        fs['miniai'](spec, *xs), fs['torch'](spec, *xs), rtol=1e-3, atol=1e-2
    )
    for _ in range(repeat):
        for name, f in fs.items():
            if device == 'cuda':
                torch.cuda.synchronize()
            start = time.perf_counter()
            f(spec, *xs)
            if device == 'cuda':
                torch.cuda.synchronize()
            best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
    return best


def measure_memory(spec, name, device):
    """MiB by which one call raises the peak.

    A small call goes first, so that loading the library isn't counted."""
    import torch

    f, xs = contestants()[name], operands(spec, device)
    f(spec, *(x[tuple(slice(8) for _ in x.shape)] for x in xs))
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f(spec, *xs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        open('/proc/self/clear_refs', 'w').write('5')  # Linux: let the peak start from here
    except OSError:
        pass
    before = peak()
    f(spec, *xs)
    return peak() - before


def peak():
    "The process's peak resident memory in MiB."
    try:
        return next(
            int(line.split()[1]) / 1024
            for line in open('/proc/self/status')
            if line.startswith('VmHWM')
        )
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**20 if sys.platform == 'darwin' else 1024
        )


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--repeat', type=int, default=25)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument(
        '--memory-of',
        nargs=2,
        metavar=('SPEC', 'NAME'),
        help='print one figure; the benchmark calls itself with this',
    )
    args = p.parse_args()
    os.environ['OMP_NUM_THREADS'] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if args.memory_of:
        print(measure_memory(*args.memory_of, device))
        return
    where = torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {args.threads} thread(s)'
    print(f'torch {torch.__version__}, {where}, best of {args.repeat}')
    print(
        f"{'spec':18}{'miniai ms':>11}{'torch ms':>11}{'ratio':>8}"
        f"{'miniai MiB':>13}{'torch MiB':>11}{'ratio':>8}  goals"
    )
    for spec in SPECS:
        t = measure_time(spec, args.repeat, device)
        m = {
            name: float(
                subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        '--threads',
                        str(args.threads),
                        '--memory-of',
                        spec,
                        name,
                    ],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for name in t
        }
        rt, rm = (x['miniai'] / x['torch'] for x in (t, m))
        print(
            f"{spec:18}{t['miniai'] * 1e3:11.2f}{t['torch'] * 1e3:11.2f}{rt:8.2f}"
            f"{m['miniai']:13.1f}{m['torch']:11.1f}{rm:8.2f}  "
            f"{'met' if rt <= 1.15 and rm <= 1.2 else 'MISSED'}"
        )


if __name__ == '__main__':
    main()
