"""fp8_block_scale_routed_moe under scan, vmap, shard_map and differentiation."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_bits
from jax_calls import (
    SMALL,
    SMALL_ALL,
    SMALL_APART,
    SMALL_BF16,
    SMALL_LORA,
    SMALL_MX,
    SMALL_MX_ALL,
    SMALL_MX_E8M0,
    SMALL_ROWS,
    TOKEN_INPUTS,
    WINDOW,
    call,
    named,
    stacked,
)
from results import assert_same_results

from jax_moe import native

BATCHES = 3


def layers(case: cases.Case) -> list[dict[str, Any]]:
    """BATCHES inputs of one shape, tokens and weights all different."""
    return [cases.arrays(dataclasses.replace(case, seed=seed)) for seed in range(BATCHES)]


def over(given: dict[str, Any], *names: str) -> dict[str, int | None]:
    """in_axes that map the named inputs."""
    return {name: 0 if name in names and array is not None else None for name, array in given.items()}


def picked(batches: list[dict[str, Any]], *names: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """For vmap: the named inputs stacked, the others of the first batch; and the inputs of each call it stands for."""
    every = stacked(*batches)
    mapped = {name: every[name] if name in names else array for name, array in batches[0].items()}
    single = [batches[0] | {name: batch[name] for name in names if name in batch} for batch in batches]
    return mapped, single


def custom_calls(function: Any, *arguments: Any) -> int:
    """How many of our custom calls the program of `function` has (one in a loop counts once)."""
    return jax.jit(function).lower(*arguments).as_text().count(native.TARGET)


def assert_each_equals(case: cases.Case, actual: Any, single: list[dict[str, Any]]) -> None:
    for batch, given in enumerate(single):
        of_batch = jax.tree.map(lambda x, b=batch: x[b], actual)
        assert_same_results(named(case, of_batch), named(case, call(case, given)))


def test_scan_over_layers_computes_what_separate_calls_do() -> None:
    batches = layers(SMALL_BF16)
    x0 = batches[0]["hidden_states"]

    def layer(x: jax.Array, weights: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        x = call(SMALL_BF16, weights | {"hidden_states": x})
        return x, x

    rest = stacked(*({name: b[name] for name in b if name != "hidden_states"} for b in batches))
    _, actual = jax.jit(lambda x, w: jax.lax.scan(layer, x, w))(x0, rest)
    x = x0
    for step, batch in enumerate(batches):
        x = call(SMALL_BF16, batch | {"hidden_states": x})
        assert_same_bits(np.asarray(actual[step]), np.asarray(x), f"step {step}")


FINALIZED_ALL = [dataclasses.replace(case, lora=False, do_finalize=True) for case in (SMALL_ALL, SMALL_MX_ALL)]
FOLDED = (SMALL, SMALL_BF16, SMALL_APART, WINDOW, SMALL_MX, SMALL_MX_E8M0, *FINALIZED_ALL)


@pytest.mark.parametrize("case", FOLDED, ids=lambda case: case.name)
@pytest.mark.parametrize("names", (TOKEN_INPUTS, ("topk_ids",), ("hidden_states", "hidden_states_scale")), ids=len)
def test_vmap_over_tokens_is_one_call_with_the_same_bits(case: cases.Case, names: tuple[str, ...]) -> None:
    mapped, single = picked(layers(case), *names)
    function = jax.vmap(lambda given: call(case, given), in_axes=(over(mapped, *names),))
    assert_each_equals(case, jax.jit(function)(mapped), single)
    assert custom_calls(function, mapped) == 1
    assert "while" not in jax.jit(function).lower(mapped).as_text()


def test_vmap_over_token_major_scales_keeps_the_bits() -> None:
    mapped, single = picked(layers(SMALL), *TOKEN_INPUTS)
    turned = mapped | {"hidden_states_scale": mapped["hidden_states_scale"].swapaxes(1, 2)}
    function = jax.vmap(
        lambda given: call(SMALL, given, hidden_states_scale_order="token_major"),
        in_axes=(over(turned, *TOKEN_INPUTS),),
    )
    assert_each_equals(SMALL, function(turned), single)


@pytest.mark.parametrize("case", (SMALL, SMALL_MX_E8M0), ids=lambda case: case.name)
@pytest.mark.parametrize("names", (("gemm1_weights", "gemm1_weights_scale"), tuple(cases.arrays(SMALL))), ids=len)
def test_vmap_over_weights_is_a_loop_with_the_same_bits(case: cases.Case, names: tuple[str, ...]) -> None:
    mapped, single = picked(layers(case), *names)
    function = jax.vmap(lambda given: call(case, given), in_axes=(over(mapped, *names),))
    assert_each_equals(case, jax.jit(function)(mapped), single)
    assert custom_calls(function, mapped) == 1


def test_vmap_over_the_weights_of_a_pair_alone_is_one_call_with_the_same_bits() -> None:
    mapped, single = picked(layers(SMALL_APART), "topk_weights")
    function = jax.vmap(lambda given: call(SMALL_APART, given), in_axes=(over(mapped, "topk_weights"),))
    assert_each_equals(SMALL_APART, jax.jit(function)(mapped), single)
    assert "while" not in jax.jit(function).lower(mapped).as_text()


@pytest.mark.parametrize("name", ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"))
def test_vmap_over_parameters_of_the_activation_is_a_loop_with_the_same_bits(name: str) -> None:
    case = dataclasses.replace(SMALL, per_expert=(name,))
    mapped, single = picked(layers(case), name)
    function = jax.vmap(lambda given: call(case, given), in_axes=(over(mapped, name),))
    assert_each_equals(case, jax.jit(function)(mapped), single)
    assert custom_calls(function, mapped) == 1


@pytest.mark.parametrize("case", (SMALL_ROWS, SMALL_LORA, SMALL_ALL, SMALL_MX_ALL), ids=lambda case: case.name)
@pytest.mark.parametrize("names", (TOKEN_INPUTS, ("topk_ids", "gemm1_lora_delta")), ids=len)
def test_vmap_that_returns_rows_gives_each_batch_its_own(case: cases.Case, names: tuple[str, ...]) -> None:
    mapped, single = picked(layers(case), *names)
    function = jax.vmap(lambda given: call(case, given), in_axes=(over(mapped, *names),))
    assert_each_equals(case, function(mapped), single)
    assert custom_calls(function, mapped) == 1


@pytest.mark.parametrize("case", (SMALL, SMALL_ROWS), ids=lambda case: case.name)
@pytest.mark.parametrize("batches", (0, 1))
def test_vmap_over_few_batches(case: cases.Case, batches: int) -> None:
    mapped = jax.tree.map(lambda x: x[:batches], stacked(*layers(case)))
    actual = named(case, jax.vmap(lambda given: call(case, given))(mapped))
    single = named(case, call(case, layers(case)[0]))
    assert {name: x.shape for name, x in actual.items()} == {n: (batches, *x.shape) for n, x in single.items()}
    if batches:
        assert_same_results({name: x[0] for name, x in actual.items()}, single)


def test_vmap_over_the_offset_gives_each_window_its_part() -> None:
    given = cases.arrays(WINDOW)
    offsets = jnp.arange(4, dtype=jnp.int32)
    actual = jax.vmap(lambda offset: call(WINDOW, given, local_expert_offset=offset))(offsets)
    for offset in range(4):
        expected = call(WINDOW, given, local_expert_offset=offset)
        assert_same_bits(np.asarray(actual[offset]), np.asarray(expected), f"offset {offset}")


def test_nested_vmap_is_still_one_call() -> None:
    batches = layers(SMALL)
    given = batches[0]
    ids = np.stack([np.stack([b["topk_ids"], b["topk_ids"][::-1]]) for b in batches])
    x, scale = (np.stack([b[name] for b in batches]) for name in ("hidden_states", "hidden_states_scale"))

    def one(ids: Any, x: Any, scale: Any) -> Any:
        tokens = {"topk_ids": ids, "hidden_states": x, "hidden_states_scale": scale}
        return call(SMALL, given | tokens)

    function = jax.vmap(jax.vmap(one, in_axes=(0, None, None)))
    actual = np.asarray(function(ids, x, scale))
    assert custom_calls(function, ids, x, scale) == 1
    for i in range(BATCHES):
        for j in range(2):
            assert_same_bits(actual[i, j], np.asarray(one(ids[i, j], x[i], scale[i])), f"batch {i}, {j}")


def test_what_else_is_in_the_batch_changes_nothing() -> None:
    for case in (SMALL, SMALL_APART, SMALL_LORA, SMALL_MX):
        many = cases.arrays(dataclasses.replace(case, tokens=150))
        together = named(case, call(case, many))["output"]
        for tokens in (slice(0, 1), slice(0, 7), slice(149, 150), slice(20, 130)):
            few = named(case, call(case, cases.of_tokens(many, tokens)))["output"]
            assert_same_bits(few, together[tokens], f"{case.name}, {tokens}")


def _loss(x: jax.Array) -> jax.Array:
    given = cases.arrays(SMALL_BF16)
    return call(SMALL_BF16, given | {"hidden_states": x}).astype(jnp.float32).sum()


def _loss_of(case: cases.Case, **changes: jax.Array) -> jax.Array:
    return jax.tree.leaves(call(case, cases.arrays(case) | changes))[0].astype(jnp.float32).sum()


def _sum_of_weights(weights: jax.Array) -> jax.Array:
    case = dataclasses.replace(SMALL_APART, do_finalize=False)
    return call(case, cases.arrays(case) | {"topk_weights": weights})[1].sum()


def _given(name: str) -> jax.Array:
    return jnp.asarray((cases.arrays(SMALL_ALL) | cases.arrays(SMALL_APART))[name])


X = jnp.asarray(cases.arrays(SMALL_BF16)["hidden_states"])
DIFFERENTIATED = {
    "grad": lambda: jax.grad(_loss)(X),
    "jit of grad": lambda: jax.jit(jax.grad(_loss))(X),
    "grad of jit": lambda: jax.grad(jax.jit(_loss))(X),
    "jvp": lambda: jax.jvp(_loss, (X,), (X,)),
    "linearize": lambda: jax.linearize(_loss, X),
    "vmap of grad": lambda: jax.vmap(jax.grad(_loss))(X[None]),
    "grad of vmap": lambda: jax.grad(lambda x: jax.vmap(_loss)(x).sum())(X[None]),
    "grad of scan": lambda: jax.grad(lambda x: jax.lax.scan(lambda c, _: (c + _loss(x), None), 0.0, None, 2)[0])(X),
    "grad of checkpoint": lambda: jax.grad(jax.checkpoint(_loss))(X),
    "grad to topk_weights": lambda: jax.grad(lambda w: _loss_of(SMALL_APART, topk_weights=w))(_given("topk_weights")),
    "grad to returned weights": lambda: jax.grad(_sum_of_weights)(_given("topk_weights")),
    "grad to gemm1_lora_delta": lambda: jax.grad(lambda d: _loss_of(SMALL_ALL, gemm1_lora_delta=d))(
        _given("gemm1_lora_delta")
    ),
    "grad to gemm1_alpha": lambda: jax.grad(lambda a: _loss_of(SMALL_ALL, gemm1_alpha=a))(_given("gemm1_alpha")),
}


@pytest.mark.parametrize("how", DIFFERENTIATED)
def test_differentiating_says_that_it_is_for_inference_only(how: str) -> None:
    words = r"^fp8_block_scale_routed_moe: .*inference only.*jax\.lax\.stop_gradient"
    with pytest.raises(NotImplementedError, match=words):
        DIFFERENTIATED[how]()


def test_a_layer_behind_stop_gradient_leaves_the_rest_differentiable() -> None:
    def loss(x: jax.Array) -> jax.Array:
        return _loss(jax.lax.stop_gradient(x)) + x.astype(jnp.float32).sum()

    assert_same_bits(np.asarray(jax.jit(jax.grad(loss))(X)), np.ones_like(X), "gradient of the rest")


def test_expert_and_data_parallel_devices_give_the_answer_of_one() -> None:
    program = Path(__file__).with_name("sharded_layer.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
