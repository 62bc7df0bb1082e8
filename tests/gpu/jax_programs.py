"""Programs that test_gpu_jax.py runs in processes of their own: `python jax_programs.py <name> <path>`.

export PATH   write an exported program of CASE for cpu and cuda to PATH; runs where JAX sees no GPU
capture PATH  run a jitted function of several calls a few times on the GPU; XLA_FLAGS decide what is dumped; the last
              output goes to PATH
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cases
import jax
import numpy as np
from cases import CASES

import jax_moe

CASE = CASES["t53"]


def layer(given: dict, **changes: object) -> jax.Array:
    options = {"num_experts": CASE.experts, "local_expert_offset": CASE.offset} | changes
    return jax_moe.fp8_block_scale_routed_moe(**given, **options)


def export(path: Path) -> None:
    from jax import export as jax_export

    assert all(device.platform == "cpu" for device in jax.devices()), "the point is to have no GPU here"
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), cases.arrays(CASE))
    program = jax_export.export(jax.jit(layer), platforms=("cpu", "cuda"), disabled_checks=jax_moe.export_checks())
    path.write_bytes(program(shapes).serialize())


def capture(path: Path) -> None:
    given = jax.device_put(cases.arrays(CASE), jax.devices("gpu")[0])

    @jax.jit
    def several(given: dict) -> tuple[jax.Array, ...]:
        return tuple(layer(given | {"topk_ids": given["topk_ids"][::step]}) for step in (1, -1))

    for _ in range(4):
        outputs = jax.block_until_ready(several(given))
    path.write_bytes(np.asarray(outputs[0]).tobytes())


if __name__ == "__main__":
    {"export": export, "capture": capture}[sys.argv[1]](Path(sys.argv[2]))
