"""Calls the op a few times on random data, for a profiler.

ncu -k regex:gemm python benchmarks/one_call.py qwen3_30b 16
"""

from __future__ import annotations

import argparse

from jax_moe.bench.machine import open_device
from jax_moe.bench.paths import Data, routed_tokens, torch_calls, whole_layer
from jax_moe.bench.workload import Cell, draw_routings, parse_shape


def main() -> None:
    parser = argparse.ArgumentParser(description="Calls the op a few times on random data, for a profiler.")
    parser.add_argument("shape", help="a name of jax_moe.shapes, or HxIxExK")
    parser.add_argument("tokens", type=int)
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--input", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    options = parser.parse_args()
    device = open_device(options.device)
    cell = Cell(parse_shape(options.shape), options.tokens, options.input == "bf16")
    tokens = routed_tokens(device, cell, draw_routings(cell, options.calls, 0), 0)
    for call in torch_calls(cell, Data([whole_layer(device, cell.shape, 0)], tokens)):
        call()
    device.synchronize()


if __name__ == "__main__":
    main()
