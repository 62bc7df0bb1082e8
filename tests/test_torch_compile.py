"""The torch facade under torch.compile, torch.export and fake tensors: the same results, from graphs without breaks."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch facade needs torch")

import torch_calls  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

from jax_moe.problem import E8M0  # noqa: E402
from torch_facade import ActivationType, WeightLayout  # noqa: E402

CASE = cases.Case("compile", tokens=5, hidden=256, inter=128, experts=8, top_k=2, window=(2, 4))
ALL_PARAMETERS = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
FORMS = {
    "finalized": CASE,
    "unfinalized": dataclasses.replace(CASE, do_finalize=False),
    "bfloat16": dataclasses.replace(CASE, x_dtype="bfloat16"),
    "strided_scale": dataclasses.replace(CASE, scale_order="token_major"),
    "parameters": dataclasses.replace(CASE, per_expert=ALL_PARAMETERS),
    "relu2_blocked": dataclasses.replace(
        CASE, activation=ActivationType.Relu2, weight_layout=WeightLayout.BlockMajorK, shuffled=True
    ),
    "apart": dataclasses.replace(CASE, topk_weights="bfloat16"),
    "apart_unfinalized": dataclasses.replace(CASE, topk_weights="float32", do_finalize=False),
    "lora": dataclasses.replace(CASE, lora=True),
    "lora_unfinalized": dataclasses.replace(CASE, lora=True, do_finalize=False),
    "lora_apart_unfinalized": dataclasses.replace(CASE, lora=True, topk_weights="float32", do_finalize=False),
    "mx": dataclasses.replace(CASE, **cases.MX),
    "mx_padded": dataclasses.replace(CASE, **cases.MX | {"scale_order": "padded", "scale_dtype": E8M0}),
    "mx_block_major": dataclasses.replace(CASE, **cases.MX | {"scale_order": "block_major", "shuffled": True}),
    "mx_lora_unfinalized": dataclasses.replace(CASE, lora=True, do_finalize=False, scale_dtype=E8M0, **cases.MX),
}
# One form of each list that an op may return, and of the tensor alone.
RESULTS = ("finalized", "unfinalized", "apart_unfinalized", "lora", "lora_unfinalized", "lora_apart_unfinalized")
RESULTS += ("mx", "mx_lora_unfinalized")
TOKENS = ("topk_ids", "hidden_states", "hidden_states_scale", "gemm1_lora_delta")
OPS = torch.ops.jax_moe


def while_tracing(words: str) -> str:
    """What a compiled call says of an error that is raised outside the ops: old torch drops its words."""
    return words if torch.__version__ >= (2, 13) else "Observed exception"


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def split(case: cases.Case, **changes: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The call as a function of its tensors (topk_ids may be two of them), and those."""
    arguments = torch_calls.arguments(case, **changes)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, (torch.Tensor, tuple))}
    options = {name: value for name, value in arguments.items() if name not in tensors}
    return lambda **given: torch_calls.function(**given, **options), tensors


def tokens_dimension(name: str, case: cases.Case) -> int:
    """Of one of TOKENS."""
    return 1 if name == "hidden_states_scale" and not case.scale_is_token_major else 0


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], tensors: dict[str, Any]) -> dict[str, Any]:
    return tree_map_only(torch.Tensor, change, tensors)


def assert_same(result: Any, expected: Any, case: cases.Case = CASE) -> None:
    """Bit for bit, but for rows that the map does not name."""
    found, wanted = torch_calls.named(case, result), torch_calls.named(case, expected)
    for name in wanted:
        assert_alike(found[name], wanted[name])
    found, wanted = torch_calls.defined(case, result), torch_calls.defined(case, expected)
    for name in wanted:
        np.testing.assert_array_equal(bits(found[name]), bits(wanted[name]), err_msg=name)


def assert_alike(a: torch.Tensor, e: torch.Tensor) -> None:
    assert (tuple(a.shape), a.dtype, a.stride(), a.device) == (tuple(e.shape), e.dtype, e.stride(), e.device)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_equals_eager(form: str, dynamic: bool) -> None:
    call, tensors = split(FORMS[form])
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same(compiled(**tensors), call(**tensors), FORMS[form])


@pytest.mark.parametrize("form", RESULTS)
def test_one_dynamic_graph_serves_any_number_of_tokens(form: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = None
    for tokens in (5, 2, 7, 129):
        case = dataclasses.replace(FORMS[form], tokens=tokens)
        call, tensors = split(case)
        compiled = compiled or torch.compile(call, fullgraph=True, backend=counter)
        if tokens == 5:
            for name, value in tensors.items():
                for tensor in tree_leaves(value) if name in TOKENS else ():
                    # Raises where a guard makes the number of tokens a constant.
                    torch._dynamo.mark_dynamic(tensor, tokens_dimension(name, case))
        assert_same(compiled(**tensors), call(**tensors), case)
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", RESULTS)
def test_inductor_equals_eager(form: str) -> None:
    call, tensors = split(FORMS[form])
    assert_same(torch.compile(call, fullgraph=True)(**tensors), call(**tensors), FORMS[form])


@pytest.mark.parametrize("form", ["apart_unfinalized", "lora_apart_unfinalized"])
def test_compiled_calls_list_the_callers_weights(form: str) -> None:
    call, tensors = split(FORMS[form])
    result = torch.compile(call, fullgraph=True, backend="aot_eager")(**tensors)
    assert torch_calls.named(FORMS[form], result)["expert_weights"] is tensors["topk_ids"][1]


def test_integers_that_change_are_compiled_anew() -> None:
    """dynamic=True makes integers symbolic; the op wants their values."""
    tensors = split(dataclasses.replace(CASE, window=(2, 4)))[1]
    fixed = {name: value for name, value in torch_calls.arguments(CASE).items() if name not in tensors}
    del fixed["local_expert_offset"]

    def call(offset: int) -> torch.Tensor:
        return torch_calls.function(**tensors, **fixed, local_expert_offset=offset)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for offset in (2, 3, 4):
        assert_same(compiled(offset), call(offset))


def test_a_factor_that_changes_is_checked_while_tracing() -> None:
    """dynamic=True makes floats symbolic."""
    given = torch_calls.arguments(CASE)
    del given["routed_scaling_factor"]

    def call(factor: float) -> torch.Tensor:
        return torch_calls.function(**given, routed_scaling_factor=factor)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for factor in (2.5, 3.5, 4.5):
        assert_same(compiled(factor), call(factor))
    with pytest.raises(Exception, match=while_tracing("routed_scaling_factor must be None or a finite number")):
        compiled("2.5")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("form", ["bfloat16", "apart", "parameters", "lora", "mx_padded"])
def test_compiled_writes_the_callers_output(form: str, backend: str) -> None:
    case = FORMS[form]
    call, tensors = split(case)
    expected = call(**tensors)
    output = torch.zeros(case.tokens, case.hidden, dtype=torch.bfloat16)

    def twice(output: torch.Tensor, **given: Any) -> tuple[Any, Any]:
        first = call(**given, output=output)
        return first, call(**given)

    written, fresh = torch.compile(twice, fullgraph=True, backend=backend)(output, **tensors)
    assert torch_calls.named(case, written)["output"] is output
    assert_same(written, expected, case)
    assert_same(fresh, expected, case)


def test_inductor_keeps_the_strides_of_the_scale() -> None:
    call, tensors = split(CASE)
    token_major = tensors.pop("hidden_states_scale").t().contiguous()

    def transposed(scale: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        return call(hidden_states_scale=scale.t(), **given)

    compiled = torch.compile(transposed, fullgraph=True)
    assert_same(compiled(token_major, **tensors), transposed(token_major, **tensors))


@pytest.mark.parametrize(
    "option",
    torch_calls.SPELLINGS,
    ids=lambda option: "-".join(f"{name}={value!r}" for name, value in option.items()),
)
def test_options_in_any_spelling_compile(option: dict[str, Any]) -> None:
    call, tensors = split(CASE, **option)
    assert_same(torch.compile(call, fullgraph=True, backend="aot_eager")(**tensors), split(CASE)[0](**tensors))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"top_k": 3}, "top_k must be 2, the size that the arrays have, got 3"),
        ({"activation_type": 77}, "activation_type must be one of ActivationType"),
        ({"fp8_quantization_type": 2}, "hidden_states_scale must be uint8[5,8]"),
        ({"gemm1_alpha": torch.zeros(3)}, "gemm1_alpha must be float32[4], got float32[3]"),
        ({"activation_type": 4, "gemm1_beta": torch.zeros(4)}, "gemm1_beta must be None with Geglu"),
        ({"gemm1_lora_delta": torch.zeros(5, 2, 256)}, "gemm1_lora_delta must be bfloat16[5,2,256], got float32"),
        ({"output": torch.zeros(5, 256)}, "output must be bfloat16[5,256], got float32[5,256]"),
        ({"routing_bias": torch.zeros(7)}, while_tracing("routing_bias must be None, bfloat16 or float32")),
        ({"topk_ids": (torch.zeros(5, 2, dtype=torch.int32),)}, while_tracing("topk_ids must be a torch.Tensor of")),
        ({"num_experts": 8.5}, while_tracing("num_experts must be an integer")),
    ],
)
def test_errors_keep_their_words_while_tracing(changes: dict[str, Any], words: str) -> None:
    call, tensors = split(CASE, **changes)
    with pytest.raises(Exception, match=re.escape(words)):
        torch.compile(call, fullgraph=True, backend="aot_eager")(**tensors)


def test_gradients_are_refused_while_tracing() -> None:
    call, tensors = split(CASE)
    tensors["hidden_states_scale"].requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=while_tracing("hidden_states_scale must not require grad")):
        compiled(**tensors)
    with torch.no_grad():
        assert_same(compiled(**tensors), call(**tensors))


class Layer(torch.nn.Module):
    """The call with its weights as buffers, the way a model holds them."""

    def __init__(self, case: cases.Case) -> None:
        super().__init__()
        self.call, tensors = split(case)
        self.names = [name for name in tensors if name not in TOKENS]
        for name in self.names:
            self.register_buffer(name, tensors[name])

    def forward(self, given: dict[str, Any]) -> Any:
        return self.call(**given, **{name: getattr(self, name) for name in self.names})


def activations(case: cases.Case) -> dict[str, Any]:
    """The tensors that depend on the tokens."""
    return {name: value for name, value in split(case)[1].items() if name in TOKENS}


@pytest.mark.parametrize("form", RESULTS)
@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_runs_for_any_number_of_tokens(strict: bool, form: str) -> None:
    layer, given = Layer(FORMS[form]), activations(FORMS[form])
    tokens = torch.export.Dim("tokens", min=0, max=1 << 20)
    shapes = {
        name: tree_map_only(torch.Tensor, lambda _, name=name: {tokens_dimension(name, FORMS[form]): tokens}, value)
        for name, value in given.items()
    }
    exported = torch.export.export(layer, (given,), dynamic_shapes=(shapes,), strict=strict)
    for count in (0, 1, 5, 129):
        case = dataclasses.replace(FORMS[form], tokens=count)
        given = activations(case)
        assert_same(exported.module()(given), layer(given), case)


def test_a_block_major_scale_of_mxfp8_is_exported_for_more_tokens_than_blocks() -> None:
    """A square one would be the other order."""
    form = FORMS["mx_block_major"]
    layer, given = Layer(form), activations(form)
    blocks = form.hidden // 32
    for least, taken in ((0, False), (blocks + 1, True)):
        case = dataclasses.replace(form, tokens=2 * blocks)
        tokens = torch.export.Dim("tokens", min=least, max=1 << 20)
        shapes = ({name: {tokens_dimension(name, form): tokens} for name in given},)
        if taken:
            exported = torch.export.export(layer, (activations(case),), dynamic_shapes=shapes, strict=False)
            more = activations(dataclasses.replace(form, tokens=129))
            assert_same(exported.module()(more), layer(more), form)
        else:
            with pytest.raises(Exception, match="tokens"):
                torch.export.export(layer, (activations(case),), dynamic_shapes=shapes, strict=False)


@pytest.mark.parametrize("form", RESULTS)
def test_exported_program_survives_a_file(form: str) -> None:
    if torch.float8_e4m3fn not in torch._export.serde.serialize._TORCH_TO_SERIALIZE_DTYPE:
        pytest.skip(f"torch {torch.__version__} cannot save float8 tensors in an exported program")
    layer, given = Layer(FORMS[form]), activations(FORMS[form])
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (given,)), file)
    file.seek(0)
    assert_same(torch.export.load(file).module()(given), layer(given), FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_fakes_describe_the_real_results(form: str, tokens: int) -> None:
    case = dataclasses.replace(FORMS[form], tokens=tokens)
    call, tensors = split(case)
    with FakeTensorMode() as mode:
        fake = torch_calls.named(case, call(**map_tensors(mode.from_tensor, tensors)))
    meta = torch_calls.named(case, call(**map_tensors(lambda value: value.to("meta"), tensors)))
    for name, r in torch_calls.named(case, call(**tensors)).items():
        assert_alike(fake[name], r)
        assert meta[name].device.type == "meta"
        assert (meta[name].shape, meta[name].dtype, meta[name].stride()) == (r.shape, r.dtype, r.stride())


@pytest.mark.parametrize("form", ["finalized", "lora"])
def test_fakes_of_the_output_form_return_the_callers_tensor(form: str) -> None:
    call, tensors = split(FORMS[form], output=torch.empty(5, 256, dtype=torch.bfloat16))
    with FakeTensorMode() as mode:
        fakes = map_tensors(mode.from_tensor, tensors)
        assert torch_calls.named(FORMS[form], call(**fakes))["output"] is fakes["output"]


def test_fakes_of_a_gpu_need_no_gpu() -> None:
    call, tensors = split(CASE)
    with FakeTensorMode() as mode:
        result = call(**map_tensors(lambda value: mode.from_tensor(value).to("cuda:1"), tensors))
    assert result.device == torch.device("cuda:1") and result.shape == (5, 256)


@pytest.mark.parametrize(
    "form, in_place",
    [(form, False) for form in FORMS] + [(form, True) for form, case in FORMS.items() if case.do_finalize],
)
def test_ops_pass_torchs_own_checks(form: str, in_place: bool) -> None:
    # All experts are local, so that every row of gemm2_output is defined: the checks compare all of it.
    case = dataclasses.replace(FORMS[form], window=None)
    given = torch_calls.arguments(case)
    optional = {name: given[name] for name in given if name in ("gemm1_lora_delta", *ALL_PARAMETERS)}
    if case.topk_weights != "packed":
        given["topk_ids"], optional["topk_weights"] = given["topk_ids"]
    options = [case.experts, case.top_k, 0, 0, case.inter, case.offset, case.local, 0]
    options += [int(case.shuffled), case.weight_layout.value, case.quantization.value]
    options += [case.activation.value, int(case.do_finalize), 0, 1]  # batch_invariant, enable_pdl
    tensors = [given[tensor] for tensor in torch_calls.TENSORS]
    # As the facade does: torch's functionalisation fails on this dtype in ops that write an argument.
    tensors = [t.view(torch.uint8) if t is not None and t.dtype == torch.float8_e8m0fnu else t for t in tensors]
    arguments = [*tensors, options]
    if in_place:
        arguments.append(torch.zeros(5, 256, dtype=torch.bfloat16))
    names = {(False, False): "", (False, True): "_list", (True, False): "_out", (True, True): "_lora_out"}
    op = getattr(OPS, f"fp8_block_scale_routed_moe{names[in_place, case.lora or not case.do_finalize]}").default
    # test_schema is left out: it multiplies its inputs, which torch cannot do with float8.
    utilities = (
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(op, arguments, optional, test_utils=utilities)


@pytest.mark.parametrize("name, written", [("", []), ("_list", []), ("_out", ["output"]), ("_lora_out", ["output"])])
def test_schemas_say_what_is_written(name: str, written: list[str]) -> None:
    schema = getattr(OPS, f"fp8_block_scale_routed_moe{name}").default._schema
    assert [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] == written
    assert schema.is_mutable == bool(written)
    assert not any(r.alias_info for r in schema.returns)
