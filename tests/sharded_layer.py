"""A program for four devices: expert parallel (each holds a quarter of the experts, outputs are summed) and data
parallel (each holds a quarter of the tokens), against one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
from compare import assert_close, assert_same_bits
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_calls import TOKEN_INPUTS, call

DEVICES = 4
SPLIT = PartitionSpec("devices")
BY_TOKEN = {"hidden_states_scale": PartitionSpec(None, "devices")}  # its tokens come second


def sharded(
    layer: Callable[[dict[str, Any]], jax.Array],
    given: dict[str, Any],
    specs: dict[str, PartitionSpec],
    out_spec: PartitionSpec,
    kind: AxisType,
) -> np.ndarray:
    """What `layer` computes on the devices' parts of `given`, put together again."""
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(kind,))
    placed = {
        name: None if array is None else jax.device_put(array, NamedSharding(mesh, specs[name]))
        for name, array in given.items()
    }
    return np.asarray(jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=(specs,), out_specs=out_spec))(placed))


def part(case: cases.Case, local: dict[str, Any]) -> jax.Array:
    """The part of the output that comes from a device's own experts."""
    return call(case, local, local_expert_offset=jax.lax.axis_index("devices") * local["gemm1_weights"].shape[0])


def summed(case: cases.Case, local: dict[str, Any]) -> jax.Array:
    y = part(case, local)
    return jax.lax.psum(y.astype(jnp.float32), "devices").astype(y.dtype)


def batched(case: cases.Case, local: dict[str, Any]) -> jax.Array:
    """Two batches, the second with its tokens' routing reversed."""
    ids = jnp.stack([local["topk_ids"], local["topk_ids"][::-1]])
    return jax.vmap(lambda topk_ids: summed(case, local | {"topk_ids": topk_ids}))(ids)


def check(case: cases.Case, kind: AxisType) -> None:
    given = cases.arrays(case)
    reverse = given | {"topk_ids": given["topk_ids"][::-1]}
    single, reversed_single = np.asarray(call(case, given)), np.asarray(call(case, reverse))
    replicated = PartitionSpec()
    by_expert = {name: replicated if name in TOKEN_INPUTS else SPLIT for name in given}
    by_token = {name: BY_TOKEN.get(name, SPLIT) if name in TOKEN_INPUTS else replicated for name in given}

    # With one expert a token, one device has its whole answer and the others add zeros.
    same = assert_same_bits if case.top_k == 1 else assert_close
    what = f"{case.name}, {kind}"
    same(sharded(lambda local: summed(case, local), given, by_expert, replicated, kind), single, f"{what}: summed")
    both = sharded(lambda local: batched(case, local), given, by_expert, replicated, kind)
    same(both[0], single, f"{what}: first batch")
    same(both[1], reversed_single, f"{what}: second batch")
    rows = sharded(lambda local: call(case, local), given, by_token, SPLIT, kind)
    assert_same_bits(rows, single, f"{what}: data parallel")
    try:
        sharded(lambda local: part(case, local), given, by_expert, replicated, kind)
    except ValueError:
        return
    raise AssertionError("parts that differ from device to device were taken for one array")


if __name__ == "__main__":
    assert jax.device_count() == DEVICES
    check(cases.Case("one_expert_a_token", 8, 256, 128, 8, 1), AxisType.Auto)
    check(cases.Case("bf16", 8, 256, 128, 8, 3, x_dtype="bfloat16"), AxisType.Explicit)
