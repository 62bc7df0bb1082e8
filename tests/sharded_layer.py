"""A program for four devices: expert parallel (each holds a quarter of the experts, outputs are summed) and data
parallel (each holds a quarter of the tokens), against one device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
from compare import Tolerance, assert_close, assert_same_bits
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_calls import TOKEN_INPUTS, call

from jax_moe.enums import WeightLayout
from jax_moe.problem import E8M0, PER_EXPERT

DEVICES = 4
SUM_OF_PARTS = Tolerance(5e-3, 0.06)  # each part is rounded to bfloat16 before the sum
SPLIT = PartitionSpec("devices")
SECOND = PartitionSpec(None, "devices")


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


def local_call(case: cases.Case, local: dict[str, Any], **changes: Any) -> list[jax.Array]:
    """A device's call with its own experts."""
    offset = jax.lax.axis_index("devices") * local["gemm1_weights"].shape[0]
    return jax.tree.leaves(call(case, local, local_expert_offset=offset, **changes))


def part(case: cases.Case, local: dict[str, Any]) -> jax.Array:
    """The part of the output that comes from a device's own experts."""
    return local_call(case, local)[0]


def summed(case: cases.Case, local: dict[str, Any]) -> jax.Array:
    y = part(case, local)
    return jax.lax.psum(y.astype(jnp.float32), "devices").astype(y.dtype)


def batched(case: cases.Case, local: dict[str, Any]) -> jax.Array:
    """Two batches, the second with its tokens' routing reversed."""
    ids = jnp.stack([local["topk_ids"], local["topk_ids"][::-1]])
    return jax.vmap(lambda topk_ids: summed(case, local | {"topk_ids": topk_ids}))(ids)


def output(case: cases.Case, given: dict[str, Any]) -> jax.Array:
    return jax.tree.leaves(call(case, given))[0]


def check(case: cases.Case, kind: AxisType) -> None:
    given = cases.arrays(case)
    reverse = given | {"topk_ids": given["topk_ids"][::-1]}
    single, reversed_single = np.asarray(output(case, given)), np.asarray(output(case, reverse))
    replicated = PartitionSpec()
    by_expert = {name: replicated if name in TOKEN_INPUTS else SPLIT for name in given}
    by_token = {name: SPLIT if name in TOKEN_INPUTS else replicated for name in given}
    if not case.scale_is_token_major:
        by_token["hidden_states_scale"] = SECOND

    # With one expert a token, one device has its whole answer and the others add zeros.
    same = assert_same_bits if case.top_k == 1 else functools.partial(assert_close, tolerance=SUM_OF_PARTS)
    what = f"{case.name}, {kind}"
    same(sharded(lambda local: summed(case, local), given, by_expert, replicated, kind), single, f"{what}: summed")
    both = sharded(lambda local: batched(case, local), given, by_expert, replicated, kind)
    same(both[0], single, f"{what}: first batch")
    same(both[1], reversed_single, f"{what}: second batch")
    rows = sharded(lambda local: output(case, local), given, by_token, SPLIT, kind)
    assert_same_bits(rows, single, f"{what}: data parallel")
    if "topk_weights" in given:  # returned, they are still the same on every device
        weights = sharded(
            lambda local: local_call(case, local, do_finalize=False)[1], given, by_expert, replicated, kind
        )
        assert_same_bits(weights, given["topk_weights"], f"{what}: weights")
    try:
        sharded(lambda local: part(case, local), given, by_expert, replicated, kind)
    except ValueError:
        return
    raise AssertionError("parts that differ from device to device were taken for one array")


if __name__ == "__main__":
    assert jax.device_count() == DEVICES
    check(cases.Case("one_expert_a_token", 8, 256, 128, 8, 1), AxisType.Auto)
    check(cases.Case("bf16", 8, 256, 128, 8, 3, x_dtype="bfloat16"), AxisType.Explicit)
    blocked = {"weight_layout": WeightLayout.BlockMajorK, "shuffled": True}
    apart = cases.Case("apart", 8, 256, 128, 8, 3, topk_weights="float32", per_expert=PER_EXPERT, **blocked)
    check(apart, AxisType.Auto)
    check(cases.Case("lora", 8, 256, 128, 8, 3, lora=True), AxisType.Explicit)
    check(cases.Case("mx", 8, 256, 128, 8, 3, **cases.MX), AxisType.Explicit)
    e8m0 = cases.MX | {"scale_order": "block_major", "scale_dtype": E8M0, "scale_rows": 32, "shuffled": True}
    check(cases.Case("mx_e8m0", 8, 384, 128, 8, 3, lora=True, **e8m0), AxisType.Auto)
