"""Finalising apart: the CPU backend and the emulated CUDA kernel against the reference and against do_finalize=True,
and what is refused.
"""

from __future__ import annotations

import dataclasses

import compare
import emulated
import emulated_finalize
import finalizing
import ml_dtypes
import numpy as np
import pytest
from call import Call
from cases import CASES as LAYERS
from finalizing import CASES, Case

from jax_moe import finalize_problem, native
from jax_moe.enums import DataType
from jax_moe.finalize_problem import FinalizeProblem
from jax_moe.problem import Array

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
needs_emulator = pytest.mark.skipif(bool(emulated.missing_compiler()), reason=str(emulated.missing_compiler()))
# By what a layer without do_finalize gives: packed weights, given ones, slots without a row.
LAYER_NAMES = ("t7", "k32", "routing_mixed_window", "apart_bf16", "apart_f32", "bf16_t53", "extreme_nan_x")


@by_name
def test_the_cpu_backend_sums_as_the_reference(case: Case) -> None:
    for seed in range(2):
        given = case.arrays(seed)
        finalizing.assert_finalized(given, finalizing.run(case, given))


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_the_parts_of_a_layer_give_the_bits_of_the_whole(name: str) -> None:
    case, given, output = finalizing.parts_of(LAYERS[name], lambda layer, given: Call(layer, given).run())
    compare.assert_same_bits(finalizing.run(case, given), output, "output")


def test_slots_are_added_in_order_and_rounded_once() -> None:
    rows = np.repeat(np.array([[2.0**24], [1], [-(2.0**24)], [2.0**-8]]), 128, 1).astype(ml_dtypes.bfloat16)
    weights = np.ones((3, 3), np.float32)
    row_of = np.array([0, 1, 2, 0, 2, 1, 1, 3, 3], np.int32)
    case = Case(3, 3, 128, 4, "float32")
    # 2^24 + 1 is 2^24 in float32; 1 + 2^-8 is 1 in bfloat16, but 1 + 2^-8 + 2^-8 is not.
    assert finalizing.run(case, (rows, weights, row_of)).astype(np.float32)[:, 0].tolist() == [0, 1, 1 + 2**-7]


def test_results_do_not_depend_on_threads_or_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(300, 8, 1024, 2000, "float32")
    given = case.arrays()
    monkeypatch.setenv("JAX_MOE_NUM_THREADS", "1")
    one = finalizing.run(case, given)
    monkeypatch.setenv("JAX_MOE_NUM_THREADS", "3")
    compare.assert_same_bits(finalizing.run(case, given), one, "output")
    few = dataclasses.replace(case, tokens=5)
    compare.assert_same_bits(finalizing.run(few, (given[0], given[1][:5], given[2][:40])), one[:5], "output")


def test_the_library_was_built_with_this_contract() -> None:
    assert native.load().finalize_abi_text() == finalize_problem.abi_text()
    with pytest.raises(ImportError, match="does not belong"):
        native.check_abi(finalize_problem.abi_text() + " more", finalize_problem.abi_text())


# ---- the CUDA kernel, emulated ---------------------------------------------------------------------------------------
@needs_emulator
@by_name
def test_the_kernel_sums_as_the_reference(emulator: emulated.Emulator, case: Case) -> None:
    for seed in range(2):
        given = case.arrays(seed)
        finalizing.assert_finalized(given, emulated_finalize.finalize(emulator, case.problem(), given, seed))


@needs_emulator
@pytest.mark.parametrize("name", ["routing_mixed_window", "apart_f32"])
def test_the_kernel_gives_the_bits_of_the_whole(emulator: emulated.Emulator, name: str) -> None:
    case, given, output = finalizing.parts_of(LAYERS[name], lambda layer, given: emulated.run(emulator, layer, given))
    got = emulated_finalize.finalize(emulator, case.problem(), given)
    compare.assert_same_bits(got, output, "output")


# ---- what is refused -------------------------------------------------------------------------------------------------
ARRAYS = {"rows": Array((9, 256), "bfloat16"), "weights": Array((6, 4), "float32"), "row_of": Array((24,), "int32")}
REFUSED: list[tuple[dict[str, Array], str]] = [
    ({"rows": Array((9, 256), "float32")}, r"gemm2_output must be bfloat16 \[num_rows, hidden_size\], got float32"),
    ({"rows": Array((256,), "bfloat16")}, r"gemm2_output must be bfloat16 .* got bfloat16\[256\]"),
    ({"rows": Array((9, 192), "bfloat16")}, "gemm2_output must be of a hidden_size that is a multiple of 128"),
    ({"rows": Array((9, 0), "bfloat16")}, "gemm2_output must be of a hidden_size that is a multiple of 128"),
    ({"rows": Array((2**31, 128), "bfloat16")}, "gemm2_output must be of at most"),
    ({"weights": Array((6, 4), "float16")}, r"expert_weights must be bfloat16 or float32 \[num_tokens, top_k\]"),
    ({"weights": Array((24,), "float32")}, r"expert_weights must be bfloat16 or float32 .* got float32\[24\]"),
    ({"weights": Array((6, 33), "float32")}, r"expert_weights must be of a top_k in \[1, 32\]"),
    ({"weights": Array((6, 0), "float32")}, r"expert_weights must be of a top_k in \[1, 32\]"),
    ({"weights": Array((2**29, 4), "float32")}, "expert_weights must be of at most .* split the call"),
    ({"row_of": Array((24,), "int64")}, r"expanded_idx_to_permuted_idx must be int32\[24\], .* got int64\[24\]"),
    ({"row_of": Array((6, 4), "int32")}, r"expanded_idx_to_permuted_idx must be int32\[24\], .* got int32\[6,4\]"),
    ({"row_of": Array((23,), "int32")}, r"expanded_idx_to_permuted_idx must be int32\[24\]"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED)
def test_what_does_not_fit_is_refused(changed: dict[str, Array], words: str) -> None:
    with pytest.raises(ValueError, match=f"^f: {words}"):
        FinalizeProblem.create("f", **(ARRAYS | changed))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_tokens", -1, r"num_tokens \* top_k must be in"),
        ("num_tokens", 2**30, r"num_tokens \* top_k must be in"),
        ("top_k", 33, "top_k must be in"),
        ("hidden_size", 120, "hidden_size must be a positive multiple"),
        ("num_rows", 2**31, "num_rows must be in"),
        ("num_rows", 10, "gemm2_output must hold 5120 bytes, got 4608"),
        ("num_tokens", 7, "expert_weights must hold 56 bytes, got 48"),
        ("weights_dtype", DataType.NONE, "expert_weights must be bfloat16 or float32"),
    ],
)
def test_the_library_checks_what_could_corrupt_memory(field: str, value: int, words: str) -> None:
    case = CASES[0]
    arrays = [*case.arrays(), np.zeros((case.tokens, case.hidden), ml_dtypes.bfloat16)]
    pointers, sizes = [array.ctypes.data for array in arrays], [array.nbytes for array in arrays]
    with pytest.raises(ValueError, match=words):
        native.finalize(dataclasses.replace(case.problem(), **{field: value}), pointers, sizes)
