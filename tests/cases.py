"""The problems that tests, benchmarks and the sanitizer program run: named once here, as sizes and patterns.

`arrays(case)` makes its numpy inputs by the names of problem.INPUTS, `problem(case, arrays)` the checked Problem.
Cases of size "small" run everywhere, "large" ones (real layer shapes, offsets past 2^31) on a GPU only.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import routings
from extremes import EXTREMES
from numpy.typing import NDArray

from jax_moe import reference
from jax_moe.problem import FLOAT8, Array, Options, Problem
from jax_moe.shapes import SHAPES

Arrays = dict[str, NDArray | None]


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. `window` is (local_expert_offset, local_num_experts), None for all experts."""

    name: str
    tokens: int = 7
    hidden: int = 256
    inter: int = 256
    experts: int = 8
    top_k: int = 2
    window: tuple[int, int] | None = None
    routing: str = "uniform"  # routings.ROUTINGS
    weights: str = "positive"  # or "signed": the routing weights
    x_dtype: str = FLOAT8  # or "bfloat16"
    scale_order: str = "block_major"  # or "token_major", "padded"
    do_finalize: bool = True
    extreme: str = "none"  # extremes.EXTREMES
    size: str = "small"
    seed: int = 0

    @property
    def offset(self) -> int:
        return self.window[0] if self.window else 0

    @property
    def local(self) -> int:
        return self.window[1] if self.window else self.experts


def _layer(layer: str, tokens: int, **changes: Any) -> Case:
    shape = SHAPES[layer]
    case = Case(
        f"{layer}_t{tokens}",
        tokens,
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_experts,
        shape.top_k,
        (shape.local_expert_offset, shape.local_num_experts),
        size="large",
    )
    return dataclasses.replace(case, **changes)


def _small_cases() -> list[Case]:
    cases = [Case(f"t{tokens}", tokens, inter=128) for tokens in (0, 1, 2, 3, 7, 53, 128, 129, 257)]
    cases += [Case(f"k{top_k}", 7, experts=32, top_k=top_k, weights="signed") for top_k in (1, 8, 22, 32)]
    cases += [Case(f"e{experts}", 53, 128, 128, experts, min(experts, 8)) for experts in (1, 8, 128, 300, 512, 1200)]
    shapes = [(128, 128), (128, 256), (256, 128), (384, 128), (128, 384), (384, 384), (640, 256), (256, 640)]
    shapes += [(896, 384), (384, 896), (1024, 512), (640, 896)]
    cases += [Case(f"h{hidden}_i{inter}", 33, hidden, inter, 4) for hidden, inter in shapes]
    for name in routings.ROUTINGS:
        cases.append(Case(f"routing_{name}", 53, 256, 128, 16, 4, routing=name, weights="signed"))
        cases.append(Case(f"routing_{name}_window", 53, 256, 128, 16, 4, (5, 7), routing=name))
    cases += [
        Case(f"window_{offset}_{count}", 19, 128, 128, 4, 3, (offset, count), seed=offset)
        for count in range(1, 5)
        for offset in range(5 - count)
    ]
    cases += [Case(f"bf16_t{tokens}", tokens, 384, 256, x_dtype="bfloat16", seed=1) for tokens in (0, 1, 7, 53, 129)]
    cases += [
        Case(f"scale_{order}_t{tokens}", tokens, 640, 128, scale_order=order)
        for order in ("token_major", "padded")
        for tokens in (1, 7, 129)
    ]
    cases += [
        Case("unfinalized_t0", 0, do_finalize=False),
        Case("unfinalized_t1", 1, do_finalize=False),
        Case("unfinalized", 53, 384, 256, 16, 4, do_finalize=False),
        Case("unfinalized_window", 53, 384, 256, 16, 4, (3, 9), "mixed", do_finalize=False),
        Case("unfinalized_nothing_local", 7, window=(0, 3), routing="none_local", do_finalize=False),
        Case("unfinalized_bf16", 129, 256, 128, 8, 3, x_dtype="bfloat16", do_finalize=False),
        Case("one_expert_t257", 257, 128, 128, 8, 1, routing="one_expert"),
        Case("one_expert_many_blocks", 2100, 128, 128, 4, 1, routing="one_expert"),
        Case("blocks_t700", 700, 128, 128, 3, 3, weights="signed"),
    ]
    for name in EXTREMES:
        x_dtype = "bfloat16" if name == "inf_x" else FLOAT8  # float8 has no Inf
        cases.append(Case(f"extreme_{name}", 33, 256, 256, 8, 3, x_dtype=x_dtype, extreme=name))
    cases += [
        Case("extreme_nan_x_bf16", 33, 256, 256, 8, 3, x_dtype="bfloat16", extreme="nan_x"),
        Case("extreme_zero_x_bf16", 33, 256, 256, 8, 3, x_dtype="bfloat16", extreme="zero_x"),
        Case("extreme_nan_x_unfinalized", 33, 256, 256, 8, 3, extreme="nan_x", do_finalize=False),
    ]
    return cases


def _large_cases() -> list[Case]:
    bf16 = {"x_dtype": "bfloat16"}
    cases = [_layer("dsv3_ep8", tokens) for tokens in (1, 16, 64, 256, 1024)]
    cases.append(_layer("dsv3_ep8", 1024, name="dsv3_ep8_bf16_unfinalized", do_finalize=False, **bf16))
    cases += [_layer("dsv3_e32", 4096), _layer("dsv3_e32", 300, name="dsv3_e32_zipf", routing="zipf")]
    cases += [_layer("dsv3_e256", tokens) for tokens in (8, 1024)]
    cases += [_layer("qwen3_30b", tokens) for tokens in (1, 8, 200, 5000)]
    cases.append(_layer("qwen3_30b", 4096, name="qwen3_30b_one_expert", routing="one_expert"))
    cases += [_layer("qwen3_235b", 32, name="qwen3_235b_bf16", **bf16), _layer("qwen3_235b", 2048)]
    cases += [
        Case("past_2_31_hidden", 40000, 7168, 256, 16, 8, size="large"),
        Case("past_2_31_hidden_bf16_unfinalized", 40000, 7168, 256, 16, 8, do_finalize=False, size="large", **bf16),
        Case("past_2_31_inter", 140000, 256, 2048, 16, 8, size="large"),
        Case("many_tokens_one_local", 200000, 256, 256, 64, 8, (17, 1), size="large"),
        Case("many_experts", 4096, 256, 256, 4000, 32, routing="mixed", size="large"),
    ]
    return cases


CASES: dict[str, Case] = {case.name: case for case in _small_cases() + _large_cases()}
SMALL = tuple(case for case in CASES.values() if case.size == "small")
LARGE = tuple(case for case in CASES.values() if case.size == "large")


def arrays(case: Case) -> Arrays:
    """The inputs by name; hidden_states_scale is [H/128, T] with the strides that scale_order asks for."""
    rng = np.random.default_rng(case.seed)
    x, scale = _activations(rng, case.tokens, case.hidden)
    result: Arrays = dict(_weights(case.local, case.hidden, case.inter, case.seed))
    result["topk_ids"] = routings.topk_ids(case, rng)
    if case.x_dtype == "bfloat16":
        dequantized = x.astype(np.float32) * np.repeat(scale, reference.BLOCK, axis=1)
        result |= {"hidden_states": dequantized.astype(ml_dtypes.bfloat16), "hidden_states_scale": None}
    else:
        result |= {"hidden_states": x, "hidden_states_scale": _ordered(scale, case.scale_order)}
    if case.extreme != "none":
        EXTREMES[case.extreme](result)
    return result


def problem(case: Case, given: Mapping[str, NDArray | None], offset_on_device: bool = False) -> Problem:
    """The Problem of a case, through the checks that every front end uses."""
    scale = given["hidden_states_scale"]
    return Problem.create(
        "test",
        {name: describe(array) for name, array in given.items()},
        Options.parse("test", do_finalize=case.do_finalize),
        num_experts=case.experts,
        local_expert_offset=None if offset_on_device else case.offset,
        scale_strides=None if scale is None else (scale.strides[0] // 4, scale.strides[1] // 4),
    )


def describe(array: NDArray | None) -> Array | None:
    return None if array is None else Array(array.shape, array.dtype.name)


def expected(case: Case, given: Arrays, tokens: NDArray | None = None, requantize: bool = True) -> reference.Result:
    """The reference's results, of all tokens or of the chosen ones."""
    chosen = slice(None) if tokens is None else tokens
    scale = given["hidden_states_scale"]
    inputs = given | {
        "topk_ids": given["topk_ids"][chosen],
        "hidden_states": given["hidden_states"][chosen],
        "hidden_states_scale": None if scale is None else scale[:, chosen],
    }
    return reference.fp8_block_scale_routed_moe(
        **inputs, num_experts=case.experts, local_expert_offset=case.offset, requantize=requantize
    )


@functools.cache
def _normal_codes() -> NDArray:
    """65536 float8 codes distributed as a normal of standard deviation 448 / 4.5."""
    normal = statistics.NormalDist(0, 448 / 4.5)
    values = [normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)]
    return np.array(values, np.float32).astype(ml_dtypes.float8_e4m3fn)


@functools.lru_cache(maxsize=1)
def _weights(experts: int, hidden: int, inter: int, seed: int) -> Mapping[str, NDArray]:
    """Normal weights with another magnitude in each 128x128 block. More than 16 experts repeat codes, never scales."""
    rng = np.random.default_rng([seed, 1])
    result = {}
    for name, rows, columns in (("gemm1_weights", 2 * inter, hidden), ("gemm2_weights", hidden, inter)):
        codes = _normal_codes()[rng.integers(0, 65536, (min(experts, 16), rows, columns), np.uint16)]
        blocks = (experts, rows // reference.BLOCK, columns // reference.BLOCK)
        magnitude = np.exp2(rng.uniform(-2, 2, blocks)) / np.sqrt(columns)
        result[name] = codes[np.arange(experts) % 16] if experts > 16 else codes
        result[f"{name}_scale"] = (magnitude * 4.5 / 448).astype(np.float32)
    for array in result.values():
        array.flags.writeable = False  # shared between cases
    return result


def _activations(rng: np.random.Generator, tokens: int, hidden: int) -> tuple[NDArray, NDArray]:
    """1x128-quantised normal rows; past 1021 tokens codes repeat, with other scales."""
    rows = min(tokens, 1021)
    x = rng.standard_normal((rows, hidden), np.float32)
    x *= np.repeat(np.exp2(rng.uniform(-1, 1, (rows, hidden // reference.BLOCK))), reference.BLOCK, axis=1)
    codes, scale = reference.quantize_1x128(x)
    row = np.arange(tokens) % max(rows, 1)
    return codes[row], scale[row] * rng.uniform(0.7, 1.4, (tokens, 1)).astype(np.float32)


def _ordered(scale: NDArray, order: str) -> NDArray:
    """[T, H/128] as an [H/128, T] array of the wanted memory order; gaps hold NaN."""
    if order == "token_major":
        return np.ascontiguousarray(scale).T
    if order == "padded":
        memory = np.full((scale.shape[1], 2 * len(scale) + 3), np.nan, np.float32)
        memory[:, : 2 * len(scale) : 2] = scale.T
        return memory[:, : 2 * len(scale) : 2]
    return np.ascontiguousarray(scale.T)
