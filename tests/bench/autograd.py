"""The slope of a judge for every pixel of a picture: by nudging each pixel, and by walking back once; PyTorch's beside ours.

    python tests/bench/autograd.py --sides 8 28 64 --repeats 5

The judge is the one of lesson 05 (squared distances to ten averages, log-softmax). Prints a table of calls, seconds (best of
`repeats`; nudging once) and their ratio. The slopes are compared before the times are.
"""

import argparse
import time

import numpy as np
import torch

from miniai.autograd import Tensor, finite_difference


def best(f, repeats):
    "Seconds of the fastest of `repeats` runs, and the last result."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = f()
        times.append(time.perf_counter() - start)
    return min(times), out


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        '--sides',
        type=int,
        nargs='+',
        default=[8, 28, 64],
        help='pixels along one side of the picture',
    )
    p.add_argument('--repeats', type=int, default=20)
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(a.seed)
    print(
        f"{'pixels':>7} {'calls':>6} {'nudging s':>10} {'walking back s':>15} {'ratio':>7} {'PyTorch s':>10} {'ours/theirs':>12}"
    )
    for side in a.sides:
        n = side * side
        x, averages = rng.uniform(-1, 1, n), rng.uniform(-1, 1, (10, n))
        averages_t = torch.tensor(averages)

        def by_numpy(x):
            d = ((x - averages) ** 2).sum(1) / n
            return -d[3] - np.log(np.exp(-d).sum())

        def by_tensor():
            t = Tensor(x, requires_grad=True)
            d = ((t - averages) ** 2).sum(1) / n
            (-d[3] - (-d).exp().sum().log()).backward()
            return t.grad

        def by_torch():
            t = torch.tensor(x, requires_grad=True)
            d = ((t - averages_t) ** 2).sum(1) / n
            (-d[3] - (-d).exp().sum().log()).backward()
            return t.grad.numpy()

        slow, nudged = best(lambda: finite_difference(by_numpy, x, kind='forward'), 1)
        fast, ours = best(by_tensor, a.repeats)
        torchs, theirs = best(by_torch, a.repeats)
        assert np.allclose(ours, theirs, atol=1e-12) and np.allclose(ours, nudged, atol=1e-5)
        print(
            f'{n:7} {n + 1:6} {slow:10.4f} {fast:15.6f} {slow / fast:7.0f} {torchs:10.6f} {fast / torchs:12.2f}'
        )


if __name__ == '__main__':
    main()
