"""MxFp8's CUDA kernels on an emulated sm_90: no bit changes with a layout or an order of events, scales are exact."""

from __future__ import annotations

from typing import Any

import cases
import emulated
import mx_properties
import pytest
import results
from numpy.typing import NDArray

pytestmark = pytest.mark.skipif(bool(emulated.missing_compiler()), reason=str(emulated.missing_compiler()))


@pytest.fixture
def run(emulator: emulated.Emulator) -> mx_properties.Run:
    def call(case: cases.Case, given: cases.Arrays) -> dict[str, NDArray]:
        return emulated.run(emulator, case, given, seed=case.tokens)

    return call


@pytest.mark.parametrize("name", mx_properties.LAYOUTS)
def test_a_layout_changes_no_bit(run: mx_properties.Run, name: str) -> None:
    mx_properties.a_layout_changes_no_bit(run, name)


@pytest.mark.parametrize("shift", [31, 110, -100])
@pytest.mark.parametrize("name", ["mx_t8", "mx_grid", "mx_t129"])
def test_powers_of_two_that_move_from_weights_to_tokens_change_no_bit(
    run: mx_properties.Run, name: str, shift: int
) -> None:
    mx_properties.powers_of_two_may_move_from_weights_to_tokens(run, name, shift)


@pytest.mark.parametrize("check", mx_properties.CHECKS, ids=lambda check: check.__name__)
def test_scales_are_exact(run: mx_properties.Run, check: mx_properties.Check) -> None:
    check(run)


@pytest.mark.parametrize("name", ["mx_t129", "mx_shuffled_t257", "mx_h640_i896", "mx_padded", "mx_lora_unfinalized"])
def test_no_order_of_events_changes_a_bit(emulator: emulated.Emulator, name: str) -> None:
    case = cases.CASES[name]
    given = cases.arrays(case)
    runs = [emulated.run(emulator, case, given, seed=seed, num_sms=1 + seed * seed) for seed in range(6)]
    results.assert_matches(case, given, runs[0])
    for found in runs:
        results.assert_same_results(found, runs[0])


def test_many_stages_and_tiles(emulator: emulated.Emulator) -> None:
    """The rings wrap often, with few and with many row blocks a tile."""
    for case in (cases.Case("", 5, 2048, 512, 4, 2, **cases.MX), cases.Case("", 300, 1024, 384, 3, 2, **cases.MX)):
        given = cases.arrays(case)
        results.assert_matches(case, given, emulated.run(emulator, case, given, seed=5, num_sms=2))


@pytest.mark.parametrize("change", [{"scale_order": "padded"}, {"x_dtype": "bfloat16"}], ids=["padded", "bf16"])
def test_tokens_are_prepared_beside_a_route_in_chunks(emulator: emulated.Emulator, change: dict[str, Any]) -> None:
    case = cases.Case("", 3000, 128, 128, 32, 8, (3, 5), **cases.MX | change)
    given = cases.arrays(case)
    results.assert_matches(case, given, emulated.run(emulator, case, given, num_sms=4))
