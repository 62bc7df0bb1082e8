"""jax_moe.route and fp8_block_scale_moe: the same results under every transformation, refusals while tracing."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import cases
import jax
import jax.export
import jax.numpy as jnp
import logits
import numpy as np
import pytest
from logits import Case

import jax_moe
from jax_moe import native
from jax_moe.enums import RoutingMethodType as Method
from jax_moe.routing_problem import METHODS

GROUPED = Case(Method.DeepSeekV3, 6, 64, 4, 8, 4, "bfloat16", "float32", 2.5)
EACH = [Case(method, top_k=1 if method is Method.Llama4 else 4) for method in METHODS] + [GROUPED]
each = pytest.mark.parametrize("case", EACH, ids=lambda case: case.name)
LAYER = cases.Case("layer", tokens=6, hidden=256, inter=128, experts=8, top_k=2, window=(2, 4))
MX_LAYER = dataclasses.replace(LAYER, name="mx_layer", shuffled=True, **cases.MX | {"scale_order": "block_major"})


def call(case: Case, routing_logits: Any, bias: Any) -> Any:
    return jax_moe.route(routing_logits, bias, **case.options())


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@each
def test_it_routes_as_the_reference(case: Case) -> None:
    given = case.arrays()
    got = call(case, *given)
    logits.assert_routed(case, given, (np.asarray(got[0]), np.asarray(got[1])))
    assert_same(jax.jit(lambda *arrays: call(case, *arrays))(*map(jnp.asarray, given)), got)


@pytest.mark.parametrize("in_axes", [(0, None), (0, 0), (None, 0), (1, None)])
def test_vmap_equals_a_loop(in_axes: tuple[int | None, int | None]) -> None:
    pairs = [GROUPED.arrays(seed) for seed in range(3)]
    batched = [
        pairs[0][i] if axis is None else np.stack([pair[i] for pair in pairs], axis) for i, axis in enumerate(in_axes)
    ]
    got = jax.vmap(lambda *arrays: call(GROUPED, *arrays), in_axes)(*batched)
    for i, pair in enumerate(pairs):
        one = [pairs[0][k] if axis is None else pair[k] for k, axis in enumerate(in_axes)]
        assert_same([x[i] for x in got], call(GROUPED, *one))


def test_vmap_over_tokens_is_one_custom_call() -> None:
    given = [np.stack([GROUPED.arrays(seed)[0] for seed in range(3)]), GROUPED.arrays()[1]]
    text = jax.jit(jax.vmap(lambda *arrays: call(GROUPED, *arrays), (0, None))).lower(*given).as_text()
    assert text.count(f"@{native.ROUTE_LOGITS_TARGET}") == 1
    assert "stablehlo.while" not in text


@each
def test_one_export_serves_every_number_of_tokens_and_platform(case: Case) -> None:
    (tokens,) = jax.export.symbolic_shape("tokens")
    routing_logits, bias = case.arrays()
    shapes = [
        jax.ShapeDtypeStruct((tokens, case.num_experts), routing_logits.dtype),
        jax.ShapeDtypeStruct(bias.shape, bias.dtype),
    ]
    function = jax.jit(lambda *arrays: call(case, *arrays))
    exported = jax.export.export(function, platforms=("cpu", "cuda"), disabled_checks=jax_moe.export_checks())(*shapes)
    restored = jax.export.deserialize(exported.serialize())
    for count in (1, 6, 70):
        given = np.resize(routing_logits, (count, case.num_experts)), bias
        assert_same(restored.call(*given), call(case, *given))


def test_shard_map_over_tokens_gathers_nothing() -> None:
    program = """
import jax, numpy as np, jax_moe
from jax.sharding import PartitionSpec as P
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
logits = np.random.default_rng(0).standard_normal((8, 64), np.float32)
route = lambda x: jax_moe.route(x, top_k=4, routing_method_type=6)
sharded = jax.jit(jax.shard_map(route, mesh=mesh, in_specs=P("x"), out_specs=(P("x"), P("x"))))
for a, b in zip(sharded(logits), route(logits), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
assert "all-gather" not in sharded.lower(logits).compile().as_text()
"""
    flags = "--xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )
    assert done.returncode == 0, done.stderr


def test_no_tokens_give_empty_results() -> None:
    ids, weights = call(GROUPED, np.zeros((0, 64), np.float32), None)
    assert ids.shape == weights.shape == (0, 4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"routing_logits": [[1.0] * 64]}, "route: routing_logits must be an array, got list"),
        ({"routing_logits": np.zeros((6, 64), np.float16)}, "route: routing_logits must be float32 or bfloat16"),
        ({"routing_bias": np.zeros(63, np.float32)}, "route: routing_bias must be None, bfloat16 or float32"),
        ({"top_k": 40}, "route: top_k must be an integer in"),
        ({"routing_method_type": 9}, "route: routing_method_type must be one of the methods"),
        ({"n_group": 5}, "route: n_group must be a positive divisor"),
    ],
)
def test_what_does_not_fit_is_refused_while_tracing(changed: dict[str, Any], words: str) -> None:
    arguments = {"routing_logits": GROUPED.arrays()[0], **GROUPED.options(), **changed}
    with pytest.raises(ValueError, match=words):
        jax.make_jaxpr(lambda: jax_moe.route(**arguments))()


def test_differentiation_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="route: every argument must be free of derivatives"):
        jax.grad(lambda x: jax_moe.route(x, top_k=4, routing_method_type=6)[1].sum())(jnp.ones((2, 64)))


def test_a_symbolic_number_of_experts_is_refused() -> None:
    (experts,) = jax.export.symbolic_shape("experts")
    function = jax.jit(lambda x: jax_moe.route(x, top_k=4, routing_method_type=6))
    with pytest.raises(NotImplementedError, match="of a constant number of experts"):
        jax.export.export(function)(jax.ShapeDtypeStruct((4, experts), jnp.float32))


# ---- the whole layer -------------------------------------------------------------------------------------------------
def layer_arrays(layer: cases.Case = LAYER) -> tuple[Case, dict[str, Any]]:
    routing = Case(Method.DeepSeekV3, LAYER.tokens, LAYER.experts, LAYER.top_k, 2, 1, routed_scaling_factor=2.5)
    given = {name: array for name, array in cases.arrays(layer).items() if name != "topk_ids" and array is not None}
    return routing, given


@pytest.mark.parametrize("layer", [LAYER, MX_LAYER], ids=lambda layer: layer.name)
@pytest.mark.parametrize("do_finalize", [True, False])
def test_the_layer_is_routing_and_the_routed_layer(do_finalize: bool, layer: cases.Case) -> None:
    routing, given = layer_arrays(layer)
    routing_logits, bias = routing.arrays()
    options = {"local_expert_offset": LAYER.offset, **layer.options, "do_finalize": do_finalize}
    if layer.mx:
        options["hidden_states_scale_order"] = "block_major"
    got = jax_moe.fp8_block_scale_moe(routing_logits, bias, **given, **routing.options(), **options)
    pair = call(routing, routing_logits, bias)
    expected = jax_moe.fp8_block_scale_routed_moe(pair, **given, num_experts=LAYER.experts, **options)
    if do_finalize:
        assert np.asarray(got, np.float32).any()
        assert_same([got], [expected])
    else:
        rows = int((np.asarray(got[2]) >= 0).sum())
        assert got[1].dtype == jnp.float32
        assert_same([got[0][:rows], *got[1:]], [expected[0][:rows], *expected[1:]])


def test_the_layer_says_its_own_name() -> None:
    routing, given = layer_arrays()
    with pytest.raises(ValueError, match=r"^fp8_block_scale_moe: top_k must be an integer"):
        jax_moe.fp8_block_scale_moe(*routing.arrays(), **given, **(routing.options() | {"top_k": 9}))
