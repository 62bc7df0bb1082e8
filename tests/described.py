"""Calls as problem.py sees them: shapes and dtypes of the arrays of a valid call, without any data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_moe.enums import ActivationType
from jax_moe.problem import FLOAT8, Array, Options, Problem

NAME = "some_function"


def described(
    tokens: int = 5,
    hidden: int = 256,
    inter: int = 128,
    local: int = 4,
    top_k: int = 2,
    x_dtype: str = FLOAT8,
    *,
    rows: int | None = None,
    blocked: bool = False,
    topk_weights: str | None = None,
    lora: bool = False,
    per_expert: tuple[str, ...] = (),
    mx_rows: int | None = None,
) -> dict[str, Array | None]:
    """The arrays of a valid call by name; `rows` (gemm1_weights', per expert) are 2 * inter unless given.

    With mx_rows, 1 or 32, the scales are those of MxFp8, of which so many rows share one.
    """
    rows = 2 * inter if rows is None else rows
    scale_rows, block, scale_dtype = (mx_rows, 32, "uint8") if mx_rows else (128, 128, "float32")
    x_scale = (tokens, hidden // block) if mx_rows else (hidden // block, tokens)

    def weights(rows: int, columns: int) -> Array:
        return Array((local, columns // 128, rows, 128) if blocked else (local, rows, columns), FLOAT8)

    arrays = {
        "topk_ids": Array((tokens, top_k), "int32"),
        "hidden_states": Array((tokens, hidden), x_dtype),
        "hidden_states_scale": Array(x_scale, scale_dtype) if x_dtype == FLOAT8 else None,
        "gemm1_weights": weights(rows, hidden),
        "gemm1_weights_scale": Array((local, rows // scale_rows, hidden // block), scale_dtype),
        "gemm2_weights": weights(hidden, inter),
        "gemm2_weights_scale": Array((local, hidden // scale_rows, inter // block), scale_dtype),
    }
    if topk_weights:
        arrays["topk_weights"] = Array((tokens, top_k), topk_weights)
    if lora:
        arrays["gemm1_lora_delta"] = Array((tokens, top_k, rows), "bfloat16")
    return arrays | {name: Array((local,), "float32") for name in per_expert}


def create(
    arrays: Mapping[str, Array | None] | None = None, options: dict[str, Any] | None = None, **words: Any
) -> Problem:
    """The problem of `described` arrays, the valid ones unless given, with 8 experts unless said otherwise."""
    words.setdefault("num_experts", 8)
    return Problem.create(NAME, arrays or described(), Options.parse(NAME, **(options or {})), **words)


def is_gated(activation: ActivationType) -> bool:
    return activation in (ActivationType.Swiglu, ActivationType.Geglu)
