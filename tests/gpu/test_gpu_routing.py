"""Routing from logits on a GPU: the reference's results at every size, the CPU backend's, and captured calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import logits
import numpy as np
import pytest
from logits import Case
from memory import Cuda
from test_routing_logits import run

from jax_moe.enums import RoutingMethodType as Method

MANY = [
    Case(Method.DeepSeekV3, 8192, 256, 8, 8, 4, "float32", "float32", 2.5),
    Case(Method.DeepSeekV3, 4099, 384, 8, bias_dtype="bfloat16", routed_scaling_factor=2.827),
    Case(Method.Renormalize, 8192, 128, 8, logits_dtype="bfloat16"),
    Case(Method.RenormalizeNaive, 70001, 512, 10),
    Case(Method.SigmoidRenorm, 1031, 2048, 32),
]


@pytest.mark.parametrize("case", [*logits.one_of_each(), *MANY], ids=lambda case: case.name)
def test_the_kernel_routes_as_the_reference(cuda: Cuda, case: Case) -> None:
    given = case.arrays()
    logits.assert_routed(case, given, run(case, given, cuda))


@pytest.mark.parametrize("case", MANY, ids=lambda case: case.name)
def test_results_are_the_same_on_every_run_and_for_every_number_of_tokens(cuda: Cuda, case: Case) -> None:
    given = case.arrays()
    first, again = run(case, given, cuda), run(case, given, cuda)
    few = dataclasses.replace(case, num_tokens=33)
    part = run(few, (given[0][:33], given[1]), cuda)
    for i in range(2):
        np.testing.assert_array_equal(first[i], again[i])
        np.testing.assert_array_equal(first[i][:33], part[i])


def torch_call(case: Case, given: tuple[Any, Any]) -> Any:
    from torch_facade.logits import OPTIONS, route_logits

    options = {"num_experts": case.num_experts, "enable_pdl": True, **case.options()}
    return route_logits(*given, [int(options[name] or 0) for name in OPTIONS], case.routed_scaling_factor)


def test_a_captured_torch_call_replays_with_new_logits(cuda: Cuda) -> None:
    import torch
    import torch_calls

    case = MANY[0]
    given = [torch_calls.tensor(array).to(f"cuda:{cuda.device}") for array in case.arrays() if array is not None]
    torch_call(case, (given[0], given[1]))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        ids, weights = torch_call(case, (given[0], given[1]))
    changed = case.arrays(1)[0], case.arrays()[1]
    given[0].copy_(torch_calls.tensor(changed[0]))
    graph.replay()
    torch.cuda.synchronize()
    logits.assert_routed(case, changed, (ids.cpu().numpy(), weights.cpu().numpy()))


def test_jax_routes_as_the_reference_on_the_gpu(gpu: int) -> None:
    jax = pytest.importorskip("jax")
    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("jax has no CUDA here")
    import jax_moe

    case = MANY[0]
    given = case.arrays()
    ids, weights = jax.jit(lambda x, bias: jax_moe.route(x, bias, **case.options()))(*given)
    logits.assert_routed(case, given, (np.asarray(ids), np.asarray(weights)))
