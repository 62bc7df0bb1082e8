"""What each option of a call costs, beside the plain call: layouts, MxFp8, FP8 tokens, routing from logits.

python benchmarks/variants.py --cells qwen3_30b:16,dsv3_e32:4096 --json variants.json

Every variant of a cell computes on the same routings and is timed in turn with the others in one process, by CUDA graph
replays of rotated inputs through torch, so that clocks and heat are the same for all. Needs a Hopper GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import torch_facade as facade
from jax_moe.bench.command import write_whole
from jax_moe.bench.device import Set
from jax_moe.bench.layouts import PLAIN, weight_layouts
from jax_moe.bench.machine import open_device
from jax_moe.bench.paths import whole_layer
from jax_moe.bench.timing import CudaGraph, medians_by_turns
from jax_moe.bench.workload import Cell, Routing, draw_routings, number_of_sets, parse_shape

CELLS = (
    "qwen3_30b:1,qwen3_30b:4,qwen3_30b:16,qwen3_30b:64,qwen3_30b:4096,dsv3_e32:1,dsv3_e32:16,dsv3_e32:64,dsv3_e32:4096"
)
ROUNDS, REPEATS, PAUSE = 5, 4, 0.03


def logits_of(routing: Routing, num_experts: int) -> torch.Tensor:
    """float32 logits whose largest are those of the routing's experts, in slot order."""
    ids = torch.from_numpy(routing.topk_ids >> 16).long()
    logits = torch.rand((len(ids), num_experts)) - 8
    falling = 4 - 0.1 * torch.arange(ids.shape[1], dtype=torch.float32)
    return logits.scatter_(1, ids, falling.expand(ids.shape))


class Variants:
    """The calls of a cell by the names of their variants."""

    def __init__(self, cell: Cell, weights: Set, layouts: dict[str, tuple[Set, dict[str, Any]]], device: Any) -> None:
        self._cell = cell
        sets = number_of_sets(cell.tokens)
        self._routings = draw_routings(cell, sets, cell.tokens)
        fp8 = dataclasses.replace(cell, bf16_input=False)
        self._tokens, self._fp8_tokens = ([device.random_tokens(c, i) for i in range(sets)] for c in (cell, fp8))
        self._ids = [device.put(routing.topk_ids) for routing in self._routings]
        self._weights, self._layouts = weights, layouts

    def calls(self) -> dict[str, list[Callable[[], Any]]]:
        sets = range(len(self._tokens))
        every = {name: [self._routed(i, *layout) for i in sets] for name, layout in self._layouts.items()}
        every["fp8 tokens"] = [self._routed(i, self._weights, self._fp8_tokens[i]) for i in sets]
        every["no overlap of kernels"] = [self._routed(i, self._weights, {"enable_pdl": False}) for i in sets]
        if self._cell.tokens <= 64:
            every["batch invariant"] = [self._routed(i, self._weights, {"batch_invariant": True}) for i in sets]
            mx, options = self._layouts["MxFp8 1x32"]
            every["MxFp8, batch invariant"] = [self._routed(i, mx, {**options, "batch_invariant": True}) for i in sets]
        for method in (facade.RoutingMethodType.Renormalize, facade.RoutingMethodType.DeepSeekV3):
            every[f"logits, {method.name}"] = [self._from_logits(i, method) for i in sets]
        return every

    def _common(self, i: int, weights: Set) -> dict[str, Any]:
        """Arguments by name that the routed function and the one that routes share."""
        s = self._cell.shape
        return {
            **{"routing_bias": None, "hidden_states_scale": None, **self._tokens[i], **weights},
            **{"num_experts": s.num_experts, "top_k": s.top_k, "n_group": None, "topk_group": None},
            **{"intermediate_size": s.intermediate_size, "local_expert_offset": s.local_expert_offset},
            **{"local_num_experts": s.local_num_experts, "routed_scaling_factor": None},
        }

    def _routed(self, i: int, weights: Set, changes: dict[str, Any]) -> Callable[[], Any]:
        arguments = {"topk_ids": self._ids[i], **self._common(i, weights), **changes}
        return lambda: facade.trtllm_fp8_block_scale_routed_moe(**arguments)

    def _from_logits(self, i: int, method: facade.RoutingMethodType) -> Callable[[], Any]:
        arguments = {
            "routing_logits": logits_of(self._routings[i], self._cell.shape.num_experts).to(self._ids[i].device),
            **self._common(i, self._weights),
            "routing_method_type": method,
        }
        if method is facade.RoutingMethodType.DeepSeekV3:
            bias = torch.zeros(self._cell.shape.num_experts, device=self._ids[i].device)
            arguments |= {"routing_bias": bias, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
        return lambda: facade.trtllm_fp8_block_scale_moe(**arguments)


def show(results: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Microseconds a call: the plain one, others above it", title_justify="left", box=None)
    table.add_column("variant")
    names = list(dict.fromkeys(name for result in results for name in result["us"]))
    for result in results:
        table.add_column(f"{result['shape']} T={result['tokens']}", justify="right")
    for name in names:
        row = []
        for result in results:
            us, plain = result["us"].get(name), result["us"][PLAIN]
            row.append("-" if us is None else f"{us:.1f}" if name == PLAIN else f"{us - plain:+.1f} ({us / plain:.3f})")
        table.add_row(name, *row)
    Console(width=240).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each option of a call costs, beside the plain call.")
    parser.add_argument("--cells", default=CELLS, help="like qwen3_30b:16,dsv3_e32:4096: a shape and its tokens")
    parser.add_argument("--variants", default="", help="a regular expression: the plain call and those it is found in")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    device = open_device("gpu")
    cells = [
        Cell(parse_shape(name), int(tokens), True) for name, tokens in (c.split(":") for c in options.cells.split(","))
    ]
    print(f"variants on {torch.cuda.get_device_name()}", flush=True)
    results: list[dict[str, Any]] = []
    for shape in dict.fromkeys(cell.shape for cell in cells):
        weights = whole_layer(device, shape, 0)
        layouts = weight_layouts(weights)
        for cell in (cell for cell in cells if cell.shape == shape):
            every = Variants(cell, weights, layouts, device).calls()
            calls = {name: one for name, one in every.items() if name == PLAIN or re.search(options.variants, name)}
            medians = medians_by_turns([CudaGraph(one) for one in calls.values()], ROUNDS, REPEATS, PAUSE)
            us = {name: 1e6 * seconds for name, seconds in zip(calls, medians, strict=True)}
            results.append({"shape": shape.name, "tokens": cell.tokens, "us": us})
            print(f"{shape.name}, {cell.tokens} tokens: plain {us[PLAIN]:.1f} us", flush=True)
            device.release()
            if options.json:
                write_whole(
                    options.json, json.dumps({"device": torch.cuda.get_device_name(), "cells": results}, indent=1)
                )
    show(results)


if __name__ == "__main__":
    main()
