"""What every test shares: tests under tests/gpu need an sm_90 GPU and say why they do not run elsewhere."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"


@functools.cache
def why_no_gpu() -> str | None:
    """Why GPU tests cannot run here; None where they can."""
    from jax_moe import native

    report = native.load().cuda_report()
    if not report["built"] or report["error"]:
        return report["error"]
    if not any((gpu["major"], gpu["minor"]) == (9, 0) for gpu in report["gpus"]):
        names = ", ".join(gpu["name"] for gpu in report["gpus"]) or "none"
        return f"no GPU of compute capability 9.0 (found: {names})"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        pytest.skip(reason)


@pytest.fixture
def gpu() -> int:
    """Number of an sm_90 GPU; skips where there is none."""
    if reason := why_no_gpu():
        pytest.skip(reason)
    from jax_moe import native

    gpus = native.load().cuda_report()["gpus"]
    return next(i for i, gpu in enumerate(gpus) if (gpu["major"], gpu["minor"]) == (9, 0))


@pytest.fixture
def cuda_build() -> None:
    """Skips where the library has no CUDA kernels, and so nothing to choose from."""
    from jax_moe import native

    if not native.load().build_info()["cuda"]:
        pytest.skip("this build has no CUDA kernels")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CUDA sources compiled for a CPU: an emulated.Emulator."""
    import emulated

    return emulated.Emulator(emulated.build(tmp_path_factory.mktemp("emulation")))
