"Every rung of the ladder against torch, with and without numba, and what it refuses."

import os
import subprocess
import sys

import pytest
import torch

from miniai.matmul import (
    matmul_broadcast,
    matmul_cuda,
    matmul_dot,
    matmul_loops,
    matmul_numba,
    matmul_row,
)

T = torch.ones
rungs = [matmul_loops, matmul_dot, matmul_row, matmul_broadcast, matmul_numba]


@pytest.mark.parametrize('f', rungs)
def test_rungs(f):
    if f is matmul_numba:
        pytest.importorskip('numba')
    for n, k, m in ((1, 1, 1), (3, 4, 5), (5, 1, 2), (2, 0, 3), (0, 2, 2)):
        for dtype in (torch.float32, torch.float64, torch.int64, torch.int32):
            a, b = (10 * torch.randn(n, k)).to(dtype), (10 * torch.randn(k, m)).to(dtype)
            torch.testing.assert_close(f(a, b), a @ b)
            torch.testing.assert_close(f(a.T.contiguous().T, b.T.contiguous().T), a @ b)


@pytest.mark.parametrize('f', [*rungs, matmul_cuda])
def test_rungs_refuse(f):
    for a, b, error, message in (
        (T(2, 3), T(4, 5), ValueError, 'a has 3 columns but b has 4 rows'),
        (T(3), T(3, 2), ValueError, 'a should be a matrix'),
        (T(2, 3), T(3, 2, 1), ValueError, 'b should be a matrix'),
        (T(2, 3), T(3, 2).int(), TypeError, 'float32 on cpu, but b is torch.int32'),
        (T(2, 3), T(3, 2, device='meta'), TypeError, 'on cpu, but b is torch.float32 on meta'),
        ([[1.0]], T(1, 1), TypeError, 'a is a list'),
    ):
        with pytest.raises(error, match=message):
            f(a, b)


SIMULATED = """
import torch
from miniai.matmul import matmul_cuda
for n, k, m, block in ((1, 1, 1, 2), (5, 8, 6, 4), (4, 3, 9, 3), (2, 0, 3, 2)):
    a, b = torch.randn(n, k + 1)[:, :k], torch.randn(m, k).T # neither in reading order
    torch.testing.assert_close(matmul_cuda(a, b, block=block), a@b)
"""


def test_gpu_kernel_in_the_simulator():
    pytest.importorskip('numba')
    r = subprocess.run(
        [sys.executable, '-c', SIMULATED],
        env=os.environ | {'NUMBA_ENABLE_CUDASIM': '1', 'CUDA_VISIBLE_DEVICES': ''},
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_kernel_on_a_gpu():
    pytest.importorskip('numba')
    for n, k, m in ((1, 1, 1), (100, 64, 10), (257, 33, 129), (2, 0, 3)):
        a, b = torch.randn(n, k, device='cuda'), torch.randn(m, k, device='cuda').T
        torch.testing.assert_close(
            matmul_cuda(a, b), (a.double() @ b.double()).float(), rtol=1e-4, atol=1e-4
        )



def test_import_is_cheap():
    code = (
        "import sys; import miniai.matmul, miniai.einsum; "
        "assert not {'numba', 'sklearn', 'matplotlib', 'scipy'} & set(sys.modules)"
    )
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


WITHOUT = """
import sys, torch
sys.modules['numba'] = None # as if it weren't installed
from miniai.matmul import matmul_cuda, matmul_numba
for f in (matmul_numba, matmul_cuda):
    try: f(torch.ones(1, 1), torch.ones(1, 1))
    except ImportError as e: assert 'pip install numba' in str(e)
    else: raise SystemExit('no error')
"""


def test_without_numba():
    r = subprocess.run([sys.executable, '-c', WITHOUT], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
