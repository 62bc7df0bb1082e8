"""The decode kernels of MxFp8 on an emulated sm_90: right results in every layout and under many orders of events."""

from __future__ import annotations

import cases
import emulated
import mx_decode
import numpy as np
import pytest
import results

pytestmark = pytest.mark.skipif(bool(emulated.missing_compiler()), reason=str(emulated.missing_compiler()))


@pytest.mark.parametrize("case", mx_decode.CASES.values(), ids=lambda case: case.name)
def test_results_are_the_references(emulator: emulated.Emulator, case: cases.Case) -> None:
    given = cases.arrays(case)
    results.assert_matches(case, given, emulated.run(emulator, case, given, seed=len(case.name)))


@pytest.mark.parametrize("case", mx_decode.WIDE, ids=lambda case: case.name)
def test_wide_layers_on_a_whole_gpu(emulator: emulated.Emulator, case: cases.Case) -> None:
    given = cases.arrays(case)
    results.assert_matches(case, given, emulated.run(emulator, case, given, seed=3, num_sms=132))


@pytest.mark.parametrize("name", ["mx_t7", "mx_shuffled_bf16_t16", "mx_shuffled_grid_geglu", "mx_h640_i896"])
def test_no_order_of_events_changes_a_bit(emulator: emulated.Emulator, name: str) -> None:
    case = mx_decode.CASES[name]
    given = cases.arrays(case)
    runs = [emulated.run(emulator, case, given, seed=seed) for seed in range(5)]
    for found in runs:
        results.assert_same_results(found, runs[0])


def test_zeros_under_the_largest_scales_are_zeros(emulator: emulated.Emulator) -> None:
    case, given = mx_decode.zeros_under_the_largest_scales()
    assert not np.any(emulated.run(emulator, case, given)["output"])


def test_layouts_change_no_bit(emulator: emulated.Emulator) -> None:
    outputs = [
        emulated.run(emulator, case, cases.arrays(case))
        for case in (mx_decode.CASES[name] for name in ("mx_t7", "mx_block_major_scales", "mx_padded_scales"))
    ]
    shuffled = mx_decode.CASES["mx_shuffled_t7"]
    outputs.append(emulated.run(emulator, shuffled, cases.arrays(shuffled)))
    for found in outputs[1:]:
        results.assert_same_results(found, outputs[0])
