"""One layer of a named model, end to end: random weights, quantised, routed, run through JAX and torch, checked.

Exit status 1 when the result is too far from the float32 reference or when JAX and torch differ in a single bit.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from . import info, reference
from .bench.cost import Ceilings, Cost, call_cost
from .bench.device import Set
from .bench.machine import device_name, share_memory, why_not_through
from .bench.paths import Data, jax_op, same_bits, torch_calls
from .bench.timing import Dispatches, Timing, WallClock, measure
from .bench.workload import Cell, cut, parse_shape
from .info import CannotRun
from .shapes import LayerShape

ERROR_BOUND = 4e-2  # relative L2 to a reference that does not requantise the activation
CPU_EXPERTS = 16
TOKENS = {"cpu": 64, "gpu": 1024}
REFERENCE_WEIGHTS = 400e6  # elements that the reference may read, which bounds the sample of tokens
REFERENCE_TOKENS = 64
REPEATS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="qwen3_30b", help="name of a layer shape, or HxIxExK (default qwen3_30b)")
    parser.add_argument("--tokens", type=int, help="default 1024 on a GPU, 64 on a CPU")
    parser.add_argument("--experts", type=int, help=f"cut the layer to so many (default on a CPU: {CPU_EXPERTS})")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    share_memory()
    kind = _choose(options.device)
    import jax

    shape = parse_shape(options.model)
    experts = options.experts or (min(CPU_EXPERTS, shape.num_experts) if kind == "cpu" else None)
    if experts:
        shape = cut(shape, experts)
    tokens = TOKENS[kind] if options.tokens is None else options.tokens
    if tokens < 1:
        raise CannotRun(f"--tokens must be at least 1, got {tokens}")
    cell = Cell(shape, tokens, bf16_input=False)
    console = info.open_console(120)
    console.print(f"{shape.title}: H={shape.hidden_size} I={shape.intermediate_size} ", end="")
    console.print(f"experts={shape.local_num_experts} top_k={shape.top_k}, {tokens} tokens, random", highlight=False)

    with Console(stderr=True).status("") as status, jax.default_device(jax.devices(_PLATFORM[kind])[0]):
        status.update("weights and tokens, quantised and routed")
        weights, routed = make_layer(shape, tokens, options.seed)
        data = Data([weights], [routed])
        call = functools.partial(jax.jit(functools.partial(jax_op, cell)), data.sets()[0])
        output = np.asarray(call())
        status.update("the float32 reference")
        error, checked = error_on_a_sample(cell, data.sets()[0], output)
        status.update("torch on the same arrays")
        why_not = why_not_through("torch", kind)
        agree = None if why_not else same_bits(torch_calls(cell, data)[0], call)
        status.update("timing")
        timing = _time(kind, call)
        ceilings = _ceilings(kind)
    ids = np.asarray(routed["topk_ids"]) >> 16
    local = reference.local_expert(ids, shape.num_experts, shape.local_expert_offset, shape.local_num_experts)
    local = local[local >= 0]
    cost = call_cost(shape, tokens, len(np.unique(local)), local.size, bf16_input=False)
    console.print(_table(kind, error, f"{checked} of {tokens} tokens", agree, why_not, timing, cost, ceilings))
    return 0 if error < ERROR_BOUND and agree is not False else 1


_PLATFORM = {"cpu": "cpu", "gpu": "cuda"}


def _choose(asked: str) -> str:
    """ "cpu" or "gpu". Raises CannotRun."""
    if reason := info.library_error() or why_not_through("jax", "cpu"):
        raise CannotRun(reason)
    if asked == "cpu":
        return "cpu"
    reason = info.hopper_devices()[1] or why_not_through("jax", "gpu")
    if reason and asked == "gpu":
        raise CannotRun(f"--device gpu is not usable: {reason}")
    return "cpu" if reason else "gpu"


def make_layer(shape: LayerShape, tokens: int, seed: int) -> tuple[Set, Set]:
    """Random bf16 weights of the local experts and tokens, in the format of the op, with softmax top-k routing.

    The weights are made and quantised expert by expert, so that the bf16 ones are never all there at once.
    """
    import jax
    import jax.numpy as jnp

    from . import pack_topk_ids, quantize_activations, quantize_weights

    hidden, inter = shape.hidden_size, shape.intermediate_size

    def expert(key: jax.Array) -> Any:
        up_gate, down = jax.random.split(key)
        gemm1 = jax.random.normal(up_gate, (2 * inter, hidden), jnp.bfloat16) * hidden**-0.5
        gemm2 = jax.random.normal(down, (hidden, inter), jnp.bfloat16) * inter**-0.5
        return *quantize_weights(gemm1), *quantize_weights(gemm2)

    @jax.jit
    def layer(key: jax.Array) -> tuple[Set, Set]:
        for_experts, for_router, for_tokens = jax.random.split(key, 3)
        names = ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale")
        weights = jax.lax.map(expert, jax.random.split(for_experts, shape.local_num_experts))
        x = jax.random.normal(for_tokens, (tokens, hidden), jnp.bfloat16)
        router = jax.random.normal(for_router, (hidden, shape.num_experts), jnp.bfloat16) * hidden**-0.5
        logits = jnp.dot(x, router, preferred_element_type=jnp.float32)
        routing_weights, ids = jax.lax.top_k(jax.nn.softmax(logits), shape.top_k)
        routing_weights /= routing_weights.sum(axis=1, keepdims=True)
        codes, scale = quantize_activations(x)
        routed = {
            "topk_ids": pack_topk_ids(ids, routing_weights),
            "hidden_states": codes,
            "hidden_states_scale": scale,
        }
        return dict(zip(names, weights, strict=True)), routed

    return jax.block_until_ready(layer(jax.random.key(seed)))


def error_on_a_sample(cell: Cell, arrays: Set, output: NDArray) -> tuple[float, int]:
    """Relative L2 of `output` to float32 arithmetic without requantisation, over evenly spaced tokens; their number.

    Only the experts of these tokens are read from the device, under new numbers.
    """
    s = cell.shape
    expert_size = 3 * s.hidden_size * s.intermediate_size
    if s.local_num_experts * expert_size <= REFERENCE_WEIGHTS:
        sample = REFERENCE_TOKENS
    else:
        sample = max(1, int(REFERENCE_WEIGHTS / (s.top_k * expert_size)))
    rows = np.unique(np.linspace(0, cell.tokens - 1, min(sample, cell.tokens)).astype(np.int64))
    packed = np.asarray(arrays["topk_ids"])[rows]
    local = reference.local_expert(packed >> 16, s.num_experts, s.local_expert_offset, s.local_num_experts)
    active = np.unique(local[local >= 0])
    renumbered = np.where(local >= 0, np.searchsorted(active, local), -1).astype(np.int32)
    names = ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale")
    expected = reference.fp8_block_scale_routed_moe(
        (renumbered << 16) | (packed & 0xFFFF),
        np.asarray(arrays["hidden_states"])[rows],
        np.asarray(arrays["hidden_states_scale"])[:, rows],
        *(np.asarray(arrays[name][active]) for name in names),
        num_experts=max(1, len(active)),
        requantize=False,
    ).output
    difference = np.linalg.norm(output[rows].astype(np.float32) - expected)
    return float(difference / (np.linalg.norm(expected) or 1)), len(rows)


def _time(kind: str, call: Any) -> Timing:
    import jax

    if kind == "gpu":
        return measure(Dispatches(call, jax.block_until_ready, 1), "cool", REPEATS)
    return measure(WallClock([lambda: jax.block_until_ready(call())]), "steady", REPEATS)


def _ceilings(kind: str) -> Ceilings | None:
    """Measured now; None on a GPU that torch does not see."""
    if kind == "cpu":
        from .bench.cpu import Cpu

        return Cpu().ceilings()
    if why_not_through("torch", kind):
        return None
    from .bench.cuda import Cuda

    return Cuda(info.hopper_devices()[0][0]).ceilings()


def _table(
    kind: str,
    error: float,
    checked: str,
    agree: bool | None,
    why_not: str,
    timing: Timing,
    cost: Cost,
    ceilings: Ceilings | None,
) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    verdict = "within" if error < ERROR_BOUND else "ABOVE"
    table.add_row("device", device_name(info.gather(), kind))
    table.add_row("relative error (L2)", f"{error:.2e} to a float32 reference on {checked}, {verdict} {ERROR_BOUND:g}")
    words = {True: "yes", False: "NO", None: f"not compared: {why_not}"}[agree]
    table.add_row("JAX = torch, bit for bit", words)
    table.add_row("time a call (median)", f"{1e6 * timing.median:.1f} us, jitted, {timing.samples} samples")
    table.add_row(
        "work", f"{cost.active_experts:.0f} active experts, {cost.bytes / 1e6:.1f} MB, {cost.flops / 1e9:.2f} GFLOP"
    )
    flops, memory = cost.flops / timing.median / 1e9, cost.bytes / timing.median / 1e9
    rate = f"{flops / 1e3:.1f} TFLOP/s" if flops >= 1e3 else f"{flops:.1f} GFLOP/s"
    table.add_row("rate", f"{rate}, {memory:.4g} GB/s")
    if ceilings:
        table.add_row("share of the roofline", f"{100 * ceilings.seconds(cost) / timing.median:.1f} %")
        rates = ", ".join(f"{name} {value:.4g}" for name, value in ceilings.measured.items())
        table.add_row("ceilings of this machine", f"{rates} (measured now)")
    else:
        table.add_row("share of the roofline", f"not measured: {why_not}")
    return table
