"""What the torch facade returns on the CPU: numbers, forms of the result, memory that it writes."""

from __future__ import annotations

import dataclasses
import threading

import cases
import ml_dtypes
import numpy as np
import pytest
import results

torch = pytest.importorskip("torch", reason="the torch facade needs torch")

import torch_calls  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from torch_facade import (  # noqa: E402
    ActivationType,
    WeightLayout,
    convert_to_block_layout,
    shuffle_matrix_a,
)

# Every number of tokens, input dtype, scale order, window and result form; test_backend.py runs the whole matrix.
PLAIN = (
    "t0 t1 t7 t129 k32 e300 h896_i384 routing_mixed_window routing_garbage routing_duplicates window_1_2 bf16_t0 "
    "bf16_t1 bf16_t53 scale_token_major_t1 scale_token_major_t129 scale_padded_t7 scale_padded_t129 unfinalized_t0 "
    "unfinalized_t1 unfinalized unfinalized_window unfinalized_nothing_local unfinalized_bf16 extreme_nan_x "
    "extreme_inf_x"
).split()
# Each option alone, two of each together, and no tokens.
PAIRS = [name for name in cases.CASES if name.startswith(("pair_", "mx_pair_"))]
OPTIONS = (
    *cases.OPTIONS,
    *PAIRS,
    *"lora_t0 lora_unfinalized lora_unfinalized_t0 apart_unfinalized_t0 apart_garbage extreme_large_geglu".split(),
    *cases.MX_OPTIONS,
    *"mx_t0 mx_t8 mx_bf16_t0 mx_shuffled_e300 mx_lora_unfinalized mx_lora_unfinalized_t0 extreme_mx_far_scales".split(),
)
SMALL = cases.CASES["t7"]


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def test_the_matrix_names_cases() -> None:
    assert {*PLAIN, *OPTIONS} <= {case.name for case in cases.SMALL}
    assert len(PAIRS) > 10


@pytest.mark.parametrize("name", [*PLAIN, *OPTIONS])
def test_results_are_the_references(name: str) -> None:
    case = cases.CASES[name]
    given = cases.arrays(case)
    found = {key: torch_calls.array(value) for key, value in torch_calls.named(case, torch_calls.call(case)).items()}
    codes = found.pop("gemm1_activation_output", None)
    results.assert_matches(case, given, found)
    if codes is not None:  # their scales are not returned
        expected = cases.expected(case, given)
        rows = np.count_nonzero(expected.expanded_idx_to_permuted_idx >= 0)
        assert codes.dtype == np.uint8 and codes.shape == (case.tokens * case.top_k, case.inter)
        scale = expected.gemm1_activation_scale[:, :rows]
        results.assert_same_activation(codes[:rows].view(ml_dtypes.float8_e4m3fn), scale, expected, rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("lora", [False, True])
def test_expert_weights_are_the_callers_own(dtype: str, lora: bool) -> None:
    case = dataclasses.replace(SMALL, topk_weights=dtype, lora=lora, do_finalize=False)
    arguments = torch_calls.arguments(case)
    assert torch_calls.named(case, torch_calls.function(**arguments))["expert_weights"] is arguments["topk_ids"][1]


def test_ids_and_weights_apart_equal_packed_ones() -> None:
    packed = torch_calls.arguments(SMALL)
    ids = packed["topk_ids"]
    weights = (ids & 0xFFFF).to(torch.int16).view(torch.bfloat16)
    expected = bits(torch_calls.function(**packed))
    for pair in ((ids >> 16, weights), [ids >> 16, weights.float()]):
        np.testing.assert_array_equal(bits(torch_calls.function(**packed | {"topk_ids": pair})), expected)


@pytest.mark.parametrize("rows", ["as they are", "shuffled"])
@pytest.mark.parametrize("layout", ["MajorK", "BlockMajorK"])
@pytest.mark.parametrize("activation", ["Swiglu", "Relu2"])
def test_prepared_weights_change_no_bit(activation: str, layout: str, rows: str) -> None:
    case = dataclasses.replace(SMALL, activation=ActivationType[activation], lora=True)
    plain = torch_calls.arguments(case)
    prepared = dict(plain, use_shuffled_weight=rows == "shuffled", weight_layout=WeightLayout[layout])
    for name in ("gemm1_weights", "gemm2_weights"):
        if rows == "shuffled":
            prepared[name] = shuffle_matrix_a(prepared[name], 64)
        if layout == "BlockMajorK":
            prepared[name] = convert_to_block_layout(prepared[name], 128)
    found, expected = (torch_calls.defined(case, torch_calls.function(**given)) for given in (prepared, plain))
    for name, value in expected.items():
        np.testing.assert_array_equal(bits(found[name]), bits(value), err_msg=name)


def test_no_tokens_give_an_empty_result() -> None:
    result = torch_calls.call(cases.CASES["t0"])
    assert result.shape == (0, SMALL.hidden) and result.dtype == torch.bfloat16


@pytest.mark.parametrize("order", ["token_major", "padded"])
def test_strides_of_the_scale_change_no_bit(order: str) -> None:
    arguments = torch_calls.arguments(cases.CASES[f"scale_{order}_t129"])
    scale = arguments["hidden_states_scale"]
    assert not scale.is_contiguous()
    strided = torch_calls.function(**arguments)
    contiguous = torch_calls.function(**arguments | {"hidden_states_scale": scale.contiguous()})
    np.testing.assert_array_equal(bits(strided), bits(contiguous))


def test_an_expanded_scale_is_read_with_stride_zero() -> None:
    arguments = torch_calls.arguments(SMALL)
    scale = torch.tensor([[0.5]]).expand(arguments["hidden_states_scale"].shape)
    assert scale.stride() == (0, 0)
    expanded = torch_calls.function(**arguments | {"hidden_states_scale": scale})
    contiguous = torch_calls.function(**arguments | {"hidden_states_scale": scale.contiguous()})
    np.testing.assert_array_equal(bits(expanded), bits(contiguous))


def test_output_is_written_in_place_and_returned() -> None:
    expected = torch_calls.call(SMALL)
    guarded = torch.full((SMALL.tokens + 2, SMALL.hidden), 77.0, dtype=torch.bfloat16)
    output = guarded[1:-1]
    address, version = output.data_ptr(), output._version
    assert torch_calls.call(SMALL, output=output) is output
    assert output.data_ptr() == address
    assert output._version > version  # autograd sees that it was written
    np.testing.assert_array_equal(bits(output), bits(expected))
    assert (guarded[0] == 77).all() and (guarded[-1] == 77).all()


def test_output_is_written_in_place_and_listed_with_lora() -> None:
    case = dataclasses.replace(SMALL, lora=True)
    expected = torch_calls.defined(case, torch_calls.call(case))
    output = torch.full((case.tokens, case.hidden), 77.0, dtype=torch.bfloat16)
    version = output._version
    found = torch_calls.defined(case, torch_calls.call(case, output=output))
    assert found["output"] is output and output._version > version
    for name, value in expected.items():
        np.testing.assert_array_equal(bits(found[name]), bits(value), err_msg=name)


def test_output_may_be_an_inference_tensor() -> None:
    expected = torch_calls.call(SMALL)
    with torch.inference_mode():
        output = torch.empty(SMALL.tokens, SMALL.hidden, dtype=torch.bfloat16)
        assert torch_calls.call(SMALL, output=output) is output
    np.testing.assert_array_equal(bits(output), bits(expected))


def test_each_call_returns_memory_of_its_own() -> None:
    first = torch_calls.call(SMALL)
    kept = first.clone()
    second = torch_calls.call(SMALL, hidden_states=torch.zeros_like(torch_calls.arguments(SMALL)["hidden_states"]))
    assert first.data_ptr() != second.data_ptr()
    np.testing.assert_array_equal(bits(first), bits(kept))
    assert not second.any()


@pytest.mark.parametrize(
    "name", ["t7", "unfinalized_window", "bf16_t7", "apart_f32", "lora_unfinalized", "alpha_beta_clamp"]
)
def test_inputs_are_not_written(name: str) -> None:
    arguments = torch_calls.arguments(cases.CASES[name])
    tensors = [value for value in tree_leaves(arguments) if isinstance(value, torch.Tensor)]
    before = [bits(value).copy() for value in tensors]
    torch_calls.function(**arguments)
    for value, expected in zip(tensors, before, strict=True):
        np.testing.assert_array_equal(bits(value), expected)


def test_arguments_without_effect_change_no_bit() -> None:
    plain = torch_calls.call(SMALL)
    varied = torch_calls.call(
        SMALL,
        routing_bias=torch.ones(SMALL.experts),
        routing_method_type=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        enable_pdl=True,
        tune_max_num_tokens=1,
    )
    np.testing.assert_array_equal(bits(plain), bits(varied))


def test_options_in_any_spelling_give_the_same() -> None:
    """Keywords or positions, members or integers or members of another library."""
    arguments = torch_calls.arguments(SMALL)
    expected = torch_calls.function(**arguments)
    positional = [arguments[name] for name in torch_calls.POSITIONAL]
    for option in torch_calls.SPELLINGS:
        result = torch_calls.function(*positional, **option)
        np.testing.assert_array_equal(bits(result), bits(expected), err_msg=str(option))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_change_no_bit(mode: type) -> None:
    expected = torch_calls.call(SMALL)
    with mode():
        result = torch_calls.call(SMALL)
    assert not result.requires_grad
    np.testing.assert_array_equal(bits(result), bits(expected))


def test_weights_may_be_parameters_without_grad() -> None:
    arguments = torch_calls.arguments(SMALL)
    expected = torch_calls.function(**arguments)
    for name in ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale"):
        arguments[name] = torch.nn.Parameter(arguments[name], requires_grad=False)
    np.testing.assert_array_equal(bits(torch_calls.function(**arguments)), bits(expected))


def test_threads_do_not_disturb_each_other() -> None:
    chosen = [cases.CASES[name] for name in ("t1", "t7", "t53", "bf16_t7", "k8", "e128", "clamp")]
    given = [torch_calls.arguments(case) for case in chosen]
    expected = [bits(torch_calls.function(**arguments)) for arguments in given]
    wrong: list[str] = []
    start = threading.Barrier(len(chosen))

    def work(first: int) -> None:
        start.wait()
        for step in range(2 * len(chosen)):
            i = (first + step) % len(chosen)
            if not np.array_equal(bits(torch_calls.function(**given[i])), expected[i]):
                wrong.append(chosen[i].name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(chosen))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
