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
from jax_calls import SMALL, SMALL_BF16, SMALL_ROWS, TOKEN_INPUTS, WINDOW, call, named, stacked

from jax_moe import native

BATCHES = 3


def layers(case: cases.Case) -> list[dict[str, Any]]:
    """BATCHES inputs of one shape, tokens and weights all different."""
    return [cases.arrays(dataclasses.replace(case, seed=seed)) for seed in range(BATCHES)]


def over(given: dict[str, Any], *names: str) -> dict[str, int | None]:
    """in_axes that map the named inputs."""
    return {name: 0 if name in names and given[name] is not None else None for name in given}


def picked(batches: list[dict[str, Any]], *names: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """For vmap: the named inputs stacked, the others of the first batch; and the inputs of each call it stands for."""
    every = stacked(*batches)
    mapped = {name: every[name] if name in names else array for name, array in batches[0].items()}
    single = [batches[0] | {name: batch[name] for name in names} for batch in batches]
    return mapped, single


def custom_calls(function: Any, *arguments: Any) -> int:
    """How many of our custom calls the program of `function` has (one in a loop counts once)."""
    return jax.jit(function).lower(*arguments).as_text().count(native.TARGET)


def assert_each_equals(case: cases.Case, actual: Any, single: list[dict[str, Any]], what: str) -> None:
    for batch, given in enumerate(single):
        expected = named(case, call(case, given))
        for name, array in named(case, jax.tree.map(lambda x, b=batch: x[b], actual)).items():
            if name == "gemm2_output":  # rows past the last one are undefined
                rows = np.count_nonzero(expected["expanded_idx_to_permuted_idx"] >= 0)
                array, expected[name] = array[:rows], expected[name][:rows]
            assert_same_bits(array, expected[name], f"{what}: batch {batch}: {name}")


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


@pytest.mark.parametrize("case", (SMALL, SMALL_BF16, WINDOW), ids=lambda case: case.name)
@pytest.mark.parametrize("names", (TOKEN_INPUTS, ("topk_ids",), ("hidden_states", "hidden_states_scale")))
def test_vmap_over_tokens_is_one_call_with_the_same_bits(case: cases.Case, names: tuple[str, ...]) -> None:
    mapped, single = picked(layers(case), *names)
    function = jax.vmap(lambda given: call(case, given), in_axes=(over(mapped, *names),))
    assert_each_equals(case, jax.jit(function)(mapped), single, f"vmap over {names}")
    assert custom_calls(function, mapped) == 1
    assert "while" not in jax.jit(function).lower(mapped).as_text()


def test_vmap_over_token_major_scales_keeps_the_bits() -> None:
    mapped, single = picked(layers(SMALL), *TOKEN_INPUTS)
    turned = mapped | {"hidden_states_scale": mapped["hidden_states_scale"].swapaxes(1, 2)}
    function = jax.vmap(
        lambda given: call(SMALL, given, hidden_states_scale_order="token_major"),
        in_axes=(over(turned, *TOKEN_INPUTS),),
    )
    assert_each_equals(SMALL, function(turned), single, "token_major")


@pytest.mark.parametrize("names", (("gemm1_weights", "gemm1_weights_scale"), tuple(cases.arrays(SMALL))), ids=len)
def test_vmap_over_weights_is_a_loop_with_the_same_bits(names: tuple[str, ...]) -> None:
    mapped, single = picked(layers(SMALL), *names)
    function = jax.vmap(lambda given: call(SMALL, given), in_axes=(over(mapped, *names),))
    assert_each_equals(SMALL, jax.jit(function)(mapped), single, f"vmap over {names}")
    assert custom_calls(function, mapped) == 1


def test_vmap_without_finalize_gives_each_batch_its_own_rows() -> None:
    mapped, single = picked(layers(SMALL_ROWS), *TOKEN_INPUTS)
    function = jax.vmap(lambda given: call(SMALL_ROWS, given), in_axes=(over(mapped, *TOKEN_INPUTS),))
    assert_each_equals(SMALL_ROWS, function(mapped), single, "rows")


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
    x, scale = (np.stack([b[name] for b in batches]) for name in TOKEN_INPUTS[1:])

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
    many = cases.arrays(dataclasses.replace(SMALL, tokens=150))
    together = np.asarray(call(SMALL, many))
    for tokens in (slice(0, 1), slice(0, 7), slice(149, 150), slice(20, 130)):
        few = many | {
            "topk_ids": many["topk_ids"][tokens],
            "hidden_states": many["hidden_states"][tokens],
            "hidden_states_scale": many["hidden_states_scale"][:, tokens],
        }
        assert_same_bits(np.asarray(call(SMALL, few)), together[tokens], str(tokens))


def _loss(x: jax.Array) -> jax.Array:
    given = cases.arrays(SMALL_BF16)
    return call(SMALL_BF16, given | {"hidden_states": x}).astype(jnp.float32).sum()


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
