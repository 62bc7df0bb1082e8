"""What is taken and refused of ids and weights apart, activations and their parameters, weight layouts and LoRA."""

from __future__ import annotations

import itertools

import pytest
from described import NAME, create, described, is_gated
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from jax_moe.enums import ActivationType, DataType, WeightLayout
from jax_moe.problem import FLOAT8, MAX_NUM_EXPERTS, MAX_TOP_K, PER_EXPERT, Array

RELU2 = {"activation_type": ActivationType.Relu2}
BLOCKED = {"weight_layout": WeightLayout.BlockMajorK}


@pytest.mark.parametrize("activation", ActivationType)
@pytest.mark.parametrize("layout", [WeightLayout.MajorK, WeightLayout.BlockMajorK])
@pytest.mark.parametrize("shuffled", [False, True])
def test_activations_and_layouts_are_taken_in_all_combinations(activation, layout, shuffled):
    rows = 256 if is_gated(activation) else 128
    options = {"activation_type": activation, "weight_layout": layout, "use_shuffled_weight": shuffled}
    problem = create(described(rows=rows, blocked=layout is WeightLayout.BlockMajorK), options)
    assert (problem.intermediate_size, problem.gemm1_rows) == (128, rows)
    assert problem.is_gated == is_gated(activation)
    assert problem.attributes().items() >= {name: int(value) for name, value in options.items()}.items()


@pytest.mark.parametrize("given", [names for n in range(4) for names in itertools.combinations(PER_EXPERT, n)], ids=str)
def test_parameters_of_swiglu_are_taken_alone_and_together(given):
    assert create(described(per_expert=given)) == create()


@pytest.mark.parametrize(
    ("dtype", "member"), [(None, DataType.NONE), ("bfloat16", DataType.BFLOAT16), ("float32", DataType.FLOAT32)]
)
def test_weights_apart_from_ids(dtype, member):
    problem = create(described(topk_weights=dtype), {"do_finalize": False})
    assert problem.topk_weights_dtype is member
    ours = Array((5, 2), "bfloat16") if dtype is None else None  # else they are the caller's
    assert problem.outputs()["expert_weights"] == ours
    assert "expert_weights" in problem.returned()


@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize("do_finalize", [True, False])
def test_results_with_a_lora_delta(tokens, do_finalize):
    problem = create(described(tokens, inter=256, lora=True), {"do_finalize": do_finalize})
    shapes = {name: shape and tuple(shape) for name, shape in problem.outputs().items()}
    assert shapes == {
        "output": ((tokens, 256), "bfloat16") if do_finalize else None,
        "gemm2_output": None if do_finalize else ((2 * tokens, 256), "bfloat16"),
        "expert_weights": None if do_finalize else ((tokens, 2), "bfloat16"),
        "expanded_idx_to_permuted_idx": ((2 * tokens,), "int32"),
        "gemm1_activation_output": ((2 * tokens, 256), "uint8"),
        "gemm1_activation_scale": ((2, {0: 0, 1: 4, 6: 12}[tokens]), "float32"),
    }
    first = ("output",) if do_finalize else ("gemm2_output", "expert_weights")
    assert problem.returned() == (*first, "expanded_idx_to_permuted_idx", "gemm1_activation_output")


REFUSED = [
    ({}, {}, "topk_weights", Array((5, 2), "float16"), "bfloat16 or float32 [num_tokens, top_k], got float16[5,2]"),
    ({}, {}, "topk_weights", Array((5, 2), FLOAT8), "bfloat16 or float32 [num_tokens, top_k], got float8_e4m3fn[5,2]"),
    ({}, {}, "topk_weights", Array((10,), "float32"), "bfloat16 or float32 [num_tokens, top_k], got float32[10]"),
    ({}, {}, "topk_weights", Array((5, 3), "float32"), "float32[5,2], got float32[5,3]"),
    ({}, {}, "topk_weights", Array((2, 5), "bfloat16"), "bfloat16[5,2], got bfloat16[2,5]"),
    ({}, {}, "gemm1_lora_delta", Array((5, 2, 256), "float32"), "bfloat16[5,2,256], got float32[5,2,256]"),
    ({}, {}, "gemm1_lora_delta", Array((5, 2, 128), "bfloat16"), "bfloat16[5,2,256], got bfloat16[5,2,128]"),
    ({}, {}, "gemm1_lora_delta", Array((10, 256), "bfloat16"), "bfloat16[5,2,256], got bfloat16[10,256]"),
    ({"rows": 128}, RELU2, "gemm1_lora_delta", Array((5, 2, 256), "bfloat16"), "bfloat16[5,2,128], got"),
    *(({}, {}, name, Array((8,), "float32"), "float32[4], got float32[8]") for name in PER_EXPERT),
    *(({}, {}, name, Array((), "float32"), "float32[4], got float32[]") for name in PER_EXPERT),
    *(({}, {}, name, Array((4,), "bfloat16"), "float32[4], got bfloat16[4]") for name in PER_EXPERT),
    *(
        ({"rows": 256 if is_gated(kind) else 128}, {"activation_type": kind}, name, Array((4,), "float32"), words)
        for kind in (ActivationType.Geglu, ActivationType.Relu2, ActivationType.Identity)
        for name in PER_EXPERT
        for words in [f"None with {kind.name}, got float32[4]"]
    ),
    ({"rows": 128}, RELU2, "gemm1_weights", Array((4, 100, 256), FLOAT8), "pad intermediate_size 100 to 128"),
    (
        {"rows": 128},
        RELU2,
        "gemm1_weights",
        None,
        "float8_e4m3fn [experts, intermediate_size, hidden_size] with MajorK, got None",
    ),
    ({}, {}, "gemm1_weights", Array((4, 257, 256), FLOAT8), "of an even number of rows (up, then gate) with Swiglu"),
    ({"blocked": True}, BLOCKED, "gemm1_weights", None, "[experts, hidden_size / 128, 2 * intermediate_size, 128]"),
    (
        {},
        BLOCKED,
        "gemm1_weights",
        Array((4, 256, 256), FLOAT8),
        "2 * intermediate_size, 128] with BlockMajorK, got float8_e4m3fn[4,2",
    ),
    ({"blocked": True}, {}, "gemm1_weights", Array((4, 2, 256, 128), FLOAT8), "[experts, 2 * intermediate_size, hidde"),
    ({"blocked": True}, BLOCKED, "gemm1_weights", Array((4, 3, 256, 128), FLOAT8), "[4,2,256,128], got float8_e4m3fn["),
    ({"blocked": True}, BLOCKED, "gemm1_weights", Array((4, 4, 256, 64), FLOAT8), "[4,2,256,128], got float8_e4m3fn[4"),
    ({"blocked": True}, BLOCKED, "gemm1_weights", Array((4, 2, 200, 128), FLOAT8), "pad intermediate_size 100 to 128"),
    (
        {"blocked": True},
        BLOCKED,
        "gemm2_weights",
        Array((4, 256, 128), FLOAT8),
        "float8_e4m3fn[4,1,256,128], got float",
    ),
    ({"blocked": True}, BLOCKED, "gemm2_weights", Array((4, 256, 1, 128), FLOAT8), "[4,1,256,128], got float8_e4m3fn["),
]


@pytest.mark.parametrize(("sizes", "options", "name", "array", "message"), REFUSED, ids=str)
def test_refused_arrays(sizes, options, name, array, message):
    with pytest.raises(ValueError, match=f"^{NAME}: {name} must be ") as caught:
        create(described(**sizes) | {name: array}, options)
    assert message in str(caught.value)


def test_gated_weights_with_an_activation_without_gate():
    """[L, 2I, H] are valid weights of 2I rows: what is wrong shows at gemm2_weights, or in the stated size."""
    words = "; gemm1_weights has 256 rows, which is intermediate_size with Relu2"
    with pytest.raises(ValueError, match=f"^{NAME}: gemm2_weights must be float8_e4m3fn.4,256,256.*{words}"):
        create(described(), RELU2)
    with pytest.raises(ValueError, match=f"^{NAME}: intermediate_size must be 256.*got 128{words}"):
        create(described(), RELU2, declared={"intermediate_size": 128})


def test_weights_without_gate_with_a_gated_activation():
    words = r"; gemm1_weights has 256 rows, which is 2 \* intermediate_size with Geglu"
    with pytest.raises(ValueError, match=f"^{NAME}: gemm2_weights must be float8_e4m3fn.4,256,128.*{words}"):
        create(described(inter=256, rows=256), {"activation_type": ActivationType.Geglu})


@st.composite
def valid_calls(draw):
    """Sizes, options and arrays that belong together."""
    num_experts = draw(st.integers(1, MAX_NUM_EXPERTS))
    local = draw(st.integers(1, min(num_experts, 64)))
    inter = 128 * draw(st.integers(1, 64))
    activation = draw(st.sampled_from(ActivationType))
    blocked = draw(st.booleans())
    parameters = draw(st.sets(st.sampled_from(PER_EXPERT))) if activation is ActivationType.Swiglu else ()
    arrays = described(
        draw(st.integers(0, 10**6)),
        128 * draw(st.integers(1, 64)),
        inter,
        local,
        draw(st.integers(1, min(num_experts, MAX_TOP_K))),
        draw(st.sampled_from((FLOAT8, "bfloat16"))),
        rows=2 * inter if is_gated(activation) else inter,
        blocked=blocked,
        topk_weights=draw(st.sampled_from((None, "bfloat16", "float32"))),
        lora=draw(st.booleans()),
        per_expert=tuple(sorted(parameters)),
    )
    options = {
        "activation_type": activation,
        "weight_layout": WeightLayout.BlockMajorK if blocked else WeightLayout.MajorK,
        "use_shuffled_weight": draw(st.booleans()),
        "do_finalize": draw(st.booleans()),
    }
    words = {
        "num_experts": num_experts,
        "local_expert_offset": draw(st.none() | st.integers(0, num_experts - local)),
        "declared": {"intermediate_size": inter, "local_num_experts": local},
    }
    return arrays, options, words


@examples(300)
@given(valid_calls())
def test_random_valid_calls_are_accepted(call):
    arrays, options, words = call
    problem = create(arrays, options, **words)
    listed = {name: array for name, array in problem.inputs().items() if name in arrays}
    assert listed == arrays
    absent = {name: array for name, array in problem.inputs().items() if name not in arrays and array is not None}
    assert set(absent) <= set(PER_EXPERT)
    assert problem.local_expert_offset == (words["local_expert_offset"] or 0)
    assert {name: getattr(problem, name) for name in options} == options
    assert set(problem.returned()) - {"expert_weights"} <= {
        name for name, array in problem.outputs().items() if array is not None
    }


@examples(300)
@given(valid_calls(), st.data())
def test_one_wrong_array_is_refused_by_its_name(call, data):
    """Another dtype, rank or size of any one array; sizes that define the others may be laid at their door."""
    arrays, options, words = call
    name = data.draw(st.sampled_from(sorted(name for name, array in arrays.items() if array is not None)))
    shape, dtype = arrays[name]
    kind = data.draw(st.sampled_from(("dtype", "rank", "size", "absent")))
    if kind == "dtype":
        wrong, culprits = Array(shape, data.draw(st.sampled_from(("float64", "uint8", "int8", "float16")))), {name}
    elif kind == "rank":
        wrong, culprits = Array((*shape, 1), dtype), {name}
    elif kind == "absent":
        if name in ("topk_weights", "gemm1_lora_delta", *PER_EXPERT):
            return  # another valid call
        wrong, culprits = None, {name}
    else:
        axis = data.draw(st.integers(0, len(shape) - 1))
        size = data.draw(st.integers(0, 2 * shape[axis] + 3).filter(lambda size: size != shape[axis]))
        wrong = Array((*shape[:axis], size, *shape[axis + 1 :]), dtype)
        culprits = {name}
        if name in ("topk_ids", "hidden_states", "gemm1_weights"):
            culprits = {*arrays, "top_k", "local_expert_offset", "intermediate_size", "local_num_experts"}
        if name == "topk_ids" and axis == 1 and 1 <= size <= min(words["num_experts"], MAX_TOP_K):
            if not {"topk_weights", "gemm1_lora_delta"} & arrays.keys():
                return  # another valid top_k
    with pytest.raises(ValueError, match=f"^{NAME}: ") as caught:
        create(arrays | {name: wrong}, options, **words)
    assert str(caught.value).removeprefix(f"{NAME}: ").split()[0] in culprits
