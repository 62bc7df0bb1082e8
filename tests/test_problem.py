"""What a call may ask for: every refusal by its words, every acceptance, and no third outcome for random arguments."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
import pytest
from described import NAME, create, described
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from jax_moe.enums import ActivationType, DataType, Fp8QuantizationType, RoutingMethodType, WeightLayout
from jax_moe.problem import FLOAT8, Array


class TheirActivation(enum.Enum):
    """Another library's enum: its names count, its numbers do not."""

    Swiglu = 99
    Identity = 9
    Silu = 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"routing_method_type": RoutingMethodType.DeepSeekV3, "n_group": 4, "topk_group": 2},
        {"routing_method_type": 2, "n_group": 8, "topk_group": 8},
        {"routing_method_type": 2},
        {"routing_method_type": 2, "n_group": np.int64(4), "topk_group": np.int32(1)},
        {"routing_method_type": np.int32(4)},
        {"n_group": 0, "topk_group": 1, "routed_scaling_factor": 2.5},
        *({"routing_method_type": method.value} for method in RoutingMethodType),
        {"do_finalize": False},
        {"do_finalize": 0, "use_shuffled_weight": 0},
        {"weight_layout": WeightLayout.MajorK, "fp8_quantization_type": 1, "activation_type": 3},
        {"activation_type": TheirActivation.Swiglu},
        {"activation_type": ActivationType.Geglu},
        {"use_shuffled_weight": True},
    ],
    ids=str,
)
def test_accepted_options(options):
    assert create(options=options).do_finalize == bool(options.get("do_finalize", True))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"fp8_quantization_type": 0}, ValueError, "fp8_quantization_type must be DeepSeekFp8 (1) or MxFp8 (2), got"),
        ({"fp8_quantization_type": 7}, ValueError, "fp8_quantization_type must be one of Fp8QuantizationType (NoneFp"),
        ({"fp8_quantization_type": "DeepSeekFp8"}, ValueError, "fp8_quantization_type must be one of"),
        ({"weight_layout": 1}, ValueError, "weight_layout must be MajorK (0) or BlockMajorK (2), got MajorMn (1)"),
        ({"weight_layout": 3}, ValueError, "weight_layout must be one of WeightLayout (MajorK=0, MajorMn=1, Block"),
        ({"activation_type": 5}, ValueError, "activation_type must be one of ActivationType (Swiglu=3, Geglu=4, Rel"),
        ({"activation_type": 9}, ValueError, "Identity=7), got 9"),
        ({"activation_type": TheirActivation.Silu}, ValueError, "activation_type must be one of"),
        ({"activation_type": True}, ValueError, "activation_type must be one of"),
        ({"activation_type": 3.0}, ValueError, "activation_type must be one of"),
        ({"activation_type": None}, ValueError, "activation_type must be one of"),
        ({"routing_method_type": 10}, ValueError, "routing_method_type must be one of RoutingMethodType (Default=0"),
        ({"routing_method_type": -1}, ValueError, "routing_method_type must be one of"),
        ({"use_shuffled_weight": "yes"}, ValueError, "use_shuffled_weight must be True or False, got 'yes'"),
        ({"do_finalize": None}, ValueError, "do_finalize must be True or False, got None"),
        ({"do_finalize": 2}, ValueError, "do_finalize must be True or False, got 2"),
        ({"n_group": 4}, ValueError, "n_group must be None, 0 or 1 with Default, got 4"),
        ({"topk_group": 2, "routing_method_type": 1}, ValueError, "topk_group must be None, 0 or 1 with Renormalize"),
        ({"routing_method_type": 2, "n_group": 3}, ValueError, "n_group must be a positive divisor of num_experts (8)"),
        ({"routing_method_type": 2, "n_group": -2}, ValueError, "n_group must be a positive divisor of num_experts"),
        ({"routing_method_type": 2, "n_group": 2.0}, ValueError, "n_group must be a positive divisor of num_experts"),
        ({"routing_method_type": 2, "n_group": 4, "topk_group": 5}, ValueError, "topk_group must be in [1, n_group]"),
        ({"routing_method_type": 2, "n_group": 4, "topk_group": -1}, ValueError, "topk_group must be in [1, n_group]"),
        (
            {"fp8_quantization_type": Fp8QuantizationType.MxFp8, "weight_layout": WeightLayout.BlockMajorK},
            ValueError,
            "weight_layout must be MajorK (0) with MxFp8, got BlockMajorK (2)",
        ),
    ],
    ids=str,
)
def test_refused_options(options, error, words):
    with pytest.raises(error) as caught:
        create(options=options)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{NAME}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({}, {"num_experts": 0}, "num_experts must be an integer in [1, 32767], got 0"),
        ({}, {"num_experts": 32768}, "num_experts must be an integer in [1, 32767], got 32768"),
        ({}, {"num_experts": 8.0}, "num_experts must be an integer in [1, 32767], got 8.0"),
        ({}, {"num_experts": True}, "num_experts must be an integer in [1, 32767], got True"),
        ({}, {"num_experts": np.True_}, "num_experts must be an integer in [1, 32767], got True"),
        ({}, {"num_experts": None}, "num_experts must be an integer in [1, 32767], got None"),
        ({}, {"num_experts": 1}, "top_k must be in [1, min(num_experts, 32)] = [1, 1], got 2"),
        ({"top_k": 0}, {}, "top_k must be in [1, min(num_experts, 32)] = [1, 8], got 0"),
        ({"top_k": 33}, {"num_experts": 40}, "top_k must be in [1, min(num_experts, 32)] = [1, 32], got 33"),
        ({"local": 0}, {}, "gemm1_weights must be of at least one local expert, got 0"),
        ({}, {"num_experts": 3}, "gemm1_weights must be of at most num_experts (3) local experts, got 4"),
        ({}, {"num_experts": 3, "local_expert_offset": None}, "gemm1_weights must be of at most num_experts (3) loc"),
        ({}, {"local_expert_offset": -1}, "local_expert_offset must be an integer in [0, num_experts - local_num_exp"),
        ({}, {"local_expert_offset": 5}, "local_num_experts] = [0, 4], got 5"),
        ({}, {"local_expert_offset": 1.0}, "local_expert_offset must be an integer in"),
        ({}, {"local_expert_offset": False}, "local_expert_offset must be an integer in"),
        ({}, {"declared": {"top_k": 3}}, "top_k must be 2, the size that the arrays have, got 3"),
        ({}, {"declared": {"intermediate_size": 64}}, "intermediate_size must be 128, the size that the arrays have"),
        ({}, {"declared": {"local_num_experts": 8}}, "local_num_experts must be 4, the size that the arrays have"),
        ({"tokens": 2**30}, {}, "topk_ids must be at most 1073741312 tokens with top_k 2; split the call, got"),
        ({"inter": 128 * 2**21}, {}, "gemm1_weights must be of at most 2147482624 rows over all local experts, got"),
        ({"hidden": 128 * 2**22}, {}, "gemm1_weights must be of at most 2147482624 rows over all local experts, got"),
    ],
    ids=str,
)
def test_refused_sizes(changes, words, message):
    with pytest.raises(ValueError, match=f"^{NAME}: ") as caught:
        create(described(**changes), **words)
    assert message in str(caught.value)


REFUSED_ARRAYS = [
    ("topk_ids", None, "int32 [num_tokens, top_k], got None"),
    ("topk_ids", Array((5,), "int32"), "int32 [num_tokens, top_k], got int32[5]"),
    ("topk_ids", Array((5, 2), "int64"), "int32 [num_tokens, top_k], got int64[5,2]"),
    ("hidden_states", None, "float8_e4m3fn or bfloat16 [num_tokens, hidden_size], got None"),
    ("hidden_states", Array((5, 256), "float16"), "float8_e4m3fn or bfloat16 [num_tokens, hidden_size], got"),
    ("hidden_states", Array((5, 256), "float8_e5m2"), "float8_e4m3fn or bfloat16 [num_tokens, hidden_size], got"),
    ("hidden_states", Array((5, 2, 256), FLOAT8), "[num_tokens, hidden_size], got float8_e4m3fn[5,2,256]"),
    ("hidden_states", Array((6, 256), FLOAT8), "float8_e4m3fn[5,256], got float8_e4m3fn[6,256]"),
    ("hidden_states", Array((5, 200), FLOAT8), "a multiple of 128; pad hidden_size 200 to 256"),
    ("hidden_states", Array((5, 0), FLOAT8), "a multiple of 128; pad hidden_size 0 to 128"),
    ("hidden_states_scale", None, "float32[2,5] (or pass hidden_states in bfloat16), got None"),
    ("hidden_states_scale", Array((5, 2), "float32"), "float32[2,5], got float32[5,2]; transpose it, or say"),
    ("hidden_states_scale", Array((2, 5), "bfloat16"), "float32[2,5], got bfloat16[2,5]"),
    ("hidden_states_scale", Array((2, 6), "float32"), "float32[2,5], got float32[2,6]"),
    ("gemm1_weights", None, "float8_e4m3fn [experts, 2 * intermediate_size, hidden_size] with MajorK, got None"),
    ("gemm1_weights", Array((4, 256, 256), "uint8"), "float8_e4m3fn [experts, 2 * intermediate_size, hidden_size]"),
    (
        "gemm1_weights",
        Array((4, 2, 128, 256), FLOAT8),
        "[experts, 2 * intermediate_size, hidden_size] with MajorK, got",
    ),
    ("gemm1_weights", Array((4, 128, 256), FLOAT8), "pad intermediate_size 64 to 128"),
    ("gemm1_weights", Array((4, 300, 256), FLOAT8), "pad intermediate_size 150 to 256"),
    ("gemm1_weights", Array((4, 0, 256), FLOAT8), "pad intermediate_size 0 to 128"),
    ("gemm1_weights", Array((4, 256, 128), FLOAT8), "float8_e4m3fn[4,256,256], got float8_e4m3fn[4,256,128]"),
    ("gemm1_weights_scale", None, "float32[4,2,2], got None"),
    ("gemm1_weights_scale", Array((4, 2, 1), "float32"), "float32[4,2,2], got float32[4,2,1]"),
    ("gemm1_weights_scale", Array((4, 256, 8), "uint8"), "float32[4,2,2], got uint8[4,256,8]"),
    ("gemm2_weights", None, "float8_e4m3fn[4,256,128], got None"),
    ("gemm2_weights", Array((4, 128, 256), FLOAT8), "float8_e4m3fn[4,256,128], got float8_e4m3fn[4,128,256]"),
    ("gemm2_weights", Array((3, 256, 128), FLOAT8), "float8_e4m3fn[4,256,128], got float8_e4m3fn[3,256,128]"),
    ("gemm2_weights_scale", None, "float32[4,2,1], got None"),
    ("gemm2_weights_scale", Array((4, 1, 2), "float32"), "float32[4,2,1], got float32[4,1,2]"),
]


@pytest.mark.parametrize(("name", "array", "message"), REFUSED_ARRAYS, ids=str)
def test_refused_arrays(name, array, message):
    with pytest.raises(ValueError, match=f"^{NAME}: {name} must be ") as caught:
        create(described() | {name: array})
    assert message in str(caught.value)


def test_a_scale_beside_bfloat16_hidden_states_is_refused():
    scale = {"hidden_states_scale": Array((2, 5), "float32")}
    with pytest.raises(ValueError, match="hidden_states_scale must be None with bfloat16 hidden_states"):
        create(described(x_dtype="bfloat16") | scale)


def test_token_major_scales_are_taken_when_said_so():
    arrays = described() | {"hidden_states_scale": Array((5, 2), "float32")}
    problem = create(arrays, scale_is_token_major=True)
    assert (problem.hidden_states_scale_block_stride, problem.hidden_states_scale_token_stride) == (1, 2)
    with pytest.raises(ValueError, match="hidden_states_scale must be float32"):
        create(described(), scale_is_token_major=True)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("do_finalize", [True, False])
def test_results_have_the_shapes_of_the_contract(tokens, do_finalize):
    problem = create(described(tokens), {"do_finalize": do_finalize}, local_expert_offset=4)
    shapes = {name: tuple(problem.outputs()[name]) for name in problem.returned()}
    if do_finalize:
        assert shapes == {"output": ((tokens, 256), "bfloat16")}
    else:
        assert shapes == {
            "gemm2_output": ((tokens * 2, 256), "bfloat16"),
            "expert_weights": ((tokens, 2), "bfloat16"),
            "expanded_idx_to_permuted_idx": ((tokens * 2,), "int32"),
        }


def test_fields_are_plain_ints_in_the_order_of_the_contract():
    problem = create(num_experts=np.int32(8), local_expert_offset=np.int16(3))
    assert all(type(value) is int for value in problem.fields())
    assert all(type(value) is int for value in problem.attributes().values())
    assert problem == create(num_experts=8, local_expert_offset=3)
    assert dict(zip((field.name for field in dataclasses.fields(problem)), problem.fields(), strict=True)) == {
        "num_tokens": 5,
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_experts": 8,
        "top_k": 2,
        "local_num_experts": 4,
        "local_expert_offset": 3,
        "topk_weights_dtype": DataType.NONE,
        "hidden_states_dtype": DataType.FLOAT8_E4M3,
        "hidden_states_scale_block_stride": 5,
        "hidden_states_scale_token_stride": 1,
        "weights_scale_rows": 128,
        "fp8_quantization_type": 1,
        "activation_type": 3,
        "weight_layout": 0,
        "use_shuffled_weight": 0,
        "has_gemm1_lora_delta": 0,
        "do_finalize": 1,
        "batch_invariant": 0,
        "enable_pdl": 1,
    }


def test_another_librarys_activation_counts_by_its_name():
    problem = create(described(rows=128), {"activation_type": TheirActivation.Identity})
    assert problem.activation_type is ActivationType.Identity


@examples(300)
@given(
    st.dictionaries(
        st.sampled_from(
            (
                "routing_method_type",
                "use_shuffled_weight",
                "weight_layout",
                "do_finalize",
                "fp8_quantization_type",
                "activation_type",
                "n_group",
                "topk_group",
                "num_experts",
                "local_expert_offset",
            )
        ),
        st.integers(-3, 12) | st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    )
)
def test_random_options_are_taken_or_refused_by_name(options):
    words = {name: options.pop(name) for name in ("num_experts", "local_expert_offset") if name in options}
    try:
        problem = create(options=options, **words)
    except (ValueError, NotImplementedError) as error:
        culprit = str(error).removeprefix(f"{NAME}: ").split()[0]
        follows = {
            "num_experts": {"top_k", "local_expert_offset", "gemm1_weights"},
            "local_expert_offset": {"gemm1_weights"},
        }
        follows["fp8_quantization_type"] = {"weight_layout", "hidden_states_scale"}
        follows |= {"weight_layout": {"gemm1_weights"}, "activation_type": {"gemm2_weights", "gemm1_weights"}}
        assert culprit in options | words or any(culprit in follows.get(name, ()) for name in options | words), error
    else:
        assert problem.is_gated
        assert problem.weight_layout is WeightLayout.MajorK
        assert problem.fp8_quantization_type is Fp8QuantizationType.DeepSeekFp8
        assert 0 <= problem.local_expert_offset <= problem.num_experts - problem.local_num_experts
