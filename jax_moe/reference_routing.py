"""What routing from logits means, in numpy and float32: for tests and benchmarks only.

Keys order the experts of a token (ties to the smaller id, NaN last); weights belong to the chosen ones, in that order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .enums import RoutingMethodType as Method


def route(
    logits: NDArray,
    bias: NDArray | None = None,
    *,
    top_k: int,
    method: Method,
    n_group: int = 1,
    topk_group: int = 1,
    routed_scaling_factor: float = 1.0,
    norm_topk_prob: bool = True,
) -> tuple[NDArray, NDArray]:
    """Logits [T, E] and bias [E] of any float dtype -> ids int32 [T, K], weights float32 [T, K]."""
    with np.errstate(all="ignore"):
        logits = logits.astype(np.float32)
        keys = keys_of(logits, bias, method)
        kept = keep_best_groups(keys, n_group, topk_group)
        ids = ranking(keys, kept)[:, :top_k].astype(np.int32)
        values = weights_of(logits, ids, method, np.float32(routed_scaling_factor), norm_topk_prob)
        return ids, values


def keys_of(logits: NDArray, bias: NDArray | None, method: Method) -> NDArray:
    """What experts are ordered by: float32 [T, E]."""
    with np.errstate(all="ignore"):
        if method in (Method.Default, Method.RenormalizeNaive):
            return softmax(logits)
        if method in (Method.Renormalize, Method.Llama4, Method.TopK):
            return logits
        scores = sigmoid(logits)
        if method in (Method.DeepSeekV3, Method.MiniMax2) and bias is not None:
            return scores + bias.astype(np.float32)
        return scores


def weights_of(logits: NDArray, ids: NDArray, method: Method, factor: np.float32, norm_topk_prob: bool) -> NDArray:
    """Weights of the chosen experts, in their order."""
    chosen = np.take_along_axis(logits, ids, axis=1)
    if method in (Method.Default, Method.RenormalizeNaive):
        probabilities = np.take_along_axis(softmax(logits), ids, axis=1)
        if method is Method.Default:
            return probabilities
        return probabilities / probabilities.sum(axis=1, keepdims=True)
    if method is Method.Renormalize:
        return softmax(chosen)
    if method is Method.TopK:
        return chosen
    scores = sigmoid(chosen)
    if method in (Method.Llama4, Method.Sigmoid) or (method is Method.SigmoidRenorm and not norm_topk_prob):
        return scores
    if method is Method.SigmoidRenorm:
        return scores / scores.sum(axis=1, keepdims=True)
    return scores * factor / (scores.sum(axis=1, keepdims=True) + np.float32(1e-20))


def ranking(keys: NDArray, kept: NDArray) -> NDArray:
    """Indices in descending order of the keys; NaN after -inf, what is not kept after everything."""
    missing = np.isnan(keys)
    indices = np.broadcast_to(np.arange(keys.shape[1]), keys.shape)
    return np.lexsort((indices, -np.where(missing, 0, keys), missing, ~kept), axis=1)


def keep_best_groups(keys: NDArray, n_group: int, topk_group: int) -> NDArray:
    """Which experts are in the groups whose two greatest keys have the greatest sums: bool [T, E]."""
    tokens, experts = keys.shape
    if n_group == 1:
        return np.ones(keys.shape, bool)
    grouped = keys.reshape(tokens * n_group, experts // n_group)
    best = np.take_along_axis(grouped, ranking(grouped, np.ones(grouped.shape, bool))[:, :2], axis=1)
    with np.errstate(all="ignore"):
        scores = (best[:, 0] + best[:, 1]).reshape(tokens, n_group)
    chosen = ranking(scores, np.ones(scores.shape, bool))[:, :topk_group]
    kept = np.zeros((tokens, n_group), bool)
    np.put_along_axis(kept, chosen, True, axis=1)
    return np.repeat(kept, experts // n_group, axis=1)


def softmax(x: NDArray) -> NDArray:
    # NaN does not count in the maximum; the sum brings it to every element of the row.
    powers = np.exp(x - np.fmax.reduce(x, axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True, dtype=np.float32)


def sigmoid(x: NDArray) -> NDArray:
    return np.float32(1) / (np.float32(1) + np.exp(-x))
