"""What GPU tests share: the device, its memory, and a clean error state after each test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from memory import Cuda

# torch and JAX share the device here; by default JAX would take most of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture
def cuda(gpu: int) -> Iterator[Cuda]:
    """Memory on an sm_90 GPU. An error that a launch left behind fails the test that made it."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here; GPU tests allocate through it")
    with torch.cuda.device(gpu):
        yield Cuda(gpu)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
