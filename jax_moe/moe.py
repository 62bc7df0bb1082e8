"""The JAX function of the op: arguments -> Problem -> one XLA custom call.

Everything is checked while tracing, before anything is lowered. Importing this module registers the custom call's
targets with XLA, which is all that a process needs to load exported or serialised programs that contain them.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from . import native
from .enums import ActivationType, Fp8QuantizationType, RoutingMethodType, WeightLayout
from .problem import INPUTS, OUTPUTS, Array, Options, Problem

FUNCTION = "fp8_block_scale_routed_moe"
TOKEN_INPUTS = ("topk_ids", "hidden_states", "hidden_states_scale")  # what a batch over tokens is made of
ABSENT_RESULT = Array((0,), "bfloat16")
SCALE_ORDERS = ("block_major", "token_major")


def fp8_block_scale_routed_moe(
    topk_ids: ArrayLike,
    hidden_states: ArrayLike,
    hidden_states_scale: ArrayLike | None,
    gemm1_weights: ArrayLike,
    gemm1_weights_scale: ArrayLike,
    gemm2_weights: ArrayLike,
    gemm2_weights_scale: ArrayLike,
    *,
    num_experts: int,
    local_expert_offset: int | ArrayLike = 0,
    routing_method_type: int | RoutingMethodType = 0,
    use_shuffled_weight: bool = False,
    weight_layout: int | WeightLayout = 0,
    do_finalize: bool = True,
    gemm1_lora_delta: ArrayLike | None = None,
    fp8_quantization_type: int | Fp8QuantizationType = Fp8QuantizationType.DeepSeekFp8,
    activation_type: int | ActivationType = ActivationType.Swiglu,
    n_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float | None = None,
    gemm1_alpha: ArrayLike | None = None,
    gemm1_beta: ArrayLike | None = None,
    gemm1_clamp_limit: ArrayLike | None = None,
    hidden_states_scale_order: str = "block_major",
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """A mixture-of-experts layer on FP8 weights with block scales, for tokens that are routed already.

    The function is FlashInfer's `trtllm_fp8_block_scale_routed_moe` (DeepSeekFp8): for every token t, the sum over its
    slots k of weight[t, k] x expert(t, k), where an expert is gemm2 . (up x silu(gate)) . gemm1. Sizes: num_tokens T,
    top_k K, hidden_size H and intermediate_size I (both multiples of 128), local experts L (those held here).

    Arrays, of exactly these types (nothing is cast):
      topk_ids               int32 [T, K], expert id and weight packed by `pack_topk_ids`. A slot whose id is not in
                             [local_expert_offset, local_expert_offset + L) contributes nothing; -1 is padding.
      hidden_states          float8_e4m3fn [T, H] (see `quantize_activations`), or bfloat16 [T, H], which is quantised
                             inside by the same rule.
      hidden_states_scale    float32 [H/128, T], or [T, H/128] with hidden_states_scale_order="token_major"; None with
                             bfloat16 hidden_states.
      gemm1_weights          float8_e4m3fn [L, 2I, H]. Rows 0..I-1 are the linear ("up") half, rows I..2I-1 the gate
                             half, the one that silu is applied to. Many checkpoints have them the other way round.
      gemm1_weights_scale    float32 [L, 2I/128, H/128], one per 128x128 block (see `quantize_weights`).
      gemm2_weights          float8_e4m3fn [L, H, I].
      gemm2_weights_scale    float32 [L, H/128, I/128].

    Options:
      num_experts            number of experts in the whole layer, K..32767.
      local_expert_offset    id of the first local expert: an integer, or an int32 scalar array known on the device only
                             (in shard_map: `jax.lax.axis_index(axis) * L`; sum the outputs with `jax.lax.psum`).
      do_finalize            True returns the output; False returns the rows before they are weighted and summed.
      hidden_states_scale_order  "block_major" or "token_major", the order of hidden_states_scale.
      n_group, topk_group, routing_method_type, routed_scaling_factor describe how topk_ids were computed. They are
                             checked against each other and change nothing: the packed weights are used as they are.
    The others (use_shuffled_weight, weight_layout, gemm1_lora_delta, fp8_quantization_type, activation_type,
    gemm1_alpha, gemm1_beta, gemm1_clamp_limit) take their default in this version.

    Returns, with do_finalize, bfloat16 [T, H]; else the tuple
      gemm2_output                  bfloat16 [T*K, H], one row a slot, sorted by expert,
      expert_weights                bfloat16 [T, K],
      expanded_idx_to_permuted_idx  int32 [T*K]: the row of slot t*K + k in gemm2_output, -1 where it has none. Rows
                                    that it does not name are undefined.

    Works under jit, scan, vmap (over tokens it stays one call, over weights it becomes a loop), shard_map, export with
    a symbolic T (which JAX takes to be at least 1), and on T = 0. A token's result does not depend on the other tokens.
    Inference only.

    Raises, while tracing, ValueError for arguments that do not fit each other and NotImplementedError for what this
    version does not have, differentiation among it.
    """
    _refuse("gemm1_lora_delta", gemm1_lora_delta)
    _refuse("gemm1_alpha", gemm1_alpha)
    _refuse("gemm1_beta", gemm1_beta)
    _refuse("gemm1_clamp_limit", gemm1_clamp_limit)
    if isinstance(topk_ids, (tuple, list)):
        raise NotImplementedError(
            f"{FUNCTION}: topk_ids must be one packed int32 array in this version, got a {type(topk_ids).__name__}; "
            "pack ids and weights with jax_moe.pack_topk_ids"
        )
    if hidden_states_scale_order not in SCALE_ORDERS:
        expected = " or ".join(map(repr, SCALE_ORDERS))
        raise ValueError(f"{FUNCTION}: hidden_states_scale_order must be {expected}, got {hidden_states_scale_order!r}")
    options = Options.parse(
        FUNCTION,
        routing_method_type=routing_method_type,
        use_shuffled_weight=use_shuffled_weight,
        weight_layout=weight_layout,
        do_finalize=do_finalize,
        fp8_quantization_type=fp8_quantization_type,
        activation_type=activation_type,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=routed_scaling_factor,
    )
    given = {
        "topk_ids": topk_ids,
        "hidden_states": hidden_states,
        "hidden_states_scale": hidden_states_scale,
        "gemm1_weights": gemm1_weights,
        "gemm1_weights_scale": gemm1_weights_scale,
        "gemm2_weights": gemm2_weights,
        "gemm2_weights_scale": gemm2_weights_scale,
    }
    offset = _known_offset(local_expert_offset)
    call = _Call(num_experts, options, hidden_states_scale_order == "token_major")
    call.problem({name: _describe(name, value) for name, value in given.items()}, offset)

    operands = [np.zeros(0, np.float32) if value is None else value for value in given.values()]
    operands.append(local_expert_offset if offset is None else np.int32(offset))
    results = _function(call.without_routing())(*operands)
    return results[0] if options.do_finalize else results


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=...)` needs to let our custom calls pass.

    They are stable: a target's name carries its version, and a version keeps its meaning.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(native.TARGET)]


class _Call(NamedTuple):
    """The static part of a call: one JAX function is made for each, once."""

    num_experts: int
    options: Options
    scale_is_token_major: bool

    def problem(self, arrays: dict[str, Array | None], offset: int | None) -> Problem:
        return Problem.create(
            FUNCTION,
            arrays,
            self.options,
            num_experts=self.num_experts,
            local_expert_offset=offset,
            scale_is_token_major=self.scale_is_token_major,
        )

    def without_routing(self) -> _Call:
        """The same without the options that were checked and change nothing."""
        kept = ("use_shuffled_weight", "weight_layout", "do_finalize", "fp8_quantization_type", "activation_type")
        return self._replace(options=Options(**{name: getattr(self.options, name) for name in kept}))


@functools.cache
def _function(call: _Call) -> Any:
    """The operands of the custom call (absent ones [0]) -> the tuple of results that a caller gets."""

    @jax.custom_batching.custom_vmap
    def apply(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return _custom_call(call, operands)

    @apply.def_vmap
    def _vmap(axis_size: int, in_batched: list[bool], *operands: jax.Array) -> tuple[Any, Any]:
        if call.options.do_finalize and not any(in_batched[len(TOKEN_INPUTS) :]):
            tokens = _fold(call, axis_size, in_batched, operands[: len(TOKEN_INPUTS)])
            (output,) = apply(*tokens, *operands[len(TOKEN_INPUTS) :])
            return (output.reshape(axis_size, -1, output.shape[1]),), (True,)

        def one(batched: list[jax.Array]) -> tuple[jax.Array, ...]:
            rest = iter(batched)
            return apply(*(next(rest) if b else x for x, b in zip(operands, in_batched, strict=True)))

        results = jax.lax.map(one, [x for x, b in zip(operands, in_batched, strict=True) if b])
        return results, tuple(True for _ in results)

    def function(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return apply(*operands)

    function.__name__ = FUNCTION  # in profiles and programs
    inference_only = jax.custom_jvp(function)
    inference_only.defjvp(_refuse_differentiation)
    return jax.jit(inference_only)


def _refuse_differentiation(primals: object, tangents: object) -> NoReturn:
    raise NotImplementedError(
        f"{FUNCTION}: every argument must be free of derivatives (inference only), got a differentiated one; "
        "wrap the arguments in jax.lax.stop_gradient"
    )


def _fold(call: _Call, size: int, batched: list[bool], operands: tuple[jax.Array, ...]) -> list[jax.Array]:
    """The token operands of `size` calls as those of one call on all their tokens, call after call."""
    folded = []
    for name, operand, is_batched in zip(TOKEN_INPUTS, operands, batched, strict=False):
        if _present(operand) is None:
            folded.append(operand)
            continue
        axis = 1 if name == "hidden_states_scale" and not call.scale_is_token_major else 0  # of the tokens
        if is_batched:
            operand = jnp.moveaxis(operand, 0, axis)
        else:
            shape = (*operand.shape[:axis], size, *operand.shape[axis:])
            operand = jnp.broadcast_to(jnp.expand_dims(operand, axis), shape)
        folded.append(operand.reshape(*operand.shape[:axis], -1, *operand.shape[axis + 2 :]))
    return folded


def _custom_call(call: _Call, operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    problem = call.problem({name: _present(x) for name, x in zip(INPUTS, operands, strict=True)}, None)
    shapes: dict[str, Array] = {name: array or ABSENT_RESULT for name, array in problem.outputs().items()}
    shapes["workspace"] = Array((native.workspace_bytes(problem),), "uint8")
    if call.options.do_finalize:
        shapes["expanded_idx_to_permuted_idx"] = Array((0,), "int32")

    results = jax.ffi.ffi_call(native.TARGET, [jax.ShapeDtypeStruct(*shapes[name]) for name in OUTPUTS])(
        *operands,
        **problem.attributes(),
        hidden_states_scale_token_major=int(call.scale_is_token_major),
    )
    by_name: dict[str, jax.Array] = dict(zip(OUTPUTS, results, strict=True))
    # Under shard_map results differ between the devices that operands differ between, which JAX cannot know.
    axes = sorted(set().union(*map(_varying_axes, operands)))
    return tuple(_vary(by_name[name], axes) for name in problem.returned())


def _present(operand: jax.Array) -> Array | None:
    """Shape and dtype of an operand, None for the [0] that stands for an absent one."""
    return None if operand.ndim == 1 else Array(operand.shape, str(operand.dtype))


def _varying_axes(x: jax.Array) -> frozenset[Any]:
    """Mesh axes of an enclosing shard_map over which `x` is known to differ."""
    kind = jax.typeof(x)
    manual = getattr(kind, "mat", None)  # jax before 0.10 has .vma
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying


def _vary(x: jax.Array, axes: list[Any]) -> jax.Array:
    missing = tuple(axis for axis in axes if axis not in _varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _describe(name: str, value: Any) -> Array | None:
    """Shape and dtype of an argument, taken before JAX could convert it. Only num_tokens may be symbolic."""
    if value is None:
        return None
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ValueError(f"{FUNCTION}: {name} must be an array, got {type(value).__name__}")
    array = Array(tuple(value.shape), str(value.dtype))
    constant = array.shape[1:] if name in ("topk_ids", "hidden_states") else array.shape
    if name != "hidden_states_scale" and not all(isinstance(size, int) for size in constant):
        raise NotImplementedError(
            f"{FUNCTION}: {name} must be of constant sizes but for num_tokens, got {array}; "
            "only num_tokens can be symbolic"
        )
    return array


def _known_offset(offset: Any) -> int | None:
    """local_expert_offset if it is known while tracing, None for an int32 scalar array."""
    if isinstance(offset, (int, np.integer)):
        return offset if isinstance(offset, bool) else int(offset)
    dtype, shape = getattr(offset, "dtype", None), getattr(offset, "shape", None)
    if dtype != jnp.int32 or shape != ():
        got = type(offset).__name__ if dtype is None else str(Array(tuple(shape or ()), str(dtype)))
        raise ValueError(f"{FUNCTION}: local_expert_offset must be an integer or an int32 scalar array, got {got}")
    return None


def _refuse(argument: str, value: object) -> None:
    if value is not None:
        raise NotImplementedError(
            f"{FUNCTION}: {argument} must be None, the one that this version supports, got a value"
        )


def _runtime_ffi_version() -> tuple[int, int]:
    """Version of the FFI API of the installed jaxlib, as its headers state it."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR)\s+(\d+)", header.read_text()))
    return int(found["MAJOR"]), int(found["MINOR"])


def _register() -> None:
    native.check_ffi_version(_runtime_ffi_version())
    for platform, targets in native.load().registrations().items():
        for target, handler in targets.items():
            jax.ffi.register_ffi_target(target, handler, platform=platform, api_version=1)


_register()
