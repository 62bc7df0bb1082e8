"""How the tokens of a case choose their experts: functions from a case to packed ids, and ids apart from weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cases import Case

PADDING = np.array(0xFFFF0000, np.uint32).view(np.int32)  # id -1, weight 0


def topk_ids(case: Case, rng: np.random.Generator) -> NDArray:
    """Packed int32 [T, K] of a cases.Case."""
    return ROUTINGS[case.routing](case, rng)


def pack(ids: NDArray, weights: NDArray) -> NDArray:
    """(id << 16) | bfloat16 bits of the weight, as int32."""
    bits = weights.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)
    return ((ids.astype(np.int64) & 0xFFFF).astype(np.uint32) << 16 | bits).view(np.int32)


def apart(case: Case, packed: NDArray, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """The same choice as (ids int32, weights of the dtype that the case asks for).

    An id that is no expert becomes any of 32 bits that is none either, and its weight NaN.
    """
    ids, weights = packed >> 16, (packed & 0xFFFF).astype(np.uint16).view(ml_dtypes.bfloat16)
    no_expert = (ids < 0) | (ids >= case.experts)
    few = rng.integers(0, case.experts, ids.shape)
    beyond = [
        few + 2**16,
        few - 2**16,
        (few % 1000 + 1) << 16,
        -1 - few,
        case.experts + few,
        2**31 - 1 - few,
        few - 2**31,
    ]
    ids = np.where(no_expert, np.choose(rng.integers(0, len(beyond), ids.shape), beyond), ids)
    dtype = ml_dtypes.bfloat16 if case.topk_weights == "bfloat16" else np.float32
    with np.errstate(invalid="ignore"):  # NaN of any kind
        fine = np.where(no_expert, np.nan, weights.astype(np.float32)) * rng.uniform(0.99, 1.01, ids.shape)
        return ids.astype(np.int32), fine.astype(dtype)


def weights(case: Case, rng: np.random.Generator) -> NDArray:
    """Routing weights [T, K]: positive ones of sum 1 a token, or signed ones."""
    if case.weights == "signed":
        return rng.uniform(0.1, 1, (case.tokens, case.top_k)) * rng.choice((-1, 1), (case.tokens, case.top_k))
    raw = rng.uniform(0.1, 1, (case.tokens, case.top_k))
    return raw / raw.sum(axis=1, keepdims=True)


def distinct(case: Case, rng: np.random.Generator) -> NDArray:
    """K different expert ids a token, all sets alike likely."""
    return np.argsort(rng.random((case.tokens, case.experts), np.float32), axis=1)[:, : case.top_k]


def _uniform(case: Case, rng: np.random.Generator) -> NDArray:
    return pack(distinct(case, rng), weights(case, rng))


def _one_expert(case: Case, rng: np.random.Generator) -> NDArray:
    """Every slot goes to one local expert."""
    ids = np.full((case.tokens, case.top_k), case.offset + case.local // 2)
    return pack(ids, weights(case, rng))


def _empty_experts(case: Case, rng: np.random.Generator) -> NDArray:
    """Every third expert is used, the others have no row."""
    ids = rng.integers(0, -(-case.experts // 3), (case.tokens, case.top_k)) * 3
    return pack(ids, weights(case, rng))


def _duplicates(case: Case, rng: np.random.Generator) -> NDArray:
    """A token names at most two experts, most of them several times."""
    two = rng.integers(0, case.experts, (case.tokens, 2))
    ids = np.take_along_axis(two, rng.integers(0, 2, (case.tokens, case.top_k)), axis=1)
    return pack(ids, weights(case, rng))


def _zipf(case: Case, rng: np.random.Generator) -> NDArray:
    """A few experts take most slots; ids inside a token differ."""
    popularity = np.log(1 / np.arange(1, case.experts + 1) ** 1.5)
    keys = popularity + rng.gumbel(size=(case.tokens, case.experts))
    return pack(np.argsort(-keys, axis=1)[:, : case.top_k], weights(case, rng))


def _invalid(case: Case, rng: np.random.Generator) -> NDArray:
    """Half of the ids are negative or beyond the last expert."""
    wrong = rng.choice((-1, -2, -32768, case.experts, case.experts + 1, 32767), (case.tokens, case.top_k))
    ids = np.where(rng.random(wrong.shape) < 0.5, wrong, distinct(case, rng))
    return pack(ids, weights(case, rng))


def _garbage(case: Case, rng: np.random.Generator) -> NDArray:
    """Half of the slots hold any 32 bits: NaN or Inf as weight where the id is no expert."""
    valid = _uniform(case, rng)
    noise = rng.integers(-(2**31), 2**31, valid.shape, np.int32)
    keep = (rng.random(valid.shape) < 0.5) | ((noise >> 16 >= 0) & (noise >> 16 < case.experts))
    noise = np.where(rng.random(valid.shape) < 0.3, noise | 0x7F80, noise)
    return np.where(keep, valid, noise)


def _padding(case: Case, rng: np.random.Generator) -> NDArray:
    """Trailing slots and whole trailing tokens are padding."""
    packed = _uniform(case, rng)
    packed[np.arange(case.top_k)[None] >= rng.integers(0, case.top_k + 1, (case.tokens, 1))] = PADDING
    packed[case.tokens - case.tokens // 4 :] = PADDING
    return packed


def _none_local(case: Case, rng: np.random.Generator) -> NDArray:
    """No id lies in the local window; without one there is no valid id at all."""
    outside = [id for id in range(case.experts) if not case.offset <= id < case.offset + case.local]
    return pack(rng.choice(outside or [-1], (case.tokens, case.top_k)), weights(case, rng))


def _mixed(case: Case, rng: np.random.Generator) -> NDArray:
    """A part of each of the others, token by token."""
    parts = [_uniform, _duplicates, _zipf, _invalid, _garbage, _padding, _none_local]
    drawn = np.stack([part(case, rng) for part in parts])
    return drawn[rng.integers(0, len(parts), case.tokens), np.arange(case.tokens)]


ROUTINGS: dict[str, Callable[[Case, np.random.Generator], NDArray]] = {
    "uniform": _uniform,
    "one_expert": _one_expert,
    "empty_experts": _empty_experts,
    "duplicates": _duplicates,
    "zipf": _zipf,
    "invalid": _invalid,
    "garbage": _garbage,
    "padding": _padding,
    "none_local": _none_local,
    "mixed": _mixed,
}
