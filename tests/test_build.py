"""Building: the CUDA packages are asked for only where they are needed, and the build check sees spills."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
from scripts import ROOT, load

CLEAN_LOG = """
ptxas info    : Compiling entry function '_Z5routePi' for 'sm_90a'
ptxas info    : Function properties for _Z5routePi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""


@pytest.fixture
def backend() -> ModuleType:
    pytest.importorskip("scikit_build_core")
    return load(ROOT / "build_backend" / "jax_moe_build.py")


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for an nvcc, the only one that can be found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("JAX_MOE_CUDA", raising=False)
    return tmp_path / "nvcc"


def write_nvcc(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


HOOKS = ["get_requires_for_build_wheel", "get_requires_for_build_editable"]


@pytest.mark.parametrize("hook", HOOKS)
def test_without_nvcc_the_compiler_comes_from_packages(hook: str, backend: ModuleType, nvcc: Path) -> None:
    assert set(backend.CUDA_PACKAGES) <= set(getattr(backend, hook)())


@pytest.mark.parametrize("hook", HOOKS)
def test_a_working_nvcc_needs_no_packages(hook: str, backend: ModuleType, nvcc: Path) -> None:
    write_nvcc(nvcc, "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    assert not set(backend.CUDA_PACKAGES) & set(getattr(backend, hook)())


@pytest.mark.parametrize("script", ["exit 127", "echo hello", "echo 'release 11.8, V11.8.1'"])
def test_a_broken_or_old_nvcc_is_passed_over(script: str, backend: ModuleType, nvcc: Path) -> None:
    write_nvcc(nvcc, script)
    assert set(backend.CUDA_PACKAGES) <= set(backend.get_requires_for_build_wheel())


def test_cuda_off_needs_no_packages(backend: ModuleType, nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = {"cmake.define.JAX_MOE_CUDA": "OFF"}
    assert not set(backend.CUDA_PACKAGES) & set(backend.get_requires_for_build_wheel(off))
    monkeypatch.setitem(os.environ, "JAX_MOE_CUDA", "off")
    assert not set(backend.CUDA_PACKAGES) & set(backend.get_requires_for_build_wheel())


def test_the_packages_are_pinned(backend: ModuleType) -> None:
    assert all("==" in package for package in backend.CUDA_PACKAGES)


def test_a_clean_build_passes_the_check() -> None:
    assert load(ROOT / ".ci" / "check_ptxas.py").complaints(CLEAN_LOG) == []


@pytest.mark.parametrize(
    "log",
    [
        CLEAN_LOG.replace("0 bytes spill stores", "8 bytes spill stores"),
        CLEAN_LOG.replace("0 bytes spill loads", "16 bytes spill loads"),
        CLEAN_LOG + "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n",
        "ninja: no work to do.\n",
    ],
)
def test_spills_serialised_wgmma_and_empty_logs_fail_the_check(log: str) -> None:
    assert len(load(ROOT / ".ci" / "check_ptxas.py").complaints(log)) == 1
