"""The classifier: accuracy on test pictures and training time, with or without augmentation.

    python tests/bench/classifier.py --data digits --epochs 30 --seeds 0 1 2 --threads 2
    MINIAI_DATA=... python tests/bench/classifier.py --data ylecun/mnist --epochs 16 --seeds 0

Prints a table: seed, seconds of training (validation after each epoch included) by the clock on the
wall and of processor, accuracy on valid and on test, test pictures read wrongly. Goals: digits 99%
in under 60 s, MNIST's 10,000 test pictures 98.8% in under 240 s, on two cores. On a busy machine
run one thread and read the processor's seconds: two cores give twice 60 and 240 of them.
"""

import argparse
import time

import torch

from miniai.callbacks import accuracy
from miniai.classifier import AugmentCB, train_classifier
from miniai.data import DataLoaders, load_images
from miniai.tensors import set_seed


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--data', default='digits', help="'digits', a Hub id or a folder")
    p.add_argument('--epochs', type=int, default=30)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--batch-size', type=int, default=128)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--plain', action='store_true', help='no augmentation in training')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    dls = DataLoaders.from_dataset(load_images(a.data), batch_size=a.batch_size)
    sizes = [len(dl.tensors[0]) for dl in (dls.train, dls.valid, dls.test)]
    print(f'{a.data}: train, valid, test {sizes}; {a.epochs} epochs, {a.threads} threads')
    print(' seed  train s    cpu s    valid     test  wrong', flush=True)
    num_classes = int(dls.test.tensors[1].max()) + 1
    for seed in a.seeds:
        set_seed(seed)
        start, work = time.perf_counter(), time.process_time()
        cbs = [] if a.plain else [AugmentCB()]
        learn = train_classifier(dls, num_classes, a.epochs, cbs=cbs)
        seconds, work = time.perf_counter() - start, time.process_time() - work
        right = accuracy(*learn.get_preds(dls.test)).item()
        print(
            f"{seed:5} {seconds:8.1f} {work:8.1f} {learn.history[-1]['accuracy']:8.2%} "
            f'{right:8.2%} {round((1 - right) * sizes[2]):6}',
            flush=True,
        )


if __name__ == '__main__':
    main()
