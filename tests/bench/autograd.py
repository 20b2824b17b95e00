"""The gradient of a loss for every pixel: finite differences, our backward, and PyTorch's.

    python tests/bench/autograd.py --sides 8 28 64 --repeats 5

The loss is the cross-entropy of squared distances to ten random pictures. Prints calls, seconds
(best of `repeats`; finite differences once) and their ratios, after comparing the gradients.
"""

import argparse
import time

import numpy as np
import torch

from miniai.autograd import Tensor, finite_difference


def best(f, repeats):
    "Seconds of the fastest of `repeats` calls, and the last result."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = f()
        times.append(time.perf_counter() - start)
    return min(times), out


def loss(x, averages, exp, log):
    d = ((x - averages) ** 2).sum(1) / averages.shape[1]
    return d[3] + log(exp(-d).sum())


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--sides', type=int, nargs='+', default=[8, 28, 64], help='of the pictures')
    p.add_argument('--repeats', type=int, default=20)
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(a.seed)
    names = 'finite differences s', 'ours s', 'ratio', 'PyTorch s', 'ours/theirs'
    print(f'{"pixels":>7} {"calls":>6} {names[0]:>21}' + ''.join(f'{n:>12}' for n in names[1:]))
    for side in a.sides:
        n = side * side
        x, averages = rng.uniform(-1, 1, n), rng.uniform(-1, 1, (10, n))
        averages_t = torch.tensor(averages)

        def ours():
            t = Tensor(x, requires_grad=True)
            loss(t, averages, Tensor.exp, Tensor.log).backward()
            return t.grad

        def theirs():
            t = torch.tensor(x, requires_grad=True)
            loss(t, averages_t, torch.exp, torch.log).backward()
            return t.grad.numpy()

        slow, measured = best(
            lambda: finite_difference(
                lambda v: loss(v, averages, np.exp, np.log), x, kind='forward'
            ),
            1,
        )
        fast, gradient = best(ours, a.repeats)
        torchs, expected = best(theirs, a.repeats)
        assert np.allclose(gradient, expected, atol=1e-12)
        assert np.allclose(gradient, measured, atol=1e-5)
        print(
            f'{n:7} {n + 1:6} {slow:21.4f}{fast:12.6f}{slow / fast:12.0f}'
            f'{torchs:12.6f}{fast / torchs:12.2f}'
        )


if __name__ == '__main__':
    main()
