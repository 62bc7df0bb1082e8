"""batch_invariant and enable_pdl on a GPU, through torch: a token's bits alone and among others, the same bits whether
kernels overlap or not, on two streams at once, and beside a kernel that occupies the SMs.
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
from memory import Cuda

torch = pytest.importorskip("torch")
torch_calls = pytest.importorskip("torch_calls")

from torch.utils._pytree import tree_map_only  # noqa: E402

TOKENS = (1, 3, 16, 17, 64, 140, 300)  # with one expert: narrow tiles, wide ones, a wide one with a narrow part
WIDE = cases.Case("wide", max(TOKENS), 1024, 512, 32, 8, (4, 20), "mixed", "signed")
FORMS = {
    "fp8": WIDE,
    "bf16": dataclasses.replace(WIDE, x_dtype="bfloat16", topk_weights="float32"),
    "blocked_relu2": dataclasses.replace(WIDE, **cases.BLOCKED, **cases.OPTIONS["relu2"]),
    "one_expert": dataclasses.replace(WIDE, top_k=1, routing="one_expert"),
    "mx": dataclasses.replace(WIDE, **cases.MX),
}
OVERLAPPING = "t1 t7 bf16_t7 t257 bf16_t53 routing_mixed_window e300 blocks_t700 lora_unfinalized".split()
Arguments = dict[str, Any]


def arguments(case: cases.Case, device: int, given: cases.Arrays | None = None) -> Arguments:
    """The case's, on the device, or those of other inputs."""
    result = torch_calls.arguments(case)
    if given is not None:
        tensors = {name: None if array is None else torch_calls.tensor(array) for name, array in given.items()}
        if "topk_weights" in tensors:
            tensors["topk_ids"] = (tensors["topk_ids"], tensors.pop("topk_weights"))
        result |= tensors
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), result)


def output(case: cases.Case, device: int, given: cases.Arrays, tokens: Any, **options: Any) -> np.ndarray:
    chosen = cases.of_tokens(given, tokens)
    sized = dataclasses.replace(case, tokens=len(chosen["topk_ids"]))
    return torch_calls.array(torch_calls.function(**arguments(sized, device, chosen), **options).cpu())


def named(case: cases.Case, returned: Any) -> dict[str, np.ndarray]:
    return {name: torch_calls.array(tensor.cpu()) for name, tensor in torch_calls.defined(case, returned).items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        compare.assert_same_bits(found[name], array, name)


# ---- batch_invariant -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", FORMS.values(), ids=FORMS)
def test_a_tokens_bits_do_not_depend_on_the_batch(cuda: Cuda, case: cases.Case) -> None:
    given = cases.arrays(case)
    run = functools.partial(output, case, cuda.device, given, batch_invariant=True)
    whole = run(slice(None))
    for tokens in TOKENS:
        for first in {0, 150 - tokens // 2, case.tokens - tokens}:
            rows = slice(first, first + tokens)
            compare.assert_same_bits(run(rows), whole[rows], f"tokens {first} to {first + tokens}")
    order = np.random.default_rng(3).permutation(case.tokens)
    compare.assert_same_bits(run(order), whole[order], "tokens in another order")


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_finalising_apart_gives_the_invariant_bits(cuda: Cuda, tokens: int) -> None:
    import torch_facade

    given = arguments(dataclasses.replace(WIDE, tokens=tokens), cuda.device)
    whole = torch_calls.function(**given, batch_invariant=True)
    parts = torch_calls.function(**given | {"do_finalize": False})
    compare.assert_same_bits(*(torch_calls.array(x.cpu()) for x in (torch_facade.finalize(*parts), whole)), "output")


@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="needs jax")
def test_jax_gives_the_same_invariant_bits(cuda: Cuda) -> None:
    import jax
    import jax_calls

    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    if not gpus:
        pytest.skip("this jax has no GPU")
    given = cases.arrays(WIDE)
    whole = output(WIDE, cuda.device, given, slice(None), batch_invariant=True)
    for tokens in (1, 16, 17, 300):
        few = cases.of_tokens(given, slice(0, tokens))
        case = dataclasses.replace(WIDE, tokens=tokens)
        on_gpu = {name: None if array is None else jax.device_put(array, gpus[0]) for name, array in few.items()}
        found = np.asarray(jax_calls.call(case, on_gpu, batch_invariant=True))
        compare.assert_same_bits(found, whole[:tokens], f"{tokens} tokens")


# ---- enable_pdl ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OVERLAPPING)
def test_the_same_bits_with_and_without_overlap(cuda: Cuda, name: str) -> None:
    """Back to back too, so that a call that overlaps follows one that does not, and the reverse."""
    case = cases.CASES[name]
    given = arguments(case, cuda.device)
    expected = named(case, torch_calls.function(**given))
    returned = [torch_calls.function(**given, enable_pdl=turn) for turn in (False, True, None, False, False, True) * 3]
    for result in returned:
        assert_same(named(case, result), expected)


def several(device: int, options: Arguments) -> list[tuple[cases.Case, Arguments]]:
    """Calls of few and of many tokens, of both paths."""
    return [
        (case, arguments(case, device) | options)
        for case in (
            dataclasses.replace(WIDE, tokens=1),
            dataclasses.replace(WIDE, tokens=16, x_dtype="bfloat16"),
            dataclasses.replace(WIDE, tokens=200),
            cases.CASES["blocks_t700"],
        )
    ]


OPTIONS = [{}, {"enable_pdl": False}, {"batch_invariant": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_different_calls_on_two_streams_at_once(cuda: Cuda, options: Arguments) -> None:
    calls = several(cuda.device, options)
    expected = [named(case, torch_calls.function(**given)) for case, given in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(cuda.device) for _ in range(2)]
    returned: list[tuple[int, Any]] = []
    for turn in range(20):
        for number, stream in enumerate(streams):
            which = (turn + number) % len(calls)  # never the same on both
            with torch.cuda.stream(stream):
                returned.append((which, torch_calls.function(**calls[which][1])))
    torch.cuda.synchronize()
    for which, result in returned:
        assert_same(named(calls[which][0], result), expected[which])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_beside_a_kernel_that_occupies_the_sms(cuda: Cuda, options: Arguments) -> None:
    """Long products on another stream: CTAs of a call start late, one by one, and some before those that they wait for
    have all started.
    """
    calls = several(cuda.device, options)
    expected = [named(case, torch_calls.function(**given)) for case, given in calls]
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=cuda.device) for _ in range(2))
    product = a @ b
    torch.cuda.synchronize()
    busy, ours = (torch.cuda.Stream(cuda.device) for _ in range(2))
    products, returned = [], []
    for turn in range(5):
        with torch.cuda.stream(busy):
            products += [a @ b for _ in range(2)]
        with torch.cuda.stream(ours):
            returned += [(which, torch_calls.function(**given)) for which, (_, given) in enumerate(calls)]
        if turn == 2:
            ours.synchronize()
    torch.cuda.synchronize()
    for which, result in returned:
        assert_same(named(calls[which][0], result), expected[which])
    assert all(torch.equal(x, product) for x in products)
