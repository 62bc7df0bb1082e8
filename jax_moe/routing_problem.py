"""What a call that routes from logits is: sizes, options, buffers, and the validation of its arguments.

`RoutingProblem` mirrors ffi/routing.h field by field (native.py compares the two when the extension is loaded). Imports
neither jax nor torch. Errors follow `<function>: <argument> must be <expected>, got <value>`.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

from .enums import DataType, RoutingMethodType, parse_enum
from .options import Options, check_scaling_factor, invalid, is_int
from .problem import DTYPES, MAX_TOP_K, ROW_LIMIT, Array

MAX_ROUTED_EXPERTS = 2048
BUFFERS = ("routing_logits", "routing_bias", "topk_ids", "topk_weights")
METHODS = tuple(method for method in RoutingMethodType if method is not RoutingMethodType.Unspecified)
FLOATS = ("float32", "bfloat16")
READ_BIAS = (RoutingMethodType.DeepSeekV3, RoutingMethodType.MiniMax2)


@dataclasses.dataclass(frozen=True)
class RoutingProblem:
    """One call: the fields of ffi/routing.h, in its order. num_tokens may be a symbolic dimension of jax.export."""

    num_tokens: Any
    num_experts: int
    top_k: int
    method: RoutingMethodType
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    logits_dtype: DataType
    bias_dtype: DataType  # NONE also where the method does not read the bias
    enable_pdl: bool
    routed_scaling_factor: float

    @staticmethod
    def create(
        function: str,
        logits: Array | None,
        bias: Array | None,
        *,
        top_k: Any,
        routing_method_type: object,
        n_group: Any = None,
        topk_group: Any = None,
        routed_scaling_factor: Any = None,
        norm_topk_prob: Any = True,
        enable_pdl: Any = None,
    ) -> RoutingProblem:
        """The problem that the arrays and options state, checked completely."""
        if logits is None or len(logits.shape) != 2 or logits.dtype not in FLOATS:
            raise invalid(function, "routing_logits", "float32 or bfloat16 [num_tokens, num_experts]", logits)
        tokens, experts = logits.shape
        if not 1 <= experts <= MAX_ROUTED_EXPERTS:
            raise invalid(function, "routing_logits", f"of 1 to {MAX_ROUTED_EXPERTS} experts", logits)
        if bias is not None and (bias.dtype not in FLOATS or tuple(bias.shape) != (experts,)):
            expected = f"None, bfloat16 or float32 [num_experts] = [{experts}]"
            raise invalid(function, "routing_bias", expected, bias)
        limit = min(experts, MAX_TOP_K)
        if not is_int(top_k) or not 1 <= top_k <= limit:
            raise invalid(function, "top_k", f"an integer in [1, min(num_experts, {MAX_TOP_K})] = [1, {limit}]", top_k)
        if is_int(tokens) and tokens * top_k > ROW_LIMIT:
            expected = f"of at most {ROW_LIMIT // top_k} tokens with top_k {top_k}; split the call"
            raise invalid(function, "routing_logits", expected, logits)
        method = parse_enum(function, "routing_method_type", RoutingMethodType, routing_method_type)
        if method is RoutingMethodType.Unspecified:
            expected = "one of the methods Default (0) to Sigmoid (8)"
            raise invalid(function, "routing_method_type", expected, "Unspecified (9), which says no way to route")
        if method is RoutingMethodType.Llama4 and top_k != 1:
            raise invalid(function, "top_k", "1 with Llama4", top_k)
        check_scaling_factor(function, routed_scaling_factor)
        groups, kept = _groups(function, experts, int(top_k), method, n_group, topk_group)
        reads_bias = bias is not None and method in READ_BIAS
        return RoutingProblem(
            tokens,
            experts,
            int(top_k),
            method,
            groups,
            kept,
            _flag(function, "norm_topk_prob", norm_topk_prob),
            DTYPES[logits.dtype],
            DTYPES[bias.dtype] if bias is not None and reads_bias else DataType.NONE,
            enable_pdl is None or _flag(function, "enable_pdl", enable_pdl, "None, True or False"),
            1.0 if routed_scaling_factor is None else float(routed_scaling_factor),
        )

    @property
    def reads_bias(self) -> bool:
        return self.bias_dtype is not DataType.NONE

    def outputs(self) -> dict[str, Array]:
        """Shape and dtype of the results, in the order of BUFFERS."""
        shape = (self.num_tokens, self.top_k)
        return {"topk_ids": Array(shape, "int32"), "topk_weights": Array(shape, "float32")}

    def fields(self) -> list[int]:
        """The integers for the C++ RoutingProblem, in order."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "routed_scaling_factor"]
        return [int(getattr(self, name)) for name in names]

    def attributes(self) -> dict[str, int | float]:
        """The XLA attributes: only what the handler cannot read from buffer dimensions and dtypes."""
        return {
            "method": int(self.method),
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "norm_topk_prob": int(self.norm_topk_prob),
            "enable_pdl": int(self.enable_pdl),
            "routed_scaling_factor": self.routed_scaling_factor,
        }


def abi_text() -> str:
    """The text that ffi/check_routing.cc's RoutingAbiText() must equal."""
    fields = [field.name for field in dataclasses.fields(RoutingProblem) if field.name != "routed_scaling_factor"]
    methods = " ".join(f"{method.name}={method.value}" for method in METHODS)
    return f"routing fields: {' '.join(fields)}\nrouting buffers: {' '.join(BUFFERS)}\nrouting methods: {methods}"


def _groups(
    function: str, experts: int, top_k: int, method: RoutingMethodType, n_group: Any, topk_group: Any
) -> tuple[int, int]:
    """Number of groups and of kept groups, 1 and 1 where experts are not grouped."""
    options = Options(routing_method_type=method, n_group=n_group, topk_group=topk_group)
    options.check_groups(function, experts)
    if method is not RoutingMethodType.DeepSeekV3:
        return 1, 1
    groups, kept = (1 if value in (None, 0) else int(value) for value in (n_group, topk_group))
    size = experts // groups
    if groups > 1 and size < 2:
        expected = f"a divisor of num_experts ({experts}) that leaves groups of at least 2 experts"
        raise invalid(function, "n_group", expected, n_group)
    if top_k > kept * size:
        expected = f"at least {-(-top_k // size)}, so that the kept groups of {size} experts hold top_k ({top_k})"
        raise invalid(function, "topk_group", expected, topk_group)
    return groups, kept


def _flag(function: str, argument: str, value: Any, expected: str = "True or False") -> bool:
    if not isinstance(value, numbers.Integral) or value not in (0, 1):
        raise invalid(function, argument, expected, repr(value))
    return bool(value)
