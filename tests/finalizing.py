"""What tests of finalising apart share: random calls with every kind of slot, a native call, and what is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import cases
import compare
import ml_dtypes
import numpy as np
from memory import INPUT_GUARD, OUTPUT_GUARD, Block, Cuda, Host, flat_bytes
from numpy.typing import NDArray

from jax_moe import native, reference
from jax_moe.finalize_problem import BUFFERS, FinalizeProblem
from jax_moe.problem import Array

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
Arrays = tuple[NDArray, NDArray, NDArray]  # gemm2_output, expert_weights, expanded_idx_to_permuted_idx


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int = 6
    top_k: int = 4
    hidden: int = 256
    rows: int = 9
    weights: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"t{self.tokens}_k{self.top_k}_h{self.hidden}_r{self.rows}_{self.weights}"

    def arrays(self, seed: int = 0) -> Arrays:
        """A fourth of the slots name no row, by each number that can say so, and the rows that nobody names are NaN."""
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((self.rows, self.hidden), np.float32).astype(ml_dtypes.bfloat16)
        weights = rng.standard_normal((self.tokens, self.top_k), np.float32).astype(DTYPES[self.weights])
        row_of = rng.integers(0, max(self.rows, 1), self.tokens * self.top_k).astype(np.int32)
        none = np.array([-1, self.rows, -(2**31), 2**31 - 1, self.rows + 1, -2], np.int64).astype(np.int32)
        row_of = np.where(rng.random(row_of.size) < (0.25 if self.rows else 1), rng.choice(none, row_of.size), row_of)
        rows[np.setdiff1d(np.arange(self.rows), row_of)] = np.nan
        return rows, weights, row_of.astype(np.int32)

    def problem(self) -> FinalizeProblem:
        return FinalizeProblem.create("test", *map(described, self.arrays()))


CASES = [
    Case(),
    Case(weights="float32"),
    Case(tokens=0),
    Case(tokens=1, top_k=1, hidden=128, rows=1),
    Case(rows=0),
    Case(tokens=33, top_k=32, rows=700, weights="float32"),
    Case(tokens=5, top_k=9, hidden=1152, rows=40),
]


def parts_of(layer: cases.Case, run: Callable[[cases.Case, cases.Arrays], Any]) -> tuple[Case, Arrays, NDArray]:
    """What a layer gives without do_finalize as a call of its own, and its output with; `run` gives results by name."""
    given = cases.arrays(layer)
    parts = run(dataclasses.replace(layer, do_finalize=False), given)
    rows, row_of = parts["gemm2_output"], parts["expanded_idx_to_permuted_idx"]
    weights = given.get("topk_weights")
    weights = parts["expert_weights"] if weights is None else weights
    case = Case(layer.tokens, layer.top_k, layer.hidden, len(rows), str(weights.dtype))
    return case, (rows, weights, row_of), run(layer, given)["output"]


def described(array: NDArray) -> Array:
    return Array(array.shape, str(array.dtype))


def run(case: Case, given: Arrays, memory: Host | Cuda | None = None) -> NDArray:
    """The output of a native call, between guards, at the weakest alignment that arrays may have."""
    memory = memory or Host()
    blocks = {}
    for name, array in zip(BUFFERS, given, strict=False):
        shift = 16 if name == "gemm2_output" else array.itemsize
        blocks[name] = Block(memory, array.nbytes, shift, INPUT_GUARD)
        blocks[name].write(flat_bytes(array))
    shape = (case.tokens, case.hidden)
    blocks["output"] = Block(memory, 2 * case.tokens * case.hidden, 16, OUTPUT_GUARD)
    blocks["output"].fill(0xFF)
    order = [blocks[name] for name in BUFFERS]
    pointers, sizes = [block.pointer for block in order], [block.nbytes for block in order]
    native.finalize(case.problem(), pointers, sizes, device=memory.device)
    for name, array in zip(BUFFERS, given, strict=False):
        assert np.array_equal(blocks[name].read(np.uint8, (array.nbytes,), name), flat_bytes(array)), name
    return blocks["output"].read(ml_dtypes.bfloat16, shape, "output")


def expected(given: Arrays) -> NDArray:
    """The output, float32 [T, H], by the reference: it knows -1 only."""
    rows, weights, row_of = given
    in_range = (row_of >= 0) & (row_of < len(rows))
    return reference.weighted_sum(rows, np.where(in_range, row_of, -1), weights)


def assert_finalized(given: Arrays, output: Any) -> None:
    compare.assert_close(np.asarray(output), expected(given), "output")
