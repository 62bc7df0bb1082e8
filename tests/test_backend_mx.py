"""MxFp8 on the CPU backend: products exact in their scales, one quantiser, and no bit that a layout changes."""

from __future__ import annotations

import cases
import mx_properties
import pytest
from call import Call
from numpy.typing import NDArray


def run(case: cases.Case, given: cases.Arrays) -> dict[str, NDArray]:
    return Call(case, given).run()


@pytest.mark.parametrize("name", mx_properties.LAYOUTS)
def test_a_layout_of_mxfp8_changes_no_bit(name: str) -> None:
    mx_properties.a_layout_changes_no_bit(run, name)


@pytest.mark.parametrize("shift", mx_properties.SHIFTS)
@pytest.mark.parametrize("name", mx_properties.MOVED)
def test_powers_of_two_that_move_from_weights_to_tokens_change_no_bit(name: str, shift: int) -> None:
    mx_properties.powers_of_two_may_move_from_weights_to_tokens(run, name, shift)


@pytest.mark.parametrize("check", mx_properties.CHECKS, ids=lambda check: check.__name__)
def test_scales_are_exact(check: mx_properties.Check) -> None:
    check(run)
