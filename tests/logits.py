"""Routing from logits: the cases of its tests, and how results are compared with the reference."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jax_moe import reference_routing
from jax_moe.enums import RoutingMethodType as Method
from jax_moe.problem import Array
from jax_moe.routing_problem import METHODS, RoutingProblem

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
KINDS = ("normal", "equal", "few values", "non-finite", "bits", "extreme")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `kind` says which logits. A bias is given where the method reads one, unless bias_dtype is None."""

    method: Method
    num_tokens: int = 5
    num_experts: int = 64
    top_k: int = 4
    n_group: int | None = None
    topk_group: int | None = None
    logits_dtype: str = "float32"
    bias_dtype: str | None = "float32"
    routed_scaling_factor: float | None = None
    norm_topk_prob: bool = True
    kind: str = "normal"

    @property
    def name(self) -> str:
        changed = [
            str(getattr(self, field.name)).replace(" ", "-")
            for field in dataclasses.fields(self)
            if field.name != "method" and getattr(self, field.name) != field.default
        ]
        return "_".join([self.method.name, *changed])

    def options(self) -> dict[str, object]:
        return {
            "top_k": self.top_k,
            "routing_method_type": self.method,
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "routed_scaling_factor": self.routed_scaling_factor,
            "norm_topk_prob": self.norm_topk_prob,
        }

    def problem(self) -> RoutingProblem:
        logits = Array((self.num_tokens, self.num_experts), self.logits_dtype)
        bias = Array((self.num_experts,), self.bias_dtype) if self.bias_dtype else None
        return RoutingProblem.create("route", logits, bias, **self.options())

    def arrays(self, seed: int = 0) -> tuple[NDArray, NDArray | None]:
        """Logits and bias."""
        random = np.random.default_rng([seed, self.num_experts, self.num_tokens, self.method, len(self.kind)])
        shape = (self.num_tokens, self.num_experts)
        logits = make_logits(random, self.kind, shape).astype(DTYPES[self.logits_dtype])
        if self.kind == "bits":
            bits = random.integers(0, 256, (*shape, logits.itemsize), np.uint8)
            logits = bits.view(logits.dtype).reshape(shape)
        bias = None
        if self.bias_dtype is not None:
            bias = make_logits(random, self.kind, (self.num_experts,)).astype(DTYPES[self.bias_dtype])
        return logits, bias

    def reference(self, logits: NDArray, bias: NDArray | None) -> tuple[NDArray, NDArray]:
        problem = self.problem()
        return reference_routing.route(
            logits,
            bias,
            top_k=problem.top_k,
            method=problem.method,
            n_group=problem.n_group,
            topk_group=problem.topk_group,
            routed_scaling_factor=problem.routed_scaling_factor,
            norm_topk_prob=problem.norm_topk_prob,
        )


def make_logits(random: np.random.Generator, kind: str, shape: tuple[int, ...]) -> NDArray:
    normal = random.standard_normal(shape, np.float32) * 2
    if kind == "equal":
        return np.zeros(shape, np.float32)
    if kind == "few values":
        return random.choice(np.array([-1, -0.0, 0, 0.5], np.float32), shape)
    if kind == "extreme":
        return random.choice(np.array([-3e38, -200, -90, -20, 20, 90, 3e38], np.float32), shape)
    if kind == "non-finite":
        odd = random.choice(np.array([np.nan, -np.nan, np.inf, -np.inf], np.float32), shape)
        return np.where(random.random(shape) < random.choice([0.1, 0.9]), odd, normal)
    return normal


def assert_routed(case: Case, given: tuple[NDArray, NDArray | None], got: tuple[NDArray, NDArray]) -> None:
    """ids are the reference's, or others of other logits whose keys are within 1e-6; weights are theirs within 1e-5."""
    logits, bias = given
    ids, weights = got
    expected, _ = case.reference(logits, bias)
    assert ids.dtype == np.int32 and weights.dtype == np.float32
    assert ids.shape == weights.shape == expected.shape
    assert ((ids >= 0) & (ids < case.num_experts)).all(), ids
    ordered = np.sort(ids, axis=1)
    assert (ordered[:, 1:] != ordered[:, :-1]).all(), "an expert was chosen twice"
    keys = reference_routing.keys_of(logits.astype(np.float32), bias, case.method)
    rows = rows_with_clear_groups(case, keys)
    found, wanted = (np.take_along_axis(keys, chosen, axis=1) for chosen in (ids, expected))
    with np.errstate(all="ignore"):
        near = np.abs(found - wanted) <= 1e-6 * np.maximum(np.abs(found), np.abs(wanted)) + 1e-37
    wrong = (ids != expected) & ~(near & others_given(logits, bias, ids, expected)) & rows[:, None]
    assert not wrong.any(), (np.argwhere(wrong)[:4], ids[wrong][:4], expected[wrong][:4])
    with np.errstate(all="ignore"):
        problem = case.problem()
        factor = np.float32(problem.routed_scaling_factor)
        right = reference_routing.weights_of(logits.astype(np.float32), ids, case.method, factor, case.norm_topk_prob)
    np.testing.assert_allclose(weights, right, rtol=1e-5, atol=1e-37)


def others_given(logits: NDArray, bias: NDArray | None, ids: NDArray, expected: NDArray) -> NDArray:
    """Where two experts have other logits or another bias, so that rounding may tell them apart: bool [T, K]."""
    differ = np.take_along_axis(logits, ids, axis=1) != np.take_along_axis(logits, expected, axis=1)
    return differ if bias is None else differ | (bias[ids] != bias[expected])


def rows_with_clear_groups(case: Case, keys: NDArray) -> NDArray:
    """Tokens whose kept and left groups differ by more than rounding: bool [T]."""
    problem = case.problem()
    if problem.n_group == 1:
        return np.ones(len(keys), bool)
    grouped = keys.reshape(len(keys), problem.n_group, -1)
    with np.errstate(all="ignore"):
        scores = np.sort(np.where(np.isnan(grouped), -np.inf, grouped), axis=2)[:, :, -2:].sum(axis=2)
        gaps = np.diff(np.sort(scores, axis=1), axis=1)
        near = gaps <= 1e-6 * np.abs(scores).max(axis=1, keepdims=True)
    return ~(near & (gaps != 0)).any(axis=1)


def one_of_each() -> list[Case]:
    """Every method over sizes, dtypes, groups and kinds of logits, each value somewhere."""
    sizes = ((1, 1), (3, 2), (32, 4), (33, 5), (64, 8), (128, 8), (256, 8), (257, 9), (384, 8), (512, 10))
    sizes += ((1000, 3), (1024, 32), (1025, 1), (2047, 7), (2048, 32))
    cases = []
    for method in METHODS:
        for i, (experts, top_k) in enumerate(sizes):
            cases.append(
                Case(
                    method,
                    num_tokens=(1, 5, 8)[i % 3],
                    num_experts=experts,
                    top_k=1 if method is Method.Llama4 else top_k,
                    logits_dtype=("float32", "bfloat16")[(i + method) % 2],
                    bias_dtype=("float32", "bfloat16", None)[(i + method) % 3],
                    routed_scaling_factor=(None, 2.5)[i % 2],
                    norm_topk_prob=i % 3 > 0,
                    kind=KINDS[(i + method) % len(KINDS)],
                )
            )
    return cases + grouped() + [Case(method, top_k=1, kind=kind) for method in METHODS for kind in KINDS]


def grouped() -> list[Case]:
    sizes = ((256, 8, 8, 4), (256, 8, 8, 8), (64, 6, 32, 3), (48, 4, 4, 2), (66, 3, 33, 2), (30, 10, 2, 1))
    sizes += ((160, 6, 8, 3), (510, 8, 255, 7), (600, 4, 3, 2), (1024, 32, 16, 2), (2048, 8, 1024, 6), (2046, 5, 2, 1))
    return [
        Case(
            Method.DeepSeekV3,
            num_experts=experts,
            top_k=top_k,
            n_group=n_group,
            topk_group=topk_group,
            logits_dtype=("float32", "bfloat16")[i % 2],
            bias_dtype=("bfloat16", None, "float32")[i % 3],
            routed_scaling_factor=2.5,
            kind=kind,
        )
        for i, (experts, top_k, n_group, topk_group) in enumerate(sizes)
        for kind in KINDS
    ]
