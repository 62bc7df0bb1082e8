"""Calls of the JAX function on the problems of cases.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import jax
import numpy as np
from cases import CASES, Case
from numpy.typing import NDArray

from jax_moe import fp8_block_scale_routed_moe
from jax_moe.enums import WeightLayout
from jax_moe.problem import E8M0, PER_EXPERT

SMALL = Case("jax_small", 7, 256, 128, 8, 2, weights="signed")
SMALL_BF16 = Case("jax_small_bf16", 7, 256, 128, 8, 2, x_dtype="bfloat16", weights="signed")
SMALL_ROWS = Case("jax_small_rows", 7, 256, 128, 8, 2, do_finalize=False)
SMALL_APART = Case("jax_small_apart", 7, 256, 128, 8, 2, topk_weights="float32", weights="signed")
SMALL_LORA = Case("jax_small_lora", 7, 256, 128, 8, 3, (2, 4), lora=True)
SMALL_ALL = Case(
    "jax_small_all",
    7,
    256,
    128,
    8,
    3,
    (2, 4),
    do_finalize=False,
    topk_weights="bfloat16",
    per_expert=PER_EXPERT,
    weight_layout=WeightLayout.BlockMajorK,
    shuffled=True,
    lora=True,
)
SMALL_MX = Case("jax_small_mx", 7, 256, 128, 8, 2, weights="signed", **cases.MX)
SMALL_MX_E8M0 = dataclasses.replace(
    SMALL_MX, name="jax_small_mx_e8m0", scale_order="block_major", scale_dtype=E8M0, scale_rows=32
)
SMALL_MX_ALL = Case(
    "jax_small_mx_all",
    7,
    256,
    128,
    8,
    3,
    (2, 4),
    do_finalize=False,
    topk_weights="float32",
    per_expert=PER_EXPERT,
    shuffled=True,
    lora=True,
    **cases.MX,
)
WINDOW = Case("jax_window", 7, 256, 128, 8, 3, (2, 4))
MX = (SMALL_MX, SMALL_MX_E8M0, SMALL_MX_ALL)
OPTIONS = {case.name: case for case in (SMALL, SMALL_BF16, SMALL_ROWS, SMALL_APART, SMALL_LORA, SMALL_ALL, *MX)}
TOKEN_INPUTS = ("topk_ids", "topk_weights", "hidden_states", "hidden_states_scale", "gemm1_lora_delta")


def named_case(name: str) -> Case:
    """One of OPTIONS or of cases.CASES."""
    return OPTIONS.get(name) or CASES[name]


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Inputs as the function takes them: topk_weights in a pair with topk_ids."""
    rest = {name: array for name, array in given.items() if name != "topk_weights"}
    return rest | {"topk_ids": (given["topk_ids"], given["topk_weights"])} if "topk_weights" in given else rest


def call(case: Case, given: dict[str, Any], **changes: Any) -> Any:
    """What the function returns for a case, whose arguments may be changed by name."""
    options = {"num_experts": case.experts, "local_expert_offset": case.offset, **case.options}
    if case.mx and not case.scale_is_token_major:
        options["hidden_states_scale_order"] = "block_major"
    return fp8_block_scale_routed_moe(**(arguments(given) | options | changes))


def names(case: Case) -> tuple[str, ...]:
    """What the documented return form of a case lists, and the scale that JAX adds to it."""
    rows = ("gemm2_output", "expert_weights") if not case.do_finalize else ("output",)
    row_of = ("expanded_idx_to_permuted_idx",) if case.lora or not case.do_finalize else ()
    return (*rows, *row_of, *(("gemm1_activation_output", "gemm1_activation_scale") if case.lora else ()))


def named(case: Case, returned: Any) -> dict[str, NDArray]:
    """The returned arrays by name."""
    returned = returned if isinstance(returned, tuple) else (returned,)
    return dict(zip(names(case), map(np.asarray, returned), strict=True))


def shapes(given: dict[str, Any]) -> dict[str, Any]:
    """The arrays' shapes and dtypes alone; None stays None."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), given)


def stacked(*calls: dict[str, Any]) -> dict[str, Any]:
    """Equally shaped inputs with a new leading axis; None stays None."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *calls)
