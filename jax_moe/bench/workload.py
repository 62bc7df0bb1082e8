"""What a cell of the benchmark computes: a layer shape, a number of tokens, and sets of routed tokens to rotate.

Routing is uniform over all experts, or as another draw of draws.py has it. Drawn in numpy from a seed, the same for
every device and front end.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..info import CannotRun
from ..problem import SCALE_BLOCK, Array, Options, Problem
from ..shapes import SHAPES, LayerShape
from .cost import Cost, call_cost
from .draws import Draw, uniform

CANDIDATES = 16  # draws of a small routing, of which the best is taken


@dataclasses.dataclass(frozen=True)
class Routing:
    """topk_ids int32 [T, K], packed, and what of them is local."""

    topk_ids: NDArray
    active: frozenset[int]
    local_slots: int


@dataclasses.dataclass(frozen=True)
class Cell:
    shape: LayerShape
    tokens: int
    bf16_input: bool
    batch_invariant: bool = False

    def problem(self) -> Problem:
        """The problem of each of its calls."""
        s, T = self.shape, self.tokens
        H, I, L = s.hidden_size, s.intermediate_size, s.local_num_experts  # noqa: E741
        hb, ib = H // SCALE_BLOCK, I // SCALE_BLOCK
        arrays = {
            "topk_ids": Array((T, s.top_k), "int32"),
            "hidden_states": Array((T, H), "bfloat16" if self.bf16_input else "float8_e4m3fn"),
            "hidden_states_scale": None if self.bf16_input else Array((hb, T), "float32"),
            "gemm1_weights": Array((L, 2 * I, H), "float8_e4m3fn"),
            "gemm1_weights_scale": Array((L, 2 * ib, hb), "float32"),
            "gemm2_weights": Array((L, H, I), "float8_e4m3fn"),
            "gemm2_weights_scale": Array((L, hb, ib), "float32"),
        }
        options = Options(batch_invariant=self.batch_invariant)
        return Problem.create(
            "bench", arrays, options, num_experts=s.num_experts, local_expert_offset=s.local_expert_offset
        )


def parse_shape(text: str) -> LayerShape:
    """A name of shapes.py, or `HxIxExK`: hidden size, intermediate size, experts (all local), top_k."""
    if text in SHAPES:
        return SHAPES[text]
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text)
    if not found:
        raise CannotRun(f"shape must be one of {', '.join(SHAPES)}, or HxIxExK like 2048x768x128x8, got {text!r}")
    hidden, inter, experts, top_k = map(int, found.groups())
    if 0 in (hidden, inter) or hidden % SCALE_BLOCK or inter % SCALE_BLOCK or not 1 <= top_k <= min(experts, 32):
        raise CannotRun(f"shape must have sizes that are multiples of 128 and 1 <= K <= min(E, 32), got {text!r}")
    return LayerShape(text, f"layer {text}", hidden, inter, experts, top_k, experts, 0)


def cut(shape: LayerShape, experts: int) -> LayerShape:
    """The shape with only `experts` experts, all local: what a small machine holds of it."""
    if not shape.top_k <= experts <= shape.num_experts:
        raise CannotRun(f"experts must be in [{shape.top_k}, {shape.num_experts}] for {shape.name}, got {experts}")
    if experts == shape.local_num_experts == shape.num_experts:
        return shape
    return dataclasses.replace(
        shape,
        name=f"{shape.name}/{experts}",
        title=f"{shape.title.split(',')[0]}, a cut of {experts} of its {shape.num_experts} experts",
        num_experts=experts,
        local_num_experts=experts,
        local_expert_offset=0,
    )


def pack(ids: NDArray, weights: NDArray) -> NDArray:
    """Expert ids and float32 weights -> int32, (id << 16) | bits of bfloat16(weight)."""
    return (ids.astype(np.int32) << 16) | weights.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.int32)


def number_of_sets(tokens: int) -> int:
    return 16 if tokens <= 64 else 8 if tokens <= 256 else 4 if tokens <= 1024 else 2


def draw_routings(
    cell: Cell, sets: int, seed: int, draw: Draw = uniform, reach: int = 1, copies: int = 1
) -> list[Routing]:
    """One routing a set. Of several draws of a small one, the one with the mean number of local slots and the fewest
    experts of the `reach` sets before: so weights are read from memory, not from what those sets left in a cache. Where
    `copies` of the weights take turns, only every one of so many sets before reads the same ones.
    """
    rng = np.random.default_rng(seed)
    s = cell.shape
    mean_slots = cell.tokens * s.top_k * s.local_num_experts / s.num_experts
    candidates = CANDIDATES if cell.tokens * s.top_k <= 256 else 1
    routings: list[Routing] = []
    for i in range(sets):
        same = (routings[j].active for j in range(i - copies, i - reach - 1, -copies) if j >= 0)
        before = frozenset[int]().union(*same)
        drawn = [_draw_routing(cell, rng, draw) for _ in range(candidates)]
        routings.append(min(drawn, key=lambda r: (abs(r.local_slots - mean_slots), len(r.active & before))))
    return routings


def _draw_routing(cell: Cell, rng: np.random.Generator, draw: Draw) -> Routing:
    s = cell.shape
    ids = draw(s, cell.tokens, rng)
    weights = rng.random(ids.shape, np.float32) + 0.1
    weights /= weights.sum(axis=1, keepdims=True)
    local = ids - s.local_expert_offset
    local = local[(local >= 0) & (local < s.local_num_experts)]
    return Routing(pack(ids, weights), frozenset(np.unique(local).tolist()), local.size)


def mean_cost(cell: Cell, routings: Sequence[Routing]) -> Cost:
    """The mean over the sets: what a call of a rotation costs."""
    active = float(np.mean([len(r.active) for r in routings]))
    slots = float(np.mean([r.local_slots for r in routings]))
    return call_cost(cell.shape, cell.tokens, active, slots, cell.bf16_input)
