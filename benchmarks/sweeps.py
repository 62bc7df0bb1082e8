"""Looks for cliffs: sweeps over tokens, routings, sizes and rows; flags what neighbours do not let expect.

python benchmarks/sweeps.py --sweeps skew,rows --json sweeps.json

Whole calls through torch from bf16 tokens and packed ids, by CUDA graph replays of rotated inputs; the cells of a
series take turns in one process. Needs a Hopper GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from jax_moe import native
from jax_moe.bench.command import write_whole
from jax_moe.bench.cost import Ceilings
from jax_moe.bench.cuda import Cuda
from jax_moe.bench.device import Set
from jax_moe.bench.machine import open_device
from jax_moe.bench.paths import Data, routed_tokens, torch_calls, whole_layer
from jax_moe.bench.sweep import (
    GROUPED,
    LARGE,
    Point,
    Result,
    Series,
    experts_to_make,
    judge,
    result_of,
    sets_of,
    sweeps,
    turns_of_weights,
)
from jax_moe.bench.table import ceilings_table
from jax_moe.bench.timing import CudaGraph, medians_by_turns
from jax_moe.bench.workload import draw_routings, mean_cost
from jax_moe.shapes import LayerShape

ROUNDS, REPEATS, PAUSE, LONG_PAUSE = 4, 4, 0.03, 0.1
MOST_POOL_BYTES = 3e9  # of weights made only so that small layers take turns

Column = tuple[str, Callable[[Result], str]]


class Weights:
    """Experts by hidden and intermediate size, made once; layers are slices of them."""

    def __init__(self, device: Cuda, points: Iterable[Point]) -> None:
        self._device = device
        cells = [point.cell for point in points]
        self._experts = experts_to_make(cells, device.rotation_bytes, MOST_POOL_BYTES)
        self._made: dict[tuple[int, int], Set] = {}

    def copies(self, point: Point) -> list[Set]:
        """As many layers with experts of their own as there are, but no more than it takes to be in no cache."""
        shape = point.cell.shape
        all_experts = self._all(shape)
        number = len(all_experts["gemm1_weights"]) // shape.local_num_experts
        layers = range(min(number, turns_of_weights(point.cell, self._device.rotation_bytes)))
        starts = [i * shape.local_num_experts for i in layers]
        return [{n: w[at : at + shape.local_num_experts] for n, w in all_experts.items()} for at in starts]

    def _all(self, shape: LayerShape) -> Set:
        sizes = shape.hidden_size, shape.intermediate_size
        if sizes not in self._made:
            number = self._experts[sizes]
            whole = dataclasses.replace(shape, num_experts=number, local_num_experts=number, local_expert_offset=0)
            self._made[sizes] = whole_layer(self._device, whole, 0)
        return self._made[sizes]


def measured(device: Cuda, weights: Weights, ceilings: Ceilings, sweep: str, series: Series) -> list[Result]:
    """The points of a series, timed by turns and judged."""
    calls, costs = [], []
    for point in series:
        cell, copies = point.cell, weights.copies(point)
        turns, sets = (of(cell, device.rotation_bytes) for of in (turns_of_weights, sets_of))
        routings = draw_routings(cell, sets, cell.tokens, point.draw, turns, len(copies))
        calls.append(torch_calls(cell, Data(copies, routed_tokens(device, cell, routings, cell.tokens))))
        costs.append(mean_cost(cell, routings))
    pause = LONG_PAUSE if any(point.cell.tokens >= LARGE for point in series) else PAUSE
    seconds = medians_by_turns([CudaGraph(one) for one in calls], ROUNDS, REPEATS, pause)
    results = []
    for point, its_seconds, cost in zip(series, seconds, costs, strict=True):
        text = native.explain(point.cell.problem(), device.num_sms)
        kernels = "decode" if "decode_gemm" in text else "grouped"
        results.append(result_of(sweep, point, kernels, its_seconds, cost, ceilings))
    return judge(sweeps()[sweep].rule, results)


# ---- tables ----------------------------------------------------------------------------------------------------------
def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.0f} %"


def us(result: Result) -> str:
    return f"{result.us:.1f}" if result.us < 1000 else f"{result.us:.0f}"


def relative(result: Result) -> str:
    return "-" if result.relative is None else f"{result.relative:.3f}"


TIME: Column = ("us", us)
SHARE: Column = ("roofline", lambda r: f"{100 * r.floor_us / r.us:.0f} %")
OFF: Column = ("off", lambda r: percent(r.off))
TOKENS: Column = ("T", lambda r: str(r.tokens))
TO_BEST: Column = ("a row, to the best", relative)
STEP: Column = ("step", lambda r: percent(r.step))
RATE: Column = ("TFLOP/s", lambda r: f"{r.flops / r.us / 1e6:.0f}")
ACTIVE: Column = ("active", lambda r: f"{r.active_experts:.1f}")
MEGABYTES: Column = ("MB", lambda r: f"{r.bytes / 1e6:.0f}")
TO_UNIFORM: Column = ("ratio", relative)
CHOSEN: Column = ("us", lambda r: us(r) + (" d" if r.kernels == "decode" else "  "))
TO_GROUPED: Column = ("ratio", relative)
BESIDE: Sequence[Column] = (("grouped", us), OFF)

USUAL = (TIME, SHARE, OFF)
COLUMNS: dict[str, Sequence[Column]] = {
    "skew": (TIME, ACTIVE, MEGABYTES, TO_UNIFORM),
    "rows": (TOKENS, TIME, SHARE, TO_BEST, STEP, OFF),
    "large": (TIME, RATE, SHARE, TO_BEST, STEP),
    "crossing": (CHOSEN, TO_GROUPED, OFF),
}


def table_of(sweep: str, results: Sequence[Result]) -> Table:
    """A row of the sweep a line, a few columns a group."""
    table = Table(title=sweeps()[sweep].title, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    table.add_column("")
    groups = list(dict.fromkeys(result.group for result in results))
    columns = {group: BESIDE if group.endswith(GROUPED) else COLUMNS.get(sweep, USUAL) for group in groups}
    for group, its in columns.items():
        for i, (name, _) in enumerate(its):
            title = group if i == 0 and its is not BESIDE else ""
            table.add_column(f"{title}\n{name}", justify="right")
    for row in dict.fromkeys(result.row for result in results):
        at = {result.group: result for result in results if result.row == row}
        cells = [show(at[group]) if group in at else "" for group, its in columns.items() for _, show in its]
        table.add_row(row, *cells)
    return table


def flag_lines(results: Sequence[Result]) -> list[str]:
    return [f"{r.sweep}: {r.group}, {r.row}: {us(r)} us, {'; '.join(r.flags)}" for r in results if r.flags]


# ---- the program -----------------------------------------------------------------------------------------------------
def names(text: str) -> list[str]:
    """Of sweeps, in the order in which they are asked for."""
    if unknown := [name for name in text.split(",") if name not in sweeps()]:
        raise argparse.ArgumentTypeError(f"must be among {','.join(sweeps())}, got {unknown[0]!r}")
    return text.split(",")


def main() -> int:
    parser = argparse.ArgumentParser(description="Sweeps over sizes and routings that look for cliffs.")
    parser.add_argument("--sweeps", type=names, default=list(sweeps()), help=f"some of {','.join(sweeps())}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    start = time.perf_counter()
    device = open_device("gpu")
    assert isinstance(device, Cuda)
    print(f"sweeps on {torch.cuda.get_device_name()}", flush=True)
    ceilings = device.ceilings()
    device.release()
    asked = {name: sweeps()[name].series for name in options.sweeps}
    weights = Weights(device, (point for all_series in asked.values() for series in all_series for point in series))
    results: list[Result] = []
    failed: list[str] = []
    for sweep, all_series in asked.items():
        for i, series in enumerate(all_series):
            where = f"{sweep} {i + 1}/{len(all_series)}: {series[0].group}, {series[0].row} to {series[-1].row}"
            try:
                results += measured(device, weights, ceilings, sweep, series)
            except Exception as error:  # out of memory, say: the other series are still worth having
                traceback.print_exc()
                failed.append(f"{where} failed: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            device.release()
            print(f"{time.perf_counter() - start:4.0f} s  {where}", flush=True)
            if options.json:
                write_whole(options.json, json.dumps(report(ceilings, results, failed), indent=1))
    console = Console(width=200)
    console.print(ceilings_table(ceilings))
    for sweep in asked:
        console.print()
        console.print(table_of(sweep, [result for result in results if result.sweep == sweep]))
    print()
    flagged = flag_lines(results)
    for line in (*flagged, *failed):
        print(line)
    print(f"{len(flagged)} of {len(results)} cells flagged, {len(failed)} series failed")
    return 1 if failed else 0


def report(ceilings: Ceilings, results: Sequence[Result], failed: Sequence[str]) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(),
        "ceilings": dataclasses.asdict(ceilings),
        "cells": [dataclasses.asdict(result) for result in results],
        "flagged": flag_lines(results),
        "failed": list(failed),
    }


if __name__ == "__main__":
    raise SystemExit(main())
