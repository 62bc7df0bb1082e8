"""batch_invariant: who says it, what is chosen then, and that a token's bits on the CPU are always those that it gets
alone. The emulated kernels' are in test_emulation_options.py, a GPU's in gpu/test_gpu_options.py.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Any

import cases
import compare
import numpy as np
import pytest
from call import Call
from described import NAME, create, described
from numpy.typing import NDArray

from jax_moe import native
from jax_moe.options import BATCH_INVARIANT, Options

# Repeated experts of a token, padding and slots that are not local are among them.
CASES = {
    name: dataclasses.replace(case, tokens=40, routing="mixed", weights="signed")
    for name, case in {
        "fp8": cases.Case("fp8", 40, 256, 256, 8, 4, (1, 6)),
        "bf16": cases.Case("bf16", 40, 256, 128, 8, 4, x_dtype="bfloat16", topk_weights="float32"),
        "mx": cases.Case("mx", 40, 256, 128, 8, 4, **cases.MX),
    }.items()
}
FRONT_ENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"needs {name}"))
    for name in ("jax", "torch")
]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BATCH_INVARIANT, raising=False)


# ---- who says it -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, False), ("", False), ("0", False), ("false", False), ("1", True), ("true", True), ("True", True)],
)
def test_none_reads_the_environment(monkeypatch: pytest.MonkeyPatch, text: str | None, expected: bool) -> None:
    if text is not None:
        monkeypatch.setenv(BATCH_INVARIANT, text)
    assert create().batch_invariant is expected
    assert create(described(), {"batch_invariant": False}).batch_invariant is False
    assert create(described(), {"batch_invariant": True}).batch_invariant is True


def test_another_word_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BATCH_INVARIANT, "yes")
    words = f"^{NAME}: environment variable {BATCH_INVARIANT} must be 1, true, 0 or false, got 'yes'"
    with pytest.raises(ValueError, match=words):
        create()
    assert create(described(), {"batch_invariant": True}).batch_invariant


@pytest.mark.parametrize("option", ["batch_invariant", "enable_pdl"])
@pytest.mark.parametrize("value", [2, "1", 0.0])
def test_other_values_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{NAME}: {option} must be None, True or False, got {value!r}"):
        Options.parse(NAME, **{option: value})


@pytest.mark.parametrize(("value", "expected"), [(None, True), (True, True), (False, False)])
def test_kernels_overlap_unless_told_otherwise(value: bool | None, expected: bool) -> None:
    problem = create(described(), {"enable_pdl": value})
    assert problem.enable_pdl is expected and problem.attributes()["enable_pdl"] == int(expected)


# ---- what is chosen --------------------------------------------------------------------------------------------------
def on_gpu(case: cases.Case, **changes: Any) -> Any:
    return dataclasses.replace(cases.problem(case, cases.arrays(case)), **changes)


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 300])
def test_all_sizes_take_the_grouped_kernels(tokens: int) -> None:
    problem = on_gpu(dataclasses.replace(CASES["fp8"], tokens=tokens))
    text = native.explain(dataclasses.replace(problem, batch_invariant=True))
    assert text.startswith("batch invariant: grouped kernels at every size\n") and "decode" not in text
    assert ("decode" in native.explain(problem)) == (tokens <= 16)


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, native.GEMM1 | native.GEMM2),
        ({"batch_invariant": True}, native.ALL_STAGES - native.PERMUTE),
        ({"do_finalize": False}, native.ROUTE | native.GEMM1 | native.GEMM2),
        ({"num_tokens": 0}, 0),
    ],
    ids=str,
)
def test_the_stages_that_launch_kernels_are_known(changes: dict[str, Any], stages: int) -> None:
    assert native.launched_stages(on_gpu(cases.CASES["t7"], **changes)) == stages


# ---- what it promises ------------------------------------------------------------------------------------------------
def outputs(front_end: str, case: cases.Case, given: cases.Arrays) -> NDArray:
    if front_end == "jax":
        import jax_calls

        return np.asarray(jax_calls.call(case, given, batch_invariant=True))
    import torch_calls

    tensors = {name: None if array is None else torch_calls.tensor(array) for name, array in given.items()}
    if "topk_weights" in tensors:
        tensors["topk_ids"] = (tensors["topk_ids"], tensors.pop("topk_weights"))
    return torch_calls.array(torch_calls.call(case, batch_invariant=True, **tensors))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_tokens_bits_are_those_it_gets_alone(front_end: str, case: cases.Case) -> None:
    """Of the first 1 to 40 tokens, and at other places among others."""
    given = cases.arrays(case)
    whole = outputs(front_end, case, given)
    for tokens in (1, 2, 3, 5, 8, 15, 16, 17, 23, 31, 39):
        first = outputs(front_end, dataclasses.replace(case, tokens=tokens), cases.of_tokens(given, slice(0, tokens)))
        compare.assert_same_bits(first, whole[:tokens], f"{tokens} tokens")
    for token in (0, 7, 39):
        alone = outputs(front_end, dataclasses.replace(case, tokens=1), cases.of_tokens(given, slice(token, token + 1)))
        compare.assert_same_bits(alone[0], whole[token], f"token {token} alone")
    order = np.random.default_rng(4).permutation(40)
    compare.assert_same_bits(outputs(front_end, case, cases.of_tokens(given, order)), whole[order], "permuted")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_number_of_tokens_gives_the_same_bits_on_the_cpu(case: cases.Case) -> None:
    given = cases.arrays(case)
    whole = Call(case, given).run()["output"]
    for tokens in range(1, 41):
        last = cases.of_tokens(given, slice(40 - tokens, 40))
        found = Call(dataclasses.replace(case, tokens=tokens), last).run()["output"]
        compare.assert_same_bits(found, whole[40 - tokens :], f"the last {tokens} tokens")


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("changes", [{"batch_invariant": True}, {"enable_pdl": False}], ids=str)
def test_the_options_reach_the_problem(
    front_end: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In JAX as attributes of the call; in torch on the long way, and every plan has its own."""
    case = dataclasses.replace(CASES["fp8"], tokens=3)
    ((option, value),) = changes.items()
    if front_end == "jax":
        import jax
        import jax_calls

        given = jax_calls.shapes(cases.arrays(case))
        text = jax.jit(lambda arrays: jax_calls.call(case, arrays, **changes)).lower(given).as_text()
        assert f"{option} = {int(value)} : i64" in text
        if option == "batch_invariant":
            monkeypatch.setenv(BATCH_INVARIANT, "1")
            assert "batch_invariant = 1" in jax.jit(lambda x: jax_calls.call(case, x)).lower(given).as_text()
        return
    import torch_calls

    from torch_facade import eager, moe

    if eager.EXCHANGE_TABLE is None:
        pytest.skip("this torch has no DLPack exchange table: there are no plans")
    plans = []
    make = moe.repeatable
    monkeypatch.setattr(moe, "repeatable", lambda call, *rest: plans.append(call.problem) or make(call, *rest))
    monkeypatch.setattr(moe, "CALLS", moe.Calls())
    for _ in range(2):
        torch_calls.call(case)
        torch_calls.call(case, **changes)
    if option == "batch_invariant":
        monkeypatch.setenv(BATCH_INVARIANT, "true")
        torch_calls.call(case)
        torch_calls.call(case)
        monkeypatch.setenv(BATCH_INVARIANT, "0")
        torch_calls.call(case)
        torch_calls.call(case)
    found = [getattr(problem, option) for problem in plans]
    assert [bool(x) for x in found][:2] == [not value, value]
    assert [bool(x) for x in found][-2:] == ([True, False] if option == "batch_invariant" else [not value, value])


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
@pytest.mark.parametrize("value", ["1", "0"])
def test_compiled_graphs_hold_what_the_environment_said(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torch_calls

    from torch_facade.plan import OPTIONS

    case = dataclasses.replace(CASES["fp8"], tokens=3)
    given = torch_calls.arguments(case)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setenv(BATCH_INVARIANT, value)
    layer = functools.partial(torch_calls.function, **given)
    torch.compile(lambda x: layer(hidden_states=x), backend=backend, fullgraph=True)(given["hidden_states"])
    op = torch.ops.jax_moe.fp8_block_scale_routed_moe.default
    (call,) = [node for node in graphs[0].graph.nodes if node.target == op]
    (options,) = [argument for argument in call.args if isinstance(argument, (list, tuple))]
    assert options[OPTIONS.index("batch_invariant")] == int(value)
