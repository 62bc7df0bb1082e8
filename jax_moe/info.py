"""Versions, build, driver and devices, and what of it is usable.

Works without a driver, jax, torch or the compiled library: what is missing is told, with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import __version__, native

PACKAGES = ("numpy", "ml_dtypes", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "torch")


class CannotRun(Exception):
    """A command that cannot do what was asked; its text says why and what would help."""


def open_console(width: int) -> Console:
    """Standard output, at least `width` columns wide where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, width))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(options: argparse.Namespace) -> int:
    report = gather()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, open_console(120))
    return 0


def gather() -> dict[str, Any]:
    """Everything that `jax-moe info --json` prints. Never raises."""
    build, cuda = _library()
    return {
        "versions": _versions(),
        "build": build,
        "driver": {
            "version": driver_version(),
            "cuda": _cuda_version(cuda["driver_version"]),
            "error": cuda["error"],
        },
        "devices": [_cpu(), *map(_gpu, cuda["gpus"])],
        "usable": {
            "cpu_backend": _usable(build["error"]),
            "hopper_kernels": _usable(why_no_hopper(build["error"], cuda)),
            "jax": _usable(_why_not_importable("jax_moe.moe")),
            "torch": _usable(_why_not_importable("torch_facade")),
        },
    }


def hopper_devices() -> tuple[list[int], str]:
    """Numbers of the GPUs that the kernels run on, and why there is none ("" when there is one)."""
    build, cuda = _library()
    reason = why_no_hopper(build["error"], cuda)
    return [] if reason else [i for i, gpu in enumerate(cuda["gpus"]) if _is_hopper(gpu)], reason


def library_error() -> str:
    """Why the compiled library does not load, "" when it does."""
    return _library()[0]["error"]


def why_no_hopper(library_error: str, cuda: dict[str, Any]) -> str:
    """From the extension's cuda_report(): why the Hopper kernels cannot run, "" where they can."""
    if library_error or cuda["error"]:
        return library_error or cuda["error"]
    if any(map(_is_hopper, cuda["gpus"])):
        return ""
    found = ", ".join(f"{gpu['name']} ({gpu['major']}.{gpu['minor']})" for gpu in cuda["gpus"]) or "none"
    return f"they need a GPU of compute capability 9.0 (H100, H200, GH200), found: {found}"


def _is_hopper(gpu: dict[str, Any]) -> bool:
    return (gpu["major"], gpu["minor"]) == (9, 0)


def _library() -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts on the compiled library, and its report on CUDA."""
    try:
        library = native.load()
        facts, cuda = library.build_info(), library.cuda_report()
    except Exception as error:  # any failure of a shared library is something to report here
        empty = {"version": "", "cuda": False, "cuda_runtime": "", "compiler": "", "ffi_api": ""}
        none = {"error": "the compiled library does not load", "driver_version": 0, "gpus": []}
        return {"error": _words(error), **empty}, none
    return {
        "error": "",
        "version": facts["version"],
        "cuda": facts["cuda"],
        "cuda_runtime": _cuda_version(facts["cuda_runtime"]),
        "compiler": facts["compiler"],
        "ffi_api": ".".join(map(str, facts["ffi_api"])),
    }, cuda


def _versions() -> dict[str, str]:
    versions = {"jax_moe": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return versions


def driver_version() -> str:
    """Of the NVIDIA driver, like 580.95.05; "" where there is none."""
    for path in ("/sys/module/nvidia/version", "/proc/driver/nvidia/version"):
        try:
            if found := re.search(r"\d+\.\d+(\.\d+)*", Path(path).read_text()):
                return found[0]
        except OSError:
            continue
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.split("\n")[0].strip() if answer.returncode == 0 else ""


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def _cpu() -> dict[str, Any]:
    name = ""
    try:
        if found := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            name = found[1]
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"kind": "cpu", "name": name or platform.machine(), "cores": cores, "memory_bytes": memory}


def _gpu(gpu: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "gpu",
        "name": gpu["name"],
        "compute_capability": f"{gpu['major']}.{gpu['minor']}",
        "multiprocessors": gpu["num_sms"],
        "memory_bytes": gpu["memory_bytes"],
    }


def _why_not_importable(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation of jax or torch may raise anything
        return _words(error)
    return ""


def _usable(reason: str) -> dict[str, Any]:
    return {"usable": not reason, "reason": reason}


def _words(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _print(report: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for package, version in report["versions"].items():
        table.add_row(package, version or "not installed")
    build = report["build"]
    if build["error"]:
        table.add_row("build", build["error"])
    else:
        cuda = f"with CUDA {build['cuda_runtime']}" if build["cuda"] else "without CUDA kernels"
        table.add_row("build", f"{cuda}, compiler {build['compiler']}, XLA FFI API {build['ffi_api']}")
    driver = report["driver"]
    table.add_row("driver", f"{driver['version']}, CUDA {driver['cuda'] or 'unknown'}" if driver["version"] else "none")
    for device in report["devices"]:
        size = f"{device['memory_bytes'] / 2**30:.0f} GiB"
        if device["kind"] == "cpu":
            table.add_row("cpu", f"{device['name']}, {device['cores']} cores, {size}")
        else:
            capability = f"compute capability {device['compute_capability']}"
            table.add_row("gpu", f"{device['name']}, {capability}, {device['multiprocessors']} SMs, {size}")
    words = {"cpu_backend": "CPU backend", "hopper_kernels": "Hopper kernels", "jax": "from JAX", "torch": "from torch"}
    for key, found in report["usable"].items():
        table.add_row(words[key], "yes" if found["usable"] else f"no, because {found['reason']}")
    console.print(table)
