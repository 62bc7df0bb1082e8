"""All results of one call against the reference, or against another call's."""

from __future__ import annotations

from collections.abc import Mapping

import cases
import compare
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jax_moe import native, reference

# Against the reference's codes times scales: a value near the middle of two codes may take the other one.
ACTIVATION = compare.Tolerance(1e-2, 0.25)
ACTIVATION_14_BITS = compare.Tolerance(2e-2, 0.25)


def assert_matches(
    case: cases.Case,
    given: cases.Arrays,
    results: Mapping[str, NDArray],
    tokens: NDArray | None = None,
    *,
    on_hopper: bool = False,
) -> None:
    """`results` by the names of problem.OUTPUTS; of a large case only the chosen `tokens` are looked at.

    The map, where there is one, must be the reference's, and every permuted row that it names must be right.
    """
    of_14_bits = on_hopper and has_sums_of_14_bits(case, given)
    few = of_14_bits and (case.size == "small" or case.inter <= 256)  # too few for errors to average
    same_quantization = compare.SAME_QUANTIZATION
    if of_14_bits:
        same_quantization = compare.FEW_VALUES_14_BITS if few else compare.MANY_VALUES_14_BITS
    if tokens is not None:
        results = _only(case, given, results, tokens)
    requantized = cases.expected(case, given, tokens)
    if "output" in results:
        compare.assert_close(results["output"], requantized.output, "output", same_quantization)
        if case.extreme == "none" and case.size == "small":
            exact = cases.expected(case, given, tokens, requantize=False)
            compare.assert_close(results["output"], exact.output, "output, unquantized", unquantized(case))
    if "expert_weights" in results:
        compare.assert_same_bits(results["expert_weights"], requantized.expert_weights, "expert_weights")
    row_of = results.get("expanded_idx_to_permuted_idx")
    if row_of is None:
        return
    assert np.array_equal(row_of, requantized.expanded_idx_to_permuted_idx), "expanded_idx_to_permuted_idx differs"
    rows = int(np.count_nonzero(row_of >= 0))
    if "gemm2_output" in results:
        found, expected = results["gemm2_output"][:rows], requantized.gemm2_output[:rows]
        compare.assert_close(found, expected, "gemm2_output", same_quantization)
    if "gemm1_activation_output" in results:
        codes, scale = results["gemm1_activation_output"], results["gemm1_activation_scale"][:, :rows]
        tolerance = ACTIVATION_14_BITS if few else ACTIVATION
        assert_same_activation(codes[:rows].view(ml_dtypes.float8_e4m3fn), scale, requantized, rows, tolerance)


def has_sums_of_14_bits(case: cases.Case, given: cases.Arrays) -> bool:
    """Whether a GPU takes the kernels that multiply FP8 in tensor cores."""
    return "grouped_gemm" in native.explain(cases.problem(case, given, offset_on_device=True))


def unquantized(case: cases.Case) -> compare.Tolerance:
    """Against a reference that rounds nowhere."""
    return compare.UNQUANTIZED_MX if case.mx else compare.UNQUANTIZED


def assert_same_activation(
    codes: NDArray,
    scale: NDArray,
    expected: reference.Result,
    rows: int,
    tolerance: compare.Tolerance = ACTIVATION,
) -> None:
    """float8 codes [rows, I] and scale [I/128, rows], or E8M0 bytes [I/128, rows, 4]: scales, and codes times them."""
    expected_scale = expected.gemm1_activation_scale[:, :rows]
    if scale.dtype == np.uint8:
        assert_same_exponents(scale, expected_scale)
    else:
        np.testing.assert_allclose(scale, expected_scale, rtol=0.01, err_msg="gemm1_activation_scale")
    with np.errstate(all="ignore"):
        actual, wanted = (
            q.astype(np.float32) * factors(s, codes.shape[1])
            for q, s in ((codes, scale), (expected.gemm1_activation_output[:rows], expected_scale))
        )
    compare.assert_close(actual, wanted, "gemm1_activation_output", tolerance)


def assert_same_exponents(scale: NDArray, expected: NDArray) -> None:
    """E8M0 bytes: NaN at the same places; few may differ, by one, where a largest value is near 448 times a power."""
    assert np.array_equal(scale == reference.MX_NAN, expected == reference.MX_NAN), "NaN of gemm1_activation_scale"
    difference = np.abs(scale.astype(np.int32) - expected)
    assert np.max(difference, initial=0) <= 1, "gemm1_activation_scale"
    assert np.mean(difference) <= 0.01 if difference.size else True, "gemm1_activation_scale"


def factors(scale: NDArray, columns: int) -> NDArray:
    """What the codes of each row [rows, columns] are multiplied by."""
    if scale.dtype == np.uint8:
        blocks, rows, per_block = scale.shape
        exponent = scale.swapaxes(0, 1).reshape(rows, blocks * per_block)
        power = np.ldexp(np.float32(1), exponent.astype(np.int32) - 127)
        return np.repeat(np.where(exponent == reference.MX_NAN, np.nan, power), columns // exponent.shape[1], axis=1)
    return np.repeat(scale.T, columns // len(scale), axis=1)


def assert_same_results(results: Mapping[str, NDArray], others: Mapping[str, NDArray]) -> None:
    """Bit for bit, but for permuted rows that the map does not name."""
    assert results.keys() == others.keys()
    for name, array in results.items():
        compare.assert_same_bits(named(name, array, results), named(name, others[name], results), name)


def named(name: str, array: NDArray, results: Mapping[str, NDArray]) -> NDArray:
    """The part of a result that the map of `results` names: rows, or columns of gemm1_activation_scale."""
    if name in ("gemm2_output", "gemm1_activation_output", "gemm1_activation_scale"):
        rows = np.count_nonzero(results["expanded_idx_to_permuted_idx"] >= 0)
        return array[:, :rows] if name == "gemm1_activation_scale" else array[:rows]
    return array


def chosen_tokens(case: cases.Case, count: int = 32) -> NDArray:
    """Some tokens, the first and the last among them."""
    if case.tokens <= count:
        return np.arange(case.tokens)
    return np.unique(np.linspace(0, case.tokens - 1, count).astype(np.int64))


def _only(case: cases.Case, given: cases.Arrays, results: Mapping[str, NDArray], tokens: NDArray) -> dict[str, NDArray]:
    """The results that a call of the chosen tokens alone would give; checks the whole map on the way."""
    chosen = {name: results[name][tokens] for name in ("output", "expert_weights") if name in results}
    row_of = results.get("expanded_idx_to_permuted_idx")
    if row_of is None:
        return chosen
    assert given["topk_ids"] is not None
    ids = (
        given["topk_ids"] if given.get("topk_weights") is not None else reference.unpack_topk_ids(given["topk_ids"])[0]
    )
    experts = reference.local_expert(ids, case.experts, case.offset, case.local)
    assert np.array_equal(row_of, reference.permutation(experts.reshape(-1))[0]), "expanded_idx_to_permuted_idx differs"
    row_of = row_of.reshape(case.tokens, case.top_k)[tokens].reshape(-1)
    map_of_chosen, order = reference.permutation(experts[tokens].reshape(-1))
    chosen["expanded_idx_to_permuted_idx"] = map_of_chosen
    for name in ("gemm2_output", "gemm1_activation_output"):
        if name in results:
            chosen[name] = results[name][row_of[order]]
    if "gemm1_activation_scale" in results:
        chosen["gemm1_activation_scale"] = results["gemm1_activation_scale"][:, row_of[order]]
    return chosen
