"""MxFp8 calls of few tokens on a GPU, which take the decode kernels: right in every layout, and the same bits every
time."""

from __future__ import annotations

import mx_decode
import numpy as np
import pytest
from call import Call
from cases import Case
from memory import Cuda
from results import assert_matches, assert_same_results

from jax_moe import native


@pytest.mark.parametrize("case", mx_decode.CASES.values(), ids=lambda case: case.name)
def test_they_take_the_decode_kernels(cuda: Cuda, case: Case) -> None:
    """What they compute is checked beside all other small cases, in test_gpu_matrix.py."""
    assert "decode_gemm" in native.explain(Call(case, memory=cuda).problem)


@pytest.mark.parametrize("case", mx_decode.WIDE, ids=lambda case: case.name)
def test_wide_layer(cuda: Cuda, case: Case) -> None:
    call = Call(case, memory=cuda)
    first = call.run()
    assert_matches(case, call.given, first, on_hopper=True)
    for _ in range(20):
        call.poison()
        assert_same_results(call.run(), first)


def test_calls_back_to_back(cuda: Cuda) -> None:
    """Launches that overlap the call before, among them ones that quantise tokens ahead and ones that do not."""
    names = ("mx_t1", "mx_quantised_ahead", "mx_shuffled_bf16_t16", "mx_grid_t7", "mx_h640_i896")
    calls = [Call(mx_decode.CASES[name], memory=cuda) for name in names]
    expected = [call.run() for call in calls]
    for call in calls:
        call.poison()
    for _ in range(20):
        for call in calls:
            call.launch()
    for call, results in zip(calls, expected, strict=True):
        assert_same_results(call.results(), results)


def test_a_captured_call_replays(cuda: Cuda) -> None:
    import torch

    call = Call(mx_decode.CASES["mx_quantised_ahead"], memory=cuda)
    expected = call.run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call.launch(torch.cuda.current_stream().cuda_stream)
    for _ in range(3):
        call.poison()
        graph.replay()
        assert_same_results(call.results(), expected)


def test_zeros_under_the_largest_scales_are_zeros(cuda: Cuda) -> None:
    case, given = mx_decode.zeros_under_the_largest_scales()
    assert not np.any(Call(case, given, cuda).run()["output"])
