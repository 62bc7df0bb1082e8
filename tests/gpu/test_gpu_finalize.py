"""Finalising apart on a GPU: the reference's results, the bits of do_finalize=True, captured and compiled calls."""

from __future__ import annotations

import os
from typing import Any

import compare
import finalizing
import numpy as np
import pytest
from call import Call
from cases import CASES as LAYERS
from finalizing import CASES, Case
from memory import Cuda

MANY = [
    Case(8192, 8, 2048, 8192 * 8),
    Case(4099, 32, 2048, 70001, "float32"),
    Case(20000, 1, 128, 5, "float32"),
]
LAYER_NAMES = ("t7", "k32", "routing_mixed_window", "apart_bf16", "apart_f32", "bf16_t53", "extreme_nan_x")


@pytest.mark.parametrize("case", [*CASES, *MANY], ids=lambda case: case.name)
def test_the_kernel_sums_as_the_reference(cuda: Cuda, case: Case) -> None:
    given = case.arrays()
    finalizing.assert_finalized(given, finalizing.run(case, given, cuda))


# Calls of fewer tokens sum over experts without rounding their rows.
@pytest.mark.parametrize("name", [name for name in LAYER_NAMES if LAYERS[name].tokens > 16])
def test_the_parts_of_a_layer_give_the_bits_of_the_whole(cuda: Cuda, name: str) -> None:
    case, given, output = finalizing.parts_of(LAYERS[name], lambda layer, given: Call(layer, given, cuda).run())
    compare.assert_same_bits(finalizing.run(case, given, cuda), output, "output")


def torch_tensors(case: Case, device: Any, seed: int = 0) -> list[Any]:
    import torch_calls

    return [torch_calls.tensor(array).to(device) for array in case.arrays(seed)]


@pytest.mark.parametrize("with_output", [False, True])
def test_a_captured_torch_call_replays_with_new_rows(cuda: Cuda, with_output: bool) -> None:
    import torch
    import torch_calls

    from torch_facade import finalize

    case = CASES[0]
    given = torch_tensors(case, cuda.device)
    if with_output:
        given.append(torch.empty(case.tokens, case.hidden, dtype=torch.bfloat16, device=cuda.device))
    finalize(*given)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        output = finalize(*given)
    for tensor, changed in zip(given, torch_tensors(case, cuda.device, 1), strict=False):
        tensor.copy_(changed)
    graph.replay()
    torch.cuda.synchronize()
    changed = case.arrays(1)
    compare.assert_same_bits(torch_calls.array(output.cpu()), finalizing.run(case, changed, cuda), "output")


def test_torch_gives_the_bits_of_the_backend_compiled_too(cuda: Cuda) -> None:
    import torch
    import torch_calls

    from torch_facade import finalize

    for case in (*CASES, MANY[0]):
        given = torch_tensors(case, cuda.device)
        expected = finalizing.run(case, case.arrays(), cuda)
        for function in (finalize, torch.compile(finalize, fullgraph=True, dynamic=False, backend="aot_eager")):
            compare.assert_same_bits(torch_calls.array(function(*given).cpu()), expected, case.name)
        torch._dynamo.reset()


def test_jax_gives_the_bits_of_the_backend_on_the_gpu(cuda: Cuda) -> None:
    jax = pytest.importorskip("jax")
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("jax has no CUDA here")
    import jax_moe

    for case in CASES:
        given = case.arrays()
        got = np.asarray(jax.jit(jax_moe.finalize)(*given))
        compare.assert_same_bits(got, finalizing.run(case, given, cuda), case.name)
