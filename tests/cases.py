"""The problems that tests, benchmarks and the sanitizer program run: named once here, as sizes and patterns.

`arrays(case)` makes its numpy inputs by the names of problem.INPUTS, `problem(case, arrays)` the checked Problem.
Cases of size "small" run everywhere, "large" ones (real layer shapes, offsets past 2^31) on a GPU only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import inputs
import numpy as np
import pairwise
import routings
from extremes import BEYOND_BF16, EXTREMES, MX_EXTREMES
from numpy.typing import NDArray

from jax_moe import reference
from jax_moe.enums import ActivationType, Fp8QuantizationType, WeightLayout
from jax_moe.problem import E8M0, FLOAT8, Array, Options, Problem
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
    scale_order: str = "block_major"  # or "token_major", "padded"; of MxFp8 "padded" is token-major too
    do_finalize: bool = True
    topk_weights: str = "packed"  # or "bfloat16", "float32": apart from the ids
    activation: ActivationType = ActivationType.Swiglu
    per_expert: tuple[str, ...] = ()  # which of problem.PER_EXPERT are given
    weight_layout: WeightLayout = WeightLayout.MajorK
    shuffled: bool = False
    lora: bool = False
    extreme: str = "none"  # extremes.EXTREMES
    size: str = "small"
    seed: int = 0
    quantization: Fp8QuantizationType = Fp8QuantizationType.DeepSeekFp8
    scale_rows: int = 1  # of MxFp8: rows that share a weight scale, or 32
    scale_dtype: str = "uint8"  # of MxFp8, or E8M0

    @property
    def offset(self) -> int:
        return self.window[0] if self.window else 0

    @property
    def local(self) -> int:
        return self.window[1] if self.window else self.experts

    @property
    def gated(self) -> bool:
        return self.activation in (ActivationType.Swiglu, ActivationType.Geglu)

    @property
    def gemm1_rows(self) -> int:
        return 2 * self.inter if self.gated else self.inter

    @property
    def mx(self) -> bool:
        return self.quantization is Fp8QuantizationType.MxFp8

    @property
    def scale_is_token_major(self) -> bool:
        """Of the array's shape: that of DeepSeekFp8 is [H/128, T] in any order of memory."""
        return self.mx and self.scale_order != "block_major"

    @property
    def options(self) -> dict[str, Any]:
        """The options that the inputs do not show, by the names of the documented signature."""
        return {
            "do_finalize": self.do_finalize,
            "activation_type": self.activation,
            "weight_layout": self.weight_layout,
            "use_shuffled_weight": self.shuffled,
            "fp8_quantization_type": self.quantization,
        }


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
    # Long rows, of which the grouped kernels take two K blocks together: an even and an odd number of them.
    long = ((33, 3072, 384, "uniform"), (100, 3200, 128, "zipf"), (129, 3200, 384, "one_expert"))
    cases += [Case(f"h{hidden}_t{n}", n, hidden, inter, 4, routing=routing) for n, hidden, inter, routing in long]
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
        *(Case(f"unfinalized_t{tokens}", tokens, do_finalize=False) for tokens in (0, 1)),
        Case("unfinalized", 53, 384, 256, 16, 4, do_finalize=False),
        Case("unfinalized_window", 53, 384, 256, 16, 4, (3, 9), "mixed", do_finalize=False),
        Case("unfinalized_nothing_local", 7, window=(0, 3), routing="none_local", do_finalize=False),
        Case("unfinalized_bf16", 129, 256, 128, 8, 3, x_dtype="bfloat16", do_finalize=False),
        Case("one_expert_t257", 257, 640, 512, 4, 1, routing="one_expert"),  # of whole rings
        Case("one_expert_many_blocks", 2100, 128, 128, 4, 1, routing="one_expert"),
        Case("blocks_t700", 700, 128, 128, 3, 3, weights="signed"),
    ]
    # Every width of a tile of the grouped kernels, and both sides of each.
    rows = (16, 17, 32, 33, 48, 49, 64, 65, 128, 129, 144, 145, 160, 272, 273, 288, 289, 433, 576, 577)
    cases += [Case(f"rows_{n}", n, 256, 256, 2, 1, routing="one_expert", do_finalize=n % 2 == 0) for n in rows]
    cases.append(Case("zipf_t200", 200, 256, 384, 16, 2, routing="zipf"))  # experts of many rows and of few
    bf16 = {"x_dtype": "bfloat16", "routing": "one_expert"}
    return cases + [Case(f"bf16_h1536_{n}", n, 1536, 128, 2, 1, **bf16) for n in (33, 140, 257)]


ALPHA, BETA, CLAMP = "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"
BLOCKED: dict[str, Any] = {"weight_layout": WeightLayout.BlockMajorK}
OPTIONS: dict[str, dict[str, Any]] = {
    "geglu": {"activation": ActivationType.Geglu},
    "relu2": {"activation": ActivationType.Relu2},
    "identity": {"activation": ActivationType.Identity},
    "alpha": {"per_expert": (ALPHA,)},
    "beta": {"per_expert": (BETA,)},
    "clamp": {"per_expert": (CLAMP,)},
    "alpha_beta": {"per_expert": (ALPHA, BETA)},
    "alpha_clamp": {"per_expert": (ALPHA, CLAMP)},
    "beta_clamp": {"per_expert": (BETA, CLAMP)},
    "alpha_beta_clamp": {"per_expert": (ALPHA, BETA, CLAMP)},
    "shuffled": {"shuffled": True},
    "blocked": BLOCKED,
    "blocked_shuffled": BLOCKED | {"shuffled": True},
    "apart_bf16": {"topk_weights": "bfloat16"},
    "apart_f32": {"topk_weights": "float32"},
    "lora": {"lora": True},
}

# What is combined in pairs: one choice of each factor makes a case.
FACTORS: tuple[dict[str, dict[str, Any]], ...] = (
    {"": {}} | {name: OPTIONS[name] for name in "alpha beta clamp alpha_beta_clamp geglu relu2 identity".split()},
    {"": {}} | {name: OPTIONS[name] for name in ("shuffled", "blocked", "blocked_shuffled")},
    {"": {}, "token_major": {"scale_order": "token_major"}, "padded": {"scale_order": "padded"}}
    | {"bf16": {"x_dtype": "bfloat16"}},
    {"": {}} | {name: OPTIONS[name] for name in ("apart_bf16", "apart_f32")},
    {"": {}, "lora": {"lora": True}},
    {"": {}, "unfinalized": {"do_finalize": False}},
    {"": {}, "window": {"window": (3, 9)}},
    {name: {"routing": name} for name in ("uniform", "mixed", "one_expert")},
    {f"t{tokens}": {"tokens": tokens} for tokens in (1, 19, 130)},
    {f"h{h}_i{i}": {"hidden": h, "inter": i} for h, i in ((128, 128), (384, 256), (256, 384))},
)


def _option_cases() -> list[Case]:
    """Each option alone, at some sizes, and all of them in pairs."""
    cases = [Case(name, 53, 256, 256, 8, 3, **option) for name, option in OPTIONS.items()]
    cases += [Case(f"{name}_h3072", 33, 3072, 256, 4, **OPTIONS[name]) for name in ("relu2", "lora", "shuffled")]
    for name in ("relu2", "lora", "shuffled"):  # both sides of the rows that a tile takes beside 128
        common: dict[str, Any] = {"routing": "one_expert"} | OPTIONS[name]
        cases += [Case(f"{name}_rows_{n}", n, 256, 256, 2, 1, **common) for n in (143, 145)]
    for name in ("relu2", "lora", "blocked_shuffled", "alpha_beta_clamp", "apart_f32"):
        cases += [Case(f"{name}_t{tokens}", tokens, 384, 128, **OPTIONS[name]) for tokens in (0, 1, 257)]
        cases.append(Case(f"{name}_e300", 53, 128, 128, 300, 8, (31, 200), "mixed", **OPTIONS[name]))
    cases += [
        Case(f"apart_{routing}", 53, 256, 128, 16, 4, (5, 7), routing, topk_weights="float32", weights="signed")
        for routing in ("invalid", "garbage", "padding", "none_local", "duplicates")
    ]
    cases += [
        Case("lora_unfinalized", 53, 256, 256, 16, 4, (3, 9), "mixed", lora=True, do_finalize=False),
        Case("lora_unfinalized_t0", 0, lora=True, do_finalize=False),
        Case("apart_unfinalized_t0", 0, topk_weights="float32", do_finalize=False),
        Case("lora_identity_one_expert", 300, 128, 128, 4, 1, routing="one_expert", lora=True, **OPTIONS["identity"]),
    ]
    for number, row in enumerate(pairwise.rows([len(factor) for factor in FACTORS])):
        changes, name = _chosen(FACTORS, row)
        common = {"experts": 16, "top_k": 4, "weights": "signed", "seed": number % 3}
        cases.append(Case(f"pair_{name}", **common | changes))
    return cases


def _chosen(factors: tuple[dict[str, dict[str, Any]], ...], row: tuple[int, ...]) -> tuple[dict[str, Any], str]:
    """What a row of choices changes, and its name."""
    chosen = [list(factor.items())[choice] for factor, choice in zip(factors, row, strict=True)]
    changes = {key: value for _, change in chosen for key, value in change.items()}
    return changes, "_".join(label for label, _ in chosen if label)


def _extreme_cases() -> list[Case]:
    cases = []
    for name in EXTREMES:
        changes: dict[str, Any] = {"x_dtype": "bfloat16"} if name == "inf_x" else {}  # float8 has no Inf
        option = max((option for option in OPTIONS if name.endswith(f"_{option}")), key=len, default="")
        cases.append(Case(f"extreme_{name}", 33, 256, 256, 8, 3, extreme=name, **changes | OPTIONS.get(option, {})))
    for option in ("geglu", "relu2", "identity", "alpha_beta_clamp", "apart_f32", "lora"):
        for name in ("nan_x_scale", "inf_x_scale", "nan_gemm1_code", "large", "tiny"):
            cases.append(Case(f"extreme_{name}_{option}", 33, 256, 256, 8, 3, extreme=name, **OPTIONS[option]))
    cases += [
        *(Case(f"extreme_{x}_bf16", 33, 256, 256, 8, 3, x_dtype="bfloat16", extreme=x) for x in ("nan_x", "zero_x")),
        Case("extreme_nan_x_unfinalized", 33, 256, 256, 8, 3, extreme="nan_x", do_finalize=False),
    ]
    return cases


MX: dict[str, Any] = {"quantization": Fp8QuantizationType.MxFp8, "scale_order": "token_major"}
GRID: dict[str, Any] = {"scale_rows": 32}
MX_OPTIONS: dict[str, dict[str, Any]] = {
    "mx": MX,
    "mx_grid": MX | GRID,
    "mx_shuffled_grid": MX | GRID | {"shuffled": True},
    "mx_block_major": MX | {"scale_order": "block_major"},
    "mx_padded": MX | {"scale_order": "padded"},
    "mx_bf16": MX | {"x_dtype": "bfloat16"},
    "mx_e8m0": MX | {"scale_dtype": E8M0},
} | {f"mx_{name}": MX | option for name, option in OPTIONS.items() if "weight_layout" not in option}

MX_FACTORS: tuple[dict[str, dict[str, Any]], ...] = (
    FACTORS[0],
    {"": {}, "grid": GRID, "shuffled": {"shuffled": True}, "shuffled_grid": GRID | {"shuffled": True}},
    {"": {}, "block_major": {"scale_order": "block_major"}, "padded": {"scale_order": "padded"}}
    | {"bf16": {"x_dtype": "bfloat16"}},
    {"": {}, "e8m0": {"scale_dtype": E8M0}},
    *FACTORS[3:],
)


def _mx_cases() -> list[Case]:
    """MxFp8: sizes, each option alone, all of them in pairs, and what is not ordinary."""
    cases = [Case(f"mx_t{tokens}", tokens, inter=128, **MX) for tokens in (0, 1, 8, 129, 257)]  # H/32 is 8
    shapes = ((128, 128), (384, 128), (128, 384), (896, 384), (640, 896), (512, 512), (512, 384), (1024, 768))
    cases += [Case(f"mx_h{h}_i{i}", 33, h, i, 4, **MX) for h, i in shapes]
    cases += [Case(name, 53, 256, 256, 8, 3, **option) for name, option in MX_OPTIONS.items()]
    cases += [Case(f"{name}_h3200", 33, 3200, 384, 4, **MX_OPTIONS[name]) for name in ("mx", "mx_bf16", "mx_shuffled")]
    rows = (17, 33, 49, 65, 97, 128, 129, 144, 145, 272, 273, 288, 289, 433, 576, 577)
    cases += [Case(f"mx_rows_{n}", n, 256, 256, 2, 1, routing="one_expert", **MX) for n in rows]
    for name in ("mx_relu2", "mx_lora", "mx_shuffled", "mx_shuffled_grid", "mx_bf16"):
        cases += [Case(f"{name}_t{tokens}", tokens, 384, 128, **MX_OPTIONS[name]) for tokens in (0, 1, 257)]
        alone = MX_OPTIONS[name] | {"routing": "one_expert"}
        cases += [Case(f"{name}_rows_{n}", n, 256, 256, 2, 1, **alone) for n in (143, 145)]
        cases.append(Case(f"{name}_e300", 53, 128, 128, 300, 8, (31, 200), "mixed", **MX_OPTIONS[name]))
    cases += [
        Case("mx_lora_unfinalized", 53, 256, 256, 16, 4, (3, 9), "mixed", lora=True, do_finalize=False, **MX),
        Case("mx_lora_unfinalized_t0", 0, lora=True, do_finalize=False, **MX),
        Case("mx_relu2_shuffled", 53, 256, 256, 8, 3, **MX_OPTIONS["mx_relu2"] | {"shuffled": True}),
        Case("mx_unfinalized_nothing_local", 7, window=(0, 3), routing="none_local", do_finalize=False, **MX),
        Case("mx_garbage_window", 53, 256, 128, 16, 4, (5, 7), routing="garbage", **MX),
        Case("mx_one_expert_many_blocks", 2100, 128, 128, 4, 1, routing="one_expert", **MX),
    ]
    for number, row in enumerate(pairwise.rows([len(factor) for factor in MX_FACTORS])):
        changes, name = _chosen(MX_FACTORS, row)
        common: dict[str, Any] = {"experts": 16, "top_k": 4, "weights": "signed", "seed": number % 3}
        cases.append(Case(f"mx_pair_{name}", **MX | common | changes))
    for name in MX_EXTREMES:
        option = MX_OPTIONS["mx_bf16" if name.endswith("_bf16") else "mx_lora"] | {"extreme": name}
        # Few rows an expert, many, and in most experts a few more than a whole tile.
        sizes = {"": 33} if name in BEYOND_BF16 else {"": 33, "_many": 77, "_tails": 363}
        cases += [Case(f"extreme_{name}{many}", tokens, 256, 256, 8, 3, **option) for many, tokens in sizes.items()]
    return cases


def _large_cases() -> list[Case]:
    bf16 = {"x_dtype": "bfloat16"}
    cases = [_layer("dsv3_ep8", tokens) for tokens in (1, 16, 64, 256, 1024)]
    cases.append(_layer("dsv3_ep8", 1024, name="dsv3_ep8_bf16_unfinalized", do_finalize=False, **bf16))
    cases += [_layer("dsv3_e32", 4096), _layer("dsv3_e32", 300, name="dsv3_e32_zipf", routing="zipf")]
    cases += [_layer("dsv3_e256", tokens) for tokens in (8, 1024)]
    cases.append(_layer("qwen3_30b", 4096, name="qwen3_30b_one_expert", routing="one_expert"))
    cases += [
        *(_layer("qwen3_30b", tokens) for tokens in (1, 8, 200, 5000)),
        _layer("qwen3_235b", 32, name="qwen3_235b_bf16", **bf16),
        _layer("qwen3_235b", 2048),
        Case("past_2_31_hidden", 40000, 7168, 256, 16, 8, size="large"),
        Case("past_2_31_hidden_bf16_unfinalized", 40000, 7168, 256, 16, 8, do_finalize=False, size="large", **bf16),
        Case("past_2_31_inter", 140000, 256, 2048, 16, 8, size="large"),
        Case("many_tokens_one_local", 200000, 256, 256, 64, 8, (17, 1), size="large"),
        Case("more_experts_than_48_kib", 64, 128, 128, 12200, 8, size="large"),  # of counters in shared memory
        Case("many_experts", 4096, 256, 256, 4000, 32, routing="mixed", size="large"),
        _layer("dsv3_ep8", 256, name="dsv3_ep8_blocked_shuffled", **OPTIONS["blocked_shuffled"]),
        _layer("dsv3_ep8", 16, name="dsv3_ep8_lora_apart", lora=True, do_finalize=False, topk_weights="float32"),
        _layer("qwen3_30b", 2048, name="qwen3_30b_lora", lora=True),
        _layer("qwen3_30b", 200, name="qwen3_30b_relu2_blocked", **BLOCKED, **OPTIONS["relu2"]),
        _layer("qwen3_30b", 1024, name="qwen3_30b_clamped", **OPTIONS["alpha_beta_clamp"]),
        _layer("qwen3_30b", 4096, name="qwen3_30b_mx", **MX),
        _layer("qwen3_30b", 2048, name="qwen3_30b_mx_shuffled_bf16", shuffled=True, **(MX | bf16)),
        _layer("qwen3_30b", 300, name="qwen3_30b_mx_grid", **MX, **GRID),
        Case("past_2_31_mx", 40000, 7168, 256, 16, 8, size="large", **MX | {"scale_order": "padded"}),
        Case("slabs", 9000, 1024, 512, 16, 4, size="large"),  # y2 in two of them
        Case("slabs_h384_bf16", 9000, 384, 512, 8, 3, (2, 5), size="large", **bf16),
        Case("slabs_one_block", 9000, 128, 512, 8, 2, size="large", **BLOCKED),
        Case("slabs_mx", 9000, 640, 512, 8, 2, size="large", shuffled=True, **MX),
        Case("past_2_31_lora", 40000, 256, 3584, 16, 8, lora=True, size="large"),
    ]
    return cases


ALL = (*_small_cases(), *_option_cases(), *_extreme_cases(), *_mx_cases(), *_large_cases())
CASES: dict[str, Case] = {case.name: case for case in ALL}
SMALL = tuple(case for case in CASES.values() if case.size == "small")
LARGE = tuple(case for case in CASES.values() if case.size == "large")


def arrays(case: Case) -> Arrays:
    """The inputs by name, those of options only where the case has them.

    hidden_states_scale is [H/128, T] with the strides that scale_order asks for, of MxFp8 [T, H/32] or [H/32, T].
    """
    rng = np.random.default_rng(case.seed)
    x, scale = inputs.activations(rng, case)
    result: Arrays = inputs.in_layout(inputs.weights_of(case), case)
    packed = routings.topk_ids(case, rng)
    if case.x_dtype == "bfloat16":
        result |= {"hidden_states": inputs.dequantized(x, scale), "hidden_states_scale": None}
    else:
        result |= {"hidden_states": x, "hidden_states_scale": inputs.ordered_scale(scale, case)}
    rng = np.random.default_rng([case.seed, 2])
    ids, weights = routings.apart(case, packed, rng)
    result |= {"topk_ids": packed} if case.topk_weights == "packed" else {"topk_ids": ids, "topk_weights": weights}
    result |= inputs.per_expert(case, rng)
    if case.lora:
        result["gemm1_lora_delta"] = inputs.lora_delta(case, ids, rng)
    if case.extreme != "none":
        (EXTREMES | MX_EXTREMES)[case.extreme](result)
    return result


def problem(case: Case, given: Mapping[str, NDArray | None], offset_on_device: bool = False) -> Problem:
    """The Problem of a case, through the checks that every front end uses."""
    scale = given["hidden_states_scale"]
    return Problem.create(
        "test",
        {name: describe(array) for name, array in given.items()},
        Options.parse("test", **case.options),
        num_experts=case.experts,
        local_expert_offset=None if offset_on_device else case.offset,
        scale_is_token_major=case.scale_is_token_major,
        scale_strides=None if scale is None else tuple(stride // scale.itemsize for stride in scale.strides),
    )


def describe(array: NDArray | None) -> Array | None:
    return None if array is None else Array(array.shape, array.dtype.name)


def expected(case: Case, given: Arrays, tokens: NDArray | None = None, requantize: bool = True) -> reference.Result:
    """The reference's results, of all tokens or of the chosen ones."""
    options = {name: value for name, value in case.options.items() if name != "do_finalize"}
    given = given if tokens is None else of_tokens(given, tokens)
    scale = given["hidden_states_scale"]
    if scale is not None and case.mx and not case.scale_is_token_major:
        given = given | {"hidden_states_scale": scale.T}
    return reference.fp8_block_scale_routed_moe(
        **given, **options, num_experts=case.experts, local_expert_offset=case.offset, requantize=requantize
    )


def of_tokens(given: Arrays, tokens: Any) -> Arrays:
    """The inputs of a call of those tokens alone (indices or a slice)."""
    scale, x = given["hidden_states_scale"], given["hidden_states"]
    changed = {"hidden_states_scale": scale}
    if scale is not None and x is not None:
        of_mx = scale.dtype != np.float32
        changed["hidden_states_scale"] = scale[tokens] if of_mx and len(scale) == len(x) else scale[:, tokens]
    for name in ("topk_ids", "topk_weights", "hidden_states", "gemm1_lora_delta"):
        array = given.get(name)
        if array is not None:
            changed[name] = array[tokens]
    return given | changed
