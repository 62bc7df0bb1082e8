"""Builds of the library beside each other, in turns in one process: what a change costs or saves.

python benchmarks/turns.py OLD.whl NEW.whl --cells qwen3_30b:64,qwen3_30b:4096

Whole calls of each build, a wheel or a shared library of the installed package's ABI, on the same arrays: clocks and
heat are the same for all, and on a GPU half a percent shows, where runs apart differ by five. `*`: other bits than the
first build's. --weights: a layout of jax_moe/bench/layouts.py. --between: MiB that a kernel copies after every call.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jax_moe import info, native
from jax_moe.bench.device import Device, Set
from jax_moe.bench.machine import device_name, open_device
from jax_moe.bench.paths import Data, native_buffers, native_calls, routed_tokens, whole_layer
from jax_moe.bench.timing import medians_by_turns
from jax_moe.bench.workload import Cell, draw_routings, parse_shape
from jax_moe.options import Options
from jax_moe.problem import Array, Problem

CELLS = "qwen3_30b:16,qwen3_30b:64,qwen3_30b:1024,qwen3_30b:4096,dsv3_e32:64,dsv3_e32:1024"
SETS, REPEATS, PAUSE = 4, 20, 0.15


def load_build(path: Path, folder: Path) -> ModuleType:
    """The extension of a wheel or shared library; `folder` keeps what is unpacked. Raises ValueError without one, and
    ImportError where its ABI is another than the installed package's.
    """
    library = path
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if name.startswith("jax_moe/_native.")]
            if not names:
                raise ValueError(f"turns: {path} must be a wheel with jax_moe/_native, got one without: build it again")
            library = Path(wheel.extract(names[0], folder))
    name = native.load().__name__  # each by the name that its initialisation has
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    native.check_abi(module.abi_text())
    return module


def compare(
    device: Device,
    cell: Cell,
    weights: Set,
    options: Options,
    builds: Sequence[ModuleType],
    rounds: int,
    between: Callable[[], Any] | None = None,
) -> list[str]:
    """For each build, microseconds a call, with what is done between calls, and the ratio to the first build's."""
    tokens = routed_tokens(device, cell, draw_routings(cell, SETS, 0), 0)
    problem = problem_of(cell, {**weights, **tokens[0]}, options)
    buffers = native_buffers(device, problem, Data([weights], tokens))
    for one in buffers:  # as an allocator gives a caller the same memory again
        one["workspace"] = buffers[0]["workspace"]
    programs, outputs = [], []
    for build in builds:
        calls = native_calls(device, problem, buffers, native.ALL_STAGES, build)
        for call in calls:
            call()
        device.synchronize()
        outputs.append([bytes_of(one["output"]) for one in buffers])
        programs.append(device.program([followed_by(between, call) for call in calls] if between else calls))
    seconds = medians_by_turns(programs, rounds, REPEATS, PAUSE)
    return [
        f"{1e6 * second:.1f} ({second / seconds[0]:.3f}){'' if same_bits(output, outputs[0]) else ' *'}"
        for second, output in zip(seconds, outputs, strict=True)
    ]


def followed_by(second: Callable[[], Any], first: Callable[[], Any]) -> Callable[[], Any]:
    def both() -> None:
        first()
        second()

    return both


def copy_of(device: Device, mebibytes: int) -> Callable[[], Any]:
    source, target = device.empty(mebibytes << 20), device.empty(mebibytes << 20)
    return lambda: target.copy_(source)


def problem_of(cell: Cell, arrays: Set, options: Options) -> Problem:
    described = {n: Array(tuple(a.shape), str(a.dtype).removeprefix("torch.")) for n, a in arrays.items()}
    s = cell.shape
    return Problem.create(
        "turns", described, options, num_experts=s.num_experts, local_expert_offset=s.local_expert_offset
    )


def laid_out(weights: Set, layout: str) -> tuple[Set, Options]:
    """The weights in a layout of bench/layouts.py, and the options of a call. Raises ValueError for another name."""
    from jax_moe.bench.layouts import LAYOUTS, weight_layouts  # needs torch

    if layout not in LAYOUTS:
        raise ValueError(f"turns: --weights must be one of {', '.join(LAYOUTS)}, got {layout}")
    made, changes = weight_layouts(weights, [layout])[layout]
    return made, Options(**changes)


def bytes_of(array: object) -> np.ndarray:
    return np.array(array if isinstance(array, np.ndarray) else array.cpu().numpy())  # type: ignore[attr-defined]


def same_bits(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Builds of the library beside each other, in turns in one process.")
    parser.add_argument("builds", nargs="+", type=Path, help="wheels or shared libraries; the first is compared with")
    parser.add_argument("--cells", default=CELLS, help="shape:tokens, ...; shapes as in jax-moe bench")
    parser.add_argument("--weights", default="plain", help="their layout or format")
    parser.add_argument("--between", type=int, default=0, metavar="MIB", help="that are copied after every call")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    options = parser.parse_args(arguments)
    device = open_device(options.device)
    if options.weights != "plain" and device.kind != "gpu":
        parser.error(f"turns: --weights must be plain on a CPU, got {options.weights}: torch lays them out on a GPU")
    if options.between < 0:
        parser.error(f"turns: --between must be 0 or more, got {options.between}")
    if options.between and device.kind != "gpu":
        parser.error(f"turns: --between must be 0 on a CPU, got {options.between}: it is about L2")
    between = copy_of(device, options.between) if options.between else None
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        builds = [load_build(path, Path(folder) / str(i)) for i, path in enumerate(options.builds)]
        name_of_device = device_name(info.gather(), device.kind)
        table = Table(
            "cell", *map(str, options.builds), title=f"Microseconds a call (ratio), {name_of_device}", box=None
        )
        name, weights, layout = "", Set(), Options()
        for text in options.cells.split(","):
            shape, tokens = text.rsplit(":", 1)
            if shape != name:
                weights = Set()  # given back before the next are made
                device.release()
                name, weights = shape, whole_layer(device, parse_shape(shape), 0)
                if options.weights != "plain":
                    weights, layout = laid_out(weights, options.weights)
            cell = Cell(parse_shape(shape), int(tokens), True)
            row = compare(device, cell, weights, layout, builds, options.rounds, between)
            console.print(text, *row, soft_wrap=True)  # at once: a table of many cells takes minutes
            table.add_row(text, *row)
        console.print(table)


if __name__ == "__main__":
    main()
