"""Time of each stage and of the whole call, with the measured ceilings of this machine and the share of them reached.

One cell is a layer shape at a number of tokens. Results are kept after each cell, also when a later one fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .. import info
from ..info import CannotRun
from ..shapes import LayerShape
from . import paths
from .cost import Ceilings
from .device import Device, Set
from .machine import device_name, open_device, open_front_ends
from .table import ceilings_table, cells_table
from .timing import Timing, measure
from .workload import Cell, cut, draw_routings, mean_cost, number_of_sets, parse_shape

LARGE = 1024  # tokens from which the sustained state is measured too


@dataclasses.dataclass(frozen=True)
class Defaults:
    shapes: str
    tokens: str
    experts: int | None
    repeats: int


DEFAULTS = {
    ("gpu", False): Defaults(
        "dsv3_ep8,dsv3_e32,dsv3_e256,qwen3_30b,qwen3_235b", "1,4,16,64,256,1024,4096,8192", None, 10
    ),
    ("gpu", True): Defaults("qwen3_30b,dsv3_ep8", "1,64,1024", None, 5),
    ("cpu", False): Defaults("qwen3_30b", "1,16,128", 16, 20),
    ("cpu", True): Defaults("qwen3_30b", "1", 8, 3),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", help="names of layers, or HxIxExK (hidden size, intermediate size, experts, top_k)")
    parser.add_argument("--tokens", help="numbers of tokens, like 1,64,1024")
    parser.add_argument("--experts", type=int, help="cut each layer to so many experts (default on a CPU)")
    parser.add_argument("--through", help="front ends: torch,jax (default: those installed)")
    parser.add_argument("--input", choices=("bf16", "fp8"), default="bf16", help="dtype of the hidden states")
    parser.add_argument("--batch-invariant", action="store_true", help="calls with batch_invariant=True: its cost")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument(
        "--state",
        choices=("cool", "sustained", "both"),
        default="both",
        help=f"of a GPU: bursts after pauses, under load, or both from {LARGE} tokens on (default)",
    )
    parser.add_argument("--repeats", type=int, help="timed repeats of which the median is taken (default 20)")
    parser.add_argument("--no-stages", action="store_true", help="time whole calls only")
    parser.add_argument("--quick", action="store_true", help="few cells, few repeats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the roofline (needs matplotlib)")


def run(options: argparse.Namespace) -> int:
    draw = _plotter(options.plot) if options.plot else None
    device = open_device(options.device)
    defaults = DEFAULTS[device.kind, options.quick]
    shapes = [parse_shape(text) for text in (options.shapes or defaults.shapes).split(",")]
    experts = options.experts or (None if options.shapes else defaults.experts)
    if experts:
        shapes = [cut(shape, experts) for shape in shapes]
    tokens = _positive("--tokens", options.tokens or defaults.tokens)
    repeats = options.repeats or defaults.repeats
    (_,) = _positive("--repeats", str(repeats))
    front_ends = open_front_ends(options.through, device)

    report = info.gather()
    result: dict[str, Any] = {
        **{key: report[key] for key in ("versions", "build", "driver", "devices")},
        "device": device_name(report, device.kind),
        "settings": {
            "input": options.input,
            "batch_invariant": options.batch_invariant,
            "state": options.state if device.kind == "gpu" else "steady",
            "through": front_ends,
            "repeats": repeats,
            "seed": options.seed,
        },
        "cells": [],
    }
    console = info.open_console(160)
    console.print(f"jax-moe bench on {result['device']}, {_how(device.kind)}", highlight=False)
    with _progress() as progress:
        task = progress.add_task("ceilings", total=len(shapes) * len(tokens))
        ceilings = device.ceilings()
        result["ceilings"] = dataclasses.asdict(ceilings)
        say = functools.partial(_describe, progress, task)
        bench = Bench(device, ceilings, front_ends, repeats, options, say)
        for shape in shapes:
            for cell in bench.cells(shape, tokens):
                result["cells"].append(cell)
                progress.advance(task)
                if options.json:
                    write_whole(options.json, json.dumps(result, indent=1))
    console.print(ceilings_table(ceilings))
    console.print(cells_table(result["cells"]))
    if draw:
        draw(result, options.plot)
    return 1 if any(cell.get("error") or cell.get("same_bits") is False for cell in result["cells"]) else 0


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all cells of a run have in common."""

    device: Device
    ceilings: Ceilings
    front_ends: Sequence[str]
    repeats: int
    options: argparse.Namespace
    say: Callable[[str], None]

    def cells(self, shape: LayerShape, tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The results of one shape, as JSON has them. A cell that fails holds the error and lets the others run."""
        weights: Set = {}
        for made in self.device.random_weights(shape, self.options.seed):
            if isinstance(made, int):
                self.say(f"{shape.name}: weights of expert {made}/{shape.local_num_experts}")
            else:
                weights = made
        copies = self.device.weight_copies(weights)
        for number in tokens:
            self.say(f"{shape.name}, {number} tokens")
            cell = Cell(shape, number, self.options.input == "bf16", self.options.batch_invariant)
            facts: dict[str, Any] = {"shape": dataclasses.asdict(shape), "tokens": number, "input": self.options.input}
            try:
                facts |= self.cell(cell, copies)
            except Exception as error:  # out of memory, say: the other cells are still worth having
                traceback.print_exc()
                facts["error"] = f"{type(error).__name__}: {error}"
            self.device.release()
            yield facts

    def cell(self, cell: Cell, weights: list[Set]) -> dict[str, Any]:
        seed = self.options.seed + cell.tokens
        routings = draw_routings(cell, number_of_sets(cell.tokens), seed)
        data = paths.Data(weights, paths.routed_tokens(self.device, cell, routings, seed))
        cost = mean_cost(cell, routings)
        stages = {} if self.options.no_stages else self.stages(cell, data)
        self.device.release()
        whole, checks = self.whole(cell, data)
        result = {
            **dataclasses.asdict(cost),
            "intensity": cost.intensity,
            "sets": len(data.tokens),
            "roofline_us": 1e6 * self.ceilings.seconds(cost),
            "stages_us": stages,
            "whole_us": whole,
            **checks,
        }
        first = self.device.states[0] if self.options.state != "sustained" else self.device.states[-1]
        through, best = min(((name, states[first]["median"]) for name, states in whole.items()), key=lambda x: x[1])
        return result | {
            "best_through": through,
            "best_us": best,
            "tflops": cost.flops / best / 1e6,
            "gbytes_per_second": cost.bytes / best / 1e3,
            "share_of_roofline": result["roofline_us"] / best,
        }

    def stages(self, cell: Cell, data: paths.Data) -> dict[str, Any]:
        programs = paths.stage_programs(self.device, cell, data)
        state = self.device.states[0]
        repeats = max(3, self.repeats // 2)
        return {name: _microseconds(measure(program, state, repeats)) for name, program in programs.items()}

    def whole(self, cell: Cell, data: paths.Data) -> tuple[dict[str, Any], dict[str, Any]]:
        """Times by front end and state; the host's share, and whether the front ends agree."""
        times: dict[str, Any] = {}
        torch_calls = paths.torch_calls(cell, data) if "torch" in self.front_ends else []
        jax_calls = paths.jax_calls(cell, data) if "jax" in self.front_ends else []
        both = bool(torch_calls and jax_calls)
        checks: dict[str, Any] = {"same_bits": paths.same_bits(torch_calls[0], jax_calls[0]) if both else None}
        if torch_calls:
            times["torch"] = self.times(cell, self.device.program(torch_calls))
            self.device.release()
        if jax_calls:
            times["jax"] = self.times(cell, paths.jax_program(self.device, cell, data))
        if self.device.kind == "gpu":
            one_torch, one_jax = (calls[0] if calls else None for calls in (torch_calls, jax_calls))
            checks["host_us"] = paths.host_times(self.device, one_torch, one_jax) if cell.tokens <= 64 else {}
        return times, checks

    def times(self, cell: Cell, program: Any) -> dict[str, Any]:
        states = self.device.states
        if self.device.kind == "gpu" and self.options.state != "both":
            states = (self.options.state,)
        elif cell.tokens < LARGE:
            states = states[:1]
        return {state: _microseconds(measure(program, state, self.repeats)) for state in states}


def _plotter(file: Path) -> Callable[[dict[str, Any], Path], None]:
    if file.suffix != ".png":
        raise CannotRun(f"--plot must be a file named *.png, got {file.name!r}")
    try:
        from .plot import draw
    except ImportError as error:
        raise CannotRun(f"--plot needs matplotlib ({error}); pip install matplotlib") from error
    return draw


def _positive(argument: str, text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise CannotRun(f"{argument} must be positive integers, separated by commas, got {text!r}")
    return [int(part) for part in text.split(",")]


def _how(kind: str) -> str:
    if kind == "cpu":
        return "which is a CPU; medians of wall-clock times"
    return "medians; stages and torch by CUDA graph replays, JAX by the wall clock over a jitted program in a row"


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _describe(progress: Progress, task: TaskID, text: str) -> None:
    progress.update(task, description=text)


def _microseconds(timing: Timing) -> dict[str, float]:
    seconds = dataclasses.asdict(timing)
    samples = seconds.pop("samples")
    return {name: 1e6 * value for name, value in seconds.items()} | {"samples": samples}


def write_whole(file: Path, text: str) -> None:
    """In one step, so that a run that is stopped leaves the whole of what it had."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(text + "\n")
    part.replace(file)
