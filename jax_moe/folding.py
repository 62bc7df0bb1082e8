"""What it means to fold MxFp8 weights onto the 128x128 scales of DeepSeekFp8: results, report, limit, refusals.

A code is moved by the difference of its block's exponent and that of the 128x128 block, which is exact until it runs
out of bits below 2^-6. jax_moe/prepare.py and torch_facade/prepare.py do it. Imports neither jax nor torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .options import invalid
from .problem import E8M0, FLOAT8, MX_SCALE_BLOCK, SCALE_BLOCK, Array

FUNCTION = "prepare_mxfp8_weights"
MAX_EXPONENT_SPREAD = 8


class FoldReport(NamedTuple):
    """How exact folded weights are, over both matrices of all experts."""

    changed_share: float  # of the codes, those whose value is another one now
    max_exponent_spread: int  # largest difference of exponents within 128x128; scales of zeros do not count
    max_relative_change: float  # largest change of a value, relative to the largest of the 32 that shared its scale


class PreparedWeights(NamedTuple):
    """Weights of `fp8_block_scale_routed_moe` with DeepSeekFp8, plain MajorK, and how exact they are."""

    gemm1_weights: Any  # float8_e4m3fn [L, M, H]
    gemm1_weights_scale: Any  # float32 [L, M/128, H/128], powers of two
    gemm2_weights: Any  # float8_e4m3fn [L, H, I]
    gemm2_weights_scale: Any  # float32 [L, H/128, I/128], powers of two
    report: FoldReport


class Folded(NamedTuple):
    """Counts and extremes of one matrix of all experts."""

    codes: int
    changed: int
    spread: int
    relative_change: float
    refused_spread: int  # largest spread, over the limit, of a 128x128 block that has changed codes; else 0


def check_weights(name: str, weights: Array, scale: Array) -> bool:
    """Whether the scale is one for 32x32. Raises ValueError unless both are those of MxFp8, `name` and `name`_scale."""
    if weights.dtype != FLOAT8 or len(weights.shape) != 3 or any(size % SCALE_BLOCK for size in weights.shape[1:]):
        expected = f"{FLOAT8} [experts, rows, columns], rows and columns multiples of {SCALE_BLOCK}"
        raise invalid(FUNCTION, name, expected, weights)
    experts, rows, columns = weights.shape
    shapes = [(experts, rows // per, columns // MX_SCALE_BLOCK) for per in (1, MX_SCALE_BLOCK)]
    if scale.dtype not in ("uint8", E8M0) or tuple(scale.shape) not in shapes:
        expected = " or ".join(str(Array(shape, "uint8")) for shape in shapes)
        raise invalid(FUNCTION, f"{name}_scale", f"{expected} (or as {E8M0})", scale)
    return tuple(scale.shape) == shapes[1]


def check_limit(limit: Any) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise invalid(FUNCTION, "max_exponent_spread", "a non-negative integer", repr(limit))


def check_folded(name: str, folded: Folded, limit: int) -> None:
    """Raises ValueError when exponents lie so far apart that more is lost than the limit allows."""
    if folded.refused_spread:
        raise invalid(
            FUNCTION,
            f"{name}_scale",
            f"of exponents at most {limit} apart within each {SCALE_BLOCK}x{SCALE_BLOCK} where codes lose bits",
            f"{folded.refused_spread} apart; call with MxFp8 and the weights as they are, or allow more with "
            "max_exponent_spread and read the report",
        )


def report(*folded: Folded) -> FoldReport:
    codes = sum(f.codes for f in folded)
    return FoldReport(
        sum(f.changed for f in folded) / codes if codes else 0.0,
        max(f.spread for f in folded),
        max(f.relative_change for f in folded),
    )
