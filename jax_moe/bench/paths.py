"""The ways to the op that are timed: stage by stage through the library, and whole through torch and through JAX."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from .. import native
from ..problem import INPUTS, OUTPUTS, Problem
from ..shapes import LayerShape
from .device import Device, Set
from .timing import Dispatches, Program, WallClock
from .workload import Cell, Routing

STAGES = {
    "route": native.ROUTE,
    "permute": native.PERMUTE,
    "gemm1": native.GEMM1,
    "gemm2": native.GEMM2,
    "finalize": native.FINALIZE,
}
HOST_CALLS = 20

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Data:
    """Weights and routed tokens to rotate: call i takes weights i modulo their number."""

    weights: list[Set]
    tokens: list[Set]

    def sets(self) -> list[Set]:
        return [{**self.weights[i % len(self.weights)], **tokens} for i, tokens in enumerate(self.tokens)]

    def map(self, function: Callable[[Any], Any]) -> Data:
        """Every array once through `function`."""
        weights, tokens = (
            [{name: function(array) for name, array in arrays.items()} for arrays in part]
            for part in (self.weights, self.tokens)
        )
        return Data(weights, tokens)


def whole_layer(device: Device, shape: LayerShape, seed: int) -> Set:
    """The weights of a layer, when all its experts are made."""
    *_, weights = device.random_weights(shape, seed)
    assert not isinstance(weights, int)
    return weights


def routed_tokens(device: Device, cell: Cell, routings: Sequence[Routing], seed: int) -> list[Set]:
    """A set of random tokens for each routing."""
    return [
        {**device.random_tokens(cell, seed + i), "topk_ids": device.put(routing.topk_ids)}
        for i, routing in enumerate(routings)
    ]


def native_buffers(device: Device, problem: Problem, data: Data) -> list[Set]:
    """The arrays of each set with those that a native call writes."""
    output_bytes, workspace_bytes = 2 * problem.num_tokens * problem.hidden_size, native.workspace_bytes(problem)
    return [
        {**arrays, "output": device.empty(output_bytes), "workspace": device.empty(workspace_bytes)}
        for arrays in data.sets()
    ]


def native_calls(
    device: Device, problem: Problem, buffers: Sequence[Set], stages: int, extension: ModuleType | None = None
) -> list[Call]:
    """One native call for each of native_buffers()."""
    order = (*INPUTS, *OUTPUTS)
    return [device.native_call(problem, [one.get(name) for name in order], stages, extension) for one in buffers]


def stage_programs(device: Device, cell: Cell, data: Data) -> dict[str, Program]:
    """Each stage that does something, alone, on the state that a whole call on the same set left in its workspace."""
    problem = cell.problem()
    done = device.stages(problem)
    buffers = native_buffers(device, problem, data)
    for call in native_calls(device, problem, buffers, native.ALL_STAGES):
        call()
    device.synchronize()
    return {
        name: device.program(native_calls(device, problem, buffers, stage))
        for name, stage in STAGES.items()
        if stage & done
    }


def torch_calls(cell: Cell, data: Data) -> list[Call]:
    """One call of torch_facade a set."""
    import torch_facade

    s = cell.shape

    def of(x: Set) -> Call:
        return lambda: torch_facade.trtllm_fp8_block_scale_routed_moe(
            x["topk_ids"],
            None,
            x["hidden_states"],
            x.get("hidden_states_scale"),
            x["gemm1_weights"],
            x["gemm1_weights_scale"],
            x["gemm2_weights"],
            x["gemm2_weights_scale"],
            s.num_experts,
            s.top_k,
            None,
            None,
            s.intermediate_size,
            s.local_expert_offset,
            s.local_num_experts,
            None,
            batch_invariant=cell.batch_invariant,
        )

    return [of(arrays) for arrays in data.map(to_torch).sets()]


def jax_calls(cell: Cell, data: Data) -> list[Call]:
    """One jitted call a set."""
    import jax

    function = jax.jit(lambda arrays: jax_op(cell, arrays))
    return [functools.partial(function, arrays) for arrays in data.map(to_jax).sets()]


def jax_program(device: Device, cell: Cell, data: Data) -> Program:
    """On a CPU, single jitted calls. On a GPU, one jitted function that makes a call for every set, dispatched several
    times before it is waited for: what a call costs the device inside a larger jitted program. Wall clock.
    """
    import jax

    if device.kind == "cpu":
        return WallClock([_waiting(call) for call in jax_calls(cell, data)])

    @jax.jit
    def chain(data: Any) -> list[Any]:
        weights, tokens = data
        return [jax_op(cell, arrays) for arrays in Data(weights, tokens).sets()]

    arrays = data.map(to_jax)
    return Dispatches(
        functools.partial(chain, (arrays.weights, arrays.tokens)), jax.block_until_ready, len(arrays.tokens)
    )


def jax_op(cell: Cell, arrays: Set) -> Any:
    """The op through JAX, to be traced."""
    from .. import fp8_block_scale_routed_moe

    return fp8_block_scale_routed_moe(
        **{"hidden_states_scale": None, **arrays},
        num_experts=cell.shape.num_experts,
        local_expert_offset=cell.shape.local_expert_offset,
        batch_invariant=cell.batch_invariant,
    )


def same_bits(torch_call: Call, jax_call: Call) -> bool:
    """Whether both front ends give the same bits on one set."""
    import torch

    ours, theirs = torch_call(), torch.from_dlpack(jax_call().block_until_ready())
    return torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def host_seconds(call: Call, wait: Callable[[Any], Any]) -> float:
    """Seconds that the host needs to start a call: a few in a row without waiting, the fastest of five rounds."""
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        results = [call() for _ in range(HOST_CALLS)]
        rounds.append((time.perf_counter() - start) / HOST_CALLS)
        wait(results)
    return min(rounds)


def host_times(device: Device, torch_call: Call | None, jax_call: Call | None) -> dict[str, float]:
    """Host microseconds of one call of each front end, and of a jitted function that does next to nothing."""
    microseconds = {}
    if torch_call:
        microseconds["torch"] = 1e6 * host_seconds(torch_call, lambda _: device.synchronize())
    if jax_call:
        import jax

        empty = functools.partial(jax.jit(lambda x: x + 1), jax.device_put(np.float32(0)))
        microseconds["jax"] = 1e6 * host_seconds(jax_call, jax.block_until_ready)
        microseconds["jax, x + 1"] = 1e6 * host_seconds(empty, jax.block_until_ready)
    return microseconds


def to_torch(array: Any) -> Any:
    """A numpy, JAX or torch array as a torch tensor on the same memory."""
    import torch

    if isinstance(array, np.ndarray):
        return torch.from_numpy(array.view(np.uint8)).view(getattr(torch, array.dtype.name))
    return array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)


def to_jax(array: Any) -> Any:
    """On the device where it is: without a copy on a GPU."""
    import jax

    if isinstance(array, np.ndarray):
        return jax.device_put(array, jax.devices("cpu")[0])
    return jax.dlpack.from_dlpack(array)


def _waiting(call: Call) -> Call:
    return lambda: call().block_until_ready()
