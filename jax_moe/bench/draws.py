"""Who routes to whom: the experts of every token, drawn in numpy, uniform, skewed or exactly balanced.

A draw gives int64 [T, K]: of all E experts K distinct ones a token, in no order unless it says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..shapes import LayerShape

Draw = Callable[[LayerShape, int, np.random.Generator], NDArray]

ZIPF_EXPONENT = 1.2


def uniform(shape: LayerShape, tokens: int, rng: np.random.Generator) -> NDArray:
    return _least(rng.random((tokens, shape.num_experts), np.float32), shape.top_k)


def zipf(shape: LayerShape, tokens: int, rng: np.random.Generator) -> NDArray:
    """An expert's probability falls with its rank to the power 1.2; ranks are dealt at random.

    A token takes one expert after the other among those that it does not have: the largest of log p + Gumbel noise.
    """
    log_rank = np.log(rng.permutation(shape.num_experts) + 1.0)
    noise = rng.gumbel(size=(tokens, shape.num_experts))
    return _least(ZIPF_EXPONENT * log_rank - noise, shape.top_k)


def one_in_half(shape: LayerShape, tokens: int, rng: np.random.Generator) -> NDArray:
    """Every second token names one local expert first, no other token names it (with K < E); all else is uniform."""
    hot = shape.local_expert_offset + rng.integers(shape.local_num_experts)
    order = rng.random((tokens, shape.num_experts), np.float32)
    order[:, hot] = 2
    order[::2, hot] = -1
    return np.argsort(order, axis=1)[:, : shape.top_k]


def balanced(shape: LayerShape, tokens: int, rng: np.random.Generator) -> NDArray:
    """Every expert has exactly T K / E rows. Tokens come in random order, as the experts of each do."""
    experts, top_k = shape.num_experts, shape.top_k
    if tokens * top_k % experts:
        raise ValueError(f"tokens * top_k must be a multiple of {experts} experts, got {tokens} * {top_k}")
    deal = math.lcm(experts, top_k)  # slots of the fewest tokens that can be balanced: some turns of one random order
    orders = np.argsort(rng.random((tokens * top_k // deal, experts)), axis=1)
    ids = np.tile(orders, (1, deal // experts)).reshape(tokens, top_k)
    return rng.permuted(rng.permutation(ids), axis=1)


def _least(order: NDArray, number: int) -> NDArray:
    """The columns of the `number` least of each row."""
    return np.argpartition(order, number - 1, axis=1)[:, :number]
