"""The CUDA backend through plain pointers: right on every case, within its buffers, and the same bits every time.

Outputs and workspace hold NaN before a call, and every buffer lies between guard bytes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import mx_decode
import numpy as np
import pytest
import routings
from call import Call
from cases import CASES, LARGE, SMALL, Case
from memory import Cuda
from results import assert_matches, assert_same_results, chosen_tokens

from jax_moe import native, problem


def some(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=lambda case: case.name)


@pytest.mark.parametrize("case", [*SMALL, *mx_decode.CASES.values()], ids=lambda case: case.name)
def test_small_case(cuda: Cuda, case: Case) -> None:
    """Right; inputs untouched; the same bits over a zeroed workspace and with every buffer at its weakest alignment."""
    call = Call(case, memory=cuda)
    first = call.run()
    assert_matches(case, call.given, first, on_hopper=True)
    assert call.changed_inputs() == []
    for byte in (0, 0xFF, 0x7F):
        call.poison(byte)
        assert_same_results(call.run(), first)
    assert_same_results(Call(case, call.given, cuda, odd=True).run(), first)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_case(cuda: Cuda, case: Case) -> None:
    """Chosen tokens are right; the whole is the same bits in a second run over another workspace content."""
    import torch

    call = Call(case, memory=cuda)
    results = call.run()
    assert_matches(case, call.given, results, chosen_tokens(case), on_hopper=True)
    before = {name: call.outputs[name].view.clone() for name in results}
    call.poison(0)
    call.launch()
    rows = int(np.count_nonzero(results.get("expanded_idx_to_permuted_idx", np.empty(0)) >= 0))
    for name, bits in before.items():
        view = call.outputs[name].view
        if name in ("gemm2_output", "gemm1_activation_output"):
            written = rows * results[name][0].nbytes
            bits, view = bits[:written], view[:written]
        if name == "gemm1_activation_scale":
            bits, view = (data.reshape(len(results[name]), -1)[:, : 4 * rows] for data in (bits, view))
        assert torch.equal(bits, view), f"{name} differs from run to run"


@pytest.mark.parametrize("option", ["", "bf16", "relu2", "lora", "blocked_shuffled"])
def test_every_number_of_tokens_around_the_tiles(cuda: Cuda, option: str) -> None:
    changes: dict[str, Any] = {"x_dtype": "bfloat16"} if option == "bf16" else cases.OPTIONS.get(option, {})
    tokens = [*range(1, 72), *range(120, 137), 191, 192, 193, 255, 256, 257, 383, 385, 511, 513, 1023, 1025]
    for count in tokens[:: 4 if option in cases.OPTIONS else 1]:
        case = Case(f"t{count}", count, 384, 384, 4, 2, weights="signed", seed=count, **changes)
        call = Call(case, memory=cuda, odd=bool(count % 2))
        assert_matches(case, call.given, call.run(), on_hopper=True)


ROWS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 273, 289, 577, 2047, 2048, 2049, 2112)


@pytest.mark.parametrize("rows", ROWS)
def test_every_number_of_rows_an_expert(cuda: Cuda, rows: int) -> None:
    """Experts of exactly `rows` rows, an empty one, and one of a single row side by side."""
    ids = np.concatenate([np.full(rows, 0), np.full(rows, 2), [3]])
    case = Case("rows", len(ids), 256, 384, 5, 1)
    given = cases.arrays(case)
    order = np.random.default_rng(rows).permutation(len(ids))
    given["topk_ids"] = routings.pack(ids[order, None], np.ones((len(ids), 1)))
    assert_matches(case, given, Call(case, given, cuda).run(), on_hopper=True)


@some("routing_mixed_window", "unfinalized_window", "bf16_t53", "window_1_2", "window_0_4")
def test_an_offset_in_memory_means_the_same_as_one_in_the_problem(cuda: Cuda, case: Case) -> None:
    call = Call(case, memory=cuda)
    assert_same_results(Call(case, call.given, cuda, offset_on_device=True).run(), call.run())


@pytest.mark.parametrize("offset", [-(2**31), -32768, -3, -1, 2, 15, 16, 32767, 65536, 2**31 - 1])
def test_any_bit_pattern_of_an_offset_in_memory_is_safe(cuda: Cuda, offset: int) -> None:
    """A window that lies partly or wholly outside the experts selects what is inside."""
    case = CASES["routing_mixed_window"]
    call = Call(case, memory=cuda, offset_on_device=True)
    call.write_input("local_expert_offset", np.array(offset, np.int32))
    moved = dataclasses.replace(case, window=(offset, case.local))
    assert_matches(moved, call.given, call.run(), on_hopper=True)


@pytest.mark.parametrize("topk_weights", ["packed", "float32"])
@pytest.mark.parametrize("seed", range(12))
def test_garbage_ids(cuda: Cuda, seed: int, topk_weights: str) -> None:
    """Any 32 bits in half of the slots, at sizes of one and of several route chunks."""
    tokens = (3, 100, 3000, 20000)[seed % 4]
    case = Case("garbage", tokens, 256, 128, 24, 8, (7, 11), "garbage", seed=seed, topk_weights=topk_weights)
    case = dataclasses.replace(case, do_finalize=seed % 3 > 0)
    call = Call(case, memory=cuda)
    assert_matches(case, call.given, call.run(), chosen_tokens(case, 200), on_hopper=True)


@pytest.mark.parametrize("topk_weights", ["packed", "float32"])
def test_ids_of_random_bits_write_nothing_outside(cuda: Cuda, topk_weights: str) -> None:
    """All 32 bits of every slot are random, and every int16 id up to 32766 is an expert."""
    case = Case("noise", 4001, 128, 128, problem.MAX_NUM_EXPERTS, 32, (12345, 1000), do_finalize=False)
    case = dataclasses.replace(case, topk_weights=topk_weights)
    given = cases.arrays(dataclasses.replace(case, routing="one_expert"))
    rng = np.random.default_rng(0)
    noise = rng.integers(-(2**31), 2**31, (case.tokens, case.top_k)).astype(np.int32)
    if topk_weights != "packed":
        noise = np.where(noise % 2 == 0, noise >> 16, noise)
    given["topk_ids"] = noise
    call = Call(case, given, cuda)
    results = call.run()
    expected = cases.expected(case, given)
    assert np.array_equal(results["expanded_idx_to_permuted_idx"], expected.expanded_idx_to_permuted_idx)
    assert call.changed_inputs() == []


@some("t7", "unfinalized", "bf16_t7", "alpha_beta_clamp", "apart_bf16", "lora_unfinalized")
def test_a_buffer_that_is_too_small_or_absent_is_refused_by_name(cuda: Cuda, case: Case) -> None:
    call = Call(case, memory=cuda)
    pointers, sizes = call.pointers_and_sizes()
    for index, name in enumerate((*problem.INPUTS, *problem.OUTPUTS)):
        absent = [] if name in problem.PER_EXPERT else [(0, 0)]
        for pointer, size in [(pointers[index], sizes[index] - 1), *absent] if sizes[index] else ():
            changed = [list(pointers), list(sizes)]
            changed[0][index], changed[1][index] = pointer, size
            with pytest.raises(ValueError, match=f"{name} must"):
                native.forward(call.problem, *changed, device=cuda.device)
    for name, output in call.results().items():
        assert np.all(output.view(np.uint8) == 0xFF), f"{name} was written by a refused call"


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_explain_says_what_would_run(gpu: int, case: Case) -> None:
    described = dataclasses.replace(
        cases.problem(CASES["t1"], cases.arrays(CASES["t1"])),
        num_tokens=case.tokens,
        hidden_size=case.hidden,
        intermediate_size=case.inter,
        num_experts=case.experts,
        top_k=case.top_k,
        local_num_experts=case.local,
        local_expert_offset=case.offset,
    )
    texts = {num_sms: native.explain(described, num_sms) for num_sms in (78, 114, 132)}
    assert all("gemm1" in text and "gemm2" in text for text in texts.values()), texts
