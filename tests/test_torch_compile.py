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

CASE = cases.Case("compile", tokens=5, hidden=256, inter=128, experts=8, top_k=2, window=(2, 4))
FORMS = {
    "finalized": CASE,
    "unfinalized": dataclasses.replace(CASE, do_finalize=False),
    "bfloat16": dataclasses.replace(CASE, x_dtype="bfloat16"),
    "strided_scale": dataclasses.replace(CASE, scale_order="token_major"),
}
OPS = torch.ops.jax_moe


def while_tracing(words: str) -> str:
    """What a compiled call says of an error that is raised outside the ops: old torch drops its words."""
    return words if torch.__version__ >= (2, 13) else "Observed exception"


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def split(case: cases.Case, **changes: Any) -> tuple[Callable[..., Any], dict[str, torch.Tensor]]:
    """The call as a function of its tensors, and the tensors."""
    arguments = torch_calls.arguments(case, **changes)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    options = {name: value for name, value in arguments.items() if name not in tensors}
    return lambda **given: torch_calls.function(**given, **options), tensors


def listed(result: Any) -> list[torch.Tensor]:
    return result if isinstance(result, list) else [result]


def assert_same(result: Any, expected: Any) -> None:
    assert type(result) is type(expected)
    for a, e in zip(defined(result), defined(expected), strict=True):
        assert_alike(a, e)
        np.testing.assert_array_equal(
            a.contiguous().view(torch.uint8).numpy(), e.contiguous().view(torch.uint8).numpy()
        )


def assert_alike(a: torch.Tensor, e: torch.Tensor) -> None:
    assert (tuple(a.shape), a.dtype, a.stride(), a.device) == (tuple(e.shape), e.dtype, e.stride(), e.device)


def defined(result: Any) -> list[torch.Tensor]:
    """The results without the rows of gemm2_output that no index names: those are the last ones."""
    if not isinstance(result, list):
        return [result]
    gemm2_output, weights, rows = result
    return [gemm2_output[: int((rows >= 0).sum())], weights, rows]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_equals_eager(form: str, dynamic: bool) -> None:
    call, tensors = split(FORMS[form])
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same(compiled(**tensors), call(**tensors))


@pytest.mark.parametrize("do_finalize", [True, False])
def test_one_dynamic_graph_serves_any_number_of_tokens(do_finalize: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = None
    for tokens in (5, 2, 7, 129):
        call, tensors = split(dataclasses.replace(CASE, tokens=tokens, do_finalize=do_finalize))
        compiled = compiled or torch.compile(call, fullgraph=True, backend=counter)
        if tokens == 5:
            for name, dimension in (("topk_ids", 0), ("hidden_states", 0), ("hidden_states_scale", 1)):
                torch._dynamo.mark_dynamic(tensors[name], dimension)  # raises where a guard makes it a constant
        assert_same(compiled(**tensors), call(**tensors))
    assert counter.frame_count == 1


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


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_writes_the_callers_output(backend: str) -> None:
    case = dataclasses.replace(CASE, x_dtype="bfloat16")
    call, tensors = split(case)
    expected = call(**tensors)
    output = torch.zeros_like(expected)

    def twice(output: torch.Tensor, **given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = call(**given, output=output)
        return first, call(**given)

    written, fresh = torch.compile(twice, fullgraph=True, backend=backend)(output, **tensors)
    assert written is output
    assert_same(output, expected)
    assert_same(fresh, expected)


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
        ({"activation_type": 4}, "activation_type must be Swiglu (3)"),
        ({"use_shuffled_weight": True}, "use_shuffled_weight must be False"),
        ({"routing_bias": torch.zeros(7)}, "routing_bias must be None, bfloat16 or float32 [num_experts] = [8]"),
        ({"output": torch.zeros(5, 256)}, "output must be bfloat16[5,256], got float32[5,256]"),
        ({"gemm1_alpha": torch.zeros(4)}, while_tracing("gemm1_alpha must be None")),
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
        self.names = [name for name in tensors if name.startswith("gemm")]
        for name in self.names:
            self.register_buffer(name, tensors[name])

    def forward(self, topk_ids: torch.Tensor, hidden_states: torch.Tensor, hidden_states_scale: torch.Tensor) -> Any:
        weights = {name: getattr(self, name) for name in self.names}
        return self.call(
            topk_ids=topk_ids, hidden_states=hidden_states, hidden_states_scale=hidden_states_scale, **weights
        )


def activations(case: cases.Case) -> tuple[torch.Tensor, ...]:
    given = torch_calls.arguments(case)
    return given["topk_ids"], given["hidden_states"], given["hidden_states_scale"]


@pytest.mark.parametrize("do_finalize", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_runs_for_any_number_of_tokens(strict: bool, do_finalize: bool) -> None:
    layer = Layer(dataclasses.replace(CASE, do_finalize=do_finalize))
    tokens = torch.export.Dim("tokens", min=0, max=1 << 20)
    shapes = {"topk_ids": {0: tokens}, "hidden_states": {0: tokens}, "hidden_states_scale": {1: tokens}}
    exported = torch.export.export(layer, activations(CASE), dynamic_shapes=shapes, strict=strict)
    for count in (0, 1, 5, 129):
        given = activations(dataclasses.replace(CASE, tokens=count))
        assert_same(exported.module()(*given), layer(*given))


def test_exported_program_survives_a_file() -> None:
    if torch.float8_e4m3fn not in torch._export.serde.serialize._TORCH_TO_SERIALIZE_DTYPE:
        pytest.skip(f"torch {torch.__version__} cannot save float8 tensors in an exported program")
    layer, given = Layer(CASE), activations(CASE)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, given), file)
    file.seek(0)
    assert_same(torch.export.load(file).module()(*given), layer(*given))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_fakes_describe_the_real_results(form: str, tokens: int) -> None:
    call, tensors = split(dataclasses.replace(FORMS[form], tokens=tokens))
    real = call(**tensors)
    with FakeTensorMode() as mode:
        fake = call(**{name: mode.from_tensor(value) for name, value in tensors.items()})
    meta = call(**{name: value.to("meta") for name, value in tensors.items()})
    assert isinstance(fake, list) == isinstance(meta, list) == isinstance(real, list)
    for r, f, m in zip(*(x if isinstance(x, list) else [x] for x in (real, fake, meta)), strict=True):
        assert_alike(f, r)
        assert m.device.type == "meta"
        assert (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())


def test_fakes_of_the_output_form_return_the_callers_tensor() -> None:
    call, tensors = split(CASE, output=torch.empty(5, 256, dtype=torch.bfloat16))
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(value) for name, value in tensors.items()}
        assert call(**fakes) is fakes["output"]


def test_fakes_of_a_gpu_need_no_gpu() -> None:
    call, tensors = split(CASE)
    with FakeTensorMode() as mode:
        result = call(**{name: mode.from_tensor(value).to("cuda:1") for name, value in tensors.items()})
    assert result.device == torch.device("cuda:1") and result.shape == (5, 256)


@pytest.mark.parametrize("name", ["", "_unfinalized", "_out"])
@pytest.mark.parametrize("form", ["finalized", "bfloat16", "strided_scale"])
def test_ops_pass_torchs_own_checks(name: str, form: str) -> None:
    # All experts are local, so that every row of gemm2_output is defined: the checks compare all of it.
    case = dataclasses.replace(FORMS[form], window=None)
    given = torch_calls.arguments(case)
    options = [case.experts, case.top_k, 0, 0, case.inter, case.offset, case.local, 0, 0, 0, 1, 3]
    arguments = [*(given[tensor] for tensor in torch_calls.TENSORS), None, options]
    if name == "_out":
        arguments.append(torch.zeros(5, 256, dtype=torch.bfloat16))
    # test_schema is left out: it multiplies its inputs, which torch cannot do with float8.
    utilities = (
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(getattr(OPS, f"fp8_block_scale_routed_moe{name}").default, arguments, test_utils=utilities)


def test_schemas_say_what_is_written() -> None:
    for name, written in (("", []), ("_unfinalized", []), ("_out", ["output"])):
        schema = getattr(OPS, f"fp8_block_scale_routed_moe{name}").default._schema
        assert [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] == written
        assert schema.is_mutable == bool(written)
