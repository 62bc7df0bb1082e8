"""What fp8_block_scale_routed_moe refuses, while tracing, and the words it has for it."""

from __future__ import annotations

import re
from typing import Any

import cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax_calls import SMALL, SMALL_BF16, call

from jax_moe import enums
from jax_moe.layout import convert_to_block_layout
from jax_moe.problem import PER_EXPERT

FUNCTION = "fp8_block_scale_routed_moe"
GIVEN = cases.arrays(SMALL)
BF16 = cases.arrays(SMALL_BF16)
BLOCKED = {name: convert_to_block_layout(GIVEN[name]) for name in ("gemm1_weights", "gemm2_weights")}
T, E = SMALL.tokens, SMALL.experts
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"topk_ids": GIVEN["topk_ids"].astype(np.int64)},
        ValueError,
        "topk_ids must be int32 [num_tokens, top_k], got int64",
    ),
    ({"topk_ids": GIVEN["topk_ids"].astype(np.float32)}, ValueError, "topk_ids must be int32 .* got float32"),
    ({"topk_ids": GIVEN["topk_ids"][0]}, ValueError, "topk_ids must be int32 .* got int32[2]"),
    ({"topk_ids": GIVEN["topk_ids"][:3]}, ValueError, "must be .*[3,256], got .*[7,256]"),
    ({"topk_ids": 3}, ValueError, "topk_ids must be an array, got int"),
    (
        {"topk_ids": np.zeros((T, 9), np.int32)},
        ValueError,
        "top_k must be in [1, min(num_experts, 32)] = [1, 8], got 9",
    ),
    (
        {"topk_ids": (GIVEN["topk_ids"], GIVEN["topk_ids"])},
        ValueError,
        "topk_weights must be bfloat16 or float32 [num_tokens, top_k], got int32[7,2]",
    ),
    (
        {"topk_ids": (GIVEN["topk_ids"], np.ones((T, 2), np.float16))},
        ValueError,
        "topk_weights must be bfloat16 or float32 [num_tokens, top_k], got float16[7,2]",
    ),
    (
        {"topk_ids": (GIVEN["topk_ids"], np.ones((T, 2), ml_dtypes.float8_e4m3fn))},
        ValueError,
        "topk_weights must be bfloat16 or float32 [num_tokens, top_k], got float8_e4m3fn[7,2]",
    ),
    (
        {"topk_ids": (GIVEN["topk_ids"], np.ones((T, 3), np.float32))},
        ValueError,
        "topk_weights must be float32[7,2], got float32[7,3]",
    ),
    ({"topk_ids": (GIVEN["topk_ids"], 1.0)}, ValueError, "topk_weights must be an array, got float"),
    (
        {"topk_ids": (GIVEN["topk_ids"].astype(np.int64), np.ones((T, 2), np.float32))},
        ValueError,
        "topk_ids must be int32 .* got int64[7,2]",
    ),
    (
        {"topk_ids": (GIVEN["topk_ids"], None)},
        ValueError,
        "one packed int32 array or a pair (ids, weights), got a tuple of (ndarray, NoneType); .*pack_topk_ids",
    ),
    ({"topk_ids": [GIVEN["topk_ids"]]}, ValueError, "or a pair (ids, weights), got a list of (ndarray)"),
    (
        {"hidden_states": BF16["hidden_states"].astype(np.float32)},
        ValueError,
        "hidden_states must be float8_e4m3fn or bfloat16 .* got float32[7,256]",
    ),
    (
        {"hidden_states": BF16["hidden_states"]},
        ValueError,
        "hidden_states_scale must be None with bfloat16 hidden_states .* got float32[2,7]",
    ),
    (
        {"hidden_states_scale": None},
        ValueError,
        "hidden_states_scale must be float32[2,7] (or pass hidden_states in bfloat16), got None",
    ),
    (
        {"hidden_states_scale": GIVEN["hidden_states_scale"].T},
        ValueError,
        "hidden_states_scale must be float32[2,7], got float32[7,2]; transpose it",
    ),
    (
        {"hidden_states_scale": np.ones((2, T), np.float64)},
        ValueError,
        "hidden_states_scale must be float32[2,7], got float64[2,7]",
    ),
    (
        {"hidden_states_scale_order": "token_major"},
        ValueError,
        "hidden_states_scale must be float32[7,2], got float32[2,7]",
    ),
    *(
        (
            {"routed_scaling_factor": value},
            ValueError,
            f"routed_scaling_factor must be None or a finite number, got {got}",
        )
        for value, got in (("2.5", "'2.5'"), (True, "True"), (float("nan"), "nan"), (np.ones(1, np.float32), "array"))
    ),
    (
        {"hidden_states_scale_order": "rows"},
        ValueError,
        "hidden_states_scale_order must be None, 'block_major' or 'token_major', got 'rows'",
    ),
    (
        {"gemm1_weights": GIVEN["gemm1_weights"].view(np.uint8)},
        ValueError,
        "gemm1_weights must be float8_e4m3fn .* got uint8",
    ),
    (
        {"gemm1_weights": GIVEN["gemm1_weights"].astype(ml_dtypes.bfloat16)},
        ValueError,
        "gemm1_weights must be float8_e4m3fn .* got bfloat16",
    ),
    (
        {"gemm1_weights": GIVEN["gemm1_weights"][:, :192]},
        ValueError,
        "gemm1_weights must be .*pad intermediate_size 96 to 128",
    ),
    (
        {"gemm1_weights_scale": GIVEN["gemm1_weights_scale"][:1]},
        ValueError,
        "gemm1_weights_scale must be float32[8,2,2], got float32[1,2,2]",
    ),
    (
        {"gemm2_weights": GIVEN["gemm2_weights"][:3]},
        ValueError,
        "gemm2_weights must be float8_e4m3fn[8,256,128], got float8_e4m3fn[3,256,128]",
    ),
    ({"gemm2_weights_scale": None}, ValueError, "gemm2_weights_scale must be float32[8,2,1], got None"),
    (
        {"num_experts": 7},
        ValueError,
        "gemm1_weights must be of at most num_experts (7) local experts, got 8",
    ),
    ({"num_experts": 0}, ValueError, "num_experts must be an integer in [1, 32767], got 0"),
    ({"num_experts": 8.0}, ValueError, "num_experts must be an integer in [1, 32767], got 8.0"),
    ({"local_expert_offset": 1}, ValueError, "local_expert_offset must be .* = [0, 0], got 1"),
    ({"local_expert_offset": np.int32(-1)}, ValueError, "local_expert_offset must be .* got -1"),
    ({"local_expert_offset": True}, ValueError, "local_expert_offset must be an integer .* got True"),
    (
        {"local_expert_offset": 0.0},
        ValueError,
        "local_expert_offset must be an integer or an int32 scalar array, got float",
    ),
    ({"local_expert_offset": np.zeros(1, np.int32)}, ValueError, "an integer or an int32 scalar array, got int32[1]"),
    ({"local_expert_offset": jnp.float32(0)}, ValueError, "an integer or an int32 scalar array, got float32[]"),
    ({"routing_method_type": 10}, ValueError, "routing_method_type must be one of RoutingMethodType .* got 10"),
    ({"n_group": 2}, ValueError, "n_group must be None, 0 or 1 with Default, got 2"),
    (
        {"routing_method_type": 2, "n_group": 3},
        ValueError,
        "n_group must be a positive divisor of num_experts (8), got 3",
    ),
    ({"do_finalize": 2}, ValueError, "do_finalize must be True or False, got 2"),
    ({"use_shuffled_weight": 2}, ValueError, "use_shuffled_weight must be True or False, got 2"),
    ({"weight_layout": 1}, ValueError, "weight_layout must be MajorK (0) or BlockMajorK (2), got MajorMn (1)"),
    (
        {"weight_layout": enums.WeightLayout.BlockMajorK},
        ValueError,
        "gemm1_weights must be .*[experts, hidden_size / 128, .*, 128] with BlockMajorK, got float8_e4m3fn[8,256,256]",
    ),
    (
        {"gemm1_weights": BLOCKED["gemm1_weights"]},
        ValueError,
        "gemm1_weights must be .* intermediate_size, hidden_size] with MajorK, got float8_e4m3fn[8,2,256,128]",
    ),
    (
        BLOCKED | {"weight_layout": 2, "gemm2_weights": GIVEN["gemm2_weights"]},
        ValueError,
        "gemm2_weights must be float8_e4m3fn[8,1,256,128], got float8_e4m3fn[8,256,128]",
    ),
    ({"fp8_quantization_type": 0}, ValueError, "fp8_quantization_type must be DeepSeekFp8 (1) or MxFp8 (2)"),
    (
        {"fp8_quantization_type": 2},
        ValueError,
        "hidden_states_scale must be uint8[7,8] (or as float8_e8m0fnu), got float32[2,7]",
    ),
    ({"fp8_quantization_type": 2, "weight_layout": 2}, ValueError, "weight_layout must be MajorK (0) with MxFp8, got"),
    ({"activation_type": 9}, ValueError, "activation_type must be one of ActivationType .* got 9"),
    (
        {"activation_type": enums.ActivationType.Relu2},
        ValueError,
        "gemm2_weights must be float8_e4m3fn[8,256,256], got float8_e4m3fn[8,256,128]",
    ),
    (
        {"gemm1_lora_delta": np.zeros((T, 2, 128), ml_dtypes.bfloat16)},
        ValueError,
        "gemm1_lora_delta must be bfloat16[7,2,256], got bfloat16[7,2,128]",
    ),
    (
        {"gemm1_lora_delta": np.zeros((T, 2, 256), np.float32)},
        ValueError,
        "gemm1_lora_delta must be bfloat16[7,2,256], got float32[7,2,256]",
    ),
    ({"gemm1_alpha": 1.702}, ValueError, "gemm1_alpha must be an array, got float"),
    ({"gemm1_alpha": np.ones(E - 1, np.float32)}, ValueError, "gemm1_alpha must be float32[8], got float32[7]"),
    ({"gemm1_alpha": np.ones(0, np.float32)}, ValueError, "gemm1_alpha must be float32[8], got float32[0]"),
    ({"gemm1_beta": np.ones(E, np.float64)}, ValueError, "gemm1_beta must be float32[8], got float64[8]"),
    ({"gemm1_clamp_limit": np.float32(7)}, ValueError, "gemm1_clamp_limit must be float32[8], got float32[]"),
    *(
        (
            {"activation_type": enums.ActivationType.Geglu, name: np.ones(E, np.float32)},
            ValueError,
            f"{name} must be None with Geglu",
        )
        for name in PER_EXPERT
    ),
]


@pytest.mark.parametrize(
    ("changes", "error", "words"), REFUSED, ids=[f"{i}_{next(iter(r[0]))}" for i, r in enumerate(REFUSED)]
)
def test_a_wrong_argument_is_refused_while_tracing_in_plain_words(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    pattern = f"^{FUNCTION}: .*" + ".*".join(map(re.escape, words.split(".*")))
    with pytest.raises(error, match=pattern):
        jax.eval_shape(lambda: call(SMALL, GIVEN, **changes))
