"""When a result counts as right, and words that say where and by how much it is not.

Bounded are the relative L2 of the whole and of each row, and the error of 99.9 % of the elements as a part of the RMS;
zero rows, NaN and Inf must be exactly where the reference has them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Tolerance(NamedTuple):
    relative_l2: float
    element: float  # of the RMS


SAME_QUANTIZATION = Tolerance(5e-3, 0.03)  # against a reference that rounds where the op rounds
UNQUANTIZED = Tolerance(4e-2, 0.5)  # against one that rounds nowhere; the element bound admits large columns
# Powers of two do not bring the largest value to 448, where codes are relatively finest.
UNQUANTIZED_MX = Tolerance(5e-2, 0.5)
# Against the first, where few values meet FP8 tensor cores, whose sums keep 14 bits: about 1 % of the intermediate's
# codes take the neighbour. In a layer of real width that is 4e-3; where a row has 128 values, one such code shows.
FEW_VALUES_14_BITS = Tolerance(2e-2, 0.3)
MANY_VALUES_14_BITS = Tolerance(5e-3, 0.04)
ROW_FACTOR = 4  # one row averages over fewer roundings than the whole
ELEMENT_SHARE = 0.999
BFLOAT16_STEP = 2.0**-7  # of a value: sums that differ by next to nothing may be rounded to neighbours


def assert_close(actual: NDArray, expected: NDArray, what: str, tolerance: Tolerance = SAME_QUANTIZATION) -> None:
    """`actual` and `expected` are [rows, columns] of any float types. Raises AssertionError."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    _assert_same_places(np.isnan(a), np.isnan(e), f"{what}: NaN")
    _assert_same_places(np.isinf(a), np.isinf(e), f"{what}: Inf")
    finite = np.isfinite(e)
    a, e = np.where(finite, a, 0), np.where(finite, e, 0)
    zero_rows = np.all(e == 0, axis=1)
    in_zero_row = (a != 0) & zero_rows[:, None]
    _assert_same_places(in_zero_row, np.zeros_like(in_zero_row), f"{what}: a value in a row of zeros")
    if not np.any(e):
        return

    error, row_norm = np.linalg.norm(a - e, axis=1), np.linalg.norm(e, axis=1)
    whole = np.linalg.norm(error) / np.linalg.norm(row_norm)
    bound = tolerance.relative_l2
    assert whole < bound, f"{what}: relative L2 {whole:.3g}, bound {bound:g}; {_worst(a, e)}"

    typical_norm = np.sqrt(np.mean(row_norm[~zero_rows] ** 2))
    row_error = error / np.maximum(row_norm, 0.1 * typical_norm)
    row = int(np.argmax(row_error))
    bound *= ROW_FACTOR
    assert row_error[row] < bound, f"{what}: row {row} has relative L2 {row_error[row]:.3g}, bound {bound:g}"

    limit = tolerance.element * np.sqrt(np.mean(e[finite & ~zero_rows[:, None]] ** 2))
    share = np.mean(np.abs(a - e)[finite] <= limit + BFLOAT16_STEP * np.abs(e[finite]))
    assert share >= ELEMENT_SHARE, (
        f"{what}: {100 * (1 - share):.3g} % of the elements are off by more than {limit:.3g}; {_worst(a, e)}"
    )


def assert_same_bits(actual: NDArray, expected: NDArray, what: str) -> None:
    """Bit for bit, NaN included."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, f"{what}: {actual.dtype}{actual.shape}"
    a = np.ascontiguousarray(actual).reshape(-1).view(np.uint8)
    e = np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
    if np.array_equal(a, e):
        return
    different = np.flatnonzero(np.any((a != e).reshape(actual.size, -1), axis=1))
    first = np.unravel_index(different[0], actual.shape)
    raise AssertionError(
        f"{what}: {different.size} of {actual.size} elements differ in their bits, first at {tuple(map(int, first))}: "
        f"{actual[first]}, expected {expected[first]}"
    )


def _assert_same_places(actual: NDArray, expected: NDArray, what: str) -> None:
    missing, extra = np.argwhere(expected & ~actual), np.argwhere(actual & ~expected)
    if len(missing) or len(extra):
        raise AssertionError(
            f"{what}: missing at {len(missing)} places (first {_first(missing)}), "
            f"unexpected at {len(extra)} (first {_first(extra)})"
        )


def _first(places: NDArray) -> str:
    return str(tuple(map(int, places[0]))) if len(places) else "none"


def _worst(a: NDArray, e: NDArray) -> str:
    place = np.unravel_index(np.argmax(np.abs(a - e)), a.shape)
    return f"worst at {tuple(map(int, place))}: {a[place]:.6g}, expected {e[place]:.6g}"
