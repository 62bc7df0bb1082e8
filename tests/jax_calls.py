"""Calls of the JAX function on the problems of cases.py."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from cases import Case
from numpy.typing import NDArray

from jax_moe import fp8_block_scale_routed_moe

SMALL = Case("jax_small", 7, 256, 128, 8, 2, weights="signed")
SMALL_BF16 = Case("jax_small_bf16", 7, 256, 128, 8, 2, x_dtype="bfloat16", weights="signed")
SMALL_ROWS = Case("jax_small_rows", 7, 256, 128, 8, 2, do_finalize=False)
WINDOW = Case("jax_window", 7, 256, 128, 8, 3, (2, 4))
TOKEN_INPUTS = ("topk_ids", "hidden_states", "hidden_states_scale")


def call(case: Case, given: dict[str, Any], **changes: Any) -> Any:
    """What the function returns for a case, whose inputs and options may be changed by name."""
    options = {"num_experts": case.experts, "local_expert_offset": case.offset, "do_finalize": case.do_finalize}
    return fp8_block_scale_routed_moe(**(given | options | changes))


def named(case: Case, returned: Any) -> dict[str, NDArray]:
    """The returned arrays by name."""
    if case.do_finalize:
        return {"output": np.asarray(returned)}
    names = ("gemm2_output", "expert_weights", "expanded_idx_to_permuted_idx")
    return dict(zip(names, map(np.asarray, returned), strict=True))


def shapes(given: dict[str, Any]) -> dict[str, Any]:
    """The arrays' shapes and dtypes alone; None stays None."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), given)


def stacked(*calls: dict[str, Any]) -> dict[str, Any]:
    """Equally shaped inputs with a new leading axis; None stays None."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *calls)
