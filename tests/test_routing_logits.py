"""Routing from logits: what the reference means, the CPU backend and the emulated CUDA kernel against it, and what is
refused.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import emulated
import emulated_routing
import hypothesis
import hypothesis.strategies as st
import logits
import numpy as np
import pytest
from logits import KINDS, Case
from memory import INPUT_GUARD, OUTPUT_GUARD, Block, Host, flat_bytes
from numpy.typing import NDArray

from jax_moe import native, reference_routing, routing_problem
from jax_moe.enums import RoutingMethodType as Method
from jax_moe.problem import Array
from jax_moe.routing_problem import BUFFERS, METHODS, RoutingProblem

CASES = logits.one_of_each()
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def run(case: Case, given: tuple[NDArray, NDArray | None], memory: Any = None) -> tuple[NDArray, NDArray]:
    """ids and weights of a native call, between guards, at the weakest alignment that arrays may have."""
    memory = memory or Host()
    problem = case.problem()
    arrays = {"routing_logits": given[0], "routing_bias": given[1] if problem.reads_bias else None}
    blocks = {}
    for name, array in arrays.items():
        if array is not None:
            blocks[name] = Block(memory, array.nbytes, array.itemsize, INPUT_GUARD)
            blocks[name].write(flat_bytes(array))
    for name, expected in problem.outputs().items():
        blocks[name] = Block(memory, 4 * math.prod(expected.shape), 4, OUTPUT_GUARD)
        blocks[name].fill(0xFF)
    order = [blocks.get(name) for name in BUFFERS]
    pointers = [block.pointer if block else 0 for block in order]
    native.route_logits(problem, pointers, [block.nbytes if block else 0 for block in order], device=memory.device)
    shape = (case.num_tokens, case.top_k)
    ids = blocks["topk_ids"].read(np.int32, shape, "topk_ids")
    return ids, blocks["topk_weights"].read(np.float32, shape, "topk_weights")


# ---- the reference ---------------------------------------------------------------------------------------------------
ROW = [1.0, 3.0, -2.0, 2.0]  # experts by logit: 1 3 0 2
BIAS = [0.0, -0.5, 0.0, 0.0]  # makes sigmoid + bias choose 3 before 0 and 1 last but one


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def hand_computed() -> dict[Method, tuple[list[int], list[float]]]:
    """ids and weights of ROW with top_k 2 (Llama4: 1), BIAS and factor 3."""
    p = [math.exp(x) / sum(map(math.exp, ROW)) for x in ROW]
    s = [sigmoid(x) for x in ROW]
    biased = [3 * s[e] / (s[3] + s[0]) for e in (3, 0)]
    return {
        Method.Default: ([1, 3], [p[1], p[3]]),
        Method.Renormalize: ([1, 3], [sigmoid(1), sigmoid(-1)]),
        Method.DeepSeekV3: ([3, 0], biased),
        Method.Llama4: ([1], [s[1]]),
        Method.RenormalizeNaive: ([1, 3], [sigmoid(1), sigmoid(-1)]),
        Method.TopK: ([1, 3], [3, 2]),
        Method.SigmoidRenorm: ([1, 3], [s[1] / (s[1] + s[3]), s[3] / (s[1] + s[3])]),
        Method.MiniMax2: ([3, 0], biased),
        Method.Sigmoid: ([1, 3], [s[1], s[3]]),
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_gives_hand_computed_weights(method: Method) -> None:
    ids, weights = hand_computed()[method]
    row, bias = np.array([ROW], np.float32), np.array(BIAS, np.float32)
    got = reference_routing.route(row, bias, top_k=len(ids), method=method, routed_scaling_factor=3)
    assert got[0].tolist() == [ids]
    np.testing.assert_allclose(got[1], [weights], rtol=1e-6)


def test_the_reference_keeps_the_groups_whose_two_best_have_the_greatest_sum() -> None:
    # Group 0 has the greatest expert, group 2 the best pair; groups 1 and 3 tie for the third place.
    row = np.array([[5, 0.1, 0, 0, 2, 2, 0, 0]], np.float32)
    for kept, ids in ((1, [4, 5]), (2, [0, 4]), (3, [0, 4])):
        got = reference_routing.route(row, top_k=2, method=Method.DeepSeekV3, n_group=4, topk_group=kept)
        assert got[0].tolist() == [ids]
    got = reference_routing.route(row, top_k=6, method=Method.DeepSeekV3, n_group=4, topk_group=3)
    assert got[0].tolist() == [[0, 4, 5, 1, 2, 3]]


def test_ties_go_to_the_smaller_id_and_nan_comes_last() -> None:
    row = np.array([[0.0, np.nan, -np.inf, -0.0, 1, -np.nan]], np.float32)
    ids, _ = reference_routing.route(row, top_k=6, method=Method.TopK)
    assert ids.tolist() == [[4, 0, 3, 2, 1, 5]]


def test_the_comparison_sees_wrong_results() -> None:
    case = Case(Method.Sigmoid, kind="few values")
    given = case.arrays()
    ids, weights = case.reference(*given)
    logits.assert_routed(case, given, (ids, weights))
    tied = given[0][0, ids[0, 0]] == given[0][0, ids[0, 1]]
    assert tied, "the first two experts have the same logit"
    swapped = ids.copy()
    swapped[0, :2] = ids[0, 1::-1]
    twice = ids.copy()
    twice[:, 1] = twice[:, 0]
    for wrong in ((swapped, weights), (twice, weights), (ids, weights * np.float32(1.0001)), (ids - 64, weights)):
        with pytest.raises(AssertionError):
            logits.assert_routed(case, given, wrong)


# ---- the CPU backend -------------------------------------------------------------------------------------------------
@by_name
def test_the_cpu_backend_routes_as_the_reference(case: Case) -> None:
    for seed in range(2):
        given = case.arrays(seed)
        logits.assert_routed(case, given, run(case, given))


@pytest.mark.parametrize("method", METHODS)
def test_no_tokens_are_no_work(method: Method) -> None:
    case = Case(method, num_tokens=0, top_k=1)
    ids, weights = run(case, case.arrays())
    assert ids.shape == weights.shape == (0, 1)


def test_results_do_not_depend_on_threads_or_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Method.DeepSeekV3, 300, 256, 8, 8, 4)
    given = case.arrays()
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("JAX_MOE_NUM_THREADS", threads)
        results.append(run(case, given))
    alone = [run(dataclasses.replace(case, num_tokens=1), (given[0][t : t + 1], given[1])) for t in range(0, 300, 50)]
    for i in range(2):
        np.testing.assert_array_equal(results[0][i], results[1][i])
        np.testing.assert_array_equal(results[0][i][::50], np.concatenate([one[i] for one in alone]))


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    method = draw(st.sampled_from(METHODS))
    size = draw(st.integers(2, 40))
    groups = draw(st.integers(1, 8)) if method is Method.DeepSeekV3 else 1
    kept = draw(st.integers(1, groups))
    return Case(
        method,
        num_tokens=draw(st.integers(0, 6)),
        num_experts=size * groups,
        top_k=1 if method is Method.Llama4 else draw(st.integers(1, min(32, size * kept))),
        n_group=groups,
        topk_group=kept,
        logits_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        bias_dtype=draw(st.sampled_from(["float32", "bfloat16", None])),
        routed_scaling_factor=draw(st.sampled_from([None, 0, 1, 2.5, -1])),
        norm_topk_prob=draw(st.booleans()),
        kind=draw(st.sampled_from(KINDS)),
    )


@hypothesis.given(case=any_case(), seed=st.integers(0, 1000))
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
def test_any_call_routes_as_the_reference(case: Case, seed: int) -> None:
    given = case.arrays(seed)
    logits.assert_routed(case, given, run(case, given))


def test_the_library_was_built_with_this_contract() -> None:
    assert native.load().routing_abi_text() == routing_problem.abi_text()
    with pytest.raises(ImportError, match="does not belong"):
        native.check_abi(routing_problem.abi_text() + " more", routing_problem.abi_text())


# ---- the CUDA kernel, emulated ---------------------------------------------------------------------------------------
@pytest.mark.skipif(bool(emulated.missing_compiler()), reason=str(emulated.missing_compiler()))
@by_name
def test_the_kernel_routes_as_the_reference(emulator: emulated.Emulator, case: Case) -> None:
    for seed in range(3):
        given = case.arrays(seed)
        arrays = {"routing_logits": given[0], "routing_bias": given[1] if case.problem().reads_bias else None}
        logits.assert_routed(case, given, emulated_routing.route(emulator, case.problem(), arrays, seed))


@pytest.mark.skipif(bool(emulated.missing_compiler()), reason=str(emulated.missing_compiler()))
@pytest.mark.parametrize("enable_pdl", [True, False])
def test_the_kernel_overlaps_when_it_may(emulator: emulated.Emulator, enable_pdl: bool) -> None:
    case = Case(Method.MiniMax2)
    given = case.arrays()
    problem = dataclasses.replace(case.problem(), enable_pdl=enable_pdl)
    arrays = dict(zip(("routing_logits", "routing_bias"), given, strict=True))
    logits.assert_routed(case, given, emulated_routing.route(emulator, problem, arrays))
    assert emulator.launches() == (1, int(enable_pdl))


# ---- what is refused -------------------------------------------------------------------------------------------------
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"logits": Array((4, 64), "float16")}, r"routing_logits must be float32 or bfloat16 \[num_tokens, num_experts\]"),
    ({"logits": Array((64,), "float32")}, r"routing_logits must be float32 or bfloat16 .* got float32\[64\]"),
    ({"logits": None}, "routing_logits must be float32 or bfloat16 .* got None"),
    ({"logits": Array((4, 2049), "float32")}, "routing_logits must be of 1 to 2048 experts"),
    ({"logits": Array((4, 0), "float32")}, "routing_logits must be of 1 to 2048 experts"),
    ({"logits": Array((2**31 // 8, 64), "float32"), "top_k": 8}, "routing_logits must be of at most .* split the call"),
    ({"bias": Array((63,), "float32")}, r"routing_bias must be None, .* \[num_experts\] = \[64\], got float32\[63\]"),
    ({"bias": Array((64,), "float16")}, "routing_bias must be None, bfloat16 or float32"),
    ({"bias": Array((63,), "float32"), "routing_method_type": 1}, "routing_bias must be None"),
    ({"top_k": 0}, r"top_k must be an integer in \[1, min\(num_experts, 32\)\] = \[1, 32\], got 0"),
    ({"top_k": 33}, "top_k must be an integer in"),
    ({"top_k": 2.0}, "top_k must be an integer in"),
    ({"top_k": True}, "top_k must be an integer in"),
    ({"logits": Array((4, 3), "float32"), "top_k": 4}, r"top_k must be an integer in .*= \[1, 3\], got 4"),
    ({"routing_method_type": 9}, "routing_method_type must be one of the methods Default .* got Unspecified"),
    ({"routing_method_type": 10}, "routing_method_type must be one of RoutingMethodType"),
    ({"routing_method_type": 3}, "top_k must be 1 with Llama4, got 4"),
    ({"n_group": 7}, r"n_group must be a positive divisor of num_experts \(64\), got 7"),
    ({"n_group": 64, "topk_group": 4}, "n_group must be a divisor of num_experts .* groups of at least 2"),
    ({"n_group": 4, "topk_group": 5}, r"topk_group must be in \[1, n_group\] = \[1, 4\], got 5"),
    ({"n_group": 32, "topk_group": 1}, r"topk_group must be at least 2, .* hold top_k \(4\), got 1"),
    ({"n_group": 4, "routing_method_type": 1}, "n_group must be None, 0 or 1 with Renormalize, got 4"),
    ({"topk_group": 2, "routing_method_type": 7}, "topk_group must be None, 0 or 1 with MiniMax2, got 2"),
    ({"routed_scaling_factor": "2"}, "routed_scaling_factor must be None or a finite number, got '2'"),
    ({"routed_scaling_factor": math.nan}, "routed_scaling_factor must be None or a finite number, got nan"),
    ({"norm_topk_prob": None}, "norm_topk_prob must be True or False, got None"),
    ({"norm_topk_prob": 2}, "norm_topk_prob must be True or False, got 2"),
    ({"enable_pdl": 2}, "enable_pdl must be None, True or False, got 2"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_does_not_fit_is_refused_in_words(changed: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"logits": Array((4, 64), "float32"), "bias": None}
    arguments |= {"top_k": 4, "routing_method_type": Method.DeepSeekV3} | changed
    with pytest.raises(ValueError, match=f"route: {words}"):
        RoutingProblem.create("route", arguments.pop("logits"), arguments.pop("bias"), **arguments)


WRONG_FIELDS = {
    "num_experts": (0, 2049, "num_experts"),
    "num_tokens": (-1, 2**40, "num_tokens"),
    "top_k": (0, 33, "top_k"),
    "method": (-1, 9, "routing_method_type"),
    "n_group": (0, 64, "n_group"),
    "topk_group": (0, 5, "topk_group"),
    "logits_dtype": (0, 1, "routing_logits"),
    "bias_dtype": (1, 7, "routing_bias"),
}


@pytest.mark.parametrize("field", WRONG_FIELDS)
def test_fields_that_could_corrupt_memory_are_refused_in_c(field: str) -> None:
    *values, words = WRONG_FIELDS[field]
    problem = Case(Method.DeepSeekV3, n_group=4, topk_group=2).problem()
    for value in values:
        with pytest.raises(ValueError, match=words):
            native.route_logits(dataclasses.replace(problem, **{field: value}), [0] * 4, [0] * 4)


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_that_are_too_small_or_misaligned_are_refused(name: str) -> None:
    case = Case(Method.MiniMax2)
    problem = case.problem()
    memory = [Block(Host(), 2048, 0, None) for _ in BUFFERS]
    sizes = [case.num_tokens * case.num_experts * 4, case.num_experts * 4, *[case.num_tokens * case.top_k * 4] * 2]
    index = BUFFERS.index(name)
    pointers = [block.pointer for block in memory]
    for shift, cut, words in ((0, 1, "must hold"), (1, 0, "must be aligned")):
        moved, cut_sizes = list(pointers), list(sizes)
        moved[index] += shift
        cut_sizes[index] -= cut
        with pytest.raises(ValueError, match=f"{name} {words}"):
            native.route_logits(problem, moved, cut_sizes)
