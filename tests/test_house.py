"""The plan of the house: who may include or import whom, and how files are named, opened and bounded in length."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FFI = ROOT / "ffi"
PYTHON_FOLDERS = ("jax_moe", "torch_facade", "build_backend", "benchmarks", "tests", ".ci")
MAX_LINES = 400
MAX_BANNER_LINES = 5
FORBIDDEN_NAMES = {"utils", "util", "helper", "helpers", "manager", "common", "misc", "impl", "v2"}

CPP_FILES = sorted(path for pattern in ("*.h", "*.cc", "*.cu", "*.cuh") for path in FFI.rglob(pattern))
CPP_TEST_FILES = sorted(path for pattern in ("*.h", "*.cc", "*.cpp") for path in (ROOT / "tests").rglob(pattern))
PYTHON_FILES = sorted(path for folder in PYTHON_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- C++ arrows ------------------------------------------------------------------------------------------------------
SHARED = {"moe.h", "finalize.h", "routing.h", "workspace.h"}  # what both backends stand on

SEES_PYTHON = ("module.cc", "python_calls.h", "python_calls.cc", "python_status.h")
SEES_XLA = ("xla_handlers.cc", "xla_finalize_handler.cc", "xla_route_handler.cc", "xla_status.h")


def includes(text: str) -> list[tuple[str, bool]]:
    """(header, whether it is quoted) of each #include line."""
    found = re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text, re.MULTILINE)
    return [(header, bracket == '"') for bracket, header in found]


def resolve(file: str, header: str) -> str:
    """A quoted header as a path below ffi/, or unchanged when it is not there."""
    for folder in (FFI / Path(file).parent, FFI):
        path = (folder / header).resolve()
        if path.is_file() and path.is_relative_to(FFI.resolve()):
            return path.relative_to(FFI.resolve()).as_posix()
    return header


def wrong_include(file: str, header: str, quoted: bool) -> str | None:
    """Why ffi/`file` may not include `header`; None where it may."""
    if header.startswith(("torch/", "ATen/", "c10/")):
        return "nothing includes torch"
    if header.startswith("xla/"):
        return None if file in SEES_XLA else f"only {SEES_XLA} see XLA"
    if header.startswith(("nanobind/", "Python.h")):
        return None if file in SEES_PYTHON else f"only {SEES_PYTHON} see Python"
    if header.startswith(("cuda", "cub/", "thrust/", "cute/", "cutlass/")) and not quoted:
        return None if file.startswith("cuda/") else "only ffi/cuda sees CUDA"
    if not quoted:
        return None
    target = resolve(file, header)
    if file == "moe.h":
        return "moe.h includes standard headers only"
    if file in (
        "finalize.h",
        "routing.h",
        "workspace.h",
        "workspace.cc",
        "check.cc",
        "check_finalize.cc",
        "check_routing.cc",
        "backends.h",
        "backends.cc",
        "dlpack_exchange.h",
        "xla_handlers.h",
        *SEES_XLA,
    ):
        return (
            None
            if target in SHARED | {"backends.h", "xla_handlers.h", "xla_status.h"}
            else "it stands on moe.h and workspace.h only"
        )
    if file in SEES_PYTHON:
        allowed = {"backends.h", "dlpack_exchange.h", "python_calls.h", "python_status.h", "xla_handlers.h"}
        return None if target in SHARED | allowed | {"cuda/device.h"} else "it stands on the contract only"
    if target in SHARED or target == "emulated_ptx.h":
        return None
    if file.startswith("cpu/"):
        return None if target.startswith("cpu/") else "the CPU backend stands on itself, moe.h and workspace.h"
    if file.startswith("cuda/kernels/"):
        return None if target.startswith("cuda/kernels/") else "kernels do not know launch code"
    if file.startswith("cuda/"):
        return None if target.startswith("cuda/") else "the CUDA backend stands on itself, moe.h and workspace.h"
    return "the file has no place in the plan of ffi/"


@pytest.mark.parametrize("path", CPP_FILES, ids=name_of)
def test_includes_follow_the_arrows(path: Path) -> None:
    file = path.relative_to(FFI).as_posix()
    wrong = [
        f"{header}: {reason}"
        for header, quoted in includes(path.read_text())
        if (reason := wrong_include(file, header, quoted))
    ]
    assert not wrong, f"ffi/{file} includes {wrong}"


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("cpu/forward.cc", '#include "xla/ffi/api/ffi.h"'),
        ("cpu/forward.cc", '#include "../cuda/launch.h"'),
        ("cuda/forward.cu", "#include <nanobind/nanobind.h>"),
        ("cuda/kernels/ptx.cuh", '#include "../launch.h"'),
        ("moe.h", '#include "workspace.h"'),
        ("xla_handlers.cc", "#include <cuda_runtime.h>"),
        ("module.cc", "#include <torch/extension.h>"),
        ("elsewhere/thing.cc", '#include "../cuda/launch.h"'),
    ],
)
def test_a_wrong_include_is_seen(file: str, line: str) -> None:
    ((header, quoted),) = includes(line)
    assert wrong_include(file, header, quoted)


# ---- Python arrows ---------------------------------------------------------------------------------------------------
# What of the two packages each module may import. `jax_moe` itself names its modules lazily and is left out.
CORE = {
    "jax_moe",
    "jax_moe.enums",
    "jax_moe.options",
    "jax_moe.problem",
    "jax_moe.finalize_problem",
    "jax_moe.routing_problem",
    "jax_moe.native",
}
ARROWS = {
    "jax_moe.enums": set(),
    "jax_moe.options": {"jax_moe.enums"},
    "jax_moe.problem": {"jax_moe.enums", "jax_moe.options"},
    "jax_moe.finalize_problem": {"jax_moe.enums", "jax_moe.options", "jax_moe.problem"},
    "jax_moe.routing_problem": {"jax_moe.enums", "jax_moe.options", "jax_moe.problem"},
    "jax_moe.native": {
        "jax_moe.enums",
        "jax_moe.problem",
        "jax_moe.finalize_problem",
        "jax_moe.routing_problem",
    },
    "jax_moe.shapes": set(),
    "jax_moe.layout": set(),
    "jax_moe.routing": CORE,
    "jax_moe.reference_routing": {"jax_moe.enums"},
    "jax_moe.logits": CORE | {"jax_moe.moe", "jax_moe.xla_call"},
    "jax_moe.finalization": CORE | {"jax_moe.xla_call"},
    "jax_moe.quantize": CORE | {"jax_moe.layout"},
    "jax_moe.folding": CORE,
    "jax_moe.prepare": CORE | {"jax_moe.layout", "jax_moe.folding", "jax_moe.quantize"},
    "jax_moe.reference": CORE | {"jax_moe.layout", "jax_moe.shapes"},
    "jax_moe.xla_call": CORE,
    "jax_moe.moe": CORE | {"jax_moe.xla_call"},
}
REFERENCES = {"jax_moe.reference", "jax_moe.reference_routing"}
SHARED_WITH_THE_FACADE = {"jax_moe.layout", "jax_moe.folding"}
JAX_FREE = CORE | REFERENCES | SHARED_WITH_THE_FACADE | {"jax_moe.shapes"}
LIBRARY = ARROWS.keys() - REFERENCES


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Absolute names of all modules that `source` imports, at any depth of nesting."""
    found = set()
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names if is_module(f"{base}.{alias.name}")}
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def wrong_import(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`; None where it may."""
    top = imported.partition(".")[0]
    in_facade = module.partition(".")[0] == "torch_facade"
    if top in ("jax", "jaxlib") and (in_facade or module in JAX_FREE):
        return "it must work without jax"
    if top == "torch" and module in LIBRARY | JAX_FREE:
        return "only torch_facade knows torch"
    if top == "torch_facade" and module in LIBRARY | JAX_FREE:
        return "jax_moe does not know the facade"
    if top != "jax_moe" or module == "jax_moe":
        return None
    if imported in REFERENCES and (in_facade or module in LIBRARY):
        return "the reference is for tests and benchmarks"
    if in_facade:
        fine = imported in CORE | SHARED_WITH_THE_FACADE
        return None if fine else "the facade stands on problem, native, layout and folding only"
    if module in ARROWS and imported != "jax_moe" and imported not in ARROWS[module]:
        return f"it may import {sorted(ARROWS[module])} only"
    return None


def package_files(package: str) -> list[Path]:
    return [path for path in PYTHON_FILES if path.relative_to(ROOT).parts[0] == package]


@pytest.mark.parametrize("path", package_files("jax_moe") + package_files("torch_facade"), ids=name_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    found = imports(path.read_text(), module, is_package)
    wrong = [f"{name}: {reason}" for name in sorted(found) if (reason := wrong_import(module, name))]
    assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("torch_facade.moe", "import jax"),
        ("torch_facade.moe", "def f():\n    from jax_moe import moe"),
        ("jax_moe.native", "from . import moe"),
        ("jax_moe.native", "import torch"),
        ("jax_moe.problem", "from jax import numpy"),
        ("jax_moe.moe", "from .reference import forward"),
        ("jax_moe.moe", "import torch_facade"),
        ("jax_moe.routing", "from .moe import fp8_block_scale_routed_moe"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    # jax_moe.moe is named here whether or not `is_module` finds it.
    assert any(wrong_import(module, name) for name in imports(source, module, is_package=False))


# ---- files -----------------------------------------------------------------------------------------------------------
ALL_FILES = [*CPP_FILES, *CPP_TEST_FILES, *PYTHON_FILES, ROOT / "CMakeLists.txt", ROOT / ".ci" / "run"]


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_a_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def banner(path: Path) -> list[str]:
    """The lines with which a file says what it is: a docstring, or comment lines (after `#!`)."""
    text = path.read_text()
    if path.suffix == ".py":
        lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        return [line for line in lines if line.strip()]
    mark = "//" if path in CPP_FILES + CPP_TEST_FILES else "#"
    lines = [line for line in text.splitlines() if not line.startswith("#!")]
    end = next((i for i, line in enumerate(lines) if not line.startswith(mark)), len(lines))
    return lines[:end]


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_a_file_opens_with_what_it_is(path: Path) -> None:
    assert 1 <= len(banner(path)) <= MAX_BANNER_LINES


@pytest.mark.parametrize("path", [path for path in ALL_FILES if path.suffix], ids=name_of)
def test_file_names_say_something(path: Path) -> None:
    words = {word for part in path.relative_to(ROOT).parts for word in re.split(r"[_.]", part.lower())}
    assert not words & FORBIDDEN_NAMES
