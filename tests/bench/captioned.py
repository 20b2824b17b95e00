"""Captioned digits: seconds to make them, pictures drawn a second, and how well the judge reads
real held-out ones. One thread, processor seconds.

python tests/bench/captioned.py                            # the embedded digits
MINIAI_DATA=... python tests/bench/captioned.py --source ylecun/mnist
"""

import argparse
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
import time

import torch

from miniai.captions import captioned_digits, train_judge
from miniai.data import DataLoaders


def seconds(f):
    start = time.process_time()
    out = f()
    return out, time.process_time() - start


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--source', help="as for captioned_digits; the embedded digits if not given")
    p.add_argument('--n-train', type=int, default=60_000)
    p.add_argument('--n-test', type=int, default=5_000)
    p.add_argument('--judge-pictures', type=int, default=39_000, help='shown to the judge')
    p.add_argument(
        '--seeds', type=int, nargs='+', default=[1], help='one judge is trained for each'
    )
    a = p.parse_args()
    torch.set_num_threads(1)
    data, s = seconds(lambda: captioned_digits(a.source, n_train=a.n_train, n_test=a.n_test))
    print(f'{sum(map(len, data.values())):,} pictures made ready in {s:.1f} s', flush=True)
    for bs in (64, 256):
        dls = DataLoaders.from_dataset(data, batch_size=bs, target='caption', device='cpu')
        n, s = seconds(lambda: sum(len(x) for x, _ in dls.train))
        print(f'batches of {bs}: {n / s:,.0f} pictures a second', flush=True)
    for seed in a.seeds:
        judge, s = seconds(lambda: train_judge(a.source, a.judge_pictures, seed, device='cpu'))
        print(f'judge of seed {seed}, {s:.0f} s')
        for k in ('test', 'unseen'):
            print(
                f'  {k:7}',
                '  '.join(
                    f'{n} {v:.1%}' for n, v in judge.score(data[k].x[:], data[k].attributes).items()
                ),
                flush=True,
            )


if __name__ == '__main__':
    main()
