"""What all tests share: one thread (two workers with two each fight over two cores), no network."""

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def root() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture
def tiny_pictures(tmp_path):
    "A folder of sixty 8x8 pictures in two classes, split by sub-folder."
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(60):
        folder = tmp_path / 'pics' / ('a' if i % 2 else 'b')
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f'{i}.png')
    return tmp_path / 'pics'


def import_torchvision():
    "torchvision, also where its compiled operators can't be loaded (transforms don't need them)."
    import torch

    try:
        import torchvision
    except RuntimeError:
        # the library must outlive this call, or the declarations vanish with it
        library = import_torchvision.library = torch.library.Library('torchvision', 'DEF')
        for op in ('nms', 'qnms'):
            library.define(f'{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        import torchvision
    return torchvision
