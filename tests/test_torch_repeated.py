"""Calls that repeat: they go the short way, give what the long way gives, and leave it where that could differ."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import cases
import finalizing
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch facade needs torch")

import torch_calls  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import torch_facade  # noqa: E402
from jax_moe import native  # noqa: E402
from jax_moe.problem import E8M0  # noqa: E402
from torch_facade import eager, finalization, logits, moe, ops  # noqa: E402

NAME = "trtllm_fp8_block_scale_routed_moe"
CASE = cases.Case("repeated", tokens=5, hidden=256, inter=128, experts=8, top_k=2, window=(2, 4))
FORMS = {
    "finalized": CASE,
    "unfinalized": dataclasses.replace(CASE, do_finalize=False),
    "bfloat16": dataclasses.replace(CASE, x_dtype="bfloat16"),
    "strided_scale": dataclasses.replace(CASE, scale_order="token_major"),
    "parameters": dataclasses.replace(CASE, per_expert=("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")),
    "apart": dataclasses.replace(CASE, topk_weights="bfloat16"),
    "apart_unfinalized": dataclasses.replace(CASE, topk_weights="float32", do_finalize=False),
    "lora": dataclasses.replace(CASE, lora=True),
    "lora_apart_unfinalized": dataclasses.replace(CASE, lora=True, topk_weights="float32", do_finalize=False),
    "no_tokens": dataclasses.replace(CASE, tokens=0),
    "mx": dataclasses.replace(CASE, **cases.MX),
    "mx_e8m0": dataclasses.replace(CASE, **cases.MX, scale_dtype=E8M0),
}
every_form = pytest.mark.parametrize("form", FORMS)
pytestmark = pytest.mark.skipif(eager.EXCHANGE_TABLE is None, reason="this torch has no DLPack exchange table")
OP = torch.ops.jax_moe.fp8_block_scale_routed_moe.default


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plans of other tests."""
    for module in (moe, ops, finalization):
        monkeypatch.setattr(module, "CALLS", eager.Calls())
    monkeypatch.setattr(logits, "CALLS", eager.Calls())
    monkeypatch.setattr(logits, "OP_CALLS", eager.Calls())


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The modules whose functions went the long way."""
    taken: list[str] = []

    def watch(module: Any) -> Callable[..., Any]:
        call = module._call

        def watched(*arguments: Any) -> Any:
            taken.append(module.__name__.rpartition(".")[2])
            return call(*arguments)

        return watched

    for module in (moe, logits, finalization):
        monkeypatch.setattr(module, "_call", watch(module))
    yield taken


def assert_same(case: cases.Case, result: Any, expected: Any) -> None:
    found, wanted = torch_calls.defined(case, result), torch_calls.defined(case, expected)
    for name, w in wanted.items():
        f = found[name]
        assert (f.shape, f.dtype, f.stride(), f.device) == (w.shape, w.dtype, w.stride(), w.device), name
        assert np.array_equal(f.reshape(-1).view(torch.uint8).numpy(), w.reshape(-1).view(torch.uint8).numpy()), name


@every_form
def test_the_second_call_goes_the_short_way_with_the_same_results(form: str, long_way: list[str]) -> None:
    case = FORMS[form]
    first = torch_calls.call(case)
    for _ in range(2):
        arguments = torch_calls.arguments(case)  # other tensors of the same layouts
        result = torch_calls.function(**arguments)
        assert_same(case, result, first)
        if isinstance(arguments["topk_ids"], tuple) and not case.do_finalize:
            assert result[1] is arguments["topk_ids"][1]
    assert long_way == ["moe"]


@pytest.mark.parametrize("form", [form for form, case in FORMS.items() if case.do_finalize])
def test_output_is_written_and_its_version_counted(form: str, long_way: list[str]) -> None:
    case = FORMS[form]
    expected = torch_calls.call(case)
    output = torch.zeros(case.tokens, case.hidden, dtype=torch.bfloat16)
    for _ in range(3):
        output.zero_()
        before = output._version
        result = torch_calls.call(case, output=output)
        assert torch_calls.named(case, result)["output"] is output
        assert output._version == before + 1
        assert_same(case, result, expected)
    assert long_way == ["moe", "moe"]
    with torch.inference_mode():
        output = torch.zeros(case.tokens, case.hidden, dtype=torch.bfloat16)
        assert_same(case, torch_calls.call(case, output=output), expected)


def test_routing_and_finalising_go_the_short_way_too(long_way: list[str]) -> None:
    given = torch_calls.arguments(CASE)
    del given["topk_ids"]
    scores = torch.randn(CASE.tokens, CASE.experts)
    given |= {"routing_logits": scores, "routing_method_type": 1, "do_finalize": False}
    results = [torch_facade.trtllm_fp8_block_scale_moe(**given) for _ in range(3)]
    finals = [torch_facade.finalize(*parts) for parts in results]
    for parts, final in zip(results, finals, strict=True):
        assert_same(FORMS["apart_unfinalized"], parts, results[0])
        assert torch.equal(final, finals[0])
    assert sorted(long_way) == ["finalization", "logits", "moe"]


def test_new_results_are_new_and_freed() -> None:
    first, second = torch_calls.call(CASE), torch_calls.call(CASE)
    third = torch_calls.call(CASE)
    assert second.data_ptr() != third.data_ptr() and torch.equal(second, third) and torch.equal(first, third)
    gone = weakref.ref(third)
    del third
    gc.collect()
    assert gone() is None


def test_what_is_in_the_tensors_may_change(long_way: list[str]) -> None:
    given = torch_calls.arguments(CASE)
    torch_calls.function(**given)
    other = torch_calls.arguments(dataclasses.replace(CASE, seed=7))
    for name in ("topk_ids", "hidden_states", "hidden_states_scale"):
        given[name].copy_(other[name])
    given["gemm1_weights"].data = other["gemm1_weights"]
    given |= {name: other[name] for name in ("gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale")}
    assert_same(CASE, torch_calls.function(**given), torch_calls.call(dataclasses.replace(CASE, seed=7)))
    assert long_way == ["moe"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": True}, "top_k must be an integer, got True"),
        ({"num_experts": 8.0}, "num_experts must be an integer, got 8.0"),
        ({"top_k": 3}, "top_k must be 2"),
        ({"use_shuffled_weight": None}, "use_shuffled_weight must be True or False, got None"),
        ({"activation_type": 7}, "gemm1_weights"),
        ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor must be None or a finite number"),
        ({"topk_ids": [1]}, "topk_ids must be a torch.Tensor"),
        ({"topk_ids": torch.zeros(5, 2, dtype=torch.int64)}, "topk_ids must be int32"),
        ({"topk_ids": torch.zeros(6, 2, dtype=torch.int32)}, "must be"),
        ({"topk_ids": torch.zeros(2, 5, dtype=torch.int32).t()}, "topk_ids must be contiguous"),
        ({"topk_ids": torch.zeros(5, 2, dtype=torch.int32, device="meta")}, "topk_ids must be on cpu"),
        ({"routing_bias": torch.zeros(7)}, "routing_bias must be None, bfloat16 or float32"),
        ({"output": torch.zeros(5, 128, dtype=torch.bfloat16)}, "output must be"),
        ({"gemm1_alpha": torch.zeros(3)}, "gemm1_alpha must be"),
    ],
)
def test_a_wrong_call_like_a_right_one_is_refused(changes: dict[str, Any], words: str) -> None:
    given = torch_calls.arguments(CASE)
    for _ in range(2):
        torch_calls.function(**given)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{NAME}: .*{words}"):
            torch_calls.function(**(given | changes))


def test_memory_at_a_wrong_address_is_refused_on_the_short_way(long_way: list[str]) -> None:
    given = torch_calls.arguments(CASE)
    torch_calls.function(**given)
    x = given["hidden_states"].view(torch.uint8)
    moved = torch.zeros(x.numel() + 16, dtype=torch.uint8)
    start = -moved.data_ptr() % 16 + 1
    shifted = moved[start : start + x.numel()].view(x.shape).copy_(x).view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="hidden_states must be aligned to 16 bytes"):
        torch_calls.function(**(given | {"hidden_states": shifted}))
    assert long_way == ["moe"]


@pytest.mark.parametrize("name", ["hidden_states_scale", "gemm2_weights_scale"])
def test_gradients_are_refused_and_wanted_by_nobody_without_grad_mode(name: str, long_way: list[str]) -> None:
    given = torch_calls.arguments(CASE)
    expected = torch_calls.function(**given)
    given[name] = torch.nn.Parameter(given[name].clone())
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=f"{name} must not require grad"):
            torch_calls.function(**given)
    with torch.no_grad():
        assert_same(CASE, torch_calls.function(**given), expected)
    assert long_way == ["moe"] * 3


@pytest.mark.parametrize("error", [ValueError, NotImplementedError, RuntimeError])
@pytest.mark.parametrize("form", ["finalized", "unfinalized", "parameters"])
@pytest.mark.parametrize("in_place", [False, True])
def test_errors_of_the_library_arrive_untouched(
    form: str, in_place: bool, error: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What C++ says of a device or a build is what the caller reads, with its type."""
    raised = error("this build has no CUDA kernels; move the tensors to the CPU")

    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(native, "forward", fail)
    case = FORMS[form]
    output = torch.zeros(5, 256, dtype=torch.bfloat16) if in_place and case.do_finalize else None
    with pytest.raises(error) as caught:
        torch_calls.call(case, output=output)
    assert caught.value is raised


# ---- who watches or overrides calls ----------------------------------------------------------------------------------
class SeenOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [SeenOps, SeenFunctions])
def test_modes_see_the_op(mode: Any) -> None:
    expected = torch_calls.call(CASE)
    with mode() as watching:
        result = torch_calls.call(CASE)
    assert OP in watching.seen
    assert_same(CASE, result, expected)


def test_profiles_name_the_op() -> None:
    torch_calls.call(CASE)
    given = torch_calls.arguments(CASE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch_calls.function(**given)
    assert "jax_moe::fp8_block_scale_routed_moe" in {event.key for event in profile.key_averages()}


class Subclass(torch.Tensor):
    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_are_asked() -> None:
    given = torch_calls.arguments(CASE)
    expected = torch_calls.function(**given)
    x = given["hidden_states"].as_subclass(Subclass)
    for _ in range(2):
        Subclass.seen.clear()
        result = torch_calls.function(**(given | {"hidden_states": x}))
        assert OP in Subclass.seen
        assert_same(CASE, result.as_subclass(torch.Tensor), expected)


def test_vmap_batches() -> None:
    given = torch_calls.arguments(CASE)
    ids = torch.stack([given["topk_ids"], given["topk_ids"].flip(0)])
    expected = [torch_calls.function(**(given | {"topk_ids": one})) for one in ids]
    batched = torch.func.vmap(lambda one: torch_calls.function(**(given | {"topk_ids": one})))(ids)
    for result, wanted in zip(batched, expected, strict=True):
        assert_same(CASE, result, wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_traces_hold_the_op() -> None:
    given = torch_calls.arguments(CASE)
    torch_calls.function(**given)

    def call(ids: torch.Tensor) -> torch.Tensor:
        return torch_calls.function(**(given | {"topk_ids": ids}))

    traced = torch.jit.trace(call, given["topk_ids"])
    assert "jax_moe::fp8_block_scale_routed_moe" in str(traced.graph)
    made = torch.fx.experimental.proxy_tensor.make_fx(call)(given["topk_ids"])
    assert OP in {node.target for node in made.graph.nodes}


def test_fakes_stay_fakes() -> None:
    given = torch_calls.arguments(CASE)
    torch_calls.function(**given)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    for context in (mode, torch.no_grad()):  # fake tensors outlive their mode
        with context:
            result = torch_calls.function(**fakes)
            assert type(result) is type(fakes["hidden_states"]) and result.shape == (5, 256)


def test_compiled_calls_do_not_depend_on_eager_ones() -> None:
    torch._dynamo.reset()
    expected = [torch_calls.call(CASE) for _ in range(2)]
    given = torch_calls.arguments(CASE)
    tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
    rest = {k: v for k, v in given.items() if k not in tensors}
    compiled = torch.compile(lambda **t: torch_calls.function(**t, **rest), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(CASE, compiled(**tensors), expected[0])


def test_a_negation_that_is_still_to_be_done_is_done() -> None:
    given = torch_calls.arguments(CASE)
    scale = given["hidden_states_scale"]
    negated = torch.complex(torch.zeros_like(scale), -scale).conj().imag
    assert negated.is_neg() and torch.equal(negated, scale)
    strided = torch.empty_strided(negated.shape, negated.stride()).copy_(scale)
    expected = [torch_calls.function(**(given | {"hidden_states_scale": strided})) for _ in range(2)]
    assert_same(CASE, torch_calls.function(**(given | {"hidden_states_scale": negated})), expected[1])


def test_tensors_whose_memory_was_taken_are_refused(long_way: list[str]) -> None:
    given = [torch_calls.tensor(array) for array in finalizing.CASES[1].arrays()]
    torch_facade.finalize(*given)
    given[0].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="gemm2_output must hold 4608 bytes, got 0"):
        torch_facade.finalize(*given)
    assert long_way == ["finalization"] * 2


# ---- what is kept ----------------------------------------------------------------------------------------------------
def test_threads_share_the_plans() -> None:
    shapes = [dataclasses.replace(CASE, tokens=tokens) for tokens in range(1, 9)]
    given = [torch_calls.arguments(case) for case in shapes]
    expected = [torch_calls.function(**one) for one in given]
    moe.CALLS = eager.Calls()
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in range(200):
            n = (first + i) % len(given)
            if not torch.equal(torch_calls.function(**given[n]), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("lacking", ["EXCHANGE_TABLE", "WATCHERS"])
def test_another_torch_goes_the_long_way(lacking: str, monkeypatch: pytest.MonkeyPatch, long_way: list[str]) -> None:
    monkeypatch.setattr(eager, lacking, None if lacking == "EXCHANGE_TABLE" else ("_no_such_function",))
    results = [torch_calls.call(CASE) for _ in range(2)]
    assert_same(CASE, *results)
    assert long_way == ["moe", "moe"]
