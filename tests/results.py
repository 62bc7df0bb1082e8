"""All results of one call against the reference, or against another call's."""

from __future__ import annotations

from collections.abc import Mapping

import cases
import compare
import numpy as np
from numpy.typing import NDArray

from jax_moe import reference


def assert_matches(
    case: cases.Case, given: cases.Arrays, results: Mapping[str, NDArray], tokens: NDArray | None = None
) -> None:
    """`results` by the names of problem.OUTPUTS; of a large case only the chosen `tokens` are looked at.

    Without do_finalize the map must be the reference's, and every row that it names must be right.
    """
    if tokens is not None:
        results = _only(case, given, results, tokens)
    requantized = cases.expected(case, given, tokens)
    if case.do_finalize:
        compare.assert_close(results["output"], requantized.output, "output")
        if case.extreme == "none" and case.size == "small":
            exact = cases.expected(case, given, tokens, requantize=False)
            compare.assert_close(results["output"], exact.output, "output, unquantized", compare.UNQUANTIZED)
        return
    row_of = results["expanded_idx_to_permuted_idx"]
    assert np.array_equal(row_of, requantized.expanded_idx_to_permuted_idx), "expanded_idx_to_permuted_idx differs"
    compare.assert_same_bits(results["expert_weights"], requantized.expert_weights, "expert_weights")
    rows = np.count_nonzero(row_of >= 0)
    compare.assert_close(results["gemm2_output"][:rows], requantized.gemm2_output[:rows], "gemm2_output")


def assert_same_results(results: Mapping[str, NDArray], others: Mapping[str, NDArray]) -> None:
    """Bit for bit, but for rows of gemm2_output that the map does not name."""
    assert results.keys() == others.keys()
    for name, array in results.items():
        other = others[name]
        if name == "gemm2_output":
            rows = np.count_nonzero(results["expanded_idx_to_permuted_idx"] >= 0)
            array, other = array[:rows], other[:rows]
        compare.assert_same_bits(array, other, name)


def chosen_tokens(case: cases.Case, count: int = 8) -> NDArray:
    """Some tokens, the first and the last among them."""
    if case.tokens <= count:
        return np.arange(case.tokens)
    return np.unique(np.linspace(0, case.tokens - 1, count).astype(np.int64))


def _only(case: cases.Case, given: cases.Arrays, results: Mapping[str, NDArray], tokens: NDArray) -> dict[str, NDArray]:
    """The results that a call of the chosen tokens alone would give; checks the whole map on the way."""
    if case.do_finalize:
        return {"output": results["output"][tokens]}
    assert given["topk_ids"] is not None
    ids, _ = reference.unpack_topk_ids(given["topk_ids"])
    experts = reference.local_expert(ids, case.experts, case.offset, case.local)
    row_of = results["expanded_idx_to_permuted_idx"]
    assert np.array_equal(row_of, reference.permutation(experts.reshape(-1))[0]), "expanded_idx_to_permuted_idx differs"
    row_of = row_of.reshape(case.tokens, case.top_k)[tokens].reshape(-1)
    map_of_chosen, order = reference.permutation(experts[tokens].reshape(-1))
    return {
        "gemm2_output": results["gemm2_output"][row_of[order]],
        "expert_weights": results["expert_weights"][tokens],
        "expanded_idx_to_permuted_idx": map_of_chosen,
    }
