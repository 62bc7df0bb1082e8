"""The XLA custom call of the op, and what JAX's transformations make of it: vmap, shard_map, differentiation, export.

Importing this module registers the call's targets with XLA, which is all that a process needs to load exported or
serialised programs that contain them.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from . import native
from .options import Options
from .problem import INPUTS, OUTPUTS, PER_EXPERT, Array, Problem

FUNCTION = "fp8_block_scale_routed_moe"
# What a batch over tokens is made of. The tokens come first, but in hidden_states_scale of block-major order.
BY_TOKEN = ("topk_ids", "topk_weights", "hidden_states", "hidden_states_scale", "gemm1_lora_delta")
# Element types of the operands and results that a call may do without: it then has empty ones, [0]. Any types would do.
ABSENT = {
    **dict.fromkeys(("topk_weights", "hidden_states_scale", *PER_EXPERT, "gemm1_activation_scale"), "float32"),
    **dict.fromkeys(("gemm1_lora_delta", "output", "gemm2_output", "expert_weights"), "bfloat16"),
    "expanded_idx_to_permuted_idx": "int32",
    "gemm1_activation_output": "uint8",
}

Operands = dict[str, Any]  # by their names in problem.INPUTS, without the absent ones


class Call(NamedTuple):
    """The static part of a call: one JAX function is made for each, once."""

    num_experts: int
    options: Options
    scale_is_token_major: bool

    def problem(self, arrays: dict[str, Array | None], offset: int | None) -> Problem:
        """The checked problem; offset None is known on the device only."""
        return Problem.create(
            FUNCTION,
            arrays,
            self.options,
            num_experts=self.num_experts,
            local_expert_offset=offset,
            scale_is_token_major=self.scale_is_token_major,
        )

    def results(self, operands: Operands) -> tuple[jax.Array, ...]:
        """The results that the documented return form names, in order; with LoRA, gemm1_activation_scale comes last."""
        return _function(self._without_routing())(operands)

    def _without_routing(self) -> Call:
        """The same without the options that were checked and change nothing."""
        kept = ("use_shuffled_weight", "weight_layout", "do_finalize", "fp8_quantization_type", "activation_type")
        kept += ("batch_invariant", "enable_pdl")
        return self._replace(options=Options(**{name: getattr(self.options, name) for name in kept}))


@functools.cache
def _function(call: Call) -> Any:
    """Operands -> results."""

    @jax.custom_batching.custom_vmap
    def apply(operands: Operands) -> tuple[jax.Array, ...]:
        return _custom_call(call, operands)

    @apply.def_vmap
    def _vmap(axis_size: int, in_batched: list[dict[str, bool]], operands: Operands) -> tuple[Any, Any]:
        batched = {name for name, is_batched in in_batched[0].items() if is_batched}
        # Rows of several calls cannot be told apart once they are sorted by expert: only whole outputs are folded.
        only_output = call.options.do_finalize and "gemm1_lora_delta" not in operands
        if only_output and batched <= set(BY_TOKEN):
            (output,) = apply(_fold(call, axis_size, batched, operands))
            tokens = operands["topk_ids"].shape[-2]
            return (output.reshape(axis_size, tokens, output.shape[1]),), (True,)
        results = jax.lax.map(lambda one: apply(operands | one), {name: operands[name] for name in batched})
        return results, tuple(True for _ in results)

    def function(operands: Operands) -> tuple[jax.Array, ...]:
        return apply(operands)

    function.__name__ = FUNCTION  # in profiles and programs
    inference_only = jax.custom_jvp(function)
    inference_only.defjvp(_refuse_differentiation)
    return jax.jit(inference_only)


def _refuse_differentiation(primals: object, tangents: object) -> NoReturn:
    raise NotImplementedError(
        f"{FUNCTION}: every argument must be free of derivatives (inference only), got a differentiated one; "
        "wrap the arguments in jax.lax.stop_gradient"
    )


def _fold(call: Call, size: int, batched: set[str], operands: Operands) -> Operands:
    """The operands of `size` calls as those of one call on all their tokens, call after call."""
    folded = dict(operands)
    for name in operands.keys() & set(BY_TOKEN):
        x = operands[name]
        axis = 1 if name == "hidden_states_scale" and not call.scale_is_token_major else 0  # of the tokens
        if name in batched:
            x = jnp.moveaxis(x, 0, axis)
        else:
            x = jnp.broadcast_to(jnp.expand_dims(x, axis), (*x.shape[:axis], size, *x.shape[axis:]))
        folded[name] = x.reshape(*x.shape[:axis], size * x.shape[axis + 1], *x.shape[axis + 2 :])
    return folded


def _custom_call(call: Call, operands: Operands) -> tuple[jax.Array, ...]:
    problem = call.problem({name: Array(x.shape, str(x.dtype)) for name, x in operands.items()}, None)
    shapes = {name: array or Array((0,), ABSENT[name]) for name, array in problem.outputs().items()}
    shapes["workspace"] = Array((native.workspace_bytes(problem),), "uint8")
    results = jax.ffi.ffi_call(native.TARGET, [jax.ShapeDtypeStruct(*shapes[name]) for name in OUTPUTS])(
        *(operands[name] if name in operands else jnp.zeros(0, ABSENT[name]) for name in INPUTS),
        **problem.attributes(),
        hidden_states_scale_token_major=int(call.scale_is_token_major),
    )
    # Under shard_map results differ between the devices that operands differ between, which JAX cannot know.
    axes = sorted(set().union(*map(varying_axes, operands.values())))
    by_name = {name: vary(x, axes) for name, x in zip(OUTPUTS, results, strict=True)}
    if "topk_weights" in operands:
        by_name["expert_weights"] = operands["topk_weights"]
    scale = ("gemm1_activation_scale",) if problem.has_gemm1_lora_delta else ()
    return tuple(by_name[name] for name in (*problem.returned(), *scale))


def varying_axes(x: jax.Array) -> frozenset[Any]:
    """Mesh axes of an enclosing shard_map over which `x` is known to differ."""
    kind = jax.typeof(x)
    manual = getattr(kind, "mat", None)  # jax before 0.10 has .vma
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying


def vary(x: jax.Array, axes: list[Any]) -> jax.Array:
    """`x`, known to differ over `axes` too."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


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
