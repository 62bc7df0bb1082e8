"""The CPU backend through plain pointers: right on every small case, within its buffers, and the same every time.

Outputs and workspace hold NaN before a call, and every buffer lies between guard bytes.
"""

from __future__ import annotations

import dataclasses
import threading

import cases
import compare
import numpy as np
import pytest
import routings
from call import Call
from cases import CASES, SMALL, Case
from hypothesis import given, note
from hypothesis import strategies as st
from memory import Block, Host
from properties import examples
from results import assert_matches, assert_same_results

from jax_moe import native, problem, reference

every_small_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
SOME = [
    CASES[name]
    for name in (
        "t53 bf16_t53 routing_mixed_window unfinalized_window scale_padded_t7 h896_i384 relu2 alpha_beta_clamp "
        "blocked_shuffled apart_f32 lora lora_unfinalized mx mx_bf16 mx_shuffled mx_grid mx_lora_unfinalized"
    ).split()
]
REFUSING = "t7 unfinalized bf16_t7 alpha_beta_clamp apart_bf16 apart_f32 lora_unfinalized mx_grid mx_lora_unfinalized"
some_cases = pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)


@every_small_case
def test_matches_the_reference(case):
    call = Call(case)
    assert_matches(case, call.given, call.run())
    assert call.changed_inputs() == []


@every_small_case
def test_same_bits_at_any_alignment_and_workspace_contents(case):
    """Twice in one place, over a zeroed and a poisoned workspace, and with every buffer at its weakest alignment."""
    call = Call(case)
    first = call.run()
    call.poison(0)
    assert_same_results(call.run(), first)
    assert_same_results(Call(case, call.given, odd=True).run(), first)


@some_cases
def test_same_bits_after_another_problem_used_the_workspace(case):
    alone = Call(case)
    expected = alone.run()
    other = Call(CASES["routing_garbage"])
    bigger = Block(
        Host(), max(block.nbytes for block in (alone.outputs["workspace"], other.outputs["workspace"])), 0, 0
    )
    for call in (other, alone):
        call.poison()
        call.outputs["workspace"] = bigger
        call.launch()
    assert_same_results(alone.results(), expected)


@some_cases
def test_a_token_does_not_depend_on_the_others_of_its_batch(case):
    """Bit for bit: each token's output is what it would be alone."""
    if not case.do_finalize:
        case = dataclasses.replace(case, do_finalize=True)
    call = Call(case)
    whole = call.run()["output"]
    for token in range(0, case.tokens, 5):
        row = slice(token, token + 1)
        alone = cases.of_tokens(call.given, row)
        output = Call(dataclasses.replace(case, tokens=1), alone).run()["output"]
        compare.assert_same_bits(output, whole[row], f"token {token}")


@pytest.mark.parametrize("case", [case for case in SMALL if not case.do_finalize], ids=lambda case: case.name)
def test_unfinalized_results_make_the_finalized_output(case):
    """The weighted sum of the rows that the map names is what do_finalize gives, but for the last bit."""
    call = Call(case)
    results = call.run()
    rows, row_of = results["gemm2_output"], results["expanded_idx_to_permuted_idx"]
    weights = results.get("expert_weights", call.given.get("topk_weights"))
    with np.errstate(all="ignore"):
        rebuilt = reference.weighted_sum(rows, row_of, weights).astype(rows.dtype)
    whole = dataclasses.replace(case, do_finalize=True)
    compare.assert_close(rebuilt, Call(whole, call.given).run()["output"], "rebuilt", compare.Tolerance(2e-3, 0.01))


@pytest.mark.parametrize("case", [case for case in SMALL if not case.do_finalize], ids=lambda case: case.name)
def test_the_map_numbers_all_rows_by_expert_then_by_slot(case):
    call = Call(case)
    row_of = call.run()["expanded_idx_to_permuted_idx"]
    packed = "topk_weights" not in call.given
    ids = (call.given["topk_ids"] >> (16 if packed else 0)).reshape(-1)
    local = (ids >= case.offset) & (ids < case.offset + case.local)
    assert np.all(row_of[~local] == -1)
    slots = np.flatnonzero(local)
    assert sorted(row_of[local].tolist()) == list(range(len(slots)))
    in_row_order = slots[np.argsort(row_of[local])]
    assert [(ids[slot], slot) for slot in in_row_order] == sorted((ids[slot], slot) for slot in slots)


@pytest.mark.parametrize("case", [case for case in SMALL if case.window], ids=lambda case: case.name)
def test_an_offset_in_memory_means_the_same_as_one_in_the_problem(case):
    call = Call(case)
    assert_same_results(Call(case, call.given, offset_on_device=True).run(), call.run())


@pytest.mark.parametrize("offset", [-(2**31), -32768, -3, -1, 2, 15, 16, 32767, 65536, 2**31 - 1])
def test_any_bit_pattern_of_an_offset_in_memory_is_safe(offset):
    """A window that lies partly or wholly outside the experts selects what is inside."""
    case = CASES["routing_mixed_window"]
    call = Call(case, offset_on_device=True)
    call.write_input("local_expert_offset", np.array(offset, np.int32))
    moved = dataclasses.replace(case, window=(offset, case.local))
    assert_matches(moved, call.given, call.run())


@pytest.mark.parametrize("case", [CASES[name] for name in REFUSING.split()], ids=lambda case: case.name)
def test_a_buffer_that_is_too_small_or_absent_or_misaligned_is_refused_by_name(case):
    call = Call(case)
    pointers, sizes = call.pointers_and_sizes()
    for index, name in enumerate((*problem.INPUTS, *problem.OUTPUTS)):
        if not sizes[index]:
            continue
        changes = [(pointers[index], sizes[index] - 1)]
        if name not in problem.PER_EXPERT:
            changes += [(0, sizes[index]), (0, 0)]
        if call.alignment[name] > 1:
            changes.append((pointers[index] + call.alignment[name] // 2, sizes[index]))
        for pointer, size in changes:
            changed = [list(pointers), list(sizes)]
            changed[0][index], changed[1][index] = pointer, size
            with pytest.raises(ValueError, match=f"{name} must"):
                native.forward(call.problem, *changed)
    for name, output in call.results().items():
        assert np.all(output.view(np.uint8) == 0xFF), f"{name} was written by a refused call"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("t7", {"fp8_quantization_type": problem.Fp8QuantizationType.NoneFp8}, "fp8_quantization_type must"),
        ("t7", {"fp8_quantization_type": problem.Fp8QuantizationType.MxFp8}, "weights_scale_rows must be 128"),
        ("t7", {"weights_scale_rows": 1}, "weights_scale_rows must be 128"),
        ("mx", {"weights_scale_rows": 128}, "weights_scale_rows must be 128"),
        ("mx", {"weights_scale_rows": 0}, "weights_scale_rows must be 128"),
        ("mx_grid", {"weights_scale_rows": 1}, "gemm1_weights_scale must hold"),
        ("mx", {"weight_layout": problem.WeightLayout.BlockMajorK}, "weight_layout must be MajorK with MxFp8"),
        ("t7", {"weight_layout": problem.WeightLayout.MajorMn}, "weight_layout must"),
        ("t7", {"activation_type": 5}, "activation_type must"),
        ("t7", {"topk_weights_dtype": problem.DataType.FLOAT8_E4M3}, "topk_weights must"),
    ],
    ids=str,
)
def test_options_that_are_none_are_refused_in_cpp_too(name, changes, words):
    call = Call(CASES[name])
    call.problem = dataclasses.replace(call.problem, **changes)
    with pytest.raises(ValueError, match=words):
        call.launch()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_tokens": -1},
        {"num_tokens": 2**31},
        {"top_k": 0},
        {"top_k": 33},
        {"hidden_size": 0},
        {"hidden_size": 200},
        {"intermediate_size": 64},
        {"intermediate_size": 2**33},
        {"local_num_experts": 0},
        {"local_num_experts": 9},
        {"num_experts": 40000},
        {"hidden_states_scale_token_stride": -1},
        {"hidden_states_dtype": problem.DataType.FLOAT32},
    ],
    ids=str,
)
def test_sizes_that_could_corrupt_memory_are_refused_in_cpp_too(changes):
    call = Call(CASES["t7"])
    call.problem = dataclasses.replace(call.problem, **changes)
    with pytest.raises(ValueError, match="must"):
        call.launch()


def test_several_threads_may_call_at_once():
    calls = [Call(case) for case in SOME for _ in range(2)]
    expected = [Call(call.case, call.given).run() for call in calls]
    start = threading.Barrier(len(calls))

    def work(call):
        start.wait()
        for _ in range(3):
            call.launch()

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for call, results in zip(calls, expected, strict=True):
        assert_same_results(call.results(), results)


def test_one_stage_after_the_other_is_the_whole_call():
    for case in SOME:
        call = Call(case)
        expected = call.run()
        call.poison()
        for stage in (native.ROUTE, native.PERMUTE, native.GEMM1, native.GEMM2, native.FINALIZE):
            call.launch(stages=stage)
        assert_same_results(call.results(), expected)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("do_finalize", [True, False])
def test_workspace_size_is_affine_in_tokens(do_finalize, lora):
    sizes = []
    for tokens in (0, 1, 2, 1000):
        case = Case("", tokens, do_finalize=do_finalize, lora=lora)
        sizes.append(native.workspace_bytes(cases.problem(case, cases.arrays(case))))
    assert sizes[3] - sizes[0] == 1000 * (sizes[1] - sizes[0]) == 500 * (sizes[2] - sizes[0]) > 0


@pytest.mark.parametrize("case", [Case("", 8193, 384, 128, 4, 2), Case("", 8200, 128, 128, 3, 1)], ids=["two", "one"])
def test_a_large_call_keeps_half_of_its_rows_columns_at_a_time(case):
    """It has the bits of two calls of half its tokens each, and less workspace than both."""
    call = Call(case)
    output = call.run()["output"]
    parts = []
    for tokens in np.array_split(np.arange(case.tokens), 2):
        part = dict(call.given)
        for name, axis in (("topk_ids", 0), ("hidden_states", 0), ("hidden_states_scale", 1)):
            part[name] = np.ascontiguousarray(np.take(call.given[name], tokens, axis))
        parts.append(Call(dataclasses.replace(case, tokens=len(tokens)), part))
    compare.assert_same_bits(output, np.concatenate([part.run()["output"] for part in parts]), "output")
    saved = sum(part.outputs["workspace"].nbytes for part in parts) - call.outputs["workspace"].nbytes
    assert saved >= case.tokens * case.top_k * 2 * max(case.hidden - 256, 0)  # bytes of bfloat16


@pytest.mark.parametrize("name", ["t53", "routing_mixed_window", "lora", "identity"])
def test_a_layout_changes_no_bit(name):
    """The same weights in every layout give the same results."""
    plain = CASES[name]
    expected = Call(plain).run()
    for shuffled in (False, True):
        for layout in (problem.WeightLayout.MajorK, problem.WeightLayout.BlockMajorK):
            case = dataclasses.replace(plain, shuffled=shuffled, weight_layout=layout)
            assert_same_results(Call(case).run(), expected)


def test_parameters_of_one_zero_and_no_limit_change_no_bit():
    case = CASES["alpha_beta_clamp"]
    given = cases.arrays(case)
    for name, value in (("gemm1_alpha", 1), ("gemm1_beta", 0), ("gemm1_clamp_limit", np.inf)):
        given[name] = np.full(case.local, value, np.float32)
    expected = Call(dataclasses.replace(case, per_expert=())).run()
    assert_same_results(Call(case, given).run(), expected)


def test_ids_apart_from_the_same_weights_change_no_bit():
    case = CASES["routing_mixed_window"]
    call = Call(case)
    ids, weights = reference.unpack_topk_ids(call.given["topk_ids"])
    apart = call.given | {"topk_ids": ids, "topk_weights": weights}
    assert_same_results(Call(case, apart).run(), call.run())
    assert_same_results(Call(case, apart | {"topk_weights": weights.astype(np.float32)}).run(), call.run())


def test_a_delta_of_zero_changes_no_bit():
    case = CASES["lora"]
    given = cases.arrays(case)
    given["gemm1_lora_delta"] = np.zeros_like(given["gemm1_lora_delta"])
    output = Call(case, given).run()["output"]
    compare.assert_same_bits(output, Call(dataclasses.replace(case, lora=False)).run()["output"], "output")


@st.composite
def random_cases(draw):
    experts = draw(st.integers(1, 40))
    local = draw(st.integers(1, experts))
    activation = draw(st.sampled_from(problem.ActivationType))
    parameters = st.sets(st.sampled_from(problem.PER_EXPERT))
    quantization = draw(st.sampled_from((problem.Fp8QuantizationType.DeepSeekFp8, problem.Fp8QuantizationType.MxFp8)))
    layouts = [problem.WeightLayout.MajorK]
    if quantization is problem.Fp8QuantizationType.DeepSeekFp8:
        layouts.append(problem.WeightLayout.BlockMajorK)
    return Case(
        "random",
        draw(st.integers(0, 40)),
        128 * draw(st.integers(1, 3)),
        128 * draw(st.integers(1, 3)),
        experts,
        draw(st.integers(1, min(experts, 32))),
        (draw(st.integers(0, experts - local)), local),
        draw(st.sampled_from(sorted(routings.ROUTINGS))),
        draw(st.sampled_from(("positive", "signed"))),
        draw(st.sampled_from(("float8_e4m3fn", "bfloat16"))),
        draw(st.sampled_from(("block_major", "token_major", "padded"))),
        draw(st.booleans()),
        topk_weights=draw(st.sampled_from(("packed", "bfloat16", "float32"))),
        activation=activation,
        per_expert=tuple(sorted(draw(parameters))) if activation is problem.ActivationType.Swiglu else (),
        weight_layout=draw(st.sampled_from(layouts)),
        shuffled=draw(st.booleans()),
        lora=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        quantization=quantization,
        scale_rows=draw(st.sampled_from((1, 32))),
    )


@examples(100)
@given(random_cases(), st.booleans(), st.booleans())
def test_random_problems_match_the_reference(case, odd, offset_on_device):
    note(str(case))
    call = Call(case, odd=odd, offset_on_device=offset_on_device)
    assert_matches(case, call.given, call.run())
