"""What of this machine a benchmark or a demo runs on: the device, and the front ends that work there."""

from __future__ import annotations

import importlib
import os
from typing import Any

from .. import info
from ..info import CannotRun
from .device import Device

FRONT_ENDS = {"torch": "torch_facade", "jax": "jax_moe.moe"}


def open_device(choice: str) -> Device:
    """The device of the benchmark named auto, cpu or gpu. Raises CannotRun."""
    share_memory()
    if choice != "cpu":
        gpus, reason = info.hopper_devices()
        reason = reason or _why_no_torch_gpu()
        if not reason:
            from .cuda import Cuda

            return Cuda(gpus[0])
        if choice == "gpu":
            raise CannotRun(f"--device gpu is not usable: {reason}")
    if error := info.library_error():
        raise CannotRun(error)
    from .cpu import Cpu

    return Cpu()


def share_memory() -> None:
    """Keeps JAX from taking most of a GPU's memory at its start, so that torch can work beside it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def device_name(report: dict[str, Any], kind: str) -> str:
    return next((d["name"] for d in report["devices"] if d["kind"] == kind), kind)


def _why_no_torch_gpu() -> str:
    try:
        import torch
    except ImportError:
        return "benchmarks on a GPU make their data and graphs with torch; pip install torch"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def open_front_ends(asked: str | None, device: Device) -> list[str]:
    """The names in `asked` ("torch,jax"), or those that work here. Raises CannotRun."""
    if asked:
        names = asked.split(",")
        if unknown := [name for name in names if name not in FRONT_ENDS]:
            raise CannotRun(f"--through must be among {','.join(FRONT_ENDS)}, got {unknown[0]!r}")
    reasons = {name: why_not_through(name, device.kind) for name in (asked.split(",") if asked else FRONT_ENDS)}
    usable = [name for name, reason in reasons.items() if not reason]
    if not usable or (asked and len(usable) < len(reasons)):
        raise CannotRun("; ".join(f"--through {name} is not usable: {why}" for name, why in reasons.items() if why))
    return usable


def why_not_through(name: str, kind: str) -> str:
    """Why a front end does not work on a device of that kind ("cpu" or "gpu"), "" where it does."""
    try:
        importlib.import_module(FRONT_ENDS[name])
        if name == "jax" and kind == "gpu":
            import jax

            jax.devices("cuda")
    except ModuleNotFoundError as error:
        return f"{error}; pip install {error.name}" if error.name == name else str(error)
    except (ImportError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return _why_no_torch_gpu() if name == "torch" and kind == "gpu" else ""
