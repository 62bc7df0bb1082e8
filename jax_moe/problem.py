"""What a call is: sizes, options, buffers, and all argument validation.

`Problem` mirrors ffi/moe.h field by field (native.py compares the two when the extension is loaded). The JAX functions
and the torch facade both describe their arrays as `Array`s, get a `Problem` from them, and read the shapes of results
from it. Imports neither jax nor torch. Errors follow `<function>: <argument> must be <expected>, got <value>`.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from .enums import (
    ActivationType,
    DataType,
    Fp8QuantizationType,
    RoutingMethodType,
    WeightLayout,
    parse_enum,
)

SCALE_BLOCK = 128
MAX_TOP_K = 32
MAX_NUM_EXPERTS = 32767  # a packed id is an int16
ROW_LIMIT = 2**31 - 1024  # rows are numbered in int32 (ffi/check.cc)

INPUTS = (
    "topk_ids",
    "hidden_states",
    "hidden_states_scale",
    "gemm1_weights",
    "gemm1_weights_scale",
    "gemm2_weights",
    "gemm2_weights_scale",
    "local_expert_offset",
)
OUTPUTS = ("output", "gemm2_output", "expert_weights", "expanded_idx_to_permuted_idx", "workspace")

FLOAT8 = "float8_e4m3fn"


class Array(NamedTuple):
    """Shape and dtype name ("float8_e4m3fn", "bfloat16", "float32", "int32", "uint8") of an array."""

    shape: tuple[Any, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


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
    ) -> Options:
        """Raises ValueError for what the contract forbids and NotImplementedError for what this build lacks."""
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
        )
        if options.fp8_quantization_type is Fp8QuantizationType.NoneFp8:
            raise _invalid(function, "fp8_quantization_type", "DeepSeekFp8 (1) or MxFp8 (2)", "NoneFp8 (0)")
        if options.weight_layout is WeightLayout.MajorMn:
            raise _invalid(function, "weight_layout", "MajorK (0) or BlockMajorK (2)", "MajorMn (1)")
        options._refuse_unsupported(function)
        return options

    def _refuse_unsupported(self, function: str) -> None:
        for argument, value, supported in (
            ("fp8_quantization_type", self.fp8_quantization_type, Fp8QuantizationType.DeepSeekFp8),
            ("activation_type", self.activation_type, ActivationType.Swiglu),
            ("weight_layout", self.weight_layout, WeightLayout.MajorK),
        ):
            if value is not supported:
                raise NotImplementedError(
                    f"{function}: {argument} must be {supported.name} ({supported.value}), the one that this version "
                    f"supports, got {value.name} ({value.value})"
                )
        if self.use_shuffled_weight:
            raise NotImplementedError(
                f"{function}: use_shuffled_weight must be False, the one that this version supports, got True; "
                "pass the weights as the checkpoint has them"
            )

    def check_groups(self, function: str, num_experts: int) -> None:
        """n_group and topk_group belong to DeepSeekV3 routing; elsewhere they may only be absent."""
        if self.routing_method_type is not RoutingMethodType.DeepSeekV3:
            for argument, value in (("n_group", self.n_group), ("topk_group", self.topk_group)):
                if value not in (None, 0, 1):
                    raise _invalid(function, argument, f"None, 0 or 1 with {self.routing_method_type.name}", value)
            return
        groups = 1 if self.n_group in (None, 0) else self.n_group
        chosen = 1 if self.topk_group in (None, 0) else self.topk_group
        if not _is_int(groups) or groups < 1 or num_experts % groups:
            raise _invalid(function, "n_group", f"a positive divisor of num_experts ({num_experts})", self.n_group)
        if not _is_int(chosen) or not 1 <= chosen <= groups:
            raise _invalid(function, "topk_group", f"in [1, n_group] = [1, {groups}]", self.topk_group)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call: the fields of ffi/moe.h, in its order. num_tokens may be a symbolic dimension of jax.export."""

    num_tokens: Any
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    local_num_experts: int
    local_expert_offset: int
    hidden_states_dtype: DataType
    hidden_states_scale_block_stride: Any
    hidden_states_scale_token_stride: Any
    fp8_quantization_type: Fp8QuantizationType
    activation_type: ActivationType
    weight_layout: WeightLayout
    use_shuffled_weight: bool
    do_finalize: bool

    @staticmethod
    def create(
        function: str,
        arrays: Mapping[str, Array | None],
        options: Options,
        *,
        num_experts: int,
        local_expert_offset: int | None = 0,
        scale_is_token_major: bool = False,
        scale_strides: tuple[Any, Any] | None = None,
        declared: Mapping[str, int] | None = None,
    ) -> Problem:
        """The problem that `arrays` (by the names of INPUTS) and `options` state, checked completely.

        local_expert_offset None means that it is known on the device only. scale_is_token_major says that
        hidden_states_scale is [T, H/128] instead of [H/128, T]; scale_strides overrides its (block, token) strides.
        `declared` are sizes the caller stated in words (top_k, intermediate_size, local_num_experts): they must match.
        """
        topk_ids = _array(function, arrays, "topk_ids", 2, ("int32",), "[num_tokens, top_k]")
        x = _array(function, arrays, "hidden_states", 2, (FLOAT8, "bfloat16"), "[num_tokens, hidden_size]")
        gemm1 = _array(function, arrays, "gemm1_weights", 3, (FLOAT8,), "[experts, 2 * intermediate_size, hidden_size]")
        _array(function, arrays, "gemm2_weights", 3, (FLOAT8,), "[experts, hidden_size, intermediate_size]")
        tokens, top_k = topk_ids.shape
        hidden, local = x.shape[1], gemm1.shape[0]
        if hidden <= 0 or hidden % SCALE_BLOCK:
            raise _invalid(function, "hidden_states", _multiple("hidden_size", hidden), x)
        if gemm1.shape[1] <= 0 or gemm1.shape[1] % (2 * SCALE_BLOCK):
            expected = _multiple("intermediate_size", gemm1.shape[1] // 2) + " (and two of them as gemm1_weights' rows)"
            raise _invalid(function, "gemm1_weights", expected, gemm1)
        problem = Problem(
            tokens,
            hidden,
            gemm1.shape[1] // 2,
            int(num_experts) if _is_int(num_experts) else num_experts,
            top_k,
            local,
            int(local_expert_offset) if _is_int(local_expert_offset) else 0,
            DataType.FLOAT8_E4M3 if x.dtype == FLOAT8 else DataType.BFLOAT16,
            *(scale_strides or ((1, hidden // SCALE_BLOCK) if scale_is_token_major else (tokens, 1))),
            options.fp8_quantization_type,
            options.activation_type,
            options.weight_layout,
            options.use_shuffled_weight,
            options.do_finalize,
        )
        problem._check_sizes(function, local_expert_offset, declared or {})
        options.check_groups(function, num_experts)
        problem._check_arrays(function, arrays, scale_is_token_major)
        return problem

    def _check_sizes(self, function: str, offset: int | None, declared: Mapping[str, int]) -> None:
        if not _is_int(self.num_experts) or not 1 <= self.num_experts <= MAX_NUM_EXPERTS:
            raise _invalid(function, "num_experts", f"an integer in [1, {MAX_NUM_EXPERTS}]", self.num_experts)
        limit = min(self.num_experts, MAX_TOP_K)
        if not 1 <= self.top_k <= limit:
            raise _invalid(function, "top_k", f"in [1, min(num_experts, {MAX_TOP_K})] = [1, {limit}]", self.top_k)
        for argument, value in declared.items():
            found = getattr(self, argument)
            if value != found:
                raise _invalid(function, argument, f"{found}, the size that the arrays have", value)
        if self.local_num_experts < 1:
            raise _invalid(function, "gemm1_weights", "of at least one local expert", self.local_num_experts)
        if offset is None:
            if self.local_num_experts > self.num_experts:
                expected = f"of at most num_experts ({self.num_experts}) local experts"
                raise _invalid(function, "gemm1_weights", expected, self.local_num_experts)
        elif not _is_int(offset) or not 0 <= offset <= self.num_experts - self.local_num_experts:
            expected = (
                f"an integer in [0, num_experts - local_num_experts] = [0, {self.num_experts - self.local_num_experts}]"
            )
            raise _invalid(function, "local_expert_offset", expected, offset)
        if _is_int(self.num_tokens) and self.num_tokens * self.top_k > ROW_LIMIT:
            expected = f"at most {ROW_LIMIT // self.top_k} tokens with top_k {self.top_k}; split the call"
            raise _invalid(function, "topk_ids", expected, self.num_tokens)
        if self.local_num_experts * max(2 * self.intermediate_size, self.hidden_size) > ROW_LIMIT:
            rows = self.local_num_experts * max(2 * self.intermediate_size, self.hidden_size)
            raise _invalid(function, "gemm1_weights", f"of at most {ROW_LIMIT} rows over all local experts", rows)

    def _check_arrays(self, function: str, arrays: Mapping[str, Array | None], scale_is_token_major: bool) -> None:
        for name, expected in self.inputs(scale_is_token_major).items():
            given = arrays.get(name)
            if expected is None:
                if given is not None:
                    raise _invalid(function, name, "None with bfloat16 hidden_states (quantised in the call)", given)
            elif given is None:
                hint = " (or pass hidden_states in bfloat16)" if name == "hidden_states_scale" else ""
                raise _invalid(function, name, f"{expected}{hint}", None)
            elif given.dtype != expected.dtype or tuple(given.shape) != tuple(expected.shape):
                hint = ""
                if name == "hidden_states_scale" and tuple(given.shape) == tuple(reversed(expected.shape)):
                    hint = "; transpose it, or say hidden_states_scale_order='token_major' in JAX"
                raise _invalid(function, name, str(expected), f"{given}{hint}")

    @property
    def hidden_states_are_bf16(self) -> bool:
        return self.hidden_states_dtype is DataType.BFLOAT16

    def inputs(self, scale_is_token_major: bool = False) -> dict[str, Array | None]:
        """Shape and dtype of each of INPUTS; None where the problem has none. local_expert_offset is not listed."""
        tokens, hidden, inter, local = self.num_tokens, self.hidden_size, self.intermediate_size, self.local_num_experts
        hidden_blocks, inter_blocks = hidden // SCALE_BLOCK, inter // SCALE_BLOCK
        scale_shape = (tokens, hidden_blocks) if scale_is_token_major else (hidden_blocks, tokens)
        bf16 = self.hidden_states_are_bf16
        return {
            "topk_ids": Array((tokens, self.top_k), "int32"),
            "hidden_states": Array((tokens, hidden), "bfloat16" if bf16 else FLOAT8),
            "hidden_states_scale": None if bf16 else Array(scale_shape, "float32"),
            "gemm1_weights": Array((local, 2 * inter, hidden), FLOAT8),
            "gemm1_weights_scale": Array((local, 2 * inter_blocks, hidden_blocks), "float32"),
            "gemm2_weights": Array((local, hidden, inter), FLOAT8),
            "gemm2_weights_scale": Array((local, hidden_blocks, inter_blocks), "float32"),
        }

    def outputs(self) -> dict[str, Array | None]:
        """Shape and dtype of each of OUTPUTS but the workspace; None where the problem has none."""
        tokens, top_k, hidden = self.num_tokens, self.top_k, self.hidden_size
        rows = tokens * top_k
        final = self.do_finalize
        return {
            "output": Array((tokens, hidden), "bfloat16") if final else None,
            "gemm2_output": None if final else Array((rows, hidden), "bfloat16"),
            "expert_weights": None if final else Array((tokens, top_k), "bfloat16"),
            "expanded_idx_to_permuted_idx": None if final else Array((rows,), "int32"),
        }

    def returned(self) -> tuple[str, ...]:
        """Names of the results a caller gets, in order."""
        if self.do_finalize:
            return ("output",)
        return ("gemm2_output", "expert_weights", "expanded_idx_to_permuted_idx")

    def fields(self) -> list[int]:
        """The values for the C++ Problem, in order."""
        return [int(getattr(self, field.name)) for field in dataclasses.fields(self)]

    def attributes(self) -> dict[str, int]:
        """The XLA attributes: only what the handler cannot read from buffer dimensions and dtypes."""
        return {
            "num_experts": self.num_experts,
            "fp8_quantization_type": int(self.fp8_quantization_type),
            "activation_type": int(self.activation_type),
            "weight_layout": int(self.weight_layout),
            "use_shuffled_weight": int(self.use_shuffled_weight),
            "do_finalize": int(self.do_finalize),
        }


def abi_text() -> str:
    """The text that ffi/check.cc's AbiText() must equal."""
    fields = " ".join(field.name for field in dataclasses.fields(Problem))
    enums = (DataType, Fp8QuantizationType, ActivationType, WeightLayout)
    values = " ".join(f"{kind.__name__}.{member.name}={member.value}" for kind in enums for member in kind)
    return f"fields: {fields}\ninputs: {' '.join(INPUTS)}\noutputs: {' '.join(OUTPUTS)}\nenums: {values}"


def _invalid(function: str, argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{function}: {argument} must be {expected}, got {got}")


def _multiple(size: str, value: int) -> str:
    padded = max(1, -(-value // SCALE_BLOCK)) * SCALE_BLOCK
    return f"of a {size} that is a multiple of {SCALE_BLOCK}; pad {size} {value} to {padded}"


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)  # numpy's integers too


def _flag(function: str, argument: str, value: object) -> bool:
    if not isinstance(value, numbers.Integral) or value not in (0, 1):
        raise _invalid(function, argument, "True or False", repr(value))
    return bool(value)


def _array(
    function: str,
    arrays: Mapping[str, Array | None],
    name: str,
    rank: int,
    dtypes: tuple[str, ...],
    shape_words: str,
) -> Array:
    given = arrays.get(name)
    if given is None or len(given.shape) != rank or given.dtype not in dtypes:
        raise _invalid(function, name, f"{' or '.join(dtypes)} {shape_words}", given)
    return given
