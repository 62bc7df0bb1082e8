"""The torch facade on CUDA tensors: the backend's bits, in place, compiled, captured, and refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import numpy as np
import pytest
from call import Call
from cases import CASES, Case
from compare import FEW_VALUES_14_BITS, assert_close, assert_same_bits
from memory import Cuda
from results import assert_same_results

torch = pytest.importorskip("torch")
torch_calls = pytest.importorskip("torch_calls")

NAMES = (
    "t0 t1 t7 t129 k32 bf16_t0 bf16_t53 routing_mixed_window window_1_2 scale_token_major_t129 unfinalized_t0 "
    "unfinalized_window unfinalized_bf16 extreme_nan_x mx_t129 mx_shuffled_t257 mx_shuffled_grid mx_bf16 "
    "mx_block_major mx_padded mx_e8m0 mx_relu2_shuffled mx_unfinalized_nothing_local"
).split()
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=lambda case: case.name)
CASE = CASES["t53"]


def arguments(case: Case, device: Any, **changes: Any) -> dict[str, Any]:
    """The arguments of a case, tensors on the device, with changes."""
    on_device = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in torch_calls.arguments(case).items()
    }
    return on_device | changes


def named(case: Case, returned: Any) -> dict[str, np.ndarray]:
    results = [returned] if case.do_finalize else returned
    names = ("output",) if case.do_finalize else ("gemm2_output", "expert_weights", "expanded_idx_to_permuted_idx")
    return {name: torch_calls.array(tensor.cpu()) for name, tensor in zip(names, results, strict=True)}


def backend(case: Case, cuda: Cuda, given: cases.Arrays | None = None) -> dict[str, np.ndarray]:
    return Call(case, given, cuda).run()


@some_cases
def test_gives_the_bits_of_the_backend(cuda: Cuda, case: Case) -> None:
    returned = torch_calls.function(**arguments(case, cuda.device))
    for tensor in [returned] if case.do_finalize else returned:
        assert tensor.device == torch.device("cuda", cuda.device)
    assert_same_results(named(case, returned), backend(case, cuda))


def test_output_is_written_in_place_and_returned(cuda: Cuda) -> None:
    output = torch.full((CASE.tokens, CASE.hidden), torch.nan, dtype=torch.bfloat16, device=cuda.device)
    assert torch_calls.function(**arguments(CASE, cuda.device), output=output) is output
    assert_same_results(named(CASE, output), backend(CASE, cuda))


def test_a_scale_with_gaps_is_read_in_place(cuda: Cuda) -> None:
    """The same bits as from a dense scale, and not one byte more allocated."""
    dense = arguments(CASE, cuda.device)
    scale = dense["hidden_states_scale"]
    wide = torch.full((scale.shape[0], 2 * scale.shape[1] + 3), torch.nan, device=cuda.device)
    strided = dense | {"hidden_states_scale": wide[:, : 2 * scale.shape[1] : 2].copy_(scale)}

    outputs, allocated = [], []
    for given in (dense, strided):
        before = torch.cuda.memory_stats(cuda.device)["allocated_bytes.all.allocated"]
        outputs.append(torch_calls.function(**given))
        allocated.append(torch.cuda.memory_stats(cuda.device)["allocated_bytes.all.allocated"] - before)
    assert allocated[0] == allocated[1]
    assert_same_results(named(CASE, outputs[1]), named(CASE, outputs[0]))


def test_runs_on_the_current_stream(cuda: Cuda) -> None:
    """Work that the stream still has to do before the call is seen by it: inputs arrive late there."""
    expected = backend(CASE, cuda)
    given = arguments(CASE, cuda.device)
    x = given["hidden_states"]
    late = x.clone()
    x.view(torch.uint8).zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(cuda.device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.view(torch.uint8).copy_(late.view(torch.uint8))
        output = torch_calls.function(**given)
    stream.synchronize()
    assert_same_results(named(CASE, output), expected)


def test_a_repeated_call_goes_the_short_way_on_any_stream(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_facade import eager, moe

    if eager.EXCHANGE_TABLE is None:
        pytest.skip("this torch has no DLPack exchange table")
    given = arguments(CASE, cuda.device)
    expected = named(CASE, torch_calls.function(**given))
    monkeypatch.setattr(moe, "_call", lambda *_: pytest.fail("the long way"))
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(cuda.device)):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = torch_calls.function(**given)
        stream.synchronize()
        assert_same_results(named(CASE, output), expected)


def test_calls_on_a_gpu_that_is_not_the_current_one(cuda: Cuda) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    other = (cuda.device + 1) % torch.cuda.device_count()
    given = arguments(CASE, other)
    outputs = [torch_calls.function(**given) for _ in range(2)]
    with torch.cuda.device(other):
        outputs += [torch_calls.function(**given) for _ in range(2)]
    outputs.append(torch_calls.function(**given))
    assert torch.cuda.current_device() == cuda.device
    for output in outputs:
        assert output.get_device() == other
        assert_same_results(named(CASE, output), backend(CASE, cuda))


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("case", [CASES["t53"], CASES["bf16_t53"], CASES["unfinalized_window"]], ids=lambda c: c.name)
def test_compiled(cuda: Cuda, case: Case, mode: str | None) -> None:
    given = arguments(case, cuda.device)

    def layer(hidden_states: Any) -> Any:
        return torch_calls.function(**(given | {"hidden_states": hidden_states}))

    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    expected = backend(case, cuda)
    with torch.inference_mode():
        for _ in range(4):  # reduce-overhead warms up, records, then replays
            torch.compiler.cudagraph_mark_step_begin()
            assert_same_results(named(case, compiled(given["hidden_states"])), expected)


@pytest.mark.parametrize("with_output", [False, True])
def test_a_captured_call_replays_with_new_inputs(cuda: Cuda, with_output: bool) -> None:
    given = arguments(CASE, cuda.device)
    if with_output:
        given["output"] = torch.empty(CASE.tokens, CASE.hidden, dtype=torch.bfloat16, device=cuda.device)
    torch_calls.function(**given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = torch_calls.function(**given)
    changed = cases.arrays(dataclasses.replace(CASE, routing="duplicates", seed=5))
    changed |= {name: array for name, array in cases.arrays(CASE).items() if name.startswith("gemm")}
    for name in ("topk_ids", "hidden_states", "hidden_states_scale"):
        tensor = torch_calls.tensor(changed[name])
        bits = torch.uint8 if tensor.dtype == torch.float8_e4m3fn else tensor.dtype
        given[name].view(bits).copy_(tensor.view(bits))
    for _ in range(3):
        output.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_results(named(CASE, output), backend(CASE, cuda, changed))


@pytest.mark.parametrize(
    "name", ["topk_ids", "hidden_states_scale", "gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "output"]
)
def test_a_tensor_on_another_device_is_refused_by_name(cuda: Cuda, name: str) -> None:
    given = arguments(CASE, cuda.device)
    given["output"] = torch.empty(CASE.tokens, CASE.hidden, dtype=torch.bfloat16, device=cuda.device)
    given[name] = given[name].cpu()
    with pytest.raises(ValueError, match=f"trtllm_fp8_block_scale_routed_moe: {name} must"):
        torch_calls.function(**given)


def test_cpu_and_cuda_agree(cuda: Cuda) -> None:
    """Two backends of one contract: the same map and weights exactly, rows up to rounding."""
    case = CASES["unfinalized_window"]
    on_cpu = named(case, torch_calls.function(**torch_calls.arguments(case)))
    on_gpu = named(case, torch_calls.function(**arguments(case, cuda.device)))
    rows = np.count_nonzero(on_cpu["expanded_idx_to_permuted_idx"] >= 0)
    for name in ("expanded_idx_to_permuted_idx", "expert_weights"):
        assert_same_bits(on_gpu[name], on_cpu[name], name)
    assert_close(on_gpu["gemm2_output"][:rows], on_cpu["gemm2_output"][:rows], "gemm2_output", FEW_VALUES_14_BITS)
