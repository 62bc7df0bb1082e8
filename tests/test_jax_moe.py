"""fp8_block_scale_routed_moe under jit and eagerly: right values, exact types, refusals while tracing."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compare import assert_close, assert_same_bits
from jax_calls import SMALL, SMALL_BF16, SMALL_ROWS, WINDOW, call, named, shapes

import jax_moe
from jax_moe import enums, reference

FUNCTION = "fp8_block_scale_routed_moe"
AGAINST_REFERENCE = (
    "t0 t1 t53 k1 k32 e300 routing_mixed_window window_1_2 h384_i384 bf16_t0 bf16_t53 unfinalized_t0 "
    "unfinalized_window unfinalized_nothing_local unfinalized_bf16 extreme_nan_x_bf16"
).split()


@pytest.mark.parametrize("name", AGAINST_REFERENCE)
def test_eager_and_compiled_calls_agree_with_each_other_and_with_the_reference(name: str) -> None:
    case = cases.CASES[name]
    given = cases.arrays(case)
    eager = named(case, call(case, given))
    compiled = named(case, jax.jit(lambda arrays: call(case, arrays))(given))
    expected = cases.expected(case, given)
    for result, actual in eager.items():
        wanted, again = getattr(expected, result), compiled[result]
        if result == "gemm2_output":  # rows past the last one are undefined
            rows = np.count_nonzero(expected.expanded_idx_to_permuted_idx >= 0)
            wanted, again, actual = wanted[:rows], again[:rows], actual[:rows]
        assert_same_bits(again, actual, f"{name}: {result} compiled")
        if result in ("output", "gemm2_output"):
            assert_close(actual, wanted, f"{name}: {result}")
        else:
            assert_same_bits(actual, wanted, f"{name}: {result}")


@pytest.mark.parametrize(
    "case", (SMALL, SMALL_BF16, SMALL_ROWS, dataclasses.replace(SMALL, tokens=0)), ids=lambda c: f"{c.name}_t{c.tokens}"
)
def test_shapes_are_known_without_running(case: cases.Case) -> None:
    given = cases.arrays(case)
    abstract = jax.eval_shape(lambda arrays: call(case, arrays), shapes(given))
    actual = call(case, given)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), actual)
    tokens, slots, hidden = case.tokens, case.tokens * case.top_k, case.hidden
    expected: Any = ((tokens, hidden), jnp.bfloat16)
    if not case.do_finalize:
        expected = (((slots, hidden), jnp.bfloat16), ((tokens, case.top_k), jnp.bfloat16), ((slots,), jnp.int32))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == expected


def test_bfloat16_tokens_are_quantised_as_quantize_activations_does() -> None:
    given = cases.arrays(SMALL_BF16)
    codes, scale = jax_moe.quantize_activations(given["hidden_states"])
    outside = call(SMALL, given | {"hidden_states": codes, "hidden_states_scale": scale})
    assert_same_bits(np.asarray(call(SMALL_BF16, given)), np.asarray(outside), "quantised outside")


def test_token_major_scales_are_the_same_scales() -> None:
    given = cases.arrays(SMALL)
    turned = given | {"hidden_states_scale": given["hidden_states_scale"].T}
    actual = call(SMALL, turned, hidden_states_scale_order="token_major")
    assert_same_bits(np.asarray(actual), np.asarray(call(SMALL, given)), "token_major")


@pytest.mark.parametrize("offset", (0, 1, 2, 4))
def test_an_offset_known_on_the_device_only_means_the_same(offset: int) -> None:
    given = cases.arrays(WINDOW)
    expected = np.asarray(call(WINDOW, given, local_expert_offset=offset))
    traced = jax.jit(lambda arrays, o: call(WINDOW, arrays, local_expert_offset=o))(given, jnp.int32(offset))
    assert_same_bits(np.asarray(traced), expected, "traced offset")
    for known in (np.int64(offset), jnp.int32(offset), np.array(offset, np.int32)):
        assert_same_bits(np.asarray(call(WINDOW, given, local_expert_offset=known)), expected, repr(known))


@pytest.mark.parametrize("offset", (-(2**31), -1, 5, 2**31 - 1))
def test_an_offset_outside_the_layer_selects_only_what_exists(offset: int) -> None:
    given = cases.arrays(WINDOW)
    actual = np.asarray(call(WINDOW, given, local_expert_offset=jnp.int32(offset)))
    expected = reference.fp8_block_scale_routed_moe(
        **given, num_experts=WINDOW.experts, local_expert_offset=offset
    ).output
    assert_close(actual, expected, f"offset {offset}")


def test_options_that_describe_the_routing_change_nothing() -> None:
    given = cases.arrays(SMALL)
    options = {"routing_method_type": enums.RoutingMethodType.DeepSeekV3, "n_group": 4, "topk_group": 2}
    routed = call(SMALL, given, routed_scaling_factor=2.5, **options)
    assert_same_bits(np.asarray(routed), np.asarray(call(SMALL, given)), "routing options")


def test_a_compiled_executable_runs_many_times_and_from_many_threads() -> None:
    given = cases.arrays(SMALL)
    executable = jax.jit(lambda arrays: call(SMALL, arrays)).lower(shapes(given)).compile()
    expected = np.asarray(call(SMALL, given))
    other = cases.arrays(dataclasses.replace(SMALL, tokens=33, seed=1))
    expected_other = np.asarray(call(SMALL, other))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ours = [pool.submit(executable, given) for _ in range(16)]
        others = [pool.submit(call, SMALL, other) for _ in range(16)]
    for future in ours:
        assert_same_bits(np.asarray(future.result()), expected, "compiled, from threads")
    for future in others:
        assert_same_bits(np.asarray(future.result()), expected_other, "eager, from threads")


GIVEN = cases.arrays(SMALL)
BF16 = cases.arrays(SMALL_BF16)
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
        NotImplementedError,
        "topk_ids must be one packed int32 .*pack_topk_ids",
    ),
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
    (
        {"hidden_states_scale_order": "rows"},
        ValueError,
        "hidden_states_scale_order must be 'block_major' or 'token_major', got 'rows'",
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
        "local_expert_offset must be an integer in [0, num_experts - local_num_experts] = [0, -1]",
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
    ({"use_shuffled_weight": True}, NotImplementedError, "use_shuffled_weight must be False"),
    ({"weight_layout": 1}, ValueError, "weight_layout must be MajorK (0) or BlockMajorK (2), got MajorMn (1)"),
    ({"weight_layout": enums.WeightLayout.BlockMajorK}, NotImplementedError, "weight_layout must be MajorK (0)"),
    ({"fp8_quantization_type": 2}, NotImplementedError, "fp8_quantization_type must be DeepSeekFp8 (1)"),
    ({"activation_type": enums.ActivationType.Geglu}, NotImplementedError, "activation_type must be Swiglu (3)"),
    (
        {"gemm1_lora_delta": np.zeros((T, 2, 256), ml_dtypes.bfloat16)},
        NotImplementedError,
        "gemm1_lora_delta must be None",
    ),
    ({"gemm1_alpha": np.ones(E, np.float32)}, NotImplementedError, "gemm1_alpha must be None"),
    ({"gemm1_beta": np.ones(E, np.float32)}, NotImplementedError, "gemm1_beta must be None"),
    ({"gemm1_clamp_limit": np.ones(E, np.float32)}, NotImplementedError, "gemm1_clamp_limit must be None"),
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


def test_a_runtime_with_an_older_ffi_api_is_refused_in_one_sentence_and_left_working(tmp_path: Any) -> None:
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 1\n")
    program = f"""
        import jax
        jax.ffi.include_dir = lambda: {str(tmp_path)!r}
        try:
            import jax_moe.moe
        except ImportError as error:
            print(error)
        print(jax.numpy.ones(3).sum())
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    sentence, total = done.stdout.splitlines()
    assert "this jaxlib has 0.1" in sentence and "upgrade" in sentence
    assert total == "3.0"


def test_loading_the_module_again_registers_the_same_targets_without_complaint() -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: importlib.reload(jax_moe.moe), range(4)))
    assert_same_bits(
        np.asarray(jax_moe.moe.fp8_block_scale_routed_moe(**GIVEN, num_experts=E)),
        np.asarray(call(SMALL, GIVEN)),
        "reloaded",
    )
