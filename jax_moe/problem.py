"""What a call is: sizes, options, buffers, and the validation of its arrays.

`Problem` mirrors ffi/moe.h field by field (native.py compares the two when the extension is loaded). The JAX functions
and the torch facade both describe their arrays as `Array`s, get a `Problem` from them, and read the shapes of results
from it. Imports neither jax nor torch. Errors follow `<function>: <argument> must be <expected>, got <value>`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from .enums import ActivationType, DataType, Fp8QuantizationType, WeightLayout
from .options import GATED, Options, invalid, is_int

SCALE_BLOCK = 128  # columns that share a scale with DeepSeekFp8
MX_SCALE_BLOCK = 32  # with MxFp8; rows too where the scales of weights are a 32x32 grid
MAX_TOP_K = 32
MAX_NUM_EXPERTS = 32767  # a packed id is an int16
ROW_LIMIT = 2**31 - 1024  # rows are numbered in int32 (ffi/check.cc)

INPUTS = (
    "topk_ids",
    "topk_weights",
    "hidden_states",
    "hidden_states_scale",
    "gemm1_weights",
    "gemm1_weights_scale",
    "gemm2_weights",
    "gemm2_weights_scale",
    "gemm1_lora_delta",
    "gemm1_alpha",
    "gemm1_beta",
    "gemm1_clamp_limit",
    "local_expert_offset",
)
OUTPUTS = (
    "output",
    "gemm2_output",
    "expert_weights",
    "expanded_idx_to_permuted_idx",
    "gemm1_activation_output",
    "gemm1_activation_scale",
    "workspace",
)
PER_EXPERT = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")  # float32 [L], each optional

SCALES = ("hidden_states_scale", "gemm1_weights_scale", "gemm2_weights_scale")
FLOAT8 = "float8_e4m3fn"
E8M0 = "float8_e8m0fnu"  # of the scales of MxFp8, which may come as uint8 too
DTYPES = {"float32": DataType.FLOAT32, "bfloat16": DataType.BFLOAT16, FLOAT8: DataType.FLOAT8_E4M3}


class Array(NamedTuple):
    """Shape and dtype name ("float8_e4m3fn", "bfloat16", "float32", "int32", "uint8", ...) of an array."""

    shape: tuple[Any, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


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
    topk_weights_dtype: DataType
    hidden_states_dtype: DataType
    hidden_states_scale_block_stride: Any
    hidden_states_scale_token_stride: Any
    weights_scale_rows: int
    fp8_quantization_type: Fp8QuantizationType
    activation_type: ActivationType
    weight_layout: WeightLayout
    use_shuffled_weight: bool
    has_gemm1_lora_delta: bool
    do_finalize: bool
    batch_invariant: bool
    enable_pdl: bool

    @staticmethod
    def create(
        function: str,
        arrays: Mapping[str, Array | None],
        options: Options,
        *,
        num_experts: int,
        local_expert_offset: int | None = 0,
        scale_is_token_major: bool | None = False,
        scale_strides: tuple[Any, Any] | None = None,
        declared: Mapping[str, int] | None = None,
    ) -> Problem:
        """The problem that `arrays` (by the names of INPUTS) and `options` state, checked completely.

        local_expert_offset None means that it is known on the device only. scale_is_token_major says that
        hidden_states_scale is [T, H/128] instead of [H/128, T]; None lets its shape decide with MxFp8, where both are
        taken and a square one is [T, H/32]. scale_strides are the strides of its dimensions unless it is contiguous.
        `declared` are sizes the caller stated in words (top_k, intermediate_size, local_num_experts): they must match.
        """
        ids = _array(function, arrays, "topk_ids", 2, ("int32",), "[num_tokens, top_k]")
        x = _array(function, arrays, "hidden_states", 2, (FLOAT8, "bfloat16"), "[num_tokens, hidden_size]")
        tokens, hidden = ids.shape[0], x.shape[1]
        if hidden <= 0 or hidden % SCALE_BLOCK:
            raise invalid(function, "hidden_states", _multiple("hidden_size", hidden), x)
        local, rows = _weight_rows(function, arrays, options)
        inter = rows // 2 if options.is_gated else rows
        if options.is_gated and rows % 2:
            expected = f"of an even number of rows (up, then gate) with {options.activation_type.name}"
            raise invalid(function, "gemm1_weights", expected, arrays["gemm1_weights"])
        if inter <= 0 or inter % SCALE_BLOCK:
            halves = " in both halves of the rows" if options.is_gated else ""
            expected = _multiple("intermediate_size", inter) + halves
            raise invalid(function, "gemm1_weights", expected, arrays["gemm1_weights"])
        blocks = hidden // (MX_SCALE_BLOCK if options.is_mx else SCALE_BLOCK)
        if scale_is_token_major is None:
            scale_is_token_major = options.is_mx and not _is_block_major(arrays, tokens, blocks)
        block_stride, token_stride = scale_strides or ((blocks, 1) if scale_is_token_major else (tokens, 1))
        if scale_is_token_major:
            block_stride, token_stride = token_stride, block_stride
        weights = arrays.get("topk_weights")
        if weights is not None:
            _array(function, arrays, "topk_weights", 2, ("bfloat16", "float32"), "[num_tokens, top_k]")
        problem = Problem(
            tokens,
            hidden,
            inter,
            int(num_experts) if is_int(num_experts) else num_experts,
            ids.shape[1],
            local,
            int(local_expert_offset) if is_int(local_expert_offset) else 0,
            DataType.NONE if weights is None else DTYPES[weights.dtype],
            DTYPES[x.dtype],
            block_stride,
            token_stride,
            _weights_scale_rows(arrays, rows) if options.is_mx else SCALE_BLOCK,
            options.fp8_quantization_type,
            options.activation_type,
            options.weight_layout,
            options.use_shuffled_weight,
            arrays.get("gemm1_lora_delta") is not None,
            options.do_finalize,
            options.batch_invariant,
            options.enable_pdl,
        )
        problem._check_sizes(function, local_expert_offset, declared or {})
        options.check_groups(function, num_experts)
        problem._check_arrays(function, arrays, scale_is_token_major)
        return problem

    def _check_sizes(self, function: str, offset: int | None, declared: Mapping[str, int]) -> None:
        if not is_int(self.num_experts) or not 1 <= self.num_experts <= MAX_NUM_EXPERTS:
            raise invalid(function, "num_experts", f"an integer in [1, {MAX_NUM_EXPERTS}]", self.num_experts)
        limit = min(self.num_experts, MAX_TOP_K)
        if not 1 <= self.top_k <= limit:
            raise invalid(function, "top_k", f"in [1, min(num_experts, {MAX_TOP_K})] = [1, {limit}]", self.top_k)
        for argument, value in declared.items():
            found = getattr(self, argument)
            if value != found:
                hint = self._rows_in_words() if argument == "intermediate_size" else ""
                raise invalid(function, argument, f"{found}, the size that the arrays have", f"{value}{hint}")
        local = self.local_num_experts
        if local < 1:
            raise invalid(function, "gemm1_weights", "of at least one local expert", local)
        if local > self.num_experts:
            expected = f"of at most num_experts ({self.num_experts}) local experts"
            raise invalid(function, "gemm1_weights", expected, local)
        if offset is not None and not (is_int(offset) and 0 <= offset <= self.num_experts - local):
            last = self.num_experts - local
            expected = f"an integer in [0, num_experts - local_num_experts] = [0, {last}]"
            raise invalid(function, "local_expert_offset", expected, offset)
        if is_int(self.num_tokens) and self.num_tokens * self.top_k > ROW_LIMIT:
            expected = f"at most {ROW_LIMIT // self.top_k} tokens with top_k {self.top_k}; split the call"
            raise invalid(function, "topk_ids", expected, self.num_tokens)
        rows = local * max(self.gemm1_rows, self.hidden_size)
        if rows > ROW_LIMIT:
            raise invalid(function, "gemm1_weights", f"of at most {ROW_LIMIT} rows over all local experts", rows)

    def _check_arrays(self, function: str, arrays: Mapping[str, Array | None], token_major: bool) -> None:
        for name, expected in self.inputs(token_major).items():
            given = arrays.get(name)
            if expected is None:
                if given is not None:
                    raise invalid(function, name, f"None with {self._reason_for_none(name)}", given)
            elif given is None:
                if name not in PER_EXPERT:
                    hint = " (or pass hidden_states in bfloat16)" if name == "hidden_states_scale" else ""
                    raise invalid(function, name, f"{self._in_words(name, expected)}{hint}", None)
            elif not self._has_dtype(name, given, expected) or tuple(given.shape) != tuple(expected.shape):
                got = f"{given}{self._hint(name, given, expected, token_major)}"
                raise invalid(function, name, self._in_words(name, expected), got)

    def _has_dtype(self, name: str, given: Array, expected: Array) -> bool:
        return given.dtype == expected.dtype or (self.is_mx and name in SCALES and given.dtype == E8M0)

    def _in_words(self, name: str, expected: Array) -> str:
        """What an array must be, with what a scale of MxFp8 may be besides."""
        if not self.is_mx or name not in SCALES:
            return str(expected)
        if name == "gemm1_weights_scale":
            experts, _, blocks = expected.shape
            shapes = ((experts, rows, blocks) for rows in (self.gemm1_rows, self.gemm1_rows // MX_SCALE_BLOCK))
            return f"{' or '.join(str(Array(shape, 'uint8')) for shape in shapes)} (or as {E8M0})"
        return f"{expected} (or as {E8M0})"

    def _reason_for_none(self, name: str) -> str:
        if name in PER_EXPERT:
            return self.activation_type.name
        return "bfloat16 hidden_states (quantised in the call)"

    def _hint(self, name: str, given: Array, expected: Array, token_major: bool) -> str:
        """The next step where a shape is a likely slip."""
        if name == "hidden_states_scale" and tuple(given.shape) == tuple(reversed(expected.shape)):
            order = "block_major" if token_major else "token_major"
            return f"; transpose it, or say hidden_states_scale_order='{order}' in JAX"
        if name == "gemm2_weights_scale" and self.is_mx:
            return f"; gemm1_weights_scale has one for each {self.weights_scale_rows}x{MX_SCALE_BLOCK}"
        if name == "gemm1_weights":
            return f"; hidden_states has hidden_size {self.hidden_size}"
        return self._rows_in_words() if name == "gemm2_weights" and given.dtype == expected.dtype else ""

    def _rows_in_words(self) -> str:
        size = "2 * intermediate_size" if self.is_gated else "intermediate_size"
        return f"; gemm1_weights has {self.gemm1_rows} rows, which is {size} with {self.activation_type.name}"

    @property
    def hidden_states_are_bf16(self) -> bool:
        return self.hidden_states_dtype is DataType.BFLOAT16

    @property
    def is_gated(self) -> bool:
        return self.activation_type in GATED

    @property
    def is_mx(self) -> bool:
        return self.fp8_quantization_type is Fp8QuantizationType.MxFp8

    @property
    def gemm1_rows(self) -> int:
        return 2 * self.intermediate_size if self.is_gated else self.intermediate_size

    def inputs(self, scale_is_token_major: bool = False) -> dict[str, Array | None]:
        """Shape and dtype of each of INPUTS but local_expert_offset; None where the problem has none.

        The PER_EXPERT arrays of Swiglu are listed although each may be left out.
        """
        tokens, hidden, inter, local = self.num_tokens, self.hidden_size, self.intermediate_size, self.local_num_experts
        rows, scale_rows, block = self.gemm1_rows, self.weights_scale_rows, SCALE_BLOCK
        bf16, scale_dtype = self.hidden_states_are_bf16, "float32"
        if self.is_mx:
            block, scale_dtype = MX_SCALE_BLOCK, "uint8"
        scale_shape = (tokens, hidden // block) if scale_is_token_major else (hidden // block, tokens)
        weights = None if self.topk_weights_dtype is DataType.NONE else self.topk_weights_dtype.name.lower()
        per_expert = Array((local,), "float32") if self.activation_type is ActivationType.Swiglu else None
        return {
            "topk_ids": Array((tokens, self.top_k), "int32"),
            "topk_weights": Array((tokens, self.top_k), weights) if weights else None,
            "hidden_states": Array((tokens, hidden), "bfloat16" if bf16 else FLOAT8),
            "hidden_states_scale": None if bf16 else Array(scale_shape, scale_dtype),
            "gemm1_weights": self._weights(rows, hidden),
            "gemm1_weights_scale": Array((local, rows // scale_rows, hidden // block), scale_dtype),
            "gemm2_weights": self._weights(hidden, inter),
            "gemm2_weights_scale": Array((local, hidden // scale_rows, inter // block), scale_dtype),
            "gemm1_lora_delta": Array((tokens, self.top_k, rows), "bfloat16") if self.has_gemm1_lora_delta else None,
            **{name: per_expert for name in PER_EXPERT},
        }

    def _weights(self, rows: int, columns: int) -> Array:
        if self.weight_layout is WeightLayout.BlockMajorK:
            return Array((self.local_num_experts, columns // SCALE_BLOCK, rows, SCALE_BLOCK), FLOAT8)
        return Array((self.local_num_experts, rows, columns), FLOAT8)

    def outputs(self) -> dict[str, Array | None]:
        """Shape and dtype of each of OUTPUTS but the workspace; None where the problem has none."""
        tokens, top_k, hidden, inter = self.num_tokens, self.top_k, self.hidden_size, self.intermediate_size
        rows, final, lora = tokens * top_k, self.do_finalize, self.has_gemm1_lora_delta
        packed = self.topk_weights_dtype is DataType.NONE
        scale = Array((inter // SCALE_BLOCK, (rows + 3) // 4 * 4), "float32")
        if self.is_mx:  # four E8M0 bytes where a float32 would be
            scale = Array((*scale.shape, SCALE_BLOCK // MX_SCALE_BLOCK), "uint8")
        return {
            "output": Array((tokens, hidden), "bfloat16") if final else None,
            "gemm2_output": None if final else Array((rows, hidden), "bfloat16"),
            "expert_weights": Array((tokens, top_k), "bfloat16") if packed and not final else None,
            "expanded_idx_to_permuted_idx": None if final and not lora else Array((rows,), "int32"),
            "gemm1_activation_output": Array((rows, inter), "uint8") if lora else None,
            "gemm1_activation_scale": scale if lora else None,
        }

    def returned(self) -> tuple[str, ...]:
        """Names of the results of the documented return forms, in order.

        expert_weights is the caller's own topk_weights when those were given.
        """
        lora = ("gemm1_activation_output",) if self.has_gemm1_lora_delta else ()
        if not self.do_finalize:
            return ("gemm2_output", "expert_weights", "expanded_idx_to_permuted_idx", *lora)
        return ("output", "expanded_idx_to_permuted_idx", *lora) if lora else ("output",)

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
            "batch_invariant": int(self.batch_invariant),
            "enable_pdl": int(self.enable_pdl),
        }


def abi_text() -> str:
    """The text that ffi/check.cc's AbiText() must equal."""
    fields = " ".join(field.name for field in dataclasses.fields(Problem))
    enums = (DataType, Fp8QuantizationType, ActivationType, WeightLayout)
    values = " ".join(f"{kind.__name__}.{member.name}={member.value}" for kind in enums for member in kind)
    return f"fields: {fields}\ninputs: {' '.join(INPUTS)}\noutputs: {' '.join(OUTPUTS)}\nenums: {values}"


def _weight_rows(function: str, arrays: Mapping[str, Array | None], options: Options) -> tuple[int, int]:
    """Local experts and rows of gemm1_weights."""
    rows = "2 * intermediate_size" if options.is_gated else "intermediate_size"
    if options.weight_layout is WeightLayout.BlockMajorK:
        words = f"[experts, hidden_size / {SCALE_BLOCK}, {rows}, {SCALE_BLOCK}] with BlockMajorK"
        gemm1 = _array(function, arrays, "gemm1_weights", 4, (FLOAT8,), words)
        return gemm1.shape[0], gemm1.shape[2]
    gemm1 = _array(function, arrays, "gemm1_weights", 3, (FLOAT8,), f"[experts, {rows}, hidden_size] with MajorK")
    return gemm1.shape[0], gemm1.shape[1]


def _is_block_major(arrays: Mapping[str, Array | None], tokens: Any, blocks: int) -> bool:
    """Whether hidden_states_scale is [blocks, tokens] and not [tokens, blocks]."""
    scale = arrays.get("hidden_states_scale")
    shape = None if scale is None else tuple(scale.shape)
    return shape != (tokens, blocks) and shape == (blocks, tokens)


def _weights_scale_rows(arrays: Mapping[str, Array | None], rows: int) -> int:
    """Rows that share a weight scale with MxFp8, by the shape of gemm1_weights_scale: 32 or else 1."""
    scale = arrays.get("gemm1_weights_scale")
    is_grid = scale is not None and len(scale.shape) == 3 and scale.shape[1] == rows // MX_SCALE_BLOCK
    return MX_SCALE_BLOCK if is_grid else 1


def _multiple(size: str, value: int) -> str:
    padded = max(1, -(-value // SCALE_BLOCK)) * SCALE_BLOCK
    article = "an" if size.startswith("i") else "a"
    return f"of {article} {size} that is a multiple of {SCALE_BLOCK}; pad {size} {value} to {padded}"


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
        raise invalid(function, name, f"{' or '.join(dtypes)} {shape_words}", given)
    return given
