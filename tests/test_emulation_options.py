"""batch_invariant and enable_pdl of the CUDA sources on the emulated machine: a token's bits are those that it gets
alone, and no bit depends on whether kernels overlap.
"""

from __future__ import annotations

import dataclasses

import cases
import emulated
import numpy as np
import pytest
import results
from compare import assert_same_bits
from numpy.typing import NDArray

pytestmark = pytest.mark.skipif(bool(emulated.missing_compiler()), reason=str(emulated.missing_compiler()))

# Repeated experts of a token, padding and slots that are not local are among them.
MIXED = cases.Case("mixed", 7, 384, 256, 8, 4, (1, 6), "mixed", "signed")
INVARIANT = {
    "fp8": MIXED,
    "bf16": dataclasses.replace(MIXED, x_dtype="bfloat16", topk_weights="float32"),
    "blocked_relu2": dataclasses.replace(MIXED, **cases.BLOCKED, **cases.OPTIONS["relu2"]),
    "tiles_of_many_rows": dataclasses.replace(MIXED, tokens=150, routing="one_expert", hidden=128, inter=128),
    "mx": dataclasses.replace(MIXED, tokens=90, **cases.MX),  # as many take the kernel of many rows anyway
}


def invariant(emulator: emulated.Emulator, case: cases.Case, given: cases.Arrays, seed: int = 0) -> NDArray:
    return emulated.run(emulator, case, given, seed=seed, batch_invariant=True)["output"]


@pytest.mark.parametrize("case", INVARIANT.values(), ids=INVARIANT)
def test_a_tokens_bits_are_those_it_gets_alone(emulator: emulated.Emulator, case: cases.Case) -> None:
    given = cases.arrays(case)
    whole = invariant(emulator, case, given)
    results.assert_matches(case, given, {"output": whole})
    for token in sorted({0, case.tokens // 2, case.tokens - 1}):
        one = cases.of_tokens(given, slice(token, token + 1))
        alone = invariant(emulator, dataclasses.replace(case, tokens=1), one, seed=token)
        assert_same_bits(alone[0], whole[token], f"token {token}")
    order = np.random.default_rng(7).permutation(case.tokens)
    moved = invariant(emulator, case, cases.of_tokens(given, order), seed=1)
    assert_same_bits(moved, whole[order], "tokens in another order")


OVERLAPPING = "t7 bf16_t7 t53 bf16_t53 routing_duplicates lora_unfinalized blocked_shuffled e300".split()


@pytest.mark.parametrize("name", OVERLAPPING)
def test_kernels_in_single_file_give_the_same_bits(emulator: emulated.Emulator, name: str) -> None:
    case = cases.CASES[name]
    given = cases.arrays(case)
    results.assert_same_results(
        emulated.run(emulator, case, given, seed=1, enable_pdl=False), emulated.run(emulator, case, given)
    )


@pytest.mark.parametrize(("tokens", "count"), [(7, 3), (600, 3), (1100, 4)])
@pytest.mark.parametrize("enable_pdl", [True, False])
def test_kernels_overlap_when_they_may(emulator: emulated.Emulator, tokens: int, count: int, enable_pdl: bool) -> None:
    """Counted over all launches: few tokens, more, and many that are routed by two kernels."""
    case = cases.Case("overlap", tokens, 128, 128, 32, 8, x_dtype="bfloat16")
    emulated.run(emulator, case, cases.arrays(case), enable_pdl=enable_pdl)
    launches, overlapping = emulator.launches()
    assert launches == count
    assert overlapping == (launches if enable_pdl else 0)
