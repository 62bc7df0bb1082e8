"""What a call that finalises apart is: sizes, buffers, and the validation of its arguments.

`FinalizeProblem` mirrors ffi/finalize.h field by field (native.py compares the two when the extension is loaded).
Imports neither jax nor torch. Errors follow `<function>: <argument> must be <expected>, got <value>`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .enums import DataType
from .options import invalid, is_int
from .problem import DTYPES, MAX_TOP_K, ROW_LIMIT, SCALE_BLOCK, Array

BUFFERS = ("gemm2_output", "expert_weights", "expanded_idx_to_permuted_idx", "output")
FLOATS = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class FinalizeProblem:
    """One call: the fields of ffi/finalize.h, in its order. num_tokens and num_rows may be symbolic."""

    num_tokens: Any
    top_k: int
    hidden_size: int
    num_rows: Any
    weights_dtype: DataType

    @staticmethod
    def create(function: str, rows: Array, weights: Array, row_of: Array) -> FinalizeProblem:
        """The problem of gemm2_output, expert_weights and expanded_idx_to_permuted_idx, checked completely."""
        if len(rows.shape) != 2 or rows.dtype != "bfloat16":
            raise invalid(function, "gemm2_output", "bfloat16 [num_rows, hidden_size]", rows)
        num_rows, hidden = rows.shape
        if hidden < 1 or hidden % SCALE_BLOCK:
            raise invalid(function, "gemm2_output", f"of a hidden_size that is a multiple of {SCALE_BLOCK}", rows)
        if is_int(num_rows) and num_rows > ROW_LIMIT:
            raise invalid(function, "gemm2_output", f"of at most {ROW_LIMIT} rows", rows)
        if len(weights.shape) != 2 or weights.dtype not in FLOATS:
            raise invalid(function, "expert_weights", "bfloat16 or float32 [num_tokens, top_k]", weights)
        tokens, top_k = weights.shape
        if not 1 <= top_k <= MAX_TOP_K:
            raise invalid(function, "expert_weights", f"of a top_k in [1, {MAX_TOP_K}]", weights)
        if is_int(tokens) and tokens * top_k > ROW_LIMIT:
            expected = f"of at most {ROW_LIMIT // top_k} tokens with top_k {top_k}; split the call"
            raise invalid(function, "expert_weights", expected, weights)
        if row_of.dtype != "int32" or tuple(row_of.shape) != (tokens * top_k,):
            expected = f"{Array((tokens * top_k,), 'int32')}, [num_tokens * top_k] of expert_weights {weights}"
            raise invalid(function, "expanded_idx_to_permuted_idx", expected, row_of)
        return FinalizeProblem(tokens, int(top_k), int(hidden), num_rows, DTYPES[weights.dtype])

    def output(self) -> Array:
        """Shape and dtype of the result."""
        return Array((self.num_tokens, self.hidden_size), "bfloat16")

    def fields(self) -> list[int]:
        """The integers for the C++ FinalizeProblem, in order."""
        return [int(getattr(self, field.name)) for field in dataclasses.fields(self)]


def abi_text() -> str:
    """The text that ffi/check_finalize.cc's FinalizeAbiText() must equal."""
    fields = " ".join(field.name for field in dataclasses.fields(FinalizeProblem))
    return f"finalize fields: {fields}\nfinalize buffers: {' '.join(BUFFERS)}"
