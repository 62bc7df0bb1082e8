"""The torch facade's signature, and the words of everything that it refuses."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from typing import Any

import cases
import pytest

torch = pytest.importorskip("torch", reason="the torch facade needs torch")

import torch_calls  # noqa: E402

import torch_facade  # noqa: E402

NAME = "trtllm_fp8_block_scale_routed_moe"
CASE = cases.Case("arguments", tokens=5, hidden=256, inter=128, experts=8, top_k=2, window=(2, 4))
# Every tensor that a call may have, but for output and routing_bias.
FULL = dataclasses.replace(
    CASE, topk_weights="float32", lora=True, per_expert=("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
)
OPTIONAL = ("topk_weights", "gemm1_lora_delta", *FULL.per_expert)
EMPTY = inspect.Parameter.empty
DEFAULTS = {
    **dict.fromkeys(torch_calls.POSITIONAL, EMPTY),
    "routing_method_type": 0,
    "use_shuffled_weight": False,
    "weight_layout": 0,
    "do_finalize": True,
    "enable_pdl": None,
    "gemm1_lora_delta": None,
    "output": None,
    "tune_max_num_tokens": 8192,
    "fp8_quantization_type": torch_facade.Fp8QuantizationType.DeepSeekFp8,
    "activation_type": 3,
    "gemm1_alpha": None,
    "gemm1_beta": None,
    "gemm1_clamp_limit": None,
    "batch_invariant": None,
}


def refused(error: type[Exception], words: str, case: cases.Case = CASE, **changes: Any) -> None:
    """`changes` are arguments, or topk_weights: the second of the pair that topk_ids then is."""
    given = torch_calls.arguments(case)
    if "topk_weights" in changes:
        given["topk_ids"] = (given["topk_ids"][0], changes.pop("topk_weights"))
    with pytest.raises(error, match=re.escape(f"{NAME}: {words}")) as raised:
        torch_calls.function(**given | changes)
    assert raised.type is error


def tensor_of(name: str, case: cases.Case = FULL) -> torch.Tensor:
    """The tensor that a case gives as an argument, or as topk_weights."""
    given = torch_calls.arguments(case)
    value = given["topk_ids"][1] if name == "topk_weights" else given[name]
    return value[0] if isinstance(value, tuple) else value


def test_signature_is_the_documented_one() -> None:
    parameters = inspect.signature(torch_facade.trtllm_fp8_block_scale_routed_moe).parameters
    assert [(name, parameter.default) for name, parameter in parameters.items()] == list(DEFAULTS.items())
    by_name_only = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    assert by_name_only == ["batch_invariant"]


def test_every_argument_is_described() -> None:
    text = inspect.getdoc(torch_facade.trtllm_fp8_block_scale_routed_moe) or ""
    assert [name for name in DEFAULTS if f"\n    {name}: " not in text] == []


def test_enum_values_are_the_documented_ones() -> None:
    assert {member.name: member.value for member in torch_facade.Fp8QuantizationType} == {
        "NoneFp8": 0,
        "DeepSeekFp8": 1,
        "MxFp8": 2,
    }
    assert {member.name: member.value for member in torch_facade.WeightLayout} == {
        "MajorK": 0,
        "MajorMn": 1,
        "BlockMajorK": 2,
    }
    assert torch_facade.ActivationType.Swiglu == 3 and torch_facade.RoutingMethodType.DeepSeekV3 == 2


def dtype_cases() -> list[tuple[str, Any, str]]:
    given = torch_calls.arguments(CASE)
    return [
        (name, given[name].view(torch.int8) if given[name].itemsize == 1 else given[name].double(), words)
        for name, words in {
            "topk_ids": "int32 [num_tokens, top_k], got float64[5,2]",
            "hidden_states": "float8_e4m3fn or bfloat16 [num_tokens, hidden_size], got int8[5,256]",
            "hidden_states_scale": "float32[2,5], got float64[2,5]",
            "gemm1_weights": "float8_e4m3fn [experts, 2 * intermediate_size, hidden_size] with MajorK, got int8[4,2",
            "gemm1_weights_scale": "float32[4,2,2], got float64[4,2,2]",
            "gemm2_weights": "float8_e4m3fn[4,256,128], got int8[4,256,128]",
            "gemm2_weights_scale": "float32[4,2,1], got float64[4,2,1]",
        }.items()
    ]


@pytest.mark.parametrize("name, value, words", dtype_cases())
def test_dtypes_are_checked(name: str, value: Any, words: str) -> None:
    refused(ValueError, f"{name} must be {words}", **{name: value})


@pytest.mark.parametrize("name, words", {
    "topk_weights": "bfloat16 or float32 [num_tokens, top_k], got float64[5,2]",
    "gemm1_lora_delta": "bfloat16[5,2,256], got float64[5,2,256]",
    "gemm1_alpha": "float32[4], got float64[4]",
    "gemm1_beta": "float32[4], got float64[4]",
    "gemm1_clamp_limit": "float32[4], got float64[4]",
}.items())  # fmt: skip
def test_dtypes_of_optional_tensors_are_checked(name: str, words: str) -> None:
    refused(ValueError, f"{name} must be {words}", FULL, **{name: tensor_of(name).double()})


@pytest.mark.parametrize("name", torch_calls.TENSORS)
def test_shapes_are_checked(name: str) -> None:
    value = torch_calls.arguments(CASE)[name]
    grown = torch.cat([value.view(torch.uint8)] * 2, dim=-1).view(value.dtype)
    assert grown.shape[-1] == 2 * value.shape[-1]
    with pytest.raises(ValueError, match=f"^{NAME}: "):
        torch_calls.call(CASE, **{name: grown})
    with pytest.raises(ValueError, match=f"^{NAME}: {name} must be "):
        torch_calls.call(CASE, **{name: value[0]})


@pytest.mark.parametrize("name", OPTIONAL)
def test_shapes_of_optional_tensors_are_checked(name: str) -> None:
    value = tensor_of(name)
    for wrong in (torch.cat([value] * 2, dim=-1), value[:-1], value[0]):
        refused(ValueError, f"{name} must be ", FULL, **{name: wrong})


@pytest.mark.parametrize("name", [name for name in torch_calls.TENSORS if name != "hidden_states_scale"])
def test_only_the_scale_may_be_strided(name: str) -> None:
    value = torch_calls.arguments(CASE)[name]
    spread = torch.empty_strided(value.shape, [2 * stride for stride in value.stride()], dtype=value.dtype)
    refused(ValueError, must_be_contiguous(name, spread), **{name: spread})


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_tensors_must_be_contiguous(name: str) -> None:
    spread = torch.stack([tensor_of(name)] * 2, dim=-1)[..., 0]
    refused(ValueError, must_be_contiguous(name, spread), FULL, **{name: spread})


def must_be_contiguous(name: str, tensor: torch.Tensor) -> str:
    shape, strides = list(tensor.shape), list(tensor.stride())
    return f"{name} must be contiguous, got shape {shape} with strides {strides}; call .contiguous()"


@pytest.mark.parametrize("name", [*torch_calls.TENSORS, "routing_bias", "output"])
def test_tensors_must_be_on_one_device(name: str) -> None:
    value = torch_calls.arguments(CASE).get(name)
    shapes = {"routing_bias": (CASE.experts,), "output": (CASE.tokens, CASE.hidden)}
    elsewhere = torch.empty(shapes[name], dtype=torch.bfloat16) if value is None else value
    if name == "hidden_states":
        words = "topk_ids must be on meta like hidden_states, got cpu"
    else:
        words = f"{name} must be on cpu like hidden_states, got meta"
    refused(ValueError, words, **{name: elsewhere.to("meta")})


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_tensors_must_be_on_the_same_device(name: str) -> None:
    words = f"{name} must be on cpu like hidden_states, got meta"
    refused(ValueError, words, FULL, **{name: tensor_of(name).to("meta")})


def test_two_gpus_are_two_devices() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = torch_calls.arguments(CASE)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v).to("cuda:0") if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        weights = torch.empty(given["gemm1_weights"].shape, dtype=torch.float8_e4m3fn, device="cuda:1")
        with pytest.raises(ValueError, match="gemm1_weights must be on cuda:0 like hidden_states, got cuda:1"):
            torch_calls.function(**fakes | {"gemm1_weights": weights})


def test_other_devices_are_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = torch_calls.arguments(CASE)
    with FakeTensorMode():
        x = torch.empty(given["hidden_states"].shape, dtype=torch.float8_e4m3fn, device="xpu:0")
        with pytest.raises(NotImplementedError, match="hidden_states must be on a cpu or cuda device, got xpu:0"):
            torch_calls.function(**given | {"hidden_states": x})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"top_k": 3}, "top_k must be 2, the size that the arrays have, got 3"),
        ({"intermediate_size": 256}, "intermediate_size must be 128, the size that the arrays have, got 256"),
        ({"local_num_experts": 8}, "local_num_experts must be 4, the size that the arrays have, got 8"),
        ({"num_experts": 0}, "num_experts must be an integer in [1, 32767], got 0"),
        ({"num_experts": 32768}, "num_experts must be an integer in [1, 32767], got 32768"),
        ({"num_experts": 5}, "local_expert_offset must be an integer in [0, num_experts - local_num_experts] = [0, 1]"),
        ({"local_expert_offset": 5}, "local_expert_offset must be an integer in"),
        ({"local_expert_offset": -1}, "local_expert_offset must be an integer in"),
        ({"num_experts": 8.0}, "num_experts must be an integer, got 8.0"),
        ({"top_k": True}, "top_k must be an integer, got True"),
        ({"local_expert_offset": None}, "local_expert_offset must be an integer, got None"),
        ({"top_k": [2]}, "top_k must be an integer, got [2]"),
        ({"n_group": "2"}, "n_group must be an integer, got '2'"),
        ({"n_group": 2}, "n_group must be None, 0 or 1 with Default, got 2"),
        ({"topk_group": 2}, "topk_group must be None, 0 or 1 with Default, got 2"),
        ({"routing_method_type": 2, "n_group": 3}, "n_group must be a positive divisor of num_experts (8), got 3"),
        (
            {"routing_method_type": 2, "n_group": 2, "topk_group": 3},
            "topk_group must be in [1, n_group] = [1, 2], got 3",
        ),
        ({"routing_method_type": 10}, "routing_method_type must be one of RoutingMethodType (Default=0"),
        ({"routing_method_type": "DeepSeekV3"}, "routing_method_type must be an integer, got 'DeepSeekV3'"),
        ({"weight_layout": 1}, "weight_layout must be MajorK (0) or BlockMajorK (2), got MajorMn (1)"),
        ({"fp8_quantization_type": 0}, "fp8_quantization_type must be DeepSeekFp8 (1) or MxFp8 (2), got NoneFp8 (0)"),
        ({"activation_type": 9}, "activation_type must be one of ActivationType (Swiglu=3"),
        ({"activation_type": True}, "activation_type must be an integer, got True"),
        (
            {"activation_type": torch_calls.OtherActivation.Silu},
            "activation_type must be one of ActivationType (Swiglu",
        ),
        ({"do_finalize": 2}, "do_finalize must be True or False, got 2"),
        ({"do_finalize": None}, "do_finalize must be True or False, got None"),
        ({"use_shuffled_weight": "no"}, "use_shuffled_weight must be True or False, got 'no'"),
        ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor must be None or a finite number, got '2.5'"),
        ({"routed_scaling_factor": True}, "routed_scaling_factor must be None or a finite number, got True"),
        ({"routed_scaling_factor": math.inf}, "routed_scaling_factor must be None or a finite number, got inf"),
        ({"enable_pdl": 1}, "enable_pdl must be None, True or False, got 1"),
        ({"batch_invariant": "yes"}, "batch_invariant must be None, True or False, got 'yes'"),
        ({"tune_max_num_tokens": 0}, "tune_max_num_tokens must be a positive integer, got 0"),
        ({"tune_max_num_tokens": 1.5}, "tune_max_num_tokens must be an integer, got 1.5"),
        ({"gemm1_weights": None}, "gemm1_weights must be a torch.Tensor, got NoneType"),
        ({"hidden_states": [1.0]}, "hidden_states must be a torch.Tensor, got list"),
        ({"output": "yes"}, "output must be a torch.Tensor, got str"),
        ({"hidden_states_scale": None}, "hidden_states_scale must be float32[2,5] (or pass hidden_states in bfloat16)"),
    ],
)
def test_wrong_values_are_value_errors(changes: dict[str, Any], words: str) -> None:
    refused(ValueError, words, **changes)


def test_equal_values_of_other_types_are_told_apart() -> None:
    """What was right before is remembered, by value and type."""
    torch_calls.call(CASE, num_experts=8, local_expert_offset=0)
    refused(ValueError, "num_experts must be an integer, got 8.0", num_experts=8.0, local_expert_offset=0)
    refused(ValueError, "local_expert_offset must be an integer, got False", num_experts=8, local_expert_offset=False)


def test_mxfp8_wants_scales_of_its_own() -> None:
    for value in (2, torch_calls.OtherQuantization.MxFp8):
        words = "hidden_states_scale must be uint8[5,8] (or as float8_e8m0fnu), got float32[2,5]"
        refused(ValueError, words, fp8_quantization_type=value)
    words = "weight_layout must be MajorK (0) with MxFp8, got BlockMajorK (2)"
    refused(ValueError, words, fp8_quantization_type=2, weight_layout=2)


def test_words_on_scales_of_mxfp8() -> None:
    mx = dataclasses.replace(CASE, **cases.MX)
    given = torch_calls.arguments(mx)
    words = "gemm2_weights_scale must be uint8[4,256,4] (or as float8_e8m0fnu), got uint8[4,8,4]; gemm1_weights_scale"
    refused(ValueError, words, mx, gemm2_weights_scale=given["gemm2_weights_scale"][:, ::32].contiguous())
    spread = torch.stack([given["gemm1_weights_scale"]] * 2, dim=-1)[..., 0]
    refused(ValueError, must_be_contiguous("gemm1_weights_scale", spread), mx, gemm1_weights_scale=spread)
    e8m0 = torch.zeros(2, 5, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    refused(ValueError, "hidden_states_scale must be float32[2,5], got float8_e8m0fnu[2,5]", hidden_states_scale=e8m0)


@pytest.mark.parametrize("wrong, got", [(None, "NoneType"), ((1, 2, 3), "tuple of 3"), ([], "list of 0"), (5, "int")])
def test_ids_are_packed_or_a_pair(wrong: object, got: str) -> None:
    refused(
        ValueError,
        "topk_ids must be a torch.Tensor of packed ids, (expert id << 16) | (bfloat16 bits of the weight & 0xFFFF), or "
        f"a pair (topk_ids, topk_weights) of them, got {got}",
        topk_ids=wrong,
    )


def test_the_ids_of_a_pair_are_checked() -> None:
    ids, weights = torch_calls.arguments(FULL)["topk_ids"]
    refused(ValueError, "topk_ids must be a torch.Tensor, got list", topk_ids=(ids.tolist(), weights))
    refused(ValueError, "topk_weights must be a torch.Tensor, got NoneType", topk_ids=(ids, None))
    refused(ValueError, "topk_ids must be int32 [num_tokens, top_k], got int64[5,2]", topk_ids=(ids.long(), weights))


@pytest.mark.parametrize("name", ["gemm1_lora_delta", *FULL.per_expert])
def test_optional_tensors_are_tensors(name: str) -> None:
    refused(ValueError, f"{name} must be a torch.Tensor, got float", **{name: 7.0})


@pytest.mark.parametrize("name", FULL.per_expert)
@pytest.mark.parametrize("activation", ["Geglu", "Relu2", "Identity"])
def test_parameters_of_swiglu_belong_to_swiglu(activation: str, name: str) -> None:
    case = dataclasses.replace(CASE, activation=torch_facade.ActivationType[activation])
    refused(ValueError, f"{name} must be None with {activation}, got float32[4]", case, **{name: torch.ones(4)})


@pytest.mark.parametrize(
    "option, words",
    [
        ({"activation": torch_facade.ActivationType.Relu2}, "[experts, intermediate_size, hidden_size]"),
        ({"weight_layout": torch_facade.WeightLayout.BlockMajorK}, "[experts, hidden_size / 128, "),
    ],
)
def test_shapes_of_weights_are_those_of_the_options(option: dict[str, Any], words: str) -> None:
    case = dataclasses.replace(CASE, **option)
    flat = tensor_of("gemm1_weights", case).view(-1, 128)
    refused(ValueError, f"gemm1_weights must be float8_e4m3fn {words}", case, gemm1_weights=flat)


def test_sizes_that_need_padding_say_to_what() -> None:
    x = torch.zeros(5, 200, dtype=torch.bfloat16)
    refused(
        ValueError,
        "hidden_states must be of a hidden_size that is a multiple of 128; pad hidden_size 200 to 256, got",
        hidden_states=x,
        hidden_states_scale=None,
    )


def test_a_scale_beside_bfloat16_is_refused() -> None:
    x = torch.zeros(5, 256, dtype=torch.bfloat16)
    refused(ValueError, "hidden_states_scale must be None with bfloat16 hidden_states", hidden_states=x)


def test_routing_bias_is_checked() -> None:
    words = "routing_bias must be None, bfloat16 or float32 [num_experts] = [8], got "
    refused(ValueError, words + "float32[7]", routing_bias=torch.zeros(7))
    refused(ValueError, words + "float64[8]", routing_bias=torch.zeros(8, dtype=torch.float64))
    refused(ValueError, "routing_bias must be a torch.Tensor, got list", routing_bias=[0.0] * 8)
    for dtype in (torch.float32, torch.bfloat16):
        torch_calls.call(CASE, routing_bias=torch.zeros(8, dtype=dtype))


@pytest.mark.parametrize(
    "output, words",
    [
        (torch.zeros(5, 256), "output must be bfloat16[5,256], got float32[5,256]"),
        (torch.zeros(5, 128, dtype=torch.bfloat16), "output must be bfloat16[5,256], got bfloat16[5,128]"),
        (
            torch.zeros(256, 5, dtype=torch.bfloat16).t(),
            "output must be contiguous, got shape [5, 256] with strides [1, 5]",
        ),
    ],
)
def test_output_is_checked(output: torch.Tensor, words: str) -> None:
    refused(ValueError, words, output=output)
    assert not output.any()


@pytest.mark.parametrize("lora", [False, True])
def test_output_is_for_finalized_results(lora: bool) -> None:
    case = dataclasses.replace(CASE, lora=lora, do_finalize=False)
    words = "output must be None with do_finalize=False, got a tensor"
    refused(ValueError, words, case, output=torch.zeros(5, 256, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", [*OPTIONAL, "routing_bias"])
def test_no_gradients_of_optional_tensors_in_silence(name: str) -> None:
    words = f"{name} must not require grad, got requires_grad=True: inference only"
    value = torch.zeros(8) if name == "routing_bias" else tensor_of(name)
    refused(NotImplementedError, words, FULL, **{name: value.requires_grad_()})


@pytest.mark.parametrize("name", ["hidden_states_scale", "gemm1_weights", "gemm2_weights_scale", "output"])
def test_no_gradients_in_silence(name: str) -> None:
    given = torch_calls.arguments(CASE, output=torch.zeros(5, 256, dtype=torch.bfloat16))
    given[name] = given[name].detach().requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{NAME}: {name} must not require grad.*inference only.*no_grad"):
        torch_calls.function(**given)
    with torch.no_grad():
        assert not given["output"].any()
        torch_calls.function(**given)
