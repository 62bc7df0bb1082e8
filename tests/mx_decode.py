"""Small MxFp8 calls of few tokens, which the CUDA backend has kernels of their own for: on the emulated machine and on
a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from cases import GRID, MX, MX_OPTIONS, Arrays, Case, arrays

LAYOUTS: dict[str, dict[str, Any]] = {
    "": {},
    "_grid": GRID,
    "_shuffled": {"shuffled": True},
    "_shuffled_grid": GRID | {"shuffled": True},
}
BF16: dict[str, Any] = {"x_dtype": "bfloat16"}


def _cases() -> list[Case]:
    cases = []
    for layout, changes in LAYOUTS.items():
        for tokens in (1, 7, 16):
            for x, x_changes in (("", {}), ("_bf16", BF16)):
                cases.append(Case(f"mx{layout}{x}_t{tokens}", tokens, 384, 256, 8, 3, **MX | changes | x_changes))
        for option in ("geglu", "relu2", "identity", "alpha_beta_clamp"):
            change = MX_OPTIONS[f"mx_{option}"] | changes
            cases.append(Case(f"mx{layout}_{option}", 11, 256, 384, 8, 3, **change))
    # K blocks of a stage and of a row that are, and are not, multiples of two and four: copies of each width.
    for hidden, inter in ((128, 128), (512, 1024), (640, 896), (1024, 512), (768, 256)):
        for layout in ("", "_shuffled"):
            name = f"mx{layout}_h{hidden}_i{inter}"
            cases.append(Case(name, 5, hidden, inter, 4, 2, **MX | LAYOUTS[layout]))
    cases += [
        Case("mx_block_major_scales", 7, 384, 256, 8, 3, **MX | {"scale_order": "block_major"}),
        Case("mx_padded_scales", 7, 384, 256, 8, 3, **MX | {"scale_order": "padded"}),
        Case("mx_window", 13, 256, 256, 16, 4, (5, 7), "mixed", **MX),
        Case("mx_garbage_window", 13, 256, 128, 16, 4, (5, 7), "garbage", **MX | {"shuffled": True}),
        Case("mx_duplicates", 9, 256, 128, 16, 4, routing="duplicates", **MX),
        Case("mx_none_local", 7, 256, 128, 16, 4, (0, 3), "none_local", **MX),
        Case("mx_apart", 9, 256, 128, 16, 4, topk_weights="float32", **MX),
        Case("mx_quantised_ahead", 16, 2048, 128, 8, 2, **MX | BF16),
        # Too many elements to be f16 in shared memory: tokens, given or quantised ahead, and h.
        Case("mx_long_x", 8, 2304, 128, 4, 1, **MX),
        Case("mx_long_x_bf16", 8, 2304, 128, 4, 1, **MX | BF16),
        Case("mx_long_h", 8, 128, 2304, 2, 1, **MX),
    ]
    extreme = Case("", 9, 256, 256, 8, 3, seed=2, **MX)
    for name in ("nan_x_scale", "nan_gemm1_scale", "nan_gemm2_scale", "nan_both_scales", "smallest_x_scale"):
        cases.append(dataclasses.replace(extreme, name=f"mx_{name}", extreme=f"mx_{name}"))
    for name in ("smallest_gemm1_scale", "smallest_gemm2_scale", "largest_gemm2_scale", "far_scales"):
        cases.append(dataclasses.replace(extreme, name=f"mx_{name}", extreme=f"mx_{name}"))
    for name in ("far_scales_of_weights", "smallest_factor", "zero_x", "nan_x", "nan_gemm1_code", "nan_gemm2_code"):
        cases.append(dataclasses.replace(extreme, name=f"mx_{name}", extreme=f"mx_{name}"))
    # The same where tokens are one tile, and where there is but one.
    for name in ("nan_x_scale", "nan_gemm1_scale", "nan_gemm2_scale", "largest_gemm2_scale"):
        cases.append(dataclasses.replace(extreme, name=f"mx_{name}_t5", extreme=f"mx_{name}", tokens=5))
    for name in ("far_scales", "far_scales_of_weights", "smallest_factor"):
        for tokens in (1, 5):
            cases.append(dataclasses.replace(extreme, name=f"mx_{name}_t{tokens}", extreme=f"mx_{name}", tokens=tokens))
    for name in ("nan_x", "inf_x", "zero_x", "tiny", "large"):
        cases.append(dataclasses.replace(extreme, name=f"mx_{name}_bf16", extreme=f"mx_{name}_bf16", **BF16))
    return cases


CASES = {case.name: case for case in _cases()}
WIDE = (
    Case("mx_wide_t1", 1, 7168, 256, 2, 1, **MX),
    Case("mx_wide_t16", 16, 7168, 256, 2, 1, **MX | {"shuffled": True}),
    Case("mx_wide_t4", 4, 2048, 768, 8, 2, **MX),
    Case("mx_wide_inter", 1, 1024, 2048, 2, 1, **MX | GRID),
    Case("mx_wide_bf16", 16, 7168, 256, 2, 1, **MX | BF16),
)


def zeros_under_the_largest_scales() -> tuple[Case, Arrays]:
    case = Case("", 3, 128, 128, 1, 1, routing="one_expert", **MX)
    given = arrays(case)
    given["hidden_states"] = np.zeros_like(given["hidden_states"])
    for name in ("hidden_states_scale", "gemm1_weights_scale", "gemm2_weights_scale"):
        given[name] = np.full_like(given[name], 254)
    return case, given
