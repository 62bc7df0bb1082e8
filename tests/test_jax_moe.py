"""fp8_block_scale_routed_moe under jit and eagerly: right values and exact types."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import os
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
from compare import Tolerance, assert_close, assert_same_bits
from jax_calls import (
    OPTIONS,
    SMALL,
    SMALL_APART,
    SMALL_BF16,
    SMALL_LORA,
    SMALL_MX,
    SMALL_MX_ALL,
    WINDOW,
    call,
    named,
    named_case,
    shapes,
)
from results import assert_matches, assert_same_results

import jax_moe
from jax_moe import enums, native, reference, xla_call

AGAINST_REFERENCE = (
    "t0 t1 t53 k1 k32 e300 routing_mixed_window window_1_2 h384_i384 bf16_t0 bf16_t53 unfinalized_t0 "
    "unfinalized_window unfinalized_nothing_local unfinalized_bf16 extreme_nan_x_bf16 geglu relu2 identity alpha beta "
    "clamp alpha_beta_clamp_e300 shuffled blocked blocked_shuffled apart_bf16 apart_f32_t0 apart_f32_e300 "
    "apart_garbage lora lora_t0 lora_e300 lora_unfinalized lora_identity_one_expert jax_small_all mx mx_t0 mx_t8 "
    "mx_block_major mx_grid mx_e8m0 mx_bf16 mx_shuffled mx_shuffled_grid mx_relu2_e300 mx_alpha_beta_clamp "
    "mx_lora_unfinalized mx_lora_unfinalized_t0 jax_small_mx_e8m0 jax_small_mx_all extreme_mx_far_scales"
).split()


@pytest.mark.parametrize("name", AGAINST_REFERENCE)
def test_eager_and_compiled_calls_agree_with_each_other_and_with_the_reference(name: str) -> None:
    case = named_case(name)
    given = cases.arrays(case)
    eager = named(case, call(case, given))
    assert_same_results(named(case, jax.jit(lambda arrays: call(case, arrays))(given)), eager)
    assert_matches(case, given, eager)


@pytest.mark.parametrize(
    "case",
    [dataclasses.replace(case, tokens=tokens) for case in OPTIONS.values() for tokens in (0, 7)],
    ids=lambda case: f"{case.name}_t{case.tokens}",
)
def test_shapes_are_known_without_running(case: cases.Case) -> None:
    given = cases.arrays(case)
    abstract = jax.eval_shape(lambda arrays: call(case, arrays), shapes(given))
    actual = call(case, given)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), actual)
    tokens, slots, hidden, inter = case.tokens, case.tokens * case.top_k, case.hidden, case.inter
    weights = jnp.bfloat16 if case.topk_weights == "packed" else jnp.dtype(case.topk_weights)
    expected: list[Any] = [((tokens, hidden), jnp.bfloat16)]
    if not case.do_finalize:
        expected = [((slots, hidden), jnp.bfloat16), ((tokens, case.top_k), weights)]
    if case.lora or not case.do_finalize:
        expected.append(((slots,), jnp.int32))
    if case.lora:
        scale = (inter // 128, -(-slots // 4) * 4)
        expected.append(((slots, inter), jnp.uint8))
        expected.append(((*scale, 4), jnp.uint8) if case.mx else (scale, jnp.float32))
    returned = abstract if isinstance(abstract, tuple) else (abstract,)
    assert [(x.shape, x.dtype) for x in returned] == expected


def test_lists_and_tuples_of_ids_and_weights_are_pairs() -> None:
    given = cases.arrays(SMALL_APART)
    expected = np.asarray(call(SMALL_APART, given))
    pair = given["topk_ids"], given["topk_weights"]
    assert_same_bits(np.asarray(call(SMALL_APART, given, topk_ids=list(pair))), expected, "list")
    on_device = tuple(map(jnp.asarray, pair))
    assert_same_bits(np.asarray(call(SMALL_APART, given, topk_ids=on_device)), expected, "JAX arrays")


def test_packed_ids_mean_what_their_parts_mean() -> None:
    given = cases.arrays(SMALL)
    ids, weights = jax_moe.unpack_topk_ids(given["topk_ids"])
    apart = call(SMALL, given, topk_ids=(ids, weights))
    assert_same_bits(np.asarray(apart), np.asarray(call(SMALL, given)), "apart")


def test_weights_of_a_pair_come_back_as_they_are() -> None:
    case = dataclasses.replace(SMALL_APART, do_finalize=False)
    given = cases.arrays(case)
    given["topk_weights"][0] = np.nan, -0.0
    for function in (call, jax.jit(call, static_argnums=0)):
        returned = named(case, function(case, given))["expert_weights"]
        assert_same_bits(returned, given["topk_weights"], "expert_weights")


def test_the_public_layout_functions_make_what_the_options_say() -> None:
    given = cases.arrays(SMALL)
    expected = np.asarray(call(SMALL, given))

    @jax.jit
    def prepared(weights: jax.Array) -> jax.Array:
        return jax_moe.convert_to_block_layout(jax_moe.shuffle_matrix_a(weights, 64), 128)

    weights = {name: prepared(given[name]) for name in ("gemm1_weights", "gemm2_weights")}
    options = {"use_shuffled_weight": True, "weight_layout": enums.WeightLayout.BlockMajorK}
    assert_same_bits(np.asarray(call(SMALL, given | weights, **options)), expected, "shuffled and blocked")


def test_the_lora_activation_is_codes_times_scale() -> None:
    """Through the second GEMM of an identity layer it gives the rows that the same call returns."""
    case = dataclasses.replace(SMALL_LORA, do_finalize=False, window=None)
    given = cases.arrays(case)
    results = named(case, call(case, given))
    rows = case.tokens * case.top_k
    codes = jax.lax.bitcast_convert_type(results["gemm1_activation_output"], jnp.float8_e4m3fn)
    activation = np.asarray(jax_moe.dequantize_activations(codes, results["gemm1_activation_scale"][:, :rows]))
    w2 = np.asarray(jax_moe.dequantize_weights(given["gemm2_weights"], given["gemm2_weights_scale"]))
    expected = np.zeros((rows, case.hidden), np.float32)
    for slot, row in enumerate(results["expanded_idx_to_permuted_idx"]):
        expected[row] = w2[given["topk_ids"].reshape(-1)[slot] >> 16] @ activation[row]
    assert_close(results["gemm2_output"], expected, "gemm2_output")


def test_bfloat16_tokens_are_quantised_as_quantize_activations_does() -> None:
    given = cases.arrays(SMALL_BF16)
    codes, scale = jax_moe.quantize_activations(given["hidden_states"])
    outside = call(SMALL, given | {"hidden_states": codes, "hidden_states_scale": scale})
    assert_same_bits(np.asarray(call(SMALL_BF16, given)), np.asarray(outside), "quantised outside")


def test_bfloat16_tokens_are_quantised_as_mxfp8_quantize_does() -> None:
    case = dataclasses.replace(SMALL_MX, x_dtype="bfloat16")
    given = cases.arrays(case)
    codes, scale = jax_moe.mxfp8_quantize(given["hidden_states"], False)
    outside = call(SMALL_MX, given | {"hidden_states": codes, "hidden_states_scale": scale})
    assert_same_bits(np.asarray(call(case, given)), np.asarray(outside), "quantised outside")


def test_the_public_layout_functions_make_shuffled_weights_of_mxfp8() -> None:
    given = cases.arrays(SMALL_MX)
    expected = np.asarray(call(SMALL_MX, given))
    gated = {
        name: jax_moe.reorder_rows_for_gated_act_gemm(given[name]) for name in ("gemm1_weights", "gemm1_weights_scale")
    }
    prepared = {
        "gemm1_weights": jax_moe.shuffle_matrix_a(gated["gemm1_weights"], 128),
        "gemm1_weights_scale": jax_moe.shuffle_matrix_sf_a(gated["gemm1_weights_scale"], 128),
        "gemm2_weights": jax_moe.shuffle_matrix_a(given["gemm2_weights"], 128),
        "gemm2_weights_scale": jax_moe.shuffle_matrix_sf_a(given["gemm2_weights_scale"], 128),
    }
    assert_same_bits(np.asarray(call(SMALL_MX, given | prepared, use_shuffled_weight=True)), expected, "shuffled")


def test_the_scale_of_an_mxfp8_activation_is_where_the_documentation_says() -> None:
    case = dataclasses.replace(SMALL_MX_ALL, window=None)
    given = cases.arrays(case)
    results = named(case, call(case, given))
    codes = results["gemm1_activation_output"].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = results["gemm1_activation_scale"].astype(np.float32)
    expected = cases.expected(case, given, requantize=False).gemm1_activation_output
    row, i = np.indices(codes.shape)
    values = codes * np.exp2(scale[i // 128, row, i % 128 // 32] - 127)
    assert_close(values, expected, "activation", Tolerance(4e-2, 0.3))


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
        list(pool.map(lambda _: importlib.reload(xla_call), range(4)))
    given = cases.arrays(SMALL)
    reloaded = importlib.reload(jax_moe.moe).fp8_block_scale_routed_moe(**given, num_experts=SMALL.experts)
    assert_same_bits(np.asarray(reloaded), np.asarray(call(SMALL, given)), "reloaded")


def test_the_gpu_handler_of_a_build_without_cuda_says_what_to_do() -> None:
    """The handler is called as XLA calls it, on the CPU that every machine has."""
    if native.load().build_info()["cuda"]:
        pytest.skip("this build has CUDA kernels")
    handler = native.load().registrations()["CUDA"][native.TARGET]
    jax.ffi.register_ffi_target("jax_moe.tests.no_cuda", handler, platform="cpu", api_version=1)
    attributes = cases.problem(SMALL, cases.arrays(SMALL)).attributes()
    result = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(Exception, match=r"UNIMPLEMENTED: .*this build has no CUDA kernels; .* or run on a CPU device"):
        jax.ffi.ffi_call("jax_moe.tests.no_cuda", result)(jnp.ones(2), **attributes).block_until_ready()
