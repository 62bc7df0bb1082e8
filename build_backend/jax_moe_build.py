"""Build backend: scikit-build-core, plus the pinned CUDA compiler packages where no nvcc works.

The packages are build requirements only. JAX_MOE_CUDA=OFF in the environment asks for none of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any

from scikit_build_core import build as scikit_build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# All pinned: nvidia-cuda-nvcc does not pin the packages that it needs, and newer ones do not fit it.
CUDA_PACKAGES = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]
OLDEST_NVCC = (12, 0)  # CMakeLists.txt has the same bound


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return scikit_build.get_requires_for_build_wheel(config_settings) + _cuda_packages(config_settings)


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return scikit_build.get_requires_for_build_editable(config_settings) + _cuda_packages(config_settings)


def _cuda_packages(config_settings: dict[str, Any] | None) -> list[str]:
    settings = config_settings or {}
    environment = os.environ.get("JAX_MOE_CUDA", "AUTO")
    choice = settings.get("cmake.define.JAX_MOE_CUDA", environment)
    if str(choice).upper() == "OFF" or nvcc_works(os.environ.get("CUDACXX")) or nvcc_works(shutil.which("nvcc")):
        return []
    return CUDA_PACKAGES


def nvcc_works(nvcc: str | None) -> bool:
    """Whether this compiler starts and is new enough. A wrapper without a toolkit behind it does not."""
    if not nvcc:
        return False
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    release = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    if answer.returncode != 0 or release is None:
        return False
    return (int(release[1]), int(release[2])) >= OLDEST_NVCC
