"""The CUDA sources on an emulated sm_90 (tests/emulation): right results under many orders of events, and nothing that
the hardware leaves undefined. First, that the emulated machine sees the mistakes that it is there for.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re

import cases
import compare
import emulated
import ml_dtypes
import numpy as np
import pytest
import results

from jax_moe.problem import INPUTS, OUTPUTS

pytestmark = pytest.mark.skipif(bool(emulated.missing_compiler()), reason=str(emulated.missing_compiler()))


# ---- the emulated machine --------------------------------------------------------------------------------------------
RIGHT = (
    "collectives",
    "static_shared_memory_is_poisoned",
    "neighbour_reads",
    "fresh_mbarrier_passes_parity_one",
    "tensor_map_rules",
    "multiply",
    "multiply_gathered",
    "registers",
    "mx_values",
    "named_barriers",
    "atomics",
    "boxes_of_rank_three",
    "zipped_box_of_rank_four",
    "zipped_box_of_rank_five",
    "cp_async_arrival",
    "decode",
    "overlap",
    "overlap_mbarrier_orders",
    "counters",
)
# What is said of each mistake, in every order of events.
WRONG = {
    "missing_thread_at_barrier": r"deadlock.*\n.*barrier 0 of 64 threads : threads 0-39 41-63\n",
    "different_counts_at_barrier": "barrier 3",
    "different_masks": "__syncwarp with mask",
    "different_instructions": "__shfl_sync with mask",
    "exited_lane": "lane 7|exited: 1 threads",
    "neighbour_reads_without_barrier": "race: a (read|write)",
    "uninitialised_mbarrier": "no initialised mbarrier",
    "bytes_that_never_come": "512 bytes missing",
    "one_arrival_too_many": "an arrival more than the 1 of a phase",
    "overwritten_mbarrier": "has been overwritten",
    "past_dynamic_shared_memory": "written 0 bytes past its end",
    "misaligned_shared": "misaligned",
    "misaligned_global": "misaligned",
    "misaligned_plain_store": "undefined behaviour",
    "integer_overflow": "undefined behaviour",
    "after_buffer": "byte 160 of 'victim'",
    "before_buffer": "byte -4 of 'victim'",
    "stack_overflow": "the stack of thread",
    "shared_memory_not_asked_for": "cudaFuncSetAttribute",
    "too_many_registers": "67584 registers",
    "registers_of_one_warp": "thread 224 has asked for 40 registers, thread 128 of its warpgroup for 0",
    "no_proxy_fence": "no fence_proxy_async",
    "no_cp_async_wait": "a cp.async of thread .*has not waited",
    "no_wgmma_fence": r"without a wgmma_fence\(\)",
    "no_wgmma_commit": "not committed",
    "early_release": "race: a write.*after the read",
    "lane_zero_releases": "race|deadlock",
    "early_accumulator_read": "wrong product.*nan",
    "early_accumulator_write": "written while its wgmma was in flight",
    "too_few_bytes": "a bulk copy brings",
    "too_many_bytes": "deadlock",
    "other_order": "other operands than in another warp",
    "misplaced_tile": "does not begin at a multiple of 1024",
    "unswizzled_a": "wrong product",
    "decode_no_full_wait": "race",
    "decode_no_barrier": "race",
    "decode_no_cp_async_wait": "a cp.async of thread .*has not waited",
    "decode_few_at_barrier": "barrier 15",
    "decode_early_release": "race",
    "misaligned_matrix_row": "a row of ldmatrix.*misaligned",
    "matrix_row_outside": "outside the CTA's memory",
    "unswizzled_matrix": "wrong product",
    "lane_missing_at_matrix": "ldmatrix",
    "lane_elsewhere_at_matrix": "(mma.sync with.*ldmatrix|ldmatrix with.*mma.sync)",
    "box_of_rank_two": "a bulk copy of rank 2 through a tensor map of rank 3",
    "box_counted_inside_only": "a bulk copy brings",
    "misaligned_box": "from element 8 of a row, which is misaligned",
    "misplaced_box": "to shared address.*misaligned",
    "cp_async_arrival_not_awaited": "race",
    "cp_async_arrival_of_lane_missing": "deadlock",
    "cp_async_arrival_too_early": "race",
    "overlap_no_wait": "read before wait_for_previous_kernel.*written it: byte .* of 'y'",
    "overlap_early_read": "read before wait_for_previous_kernel.*written it: byte .* of 'y'",
    "overlap_early_bulk_copy": "read before wait_for_previous_kernel.*written it: byte 0 of 'y'",
    "overlap_early_cp_async": "read before wait_for_previous_kernel.*written it: byte .* of 'y'",
    "overlap_early_write": "written before wait_for_previous_kernel.*accessed it: byte .* of 'y'",
    "overlap_early_write_of_input": "written before wait_for_previous_kernel.*accessed it: byte .* of 'x'",
    "overlap_early_atomic": "written before wait_for_previous_kernel.*accessed it: byte .* of 'y'",
    "overlap_read_only_path": "read-only load.* of 'y'",
    "overlap_read_only_own": "read-only load.* which this kernel writes: byte .* of 'z'",
    "overlap_lane_zero_waits": "read before wait_for_previous_kernel.*written it: byte .* of 'y'",
    "overlap_nobody_waits": "no thread of it has called wait_for_previous_kernel",
    "overlap_unknown_before": "may have written it: byte .* of 'x'",
    "registers_overwritten": "register of A was written while its wgmma was in flight",
    "registers_no_proxy_fence": "no fence_proxy_async",
    "registers_no_wgmma_fence": r"without a wgmma_fence\(\)",
    "counters_nobody_gives": "deadlock(.*\n)*.*any counter.* threads 0-31\n",
    "counters_one_is_missing": "deadlock(.*\n)*.*any counter.* threads 0-31\n",
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_go_through(emulator: emulated.Emulator, name: str) -> None:
    assert [emulator.selftest(name, seed) for seed in range(12)] == [""] * 12


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_reported(emulator: emulated.Emulator, name: str) -> None:
    for seed in range(12):
        error = emulator.selftest(name, seed)
        assert re.search(WRONG[name], error), f"seed {seed}: {error}"


def test_conversions_round_as_the_formats_say(emulator: emulated.Emulator) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    exact = np.sort(codes[np.isfinite(codes)])
    ties = (exact[1:] + exact[:-1]) / 2
    near = np.concatenate(
        [exact, ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, -np.float32(np.inf))]
    )
    small = (np.random.default_rng(1).standard_normal(200_000) * 30).astype(np.float32)
    values = np.concatenate([bits.view(np.float32), near, small, np.float32([np.nan, np.inf, -np.inf])])
    e4m3, bf16 = np.empty(values.size, np.uint8), np.empty(values.size, np.uint16)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (values, e4m3, bf16)]
    emulator.library.emulated_convert(pointers[0], ctypes.c_int64(values.size), pointers[1], pointers[2])
    number = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        saturated = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        rounded = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(e4m3[number], saturated[number])
    np.testing.assert_array_equal(bf16[number], rounded[number])
    assert np.all(e4m3[~number] == 0x7F) and np.all(bf16[~number] == 0x7FFF)


def test_every_e4m3_code_becomes_f16(emulator: emulated.Emulator) -> None:
    codes = np.arange(256, dtype=np.uint8)
    found = np.empty(256, np.uint16)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (codes, found)]
    emulator.library.emulated_decode(pointers[0], ctypes.c_int64(64), pointers[1])
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(found[number], expected[number].view(np.uint16))
    assert np.all(found[~number] == 0x7FFF)


# ---- the kernels -----------------------------------------------------------------------------------------------------
def check(case: cases.Case, given: cases.Arrays, outputs: dict[str, np.ndarray]) -> None:
    """Against the reference; permuted rows that the map does not name are left alone."""
    results.assert_matches(case, given, outputs)
    for name in ("gemm2_output", "gemm1_activation_output"):
        if name in outputs:
            rows = np.count_nonzero(outputs["expanded_idx_to_permuted_idx"] >= 0)
            assert np.all(outputs[name][rows:].view(np.uint8) == 0xFF), f"a row of {name} without a name was written"


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_results_are_the_references(emulator: emulated.Emulator, case: cases.Case) -> None:
    given = cases.arrays(case)
    check(case, given, emulated.run(emulator, case, given, seed=len(case.name)))


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 7168, 256, 2, 1),
        (1, 2048, 256, 8, 8),
        (4, 2048, 768, 8, 2),
        (16, 2048, 256, 8, 2),
        (1, 1024, 2048, 2, 1),
        (8, 2304, 128, 4, 1),  # more of x than is held as f16
        (8, 128, 2304, 2, 1),  # of h
    ],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
def test_wide_layers_on_a_whole_gpu(emulator: emulated.Emulator, sizes: tuple[int, ...]) -> None:
    """Few tokens, experts as wide as real ones: rings that wrap and CTAs with several tiles."""
    case = cases.Case("wide", *sizes)
    given = cases.arrays(case)
    check(case, given, emulated.run(emulator, case, given, seed=3, num_sms=132))


@pytest.mark.parametrize(
    "name",
    ["t53", "t129", "k22", "h640_i896", "routing_zipf_window", "lora_unfinalized", "relu2_t257", "one_expert_t257"],
)
def test_no_order_of_events_changes_a_bit(emulator: emulated.Emulator, name: str) -> None:
    case = cases.CASES[name]
    given = cases.arrays(case)
    runs = [emulated.run(emulator, case, given, seed=seed, num_sms=1 + seed * seed) for seed in range(6)]
    check(case, given, runs[0])
    for found in runs:
        results.assert_same_results(found, runs[0])


def test_the_experts_offset_may_be_on_the_device(emulator: emulated.Emulator) -> None:
    case = cases.CASES["routing_uniform_window"]
    given = cases.arrays(case)
    check(case, given, emulated.run(emulator, case, given, offset_on_device=True))


@pytest.mark.parametrize(
    ("tokens", "experts", "window", "routing"),
    [
        (3000, 32, (3, 5), "uniform"),
        (3000, 32, (3, 5), "zipf"),
        (257, 32, (3, 5), "zipf"),
        (1023, 32, None, "zipf"),
        (1024, 1024, (8, 1000), "zipf"),
        (300, 1100, None, "zipf"),
    ],
)
def test_many_rows_are_routed_in_chunks(
    emulator: emulated.Emulator, tokens: int, experts: int, window: tuple[int, int] | None, routing: str
) -> None:
    case = cases.Case("chunks", tokens, 128, 128, experts, 8, window, routing=routing)
    given = cases.arrays(case)
    check(case, given, emulated.run(emulator, case, given, num_sms=4))


@pytest.mark.parametrize(("tokens", "hidden"), [(1100, 384), (2050, 128), (1024, 1152)])
def test_tokens_without_a_local_expert_need_not_be_quantised(
    emulator: emulated.Emulator, tokens: int, hidden: int
) -> None:
    case = cases.Case("some", tokens, hidden, 128, 64, 2, (60, 4), x_dtype="bfloat16")
    given = cases.arrays(case)
    check(case, given, emulated.run(emulator, case, given, num_sms=4))


def test_offsets_past_2_31(emulator: emulated.Emulator) -> None:
    """The last two of many tokens go to the last of many experts; what nobody reads takes no memory."""
    near = cases.Case("near", 2, 65536, 128, 1, 1, routing="one_expert", do_finalize=False)
    tokens, experts = 2**31 // near.hidden + 3, 2**31 // (2 * near.inter * near.hidden) + 2
    case = dataclasses.replace(near, name="far", tokens=tokens, experts=experts, window=(0, experts))
    given = cases.arrays(near)
    far = {name: far_end(name, array, tokens, experts) for name, array in given.items() if array is not None}
    far["topk_ids"][:-2] = -65536  # id -1
    far["topk_ids"][-2:] = given["topk_ids"] + (experts - 1 << 16)
    found = emulated.run(emulator, case, far, num_sms=2)
    row_of = found["expanded_idx_to_permuted_idx"]
    assert np.all(row_of[:-2] == -1) and list(row_of[-2:]) == [0, 1]
    compare.assert_close(found["gemm2_output"][:2], cases.expected(near, given).gemm2_output, "gemm2_output")


def far_end(name: str, array: np.ndarray, tokens: int, experts: int) -> np.ndarray:
    """An array of zeros for so many tokens or experts that ends with the given one."""
    if name == "hidden_states_scale":
        return far_end("", array.T, tokens, experts).T
    shape = (experts if "weights" in name else tokens, *array.shape[1:])
    result = np.zeros(shape, array.dtype)
    result[-len(array) :] = array
    return result


def test_no_rows_at_all_is_no_launch_of_empty_grids(emulator: emulated.Emulator) -> None:
    case = dataclasses.replace(cases.CASES["t0"], do_finalize=False)
    found = emulated.run(emulator, case, cases.arrays(case))
    assert all(array.size == 0 for array in found.values())


def test_a_buffer_that_is_too_small_is_refused(emulator: emulated.Emulator) -> None:
    case = cases.CASES["t7"]
    problem = cases.problem(case, cases.arrays(case))
    nothing = [0] * len((*INPUTS, *OUTPUTS))
    with pytest.raises(emulated.EmulatedError, match="topk_ids must hold 56 bytes"):
        emulator.forward(problem, nothing, nothing, emulated.ALL_STAGES, 0, 3)
