"""The torch facade on an sm_90 GPU: streams, CUDA graphs, compiled graphs, and the same results as on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import compare
import pytest
import results

torch = pytest.importorskip("torch", reason="the torch facade needs torch")

import torch_calls  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

pytestmark = pytest.mark.gpu

CASE = cases.Case("gpu", tokens=53, hidden=512, inter=256, experts=16, top_k=4, window=(3, 9))


@pytest.fixture
def device(gpu: int) -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip(f"this torch ({torch.__version__}) has no CUDA")
    return torch.device("cuda", gpu)


def on(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with their tensors moved; dense ones keep their strides."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), arguments)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8).cpu()


PLAIN = ("t0", "t1", "t129", "bf16_t53", "scale_token_major_t129", "routing_mixed_window")
PAIRS = tuple(name for name in cases.CASES if name.startswith("pair_"))


@pytest.mark.parametrize("name", [*PLAIN, *cases.OPTIONS, *PAIRS, "lora_unfinalized"])
def test_results_are_the_references(name: str, device: torch.device) -> None:
    case = cases.CASES[name]
    by_name = torch_calls.named(case, torch_calls.function(**on(device, torch_calls.arguments(case))))
    assert all(result.device == device for result in by_name.values())
    found = {name: torch_calls.array(result.cpu()) for name, result in by_name.items()}
    found.pop("gemm1_activation_output", None)  # its scales are not returned
    results.assert_matches(case, cases.arrays(case), found, on_hopper=True)


def test_gemm1_activations_are_those_of_the_cpu(device: torch.device) -> None:
    case = cases.CASES["lora_unfinalized"]
    arguments = torch_calls.arguments(case)
    found, expected = (
        torch_calls.defined(case, torch_calls.function(**given))["gemm1_activation_output"].cpu()
        for given in (on(device, arguments), arguments)
    )
    values, wanted = (codes.view(torch.float8_e4m3fn).float().numpy() for codes in (found, expected))
    compare.assert_close(values, wanted, "gemm1_activation_output", results.ACTIVATION_14_BITS)


def test_unfinalized_maps_are_those_of_the_cpu(device: torch.device) -> None:
    arguments = torch_calls.arguments(dataclasses.replace(CASE, do_finalize=False))
    y, weights, rows = torch_calls.function(**on(device, arguments))
    y_cpu, weights_cpu, rows_cpu = torch_calls.function(**arguments)
    assert torch.equal(rows.cpu(), rows_cpu) and torch.equal(bits(weights), bits(weights_cpu))
    named = rows_cpu[rows_cpu >= 0].long()
    found, expected = (torch_calls.array(each.cpu()[named]) for each in (y, y_cpu))
    compare.assert_close(found, expected, "gemm2_output", compare.FEW_VALUES_14_BITS)


def test_a_call_runs_on_the_current_stream(device: torch.device) -> None:
    """Inputs are written on a side stream just before the call: another stream would read the old ones."""
    arguments = on(device, torch_calls.arguments(CASE))
    expected = torch_calls.function(**arguments)
    zeros = torch.zeros_like(arguments["hidden_states"].view(torch.uint8))
    x = zeros.clone().view(torch.float8_e4m3fn)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.view(torch.uint8).copy_(arguments["hidden_states"].view(torch.uint8))
        result = torch_calls.function(**arguments | {"hidden_states": x})
    stream.synchronize()
    assert torch.equal(bits(result), bits(expected))


@pytest.mark.parametrize("case", [CASE, dataclasses.replace(CASE, lora=True, topk_weights="float32")])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_cuda_graph_replays_with_changed_inputs(in_place: bool, case: cases.Case, device: torch.device) -> None:
    arguments = on(device, torch_calls.arguments(case))
    other = on(device, torch_calls.arguments(dataclasses.replace(case, seed=1)))

    def output(given: dict[str, Any]) -> torch.Tensor:
        return torch_calls.named(case, torch_calls.function(**given))["output"]

    expected = [output(given) for given in (arguments, arguments | changed(other))]
    assert not torch.equal(*map(bits, expected))
    if in_place:
        arguments["output"] = torch.empty_like(expected[0])
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = output(arguments)
    graph.replay()
    assert torch.equal(bits(result), bits(expected[0]))
    for old, new in zip(tree_leaves(changed(arguments)), tree_leaves(changed(other)), strict=True):
        old.view(torch.uint8).copy_(new.view(torch.uint8))
    for _ in range(3):
        graph.replay()
        assert torch.equal(bits(result), bits(expected[1]))


def changed(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a replay reads anew: the tensors of the tokens, some of them in a pair."""
    names = ("topk_ids", "hidden_states", "hidden_states_scale", "gemm1_lora_delta")
    return {name: arguments[name] for name in names if name in arguments}


@pytest.mark.parametrize("option", [{"x_dtype": "bfloat16"}, {"lora": True, "topk_weights": "float32"}])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_equals_eager(mode: str, option: dict[str, Any], device: torch.device) -> None:
    case = dataclasses.replace(CASE, **option)
    arguments = on(device, torch_calls.arguments(case))
    tensors = {name: value for name, value in arguments.items() if isinstance(value, (torch.Tensor, tuple))}
    options = {name: value for name, value in arguments.items() if name not in tensors}

    def layer(**given: Any) -> Any:
        return torch_calls.function(**given, **options)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    expected = torch_calls.defined(case, layer(**tensors))
    for _ in range(4):  # the third call of reduce-overhead replays a graph
        torch.compiler.cudagraph_mark_step_begin()
        found = torch_calls.defined(case, compiled(**tensors))
        for name, value in expected.items():
            assert torch.equal(bits(found[name]), bits(value)), name


def test_a_call_leaves_only_its_result_allocated(device: torch.device) -> None:
    arguments = on(device, torch_calls.arguments(CASE))
    torch_calls.function(**arguments)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    result = torch_calls.function(**arguments)
    torch.cuda.synchronize(device)
    assert 0 < torch.cuda.memory_allocated(device) - before <= result.nbytes + 512


def test_mixed_devices_are_refused(device: torch.device) -> None:
    arguments = on(device, torch_calls.arguments(CASE))
    words = f"gemm1_weights must be on {device} like hidden_states, got cpu"
    with pytest.raises(ValueError, match=words):
        torch_calls.function(**arguments | {"gemm1_weights": arguments["gemm1_weights"].cpu()})
