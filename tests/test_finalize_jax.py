"""jax_moe.finalize: the same results under every transformation, refusals while tracing."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import cases
import compare
import finalizing
import jax
import jax.export
import jax.numpy as jnp
import jax_calls
import numpy as np
import pytest
from finalizing import CASES, Case

import jax_moe
from jax_moe import native

CASE = Case(weights="float32")


def assert_same(got: Any, expected: Any) -> None:
    compare.assert_same_bits(np.asarray(got), np.asarray(expected), "output")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_sums_as_the_backend(case: Case) -> None:
    given = case.arrays()
    expected = finalizing.run(case, given)
    assert_same(jax_moe.finalize(*given), expected)
    assert_same(jax.jit(jax_moe.finalize)(*map(jnp.asarray, given)), expected)


@pytest.mark.parametrize("name", ["jax_small", "jax_small_apart", "jax_window", "k32", "extreme_nan_x"])
def test_the_parts_of_a_layer_give_the_bits_of_the_whole(name: str) -> None:
    layer = jax_calls.WINDOW if name == "jax_window" else jax_calls.named_case(name)

    def run(case: Any, given: Any) -> dict[str, Any]:
        return jax_calls.named(case, jax_calls.call(case, given))

    _, given, output = finalizing.parts_of(layer, run)
    assert_same(jax_moe.finalize(*given), output)


def test_a_layer_may_be_finalized_in_the_same_program() -> None:
    layer = jax_calls.SMALL_ROWS
    given = cases.arrays(layer)
    whole = jax_calls.call(layer, given, do_finalize=True)
    assert_same(jax.jit(lambda given: jax_moe.finalize(*jax_calls.call(layer, given)))(given), whole)


@pytest.mark.parametrize("batched", [b for b in itertools.product([False, True], repeat=3) if any(b)])
def test_vmap_equals_a_loop_and_stays_one_call(batched: tuple[bool, bool, bool]) -> None:
    calls = [CASE.arrays(seed) for seed in range(3)]
    given = [np.stack([call[i] for call in calls]) if batched[i] else calls[0][i] for i in range(3)]
    function = jax.jit(jax.vmap(jax_moe.finalize, [0 if b else None for b in batched]))
    for n, one in enumerate(function(*given)):
        assert_same(one, jax_moe.finalize(*(calls[n if batched[i] else 0][i] for i in range(3))))
    text = function.lower(*given).as_text()
    assert text.count(f"@{native.FINALIZE_TARGET}") == 1 and "stablehlo.while" not in text


def test_nested_vmap_over_other_axes() -> None:
    calls = [[CASE.arrays(2 * i + j) for j in range(2)] for i in range(3)]
    given = [np.stack([np.stack([call[k] for call in row], -1) for row in calls]) for k in range(3)]
    got = jax.vmap(jax.vmap(jax_moe.finalize, -1, -1))(*given)
    for i, j in itertools.product(range(3), range(2)):
        assert_same(got[i, ..., j], jax_moe.finalize(*calls[i][j]))


def test_one_export_serves_every_number_of_tokens_and_platform() -> None:
    tokens, rows = jax.export.symbolic_shape("tokens, rows")
    shapes = [
        jax.ShapeDtypeStruct((rows, CASE.hidden), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens, CASE.top_k), jnp.float32),
        jax.ShapeDtypeStruct((tokens * CASE.top_k,), jnp.int32),
    ]
    function = jax.jit(jax_moe.finalize)
    exported = jax.export.export(function, platforms=("cpu", "cuda"), disabled_checks=jax_moe.export_checks())(*shapes)
    restored = jax.export.deserialize(exported.serialize())
    for count, num_rows in ((1, 3), (6, 24), (70, 9)):
        given = Case(count, CASE.top_k, CASE.hidden, num_rows, "float32").arrays()
        assert_same(restored.call(*given), jax_moe.finalize(*given))


def test_a_layer_and_its_finalization_export_with_a_symbolic_number_of_tokens() -> None:
    layer = jax_calls.SMALL_ROWS
    (tokens,) = jax.export.symbolic_shape("tokens")
    given = cases.arrays(layer)
    shapes = jax_calls.shapes(given)
    for name, axis in (("topk_ids", 0), ("hidden_states", 0), ("hidden_states_scale", 1)):
        shape = list(shapes[name].shape)
        shape[axis] = tokens
        shapes[name] = jax.ShapeDtypeStruct(tuple(shape), shapes[name].dtype)
    function = jax.jit(lambda given: jax_moe.finalize(*jax_calls.call(layer, given)))
    exported = jax.export.export(function, disabled_checks=jax_moe.export_checks())(shapes)
    assert_same(exported.call(given), jax_calls.call(layer, given, do_finalize=True))


def test_shard_map_over_tokens_gathers_nothing() -> None:
    program = """
import jax, numpy as np, jax_moe, finalizing
from jax.sharding import PartitionSpec as P
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
given = finalizing.Case(tokens=8).arrays()
specs = P(), P("x"), P("x")
sharded = jax.jit(jax.shard_map(jax_moe.finalize, mesh=mesh, in_specs=specs, out_specs=P("x")))
assert np.asarray(sharded(*given)).tobytes() == np.asarray(jax_moe.finalize(*given)).tobytes()
assert "all-gather" not in sharded.lower(*given).compile().as_text()
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PYTHONPATH": os.path.dirname(__file__),
        },
    )
    assert done.returncode == 0, done.stderr


ROWS, WEIGHTS, ROW_OF = CASE.arrays()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (([[1.0]], WEIGHTS, ROW_OF), "finalize: gemm2_output must be an array, got list"),
        ((ROWS, None, ROW_OF), "finalize: expert_weights must be an array, got NoneType"),
        ((ROWS.astype(np.float32), WEIGHTS, ROW_OF), "finalize: gemm2_output must be bfloat16"),
        ((ROWS, WEIGHTS.astype(np.float16), ROW_OF), "finalize: expert_weights must be bfloat16 or float32"),
        ((ROWS, WEIGHTS, ROW_OF.astype(np.int64)), "finalize: expanded_idx_to_permuted_idx must be int32"),
        ((ROWS, WEIGHTS, ROW_OF[:-1]), "finalize: expanded_idx_to_permuted_idx must be int32"),
    ],
)
def test_what_does_not_fit_is_refused_while_tracing(given: tuple[Any, Any, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        jax.make_jaxpr(lambda: jax_moe.finalize(*given))()


def test_differentiation_is_refused() -> None:
    for argument in (0, 1):
        with pytest.raises(NotImplementedError, match="finalize: every argument must be free of derivatives"):
            jax.grad(lambda *given: jax_moe.finalize(*given).sum(), argument)(
                *map(jnp.asarray, (ROWS, WEIGHTS, ROW_OF))
            )


@pytest.mark.parametrize("which", [0, 1])
def test_other_symbolic_sizes_are_refused(which: int) -> None:
    (size,) = jax.export.symbolic_shape("size")
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (ROWS, WEIGHTS, ROW_OF)]
    shapes[which] = jax.ShapeDtypeStruct((shapes[which].shape[0], size), shapes[which].dtype)
    with pytest.raises(NotImplementedError, match="must be of constant sizes but the first"):
        jax.export.export(jax.jit(jax_moe.finalize))(*shapes)
