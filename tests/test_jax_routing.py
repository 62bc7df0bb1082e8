"""pack_topk_ids and unpack_topk_ids: the bits of the format, whatever the ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import routings
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_moe import pack_topk_ids, unpack_topk_ids

EXAMPLES = [(0, 1.0, 0x00003F80), (5, 0.5, 0x00053F00), (255, 0.125, 0x00FF3E00), (3, -0.25, 0x0003BE80)]


@pytest.mark.parametrize(("expert", "weight", "packed"), EXAMPLES)
def test_the_examples_of_the_format(expert: int, weight: float, packed: int) -> None:
    ids, weights = np.full((2, 3), expert), np.full((2, 3), weight, np.float32)
    actual = jax.jit(pack_topk_ids)(ids, weights)
    assert actual.dtype == jnp.int32 and (np.asarray(actual) == packed).all()
    unpacked_ids, unpacked_weights = unpack_topk_ids(actual)
    assert (np.asarray(unpacked_ids) == expert).all() and (np.asarray(unpacked_weights) == weight).all()


def test_padding_is_id_minus_one_whatever_its_weight() -> None:
    packed = np.asarray(pack_topk_ids(np.full(3, -1), np.array([0.0, -1.0, np.inf], np.float32)))
    assert packed[0] == np.array(0xFFFF0000, np.uint32).view(np.int32)
    assert (packed >> 16 == -1).all()


IDS = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-40000, 40000), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(ids=IDS, seed=st.integers(0, 1000))
def test_an_id_is_kept_exactly_or_becomes_padding(ids: list[int], seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal(len(ids)).astype(np.float32)
    unpacked, rounded = unpack_topk_ids(pack_topk_ids(np.array(ids, np.int64), weights))
    assert np.asarray(unpacked).tolist() == [i if 0 <= i <= 32767 else -1 for i in ids]
    np.testing.assert_array_equal(np.asarray(rounded), weights.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32))
def test_every_integer_type_of_ids_means_its_values(dtype: type) -> None:
    limits = np.iinfo(dtype)
    ids = np.array([limits.min, 0, 1, 100, limits.max], dtype)
    expected = np.where((ids.astype(np.int64) >= 0) & (ids.astype(np.int64) <= 32767), ids.astype(np.int64), -1)
    weights = np.ones(5, np.float32)
    for given_ids in (ids, jnp.asarray(ids)):
        np.testing.assert_array_equal(np.asarray(unpack_topk_ids(pack_topk_ids(given_ids, weights))[0]), expected)


def test_the_weight_keeps_every_bit_of_a_bfloat16() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    packed = np.asarray(pack_topk_ids(np.full(65536, 77), bits.view(ml_dtypes.bfloat16)))
    np.testing.assert_array_equal(packed & 0xFFFF, bits)
    np.testing.assert_array_equal(packed >> 16, 77)
    np.testing.assert_array_equal(np.asarray(unpack_topk_ids(packed)[1]).view(np.uint16), bits)


def test_packing_agrees_with_the_numpy_packing_of_the_cases() -> None:
    rng = np.random.default_rng(0)
    ids, weights = rng.integers(-1, 32768, (50, 8)), rng.standard_normal((50, 8)).astype(np.float32)
    expected = routings.pack(ids, weights)
    np.testing.assert_array_equal(np.asarray(pack_topk_ids(ids, weights)), expected)
    np.testing.assert_array_equal(np.asarray(jax.vmap(pack_topk_ids)(jnp.asarray(ids), jnp.asarray(weights))), expected)


def test_wrong_arguments_are_refused() -> None:
    ids, weights = np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"^pack_topk_ids: ids must be of an integer dtype, got float32\[2, 3\]"):
        pack_topk_ids(weights, weights)
    with pytest.raises(ValueError, match=r"^pack_topk_ids: weights must be bfloat16, float16 or float32, got int32"):
        pack_topk_ids(ids, ids)
    with pytest.raises(ValueError, match=r"^pack_topk_ids: weights must be \[2, 3\], the shape of ids, got \[3\]"):
        pack_topk_ids(ids, weights[0])
    with pytest.raises(ValueError, match=r"^unpack_topk_ids: packed must be int32, got float32"):
        unpack_topk_ids(weights)


def test_routing_weights_have_no_silent_zero_gradient() -> None:
    ids = np.zeros((2, 3), np.int32)
    with pytest.raises(NotImplementedError, match=r"^pack_topk_ids: weights .*stop_gradient"):
        jax.grad(lambda w: (pack_topk_ids(ids, w) * 1.0).sum())(jnp.ones((2, 3)))
    assert pack_topk_ids(ids, jax.lax.stop_gradient(jnp.ones((2, 3)))).shape == (2, 3)
