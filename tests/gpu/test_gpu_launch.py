"""How calls of the CUDA backend go together: captured, replayed, back to back, on several streams and threads."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from call import Call
from cases import CASES, Case
from memory import Block, Cuda
from results import assert_matches, assert_same_results

from jax_moe import native

NAMES = (
    "t7 t257 bf16_t53 routing_mixed_window unfinalized_window e300 blocks_t700 lora_unfinalized blocked_shuffled_t257 "
    "alpha_beta_clamp apart_f32 relu2_t257 mx_t257 mx_shuffled_t257"
).split()
PER_TOKEN = ("topk_ids", "topk_weights", "hidden_states", "gemm1_lora_delta")
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=lambda case: case.name)


def other_tokens(case: Case) -> cases.Arrays:
    """Inputs of the same shapes with other tokens, scales and routing; the weights stay."""
    rotated = cases.arrays(dataclasses.replace(case, routing="zipf"))
    for name in rotated.keys() & PER_TOKEN:
        rotated[name] = np.ascontiguousarray(np.roll(rotated[name], 1, axis=0))
    if rotated["hidden_states_scale"] is not None:
        rotated["hidden_states_scale"] = np.ascontiguousarray(np.roll(rotated["hidden_states_scale"], 1, axis=1))
    return rotated


def stream_of(stream: Any) -> int:
    return stream.cuda_stream


@pytest.mark.parametrize("name", ["t7", "bf16_t53"])
def test_the_first_call_of_a_process_may_be_a_captured_one(name: str) -> None:
    program = [sys.executable, str(Path(__file__).with_name("first_call_captured.py")), name]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@some_cases
def test_a_captured_call_replays_with_new_inputs(cuda: Cuda, case: Case) -> None:
    import torch

    call = Call(case, memory=cuda)
    call.run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call.launch(stream_of(torch.cuda.current_stream()))
    changed = other_tokens(case)
    expected = Call(case, changed, cuda).run()
    for name in (*PER_TOKEN, "hidden_states_scale"):
        if changed.get(name) is not None:
            call.write_input(name, changed[name])
    for _ in range(3):
        call.poison()
        graph.replay()
        assert_same_results(call.results(), expected)
    assert_matches(case, changed, expected, on_hopper=True)


def test_several_captured_calls_in_one_graph(cuda: Cuda) -> None:
    import torch

    calls = [Call(CASES[name], memory=cuda) for name in NAMES]
    expected = [call.run() for call in calls]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls * 2:
            call.launch(stream_of(torch.cuda.current_stream()))
    for call in calls:
        call.poison()
    for _ in range(3):
        graph.replay()
    for call, results in zip(calls, expected, strict=True):
        assert_same_results(call.results(), results)


def test_calls_back_to_back_may_share_a_workspace(cuda: Cuda) -> None:
    """On one stream, without a wait between them: a call's last kernels and the next one's first must not overlap."""
    calls = [Call(CASES[name], memory=cuda) for name in NAMES]
    expected = [call.run() for call in calls]
    shared = Block(cuda, max(call.outputs["workspace"].nbytes for call in calls), 0, 0xA5)
    for call in calls:
        call.poison()
        call.outputs["workspace"] = shared
    for _ in range(50):
        for call in calls:
            call.launch()
    for call, results in zip(calls, expected, strict=True):
        assert_same_results(call.results(), results)


def run_on_two_streams(calls: list[Call]) -> None:
    import torch

    expected = [call.run() for call in calls]
    for call in calls:
        call.poison()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(50):
        for call, stream in zip(calls, streams, strict=True):
            call.launch(stream_of(stream))
    torch.cuda.synchronize()
    for call, results in zip(calls, expected, strict=True):
        assert_same_results(call.results(), results)


def test_calls_on_two_streams_at_once(cuda: Cuda) -> None:
    run_on_two_streams([Call(CASES[name], memory=cuda) for name in ("blocks_t700", "routing_mixed_window")])


@pytest.mark.parametrize(
    "case", [Case("many_rows", 2000, 1024, 1024, 16, 4), Case("few_rows", 64, 1024, 512, 128, 8)], ids=lambda c: c.name
)
def test_calls_that_do_not_fit_on_the_gpu_together(cuda: Cuda, case: Case) -> None:
    """Either has a CTA for every SM, and CTAs that wait for tiles of others must not keep those out."""
    calls = [Call(case, memory=cuda) for _ in range(2)]
    assert "grouped_gemm" in native.explain(calls[0].problem)
    run_on_two_streams(calls)


def test_several_threads_at_once(cuda: Cuda) -> None:
    """Each thread with its own stream; the device that is current in a new thread is not always the call's."""
    import torch

    calls = [Call(CASES[name], memory=cuda) for name in NAMES]
    expected = [call.run() for call in calls]
    for call in calls:
        call.poison()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    start = threading.Barrier(len(calls))
    errors: list[BaseException] = []

    def work(call: Call, stream: Any) -> None:
        try:
            start.wait()
            for _ in range(20):
                call.launch(stream_of(stream))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, streams, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not errors
    for call, results in zip(calls, expected, strict=True):
        assert_same_results(call.results(), results)


@some_cases
def test_one_stage_after_the_other_is_the_whole_call(cuda: Cuda, case: Case) -> None:
    call = Call(case, memory=cuda)
    expected = call.run()
    call.poison()
    for stage in (native.ROUTE, native.PERMUTE, native.GEMM1, native.GEMM2, native.FINALIZE):
        call.launch(stages=stage)
    assert_same_results(call.results(), expected)


def test_a_call_allocates_nothing(cuda: Cuda) -> None:
    import torch

    call = Call(CASES["t257"], memory=cuda)
    call.run()
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info(cuda.device)
    for _ in range(10):
        call.launch()
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info(cuda.device) == before
