"""The function that serving frameworks call, with the names, order and defaults of its documented signature.

Here are only the checks that need the caller's Python objects (kinds of arguments, what nothing else reads); shapes,
dtypes, devices and options are checked inside the ops (plan.py), where torch.compile runs them too.
"""

from __future__ import annotations

import enum
import functools
import inspect
from typing import Any

import torch

from jax_moe import native
from jax_moe.enums import ActivationType, Fp8QuantizationType, RoutingMethodType, WeightLayout, parse_enum
from jax_moe.options import check_scaling_factor, resolve_batch_invariant
from jax_moe.problem import SCALES, Array

from . import ops
from .arguments import check_device, check_tensor, increment_version
from .eager import Calls
from .plan import FUNCTION, HIDDEN_STATES, OPTIONAL, OPTIONS, TENSORS, repeatable

CALLS = Calls()
GIVEN = (*ops.GIVEN, "routing_bias")  # the tensors of those calls
NUM_EXPERTS, DO_FINALIZE = OPTIONS.index("num_experts"), OPTIONS.index("do_finalize")
FP8_QUANTIZATION_TYPE = OPTIONS.index("fp8_quantization_type")
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)  # torch has it since 2.7


def trtllm_fp8_block_scale_routed_moe(
    topk_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    routing_bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor | None,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    routing_method_type: int = 0,
    use_shuffled_weight: bool = False,
    weight_layout: int = 0,
    do_finalize: bool = True,
    enable_pdl: bool | None = None,
    gemm1_lora_delta: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    tune_max_num_tokens: int = 8192,
    fp8_quantization_type: Fp8QuantizationType = Fp8QuantizationType.DeepSeekFp8,
    activation_type: int = 3,
    gemm1_alpha: torch.Tensor | None = None,
    gemm1_beta: torch.Tensor | None = None,
    gemm1_clamp_limit: torch.Tensor | None = None,
    *,
    batch_invariant: bool | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """A mixture-of-experts layer in FP8 with block scales, on tokens that are routed already.

    With T tokens, K = top_k, E = num_experts, L = local_num_experts, H = hidden size, I = intermediate_size, and M = 2I
    for the gated activations Swiglu and Geglu, M = I for Relu2 and Identity:
    out[t] = sum over k of w[t,k] * (activation(x[t] W1[e]^T + delta[t,k]) W2[e]^T), e = id[t,k] - local_expert_offset,
    where slots whose id is outside [local_expert_offset, local_expert_offset + L) contribute nothing. GEMMs accumulate
    in float32; the activation is computed in float32 and requantised to FP8 per row and 128 columns (MxFp8: 32); the
    sum is rounded to bfloat16 once. Results are the same bit for bit from run to run. Every value of an expert id is
    safe. All tensors live on one device, cpu or cuda (Hopper), and are contiguous unless told otherwise.

    Args:
        topk_ids: int32 [T, K], packed: the upper 16 bits are the expert id (signed, -1 is padding), the lower 16 bits
            are those of the bfloat16 weight. Or a pair (topk_ids, topk_weights): int32 [T, K] plain ids, and bfloat16
            or float32 [T, K] weights, used as they are.
        routing_bias: None, or bfloat16 or float32 [E]; checked, then unused, since the tokens are routed already.
        hidden_states: float8_e4m3fn [T, H] with its scale; or bfloat16 [T, H], quantised per 1x128 (MxFp8: 1x32)
            inside the call.
        hidden_states_scale: float32 [H/128, T], any strides (`scale.t()` of a [T, H/128] is read in place, not copied);
            None with bfloat16 hidden_states. The value of an element is its FP8 number times its scale. MxFp8: E8M0
            bytes (b is 2^(b-127), 255 is NaN), uint8 or float8_e8m0fnu, [T, H/32] or [H/32, T], any strides; where T is
            H/32, [T, H/32].
        gemm1_weights: float8_e4m3fn [L, M, H]. Of the gated activations rows 0..I-1 are the linear ("up") half, rows
            I..2I-1 the gate half, the one that silu or gelu is applied to. Swapping the two halves is the classic
            mistake: nothing can detect it. With BlockMajorK [L, H/128, M, 128].
        gemm1_weights_scale: float32 [L, M/128, H/128], whatever the order of the weights in memory. MxFp8: E8M0 bytes
            [L, M, H/32], or one for each 32x32 block, [L, M/32, H/32].
        gemm2_weights: float8_e4m3fn [L, H, I]. With BlockMajorK [L, I/128, H, 128].
        gemm2_weights_scale: float32 [L, H/128, I/128], likewise. MxFp8: [L, H, I/32], or [L, H/32, I/32] as gemm1's.
        num_experts: E, of the whole model, at most 32767.
        top_k: K, at most min(E, 32).
        n_group: number of expert groups, a divisor of E, with routing_method_type DeepSeekV3; else None, 0 or 1.
            Checked, then unused.
        topk_group: number of chosen groups, in [1, n_group], likewise.
        intermediate_size: I, a multiple of 128 (as H must be).
        local_expert_offset: id of the first expert whose weights are given, in [0, E - L].
        local_num_experts: L.
        routed_scaling_factor: None or a finite number, unused: the weights of topk_ids are taken as they are.
        routing_method_type: RoutingMethodType, unused but for the check of n_group and topk_group.
        use_shuffled_weight: True when the rows of both weights are in the order of `shuffle_matrix_a(weights, 64)`.
            MxFp8: of `shuffle_matrix_a(weights, 128)`, gated gemm1_weights after `reorder_rows_for_gated_act_gemm`,
            and their scales likewise of `shuffle_matrix_sf_a(scales, 128)`; scales for 32x32 blocks stay as they are.
        weight_layout: WeightLayout.MajorK, or BlockMajorK, the order of `convert_to_block_layout(weights, 128)`, with
            or without shuffled rows. Weights are read in place in every order. MxFp8 has MajorK only.
        do_finalize: True returns the tensor out; False stops before the weighted sum.
        enable_pdl: None or True: a kernel on a GPU may start while the one before it ends (programmatic dependent
            launch). False: one after the other. Same bits.
        gemm1_lora_delta: None, or bfloat16 [T, K, M], added to the result of the first GEMM before the activation: row
            [t, k] belongs to slot k of token t, unweighted, its columns in the order of unshuffled gemm1_weights' rows.
        output: None, or bfloat16 [T, H], contiguous, on the same device: written in place and returned.
        tune_max_num_tokens: a positive integer, unused: there is no autotuner.
        fp8_quantization_type: Fp8QuantizationType.DeepSeekFp8 or MxFp8. `prepare_mxfp8_weights` makes weights
            for DeepSeekFp8 of those for MxFp8, which is faster on a GPU where tokens are many.
        activation_type: ActivationType.Swiglu: gate * sigmoid(alpha * gate) * (up + beta), after
            gate = min(gate, limit) and up = clamp(up, -limit, limit). Geglu: up * gelu(gate), with the exact erf.
            Relu2: max(x, 0)^2. Identity: x.
        gemm1_alpha: None (1), or float32 [L], one for each local expert; of Swiglu only.
        gemm1_beta: None (0), or float32 [L], likewise.
        gemm1_clamp_limit: None (no clamp), or float32 [L], likewise.
        batch_invariant: True: a token's bits do not depend on the other tokens of the call, on their number or on the
            kernels that a number of tokens would get. On a GPU calls of few tokens are slower for it; the CPU does so
            anyway. None: as environment variable JAX_MOE_BATCH_INVARIANT says at the call (1 or true), in compiled
            graphs when they are traced.

    Enum arguments may be members, their integers, or members of the same name of another library's enum.

    Returns:
        do_finalize=True: bfloat16 [T, H], the tensor itself; with gemm1_lora_delta a list [that tensor,
        expanded_idx_to_permuted_idx, gemm1_activation_output].
        do_finalize=False: a list [gemm2_output, expert_weights, expanded_idx_to_permuted_idx], with gemm1_lora_delta
        also gemm1_activation_output.
        gemm2_output bfloat16 [T*K, H] and gemm1_activation_output uint8 [T*K, I] (float8_e4m3fn codes) have one row for
        each slot with a local expert; expanded_idx_to_permuted_idx int32 [T*K] holds the row of slot t*K + k, -1 where
        it has none. Rows that it does not name are undefined. expert_weights are those of topk_ids: bfloat16 [T, K]
        from packed ids, else the caller's own tensor.

    Raises:
        ValueError: an argument is not what is written above; the message names it, the expected and the given.
        NotImplementedError: what this version, build or device does not have, and tensors that require grad while grad
            mode is on: there is no backward.
    """
    ids, weights = (topk_ids, None) if isinstance(topk_ids, torch.Tensor) else _pair(topk_ids)
    given = (
        ids,
        hidden_states,
        hidden_states_scale,
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        weights,
        gemm1_lora_delta,
        gemm1_alpha,
        gemm1_beta,
        gemm1_clamp_limit,
        output,
        routing_bias,
    )
    options = (
        num_experts,
        top_k,
        n_group,
        topk_group,
        intermediate_size,
        local_expert_offset,
        local_num_experts,
        routed_scaling_factor,
        routing_method_type,
        use_shuffled_weight,
        weight_layout,
        enable_pdl,
        tune_max_num_tokens,
        fp8_quantization_type,
        activation_type,
        do_finalize,
        batch_invariant,
    )
    if torch.compiler.is_compiling():
        return _call(given, options)
    result = CALLS.run(given, options)
    if result is None:
        result = _call(given, options)
        CALLS.keep(given, options, lambda: _plan(given, options))
    elif output is not None:
        increment_version(output)
    return result


def _call(given: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
    """The function on tensors in the order of GIVEN and options in that of _checked_options, through an op."""
    tensors, optional, output, options = _checked(given, values)
    if not options[DO_FINALIZE]:
        gemm2_output, *rest = ops.listed(*tensors, options, **optional)
        if "topk_weights" in optional:
            return [gemm2_output, optional["topk_weights"], *rest]
        return [gemm2_output, *rest]
    if "gemm1_lora_delta" in optional:
        if output is None:
            return ops.listed(*tensors, options, **optional)
        return [output, *ops.lora_out(*tensors, options, output, **optional)]
    if output is None:
        return ops.finalized(*tensors, options, **optional)
    ops.finalized_out(*tensors, options, output, **optional)
    return output


def explain(*arguments: Any, num_sms: int | None = None, **options: Any) -> str:
    """What a call with these arguments would run on a GPU, as text, without running it: kernels, tiles, workspace.

    The arguments are those of `trtllm_fp8_block_scale_routed_moe`, of which only shapes, dtypes and strides are looked
    at; on any machine. num_sms: multiprocessors of the GPU; None: those of the tensors' own, 132 (H100 and H200 SXM)
    with tensors on a CPU.

    Raises what the call itself raises, and NotImplementedError where this build has no CUDA kernels.
    """
    if not (num_sms is None or (isinstance(num_sms, int) and not isinstance(num_sms, bool) and num_sms > 0)):
        raise ValueError(f"explain: num_sms must be None or a positive integer, got {num_sms!r}")
    bound = inspect.signature(trtllm_fp8_block_scale_routed_moe).bind(*arguments, **options)
    bound.apply_defaults()
    by_name = dict(bound.arguments)
    ids = by_name.pop("topk_ids")
    ids, weights = (ids, None) if isinstance(ids, torch.Tensor) else _pair(ids)
    tensors = by_name | {"topk_ids": ids, "topk_weights": weights}
    given = tuple(tensors[name] for name in GIVEN)
    values = tuple(by_name[name] for name in inspect.signature(_checked_options).parameters)
    _checked(given, values)
    if num_sms is None:
        device = tensors["hidden_states"].device
        on_gpu = device.type == "cuda"
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 132
    return native.explain(_planned(given, values).problem, num_sms)


def _checked(given: tuple[Any, ...], values: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any], Any, Any]:
    """The op's tensors, those by name, output and options, after all checks that need the caller's Python objects."""
    tensors, output, routing_bias = given[: len(TENSORS)], given[-2], given[-1]
    optional = {
        name: tensor for name, tensor in zip(OPTIONAL, given[len(TENSORS) : -2], strict=True) if tensor is not None
    }
    _check_tensors(tensors, optional, output)
    options = _options(*values)
    if options[FP8_QUANTIZATION_TYPE] == Fp8QuantizationType.MxFp8:
        tensors = tuple([_as_bytes(name, tensor) for name, tensor in zip(TENSORS, tensors, strict=True)])
    if routing_bias is not None:
        _check_routing_bias(routing_bias, options[NUM_EXPERTS], tensors[HIDDEN_STATES].device)
    if not options[DO_FINALIZE] and output is not None:
        raise ValueError(f"{FUNCTION}: output must be None with do_finalize=False, got a tensor")
    return tensors, optional, output, options


def _planned(given: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
    """ops.planned of a call that has been checked."""
    by_name = dict(zip(GIVEN, given, strict=True))
    return ops.planned([_as_bytes(name, by_name[name]) for name in ops.GIVEN], _options(*values))


def _plan(given: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
    """The plan of calls like this one, which _call has checked."""
    by_name = dict(zip(GIVEN, given, strict=True))
    call = _planned(given, values)
    apart = by_name["topk_weights"] is not None
    returned = ["topk_weights" if apart and name == "expert_weights" else name for name in call.problem.returned()]
    return repeatable(call, by_name, returned)


def _as_bytes(name: str, tensor: Any) -> Any:
    """A scale of MxFp8 in its second dtype as uint8: torch.compile fails on it in ops that write a given output."""
    if name in SCALES and tensor is not None and tensor.dtype == E8M0:
        return tensor.view(torch.uint8)
    return tensor


def _pair(topk_ids: Any) -> Any:
    if not isinstance(topk_ids, (tuple, list)) or len(topk_ids) != 2:
        given = f"{type(topk_ids).__name__}{f' of {len(topk_ids)}' if isinstance(topk_ids, (tuple, list)) else ''}"
        raise ValueError(
            f"{FUNCTION}: topk_ids must be a torch.Tensor of packed ids, (expert id << 16) | (bfloat16 bits of the "
            f"weight & 0xFFFF), or a pair (topk_ids, topk_weights) of them, got {given}"
        )
    if topk_ids[1] is None:
        _check_tensor("topk_weights", None)
    return topk_ids


def _check_tensors(tensors: tuple[Any, ...], optional: dict[str, Any], output: Any) -> None:
    no_grad = not torch.is_grad_enabled()
    for index, tensor in enumerate(tensors):
        if not (isinstance(tensor, torch.Tensor) and (no_grad or not tensor.requires_grad)):
            _check_tensor(TENSORS[index], tensor)
    for name, tensor in optional.items():
        _check_tensor(name, tensor)
    if output is not None:
        _check_tensor("output", output)
    check_device(FUNCTION, "hidden_states", tensors[HIDDEN_STATES])


def _check_tensor(name: str, tensor: Any) -> None:
    if tensor is None and name == "hidden_states_scale":
        return
    check_tensor(FUNCTION, name, tensor)


def _check_routing_bias(bias: Any, num_experts: int, device: torch.device) -> None:
    _check_tensor("routing_bias", bias)
    if bias.device != device:
        raise ValueError(f"{FUNCTION}: routing_bias must be on {device} like hidden_states, got {bias.device}")
    if bias.dtype not in (torch.bfloat16, torch.float32) or tuple(bias.shape) != (num_experts,):
        raise ValueError(
            f"{FUNCTION}: routing_bias must be None, bfloat16 or float32 [num_experts] = [{num_experts}], "
            f"got {Array(tuple(bias.shape), str(bias.dtype).removeprefix('torch.'))}"
        )


def _options(*values: Any) -> tuple[int, ...]:
    """The integers of the op. Eager calls repeat the same values, so these are looked up."""
    *others, batch_invariant = values
    values = (*others, resolve_batch_invariant(FUNCTION, batch_invariant))
    if torch.compiler.is_compiling():  # values may be symbolic there, and compiled code does not come back here
        return _checked_options(*values)
    try:
        return _known_options(*values)
    except TypeError:  # a value that cannot be hashed is none of the right ones; say which
        return _checked_options(*values)


def _checked_options(
    num_experts: Any,
    top_k: Any,
    n_group: Any,
    topk_group: Any,
    intermediate_size: Any,
    local_expert_offset: Any,
    local_num_experts: Any,
    routed_scaling_factor: Any,
    routing_method_type: Any,
    use_shuffled_weight: Any,
    weight_layout: Any,
    enable_pdl: Any,
    tune_max_num_tokens: Any,
    fp8_quantization_type: Any,
    activation_type: Any,
    do_finalize: Any,
    batch_invariant: bool,
) -> tuple[int, ...]:
    check_scaling_factor(FUNCTION, routed_scaling_factor)
    if not (enable_pdl is None or isinstance(enable_pdl, bool)):
        raise _invalid("enable_pdl", "None, True or False", enable_pdl)
    if _integer("tune_max_num_tokens", tune_max_num_tokens) < 1:
        raise _invalid("tune_max_num_tokens", "a positive integer", tune_max_num_tokens)
    return (
        _integer("num_experts", num_experts),
        _integer("top_k", top_k),
        0 if n_group is None else _integer("n_group", n_group),
        0 if topk_group is None else _integer("topk_group", topk_group),
        _integer("intermediate_size", intermediate_size),
        _integer("local_expert_offset", local_expert_offset),
        _integer("local_num_experts", local_num_experts),
        _member("routing_method_type", RoutingMethodType, routing_method_type),
        _flag("use_shuffled_weight", use_shuffled_weight),
        _member("weight_layout", WeightLayout, weight_layout),
        _member("fp8_quantization_type", Fp8QuantizationType, fp8_quantization_type),
        _member("activation_type", ActivationType, activation_type),
        _flag("do_finalize", do_finalize),
        int(batch_invariant),
        int(enable_pdl is not False),
    )


_known_options = functools.lru_cache(maxsize=1024, typed=True)(_checked_options)  # typed: True is no number of experts


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise _invalid(name, "an integer", value)
    return int(value)


def _flag(name: str, value: Any) -> int:
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise _invalid(name, "True or False", value)
    return int(value)


def _member(name: str, kind: type[enum.IntEnum], value: Any) -> int:
    """Members become integers by name, since other libraries number them otherwise; the op checks the integers."""
    if not isinstance(value, enum.Enum):
        return _integer(name, value)
    member = getattr(kind, value.name, None)  # what parse_enum does, in words that old torch.compile can trace
    return member.value if isinstance(member, kind) else parse_enum(FUNCTION, name, kind, value).value


def _invalid(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{FUNCTION}: {name} must be {expected}, got {got!r}")
