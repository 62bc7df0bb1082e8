"""Time that the host spends to start a call, on a layer so small that the kernels have next to nothing to do.

python benchmarks/host_time.py [--device cpu|gpu] [--rounds 200] [--json host_time.json]
On a CPU a call ends when it is computed: what the library itself takes is a line of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

TOKENS, HIDDEN, INTER, EXPERTS, TOP_K = 1, 128, 128, 16, 1
OFFSET, LOCAL = 8, 8  # the experts from number 8 on are here, and chosen is another one
CALLS = 20  # of a round; a GPU's queue takes their launches without making the host wait
Row = tuple[str, Callable[[], Any]]


def arrays() -> dict[str, np.ndarray]:
    """By the names of problem.INPUTS; float8 as its bytes. The one slot chose expert 0: no row is multiplied."""
    return {
        "topk_ids": np.full((TOKENS, TOP_K), 0x3F80, np.int32),
        "hidden_states": np.zeros((TOKENS, HIDDEN), np.uint8),
        "hidden_states_scale": np.ones((HIDDEN // 128, TOKENS), np.float32),
        "gemm1_weights": np.zeros((LOCAL, 2 * INTER, HIDDEN), np.uint8),
        "gemm1_weights_scale": np.ones((LOCAL, 2 * INTER // 128, HIDDEN // 128), np.float32),
        "gemm2_weights": np.zeros((LOCAL, HIDDEN, INTER), np.uint8),
        "gemm2_weights_scale": np.ones((LOCAL, HIDDEN // 128, INTER // 128), np.float32),
    }


def microseconds(call: Callable[[], Any], wait: Callable[[Any], Any], rounds: int) -> tuple[float, float]:
    """The fastest round and the median one, a call."""
    for _ in range(3 * CALLS):
        result = call()
    wait(result)
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(CALLS):
            result = call()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
        wait(result)
    return min(samples), statistics.median(samples)


# ---- torch -----------------------------------------------------------------------------------------------------------
def torch_rows(device: str) -> Iterator[Row]:
    import torch

    import torch_facade

    given = {name: torch.from_numpy(array).to(device) for name, array in arrays().items()}
    for name, array in given.items():
        given[name] = array.view(torch.float8_e4m3fn) if array.dtype == torch.uint8 else array
    options: dict[str, Any] = {
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "n_group": None,
        "topk_group": None,
        "intermediate_size": INTER,
        "local_expert_offset": OFFSET,
        "local_num_experts": LOCAL,
        "routed_scaling_factor": 2.5,
    }
    layer = {**given, "routing_bias": None, **options}
    output = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)
    routed = torch_facade.trtllm_fp8_block_scale_routed_moe
    yield "torch eager", lambda: routed(**layer)
    yield "torch eager, output=", lambda: routed(**layer, output=output)
    yield "torch eager, do_finalize=False", lambda: routed(**layer, do_finalize=False)

    logits = torch.zeros(TOKENS, EXPERTS, device=device)
    routing: dict[str, Any] = {name: value for name, value in layer.items() if name != "topk_ids"} | {
        "routing_method_type": 1
    }
    yield "torch eager, from logits", lambda: torch_facade.trtllm_fp8_block_scale_moe(logits, **routing)
    if hasattr(torch_facade, "finalize"):
        parts = routed(**layer, do_finalize=False)
        yield "torch eager, finalize", lambda: torch_facade.finalize(*parts)
    yield "torch, an addition", lambda: output + output

    tensors = [given[name] for name in arrays()]
    integers = [EXPERTS, TOP_K, 0, 0, INTER, OFFSET, LOCAL, 0, 0, 0, 1, 3, 1, 0, 1]
    op = torch.ops.jax_moe.fp8_block_scale_routed_moe.default
    yield "torch op, as compiled graphs call it", lambda: op(*tensors, integers)
    yield "torch compiled", torch.compile(lambda: routed(**layer), fullgraph=True, backend="aot_eager")
    yield "torch compiled, an addition", torch.compile(lambda: output + output, fullgraph=True, backend="aot_eager")
    if device != "cpu":
        graph = torch.cuda.CUDAGraph()
        routed(**layer)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            routed(**layer)
        yield "torch graph replay", graph.replay


def torch_wait(device: str) -> Callable[[Any], None]:
    import torch

    return (lambda _: None) if device == "cpu" else (lambda _: torch.cuda.synchronize())


# ---- the library -----------------------------------------------------------------------------------------------------
def library_rows(device: str) -> Iterator[Row]:
    """The compiled library alone, given pointers: what is below both front ends."""
    import torch

    from jax_moe import native
    from jax_moe.options import Options
    from jax_moe.problem import INPUTS, OUTPUTS, Array, Problem

    given = arrays()
    types = {np.dtype(np.uint8): "float8_e4m3fn"}
    described: dict[str, Array | None] = {
        name: Array(array.shape, types.get(array.dtype, str(array.dtype))) for name, array in given.items()
    }
    problem = Problem.create("host_time", described, Options(), num_experts=EXPERTS, local_expert_offset=OFFSET)
    buffers = {name: torch.from_numpy(array).to(device) for name, array in given.items()}
    buffers["output"] = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)
    buffers["workspace"] = torch.empty(native.workspace_bytes(problem), dtype=torch.uint8, device=device)
    order = [buffers.get(name) for name in (*INPUTS, *OUTPUTS)]
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in order]
    sizes = [0 if tensor is None else tensor.nbytes for tensor in order]
    where: dict[str, Any] = {} if device == "cpu" else {"device": 0, "stream": torch.cuda.current_stream().cuda_stream}
    yield "the library alone", lambda: native.forward(problem, pointers, sizes, **where)


# ---- JAX -------------------------------------------------------------------------------------------------------------
def jax_rows(device: str) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp

    import jax_moe

    where = jax.devices(device)[0]
    given = {name: jax.device_put(array, where) for name, array in arrays().items()}
    for name, array in given.items():
        given[name] = array.view(jnp.float8_e4m3fn) if array.dtype == jnp.uint8 else array
    operands = list(given.values())

    @jax.jit
    def layer(*operands: Any) -> Any:
        named = dict(zip(given, operands, strict=True))
        return jax_moe.fp8_block_scale_routed_moe(**named, num_experts=EXPERTS, local_expert_offset=OFFSET)

    empty = jax.jit(lambda *operands: jnp.zeros((TOKENS, HIDDEN), jnp.bfloat16), keep_unused=True)
    yield "jax jitted", lambda: layer(*operands)
    yield "jax, an empty jitted function", lambda: empty(*operands)


def jax_wait(device: str) -> Callable[[Any], Any]:
    import jax

    return jax.block_until_ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", help="also write the numbers there")
    options = parser.parse_args()
    torch_device = "cpu" if options.device == "cpu" else "cuda"
    parts = (
        (library_rows, torch_wait, torch_device),
        (torch_rows, torch_wait, torch_device),
        (jax_rows, jax_wait, options.device),
    )
    found: dict[str, tuple[float, float]] = {}
    print(f"{'microseconds a call':40} {'fastest':>9} {'median':>9}")
    for rows, wait, device in parts:
        with contextlib.suppress(ImportError):  # one front end may be absent
            for name, call in rows(device):
                found[name] = microseconds(call, wait(device), options.rounds)
                print(f"{name:40} {found[name][0]:9.2f} {found[name][1]:9.2f}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
