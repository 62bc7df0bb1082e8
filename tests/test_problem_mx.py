"""What is taken and refused of MxFp8: shapes and dtypes of its scales, their order, and the layouts of weights."""

from __future__ import annotations

import pytest
from described import NAME, create, described, is_gated
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from jax_moe.enums import ActivationType, Fp8QuantizationType
from jax_moe.problem import E8M0, FLOAT8, SCALES, Array

MX = {"fp8_quantization_type": Fp8QuantizationType.MxFp8}
TOKEN_MAJOR = {"scale_is_token_major": True}


def strides(problem):
    return problem.hidden_states_scale_block_stride, problem.hidden_states_scale_token_stride


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("activation", ActivationType)
def test_scales_are_taken_for_rows_and_for_a_grid(rows, shuffled, activation):
    arrays = described(rows=256 if is_gated(activation) else 128, mx_rows=rows)
    options = MX | {"activation_type": activation, "use_shuffled_weight": shuffled}
    problem = create(arrays, options, **TOKEN_MAJOR)
    assert problem.weights_scale_rows == rows and problem.is_mx
    assert strides(problem) == (1, 8)
    listed = problem.inputs(scale_is_token_major=True)
    assert {name: listed[name] for name in arrays} == arrays


def test_scales_may_be_of_the_e8m0_dtype():
    arrays = described(mx_rows=1)
    for name in SCALES:
        arrays[name] = arrays[name]._replace(dtype=E8M0)
        assert create(arrays, MX, **TOKEN_MAJOR) == create(described(mx_rows=1), MX, **TOKEN_MAJOR)


def test_the_order_of_the_scale_is_said_or_shown_by_its_shape():
    token_major = described(mx_rows=1)
    block_major = token_major | {"hidden_states_scale": Array((8, 5), "uint8")}
    assert strides(create(token_major, MX, scale_is_token_major=None)) == (1, 8)
    assert strides(create(block_major, MX, scale_is_token_major=None)) == (5, 1)
    assert strides(create(block_major, MX, scale_is_token_major=False)) == (5, 1)
    assert strides(create(token_major, MX, scale_is_token_major=None, scale_strides=(20, 2))) == (2, 20)
    assert strides(create(block_major, MX, scale_is_token_major=None, scale_strides=(20, 2))) == (20, 2)
    square = described(8, mx_rows=1)
    assert square["hidden_states_scale"].shape == (8, 8)
    assert strides(create(square, MX, scale_is_token_major=None, scale_strides=(20, 2))) == (2, 20)
    with pytest.raises(
        ValueError, match=r"hidden_states_scale must be uint8.8,5.* say hidden_states_scale_order='token"
    ):
        create(token_major, MX, scale_is_token_major=False)
    with pytest.raises(
        ValueError, match=r"hidden_states_scale must be uint8.5,8.* say hidden_states_scale_order='block"
    ):
        create(block_major, MX, scale_is_token_major=True)


def test_the_order_of_deepseeks_scale_is_never_guessed():
    assert create(scale_is_token_major=None) == create()
    turned = described() | {"hidden_states_scale": Array((5, 2), "float32")}
    with pytest.raises(ValueError, match=r"hidden_states_scale must be float32.2,5"):
        create(turned, scale_is_token_major=None)


def test_bfloat16_hidden_states_need_no_scale():
    problem = create(described(x_dtype="bfloat16", mx_rows=1), MX, scale_is_token_major=None)
    assert problem.hidden_states_are_bf16


@pytest.mark.parametrize(("tokens", "columns"), [(0, 0), (1, 4), (6, 12)])
def test_the_scale_of_the_activation_has_four_bytes_for_each_float(tokens, columns):
    problem = create(described(tokens, inter=256, lora=True, mx_rows=1), MX, **TOKEN_MAJOR)
    assert problem.outputs()["gemm1_activation_scale"] == Array((2, columns, 4), "uint8")


E = f" (or as {E8M0})"
REFUSED = [
    ("hidden_states_scale", None, f"uint8[5,8]{E} (or pass hidden_states in bfloat16), got None"),
    ("hidden_states_scale", Array((5, 8), "float32"), f"uint8[5,8]{E}, got float32[5,8]"),
    ("hidden_states_scale", Array((5, 8), "int8"), f"uint8[5,8]{E}, got int8[5,8]"),
    ("hidden_states_scale", Array((5, 2), "uint8"), f"uint8[5,8]{E}, got uint8[5,2]"),
    ("hidden_states_scale", Array((40,), "uint8"), f"uint8[5,8]{E}, got uint8[40]"),
    ("gemm1_weights_scale", None, f"uint8[4,256,8] or uint8[4,8,8]{E}, got None"),
    ("gemm1_weights_scale", Array((4, 2, 2), "float32"), f"uint8[4,256,8] or uint8[4,8,8]{E}, got float32[4,2,2]"),
    ("gemm1_weights_scale", Array((4, 256, 2), "uint8"), f"uint8[4,256,8] or uint8[4,8,8]{E}, got uint8[4,256,2]"),
    ("gemm1_weights_scale", Array((4, 2, 8), "uint8"), f"uint8[4,256,8] or uint8[4,8,8]{E}, got uint8[4,2,8]"),
    ("gemm1_weights_scale", Array((4 * 256 * 8,), "uint8"), f"uint8[4,256,8] or uint8[4,8,8]{E}, got uint8[8192]"),
    ("gemm2_weights_scale", None, f"uint8[4,256,4]{E}, got None"),
    ("gemm2_weights_scale", Array((4, 8, 4), "uint8"), "got uint8[4,8,4]; gemm1_weights_scale has one for each 1x32"),
    ("gemm2_weights_scale", Array((4, 256, 4), "float8_e4m3fn"), f"uint8[4,256,4]{E}, got float8_e4m3fn[4,256,4]"),
    ("gemm1_weights", Array((4, 256, 128), FLOAT8), "float8_e4m3fn[4,256,256], got float8_e4m3fn[4,256,128]"),
    ("gemm1_weights", Array((4, 192, 256), FLOAT8), "pad intermediate_size 96 to 128"),
    ("hidden_states", Array((5, 160), FLOAT8), "pad hidden_size 160 to 256"),
]


@pytest.mark.parametrize(("name", "array", "message"), REFUSED, ids=str)
def test_refused_arrays(name, array, message):
    with pytest.raises(ValueError, match=f"^{NAME}: {name} must be ") as caught:
        create(described(mx_rows=1) | {name: array}, MX, scale_is_token_major=None)
    assert message in str(caught.value)


def test_scales_of_another_quantisation_are_refused():
    with pytest.raises(ValueError, match=r"hidden_states_scale must be uint8.*got float32"):
        create(described(), MX)
    with pytest.raises(ValueError, match=r"hidden_states_scale must be float32.*got uint8"):
        create(described(mx_rows=1))
    e8m0 = described(x_dtype="bfloat16") | {"gemm1_weights_scale": Array((4, 2, 2), E8M0)}
    with pytest.raises(ValueError, match=r"gemm1_weights_scale must be float32.4,2,2., got float8_e8m0fnu"):
        create(e8m0)


@examples(200)
@given(st.data())
def test_one_wrong_scale_is_refused_by_its_name(data):
    arrays = described(data.draw(st.integers(1, 40)), mx_rows=data.draw(st.sampled_from((1, 32))))
    name = data.draw(st.sampled_from(SCALES))
    shape, dtype = arrays[name]
    if data.draw(st.booleans()):
        wrong = Array(shape, data.draw(st.sampled_from(("float32", "int8", "uint16", FLOAT8))))
    else:
        axis = data.draw(st.integers(0, len(shape) - 1))
        size = data.draw(st.integers(0, 2 * shape[axis] + 3).filter(lambda size: size != shape[axis]))
        wrong = Array((*shape[:axis], size, *shape[axis + 1 :]), dtype)
    culprits = {name, "gemm2_weights_scale"} if name == "gemm1_weights_scale" else {name}  # of the other kind
    with pytest.raises(ValueError, match=f"^{NAME}: ") as caught:
        create(arrays | {name: wrong}, MX, **TOKEN_MAJOR)
    assert str(caught.value).removeprefix(f"{NAME}: ").split()[0] in culprits
