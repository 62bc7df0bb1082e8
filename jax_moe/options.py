"""The options of the documented signature that are not array sizes, checked against each other.

Imports neither jax nor torch. Errors follow `<function>: <argument> must be <expected>, got <value>`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from typing import Any, TypeGuard

from .enums import ActivationType, Fp8QuantizationType, RoutingMethodType, WeightLayout, parse_enum

BATCH_INVARIANT = "JAX_MOE_BATCH_INVARIANT"  # the environment variable that batch_invariant=None reads
SPELLINGS = {"": False, "0": False, "false": False, "1": True, "true": True}  # of its value

GATED = (ActivationType.Swiglu, ActivationType.Geglu)  # gemm1_weights has up rows and gate rows


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the documented signature that are not array sizes, checked against each other."""

    routing_method_type: RoutingMethodType = RoutingMethodType.Default
    use_shuffled_weight: bool = False
    weight_layout: WeightLayout = WeightLayout.MajorK
    do_finalize: bool = True
    fp8_quantization_type: Fp8QuantizationType = Fp8QuantizationType.DeepSeekFp8
    activation_type: ActivationType = ActivationType.Swiglu
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float | None = None
    batch_invariant: bool = False
    enable_pdl: bool = True

    @staticmethod
    def parse(
        function: str,
        *,
        routing_method_type: object = 0,
        use_shuffled_weight: object = False,
        weight_layout: object = 0,
        do_finalize: object = True,
        fp8_quantization_type: object = Fp8QuantizationType.DeepSeekFp8,
        activation_type: object = ActivationType.Swiglu,
        n_group: int | None = None,
        topk_group: int | None = None,
        routed_scaling_factor: float | None = None,
        batch_invariant: object = None,
        enable_pdl: object = None,
    ) -> Options:
        """Raises ValueError for what the contract forbids."""
        options = Options(
            parse_enum(function, "routing_method_type", RoutingMethodType, routing_method_type),
            _flag(function, "use_shuffled_weight", use_shuffled_weight),
            parse_enum(function, "weight_layout", WeightLayout, weight_layout),
            _flag(function, "do_finalize", do_finalize),
            parse_enum(function, "fp8_quantization_type", Fp8QuantizationType, fp8_quantization_type),
            parse_enum(function, "activation_type", ActivationType, activation_type),
            n_group,
            topk_group,
            routed_scaling_factor,
            resolve_batch_invariant(function, batch_invariant),
            enable_pdl is None or _flag(function, "enable_pdl", enable_pdl, "None, True or False"),
        )
        check_scaling_factor(function, routed_scaling_factor)
        options._check_combination(function)
        return options

    def _check_combination(self, function: str) -> None:
        if self.fp8_quantization_type is Fp8QuantizationType.NoneFp8:
            raise invalid(function, "fp8_quantization_type", "DeepSeekFp8 (1) or MxFp8 (2)", "NoneFp8 (0)")
        if self.weight_layout is WeightLayout.MajorMn:
            raise invalid(function, "weight_layout", "MajorK (0) or BlockMajorK (2)", "MajorMn (1)")
        if self.is_mx and self.weight_layout is not WeightLayout.MajorK:
            raise invalid(function, "weight_layout", "MajorK (0) with MxFp8", "BlockMajorK (2)")

    @property
    def is_mx(self) -> bool:
        return self.fp8_quantization_type is Fp8QuantizationType.MxFp8

    @property
    def is_gated(self) -> bool:
        return self.activation_type in GATED

    def check_groups(self, function: str, num_experts: int) -> None:
        """n_group and topk_group belong to DeepSeekV3 routing; elsewhere they may only be absent."""
        if self.routing_method_type is not RoutingMethodType.DeepSeekV3:
            for argument, value in (("n_group", self.n_group), ("topk_group", self.topk_group)):
                if value not in (None, 0, 1):
                    raise invalid(function, argument, f"None, 0 or 1 with {self.routing_method_type.name}", value)
            return
        groups = 1 if self.n_group in (None, 0) else self.n_group
        chosen = 1 if self.topk_group in (None, 0) else self.topk_group
        if not is_int(groups) or groups < 1 or num_experts % groups:
            raise invalid(function, "n_group", f"a positive divisor of num_experts ({num_experts})", self.n_group)
        if not is_int(chosen) or not 1 <= chosen <= groups:
            raise invalid(function, "topk_group", f"in [1, n_group] = [1, {groups}]", self.topk_group)


def invalid(function: str, argument: str, expected: str, got: object) -> ValueError:
    """The error for an argument that does not fit the contract."""
    return ValueError(f"{function}: {argument} must be {expected}, got {got}")


def is_int(value: object) -> TypeGuard[int]:
    """Python's or numpy's integer, not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_scaling_factor(function: str, value: Any) -> None:
    """routed_scaling_factor, where it is used and where it is not."""
    if value is None:
        return
    # NOTE: compared, not math.isfinite, which torch.compile cannot trace for a float that it made symbolic.
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not -math.inf < float(value) < math.inf:
        raise invalid(function, "routed_scaling_factor", "None or a finite number", repr(value))


def resolve_batch_invariant(function: str, value: object) -> bool:
    """What batch_invariant says, or where it is None the environment at this moment."""
    if value is not None:
        return _flag(function, "batch_invariant", value, "None, True or False")
    text = os.environ.get(BATCH_INVARIANT, "")
    if text.lower() not in SPELLINGS:
        raise invalid(function, f"environment variable {BATCH_INVARIANT}", "1, true, 0 or false", repr(text))
    return SPELLINGS[text.lower()]


def _flag(function: str, argument: str, value: object, expected: str = "True or False") -> bool:
    if not isinstance(value, numbers.Integral) or value not in (0, 1):
        raise invalid(function, argument, expected, repr(value))
    return bool(value)
