"""The cases of cases.py as calls of the torch facade."""

from __future__ import annotations

import enum
from typing import Any

import cases
import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from jax_moe.problem import E8M0
from torch_facade import ActivationType, Fp8QuantizationType, RoutingMethodType, WeightLayout
from torch_facade import trtllm_fp8_block_scale_routed_moe as function

# The arguments without a default, in order.
POSITIONAL = (
    "topk_ids routing_bias hidden_states hidden_states_scale gemm1_weights gemm1_weights_scale gemm2_weights "
    "gemm2_weights_scale num_experts top_k n_group topk_group intermediate_size local_expert_offset local_num_experts "
    "routed_scaling_factor"
).split()
TENSORS = tuple(name for name in POSITIONAL[:8] if name != "routing_bias")
# What is returned, by (do_finalize, gemm1_lora_delta given); one name: the tensor itself, else a list.
RETURNED = {
    (True, False): ("output",),
    (True, True): ("output", "expanded_idx_to_permuted_idx", "gemm1_activation_output"),
    (False, False): ("gemm2_output", "expert_weights", "expanded_idx_to_permuted_idx"),
    (False, True): ("gemm2_output", "expert_weights", "expanded_idx_to_permuted_idx", "gemm1_activation_output"),
}


class OtherActivation(enum.Enum):
    """Another library's names with other numbers."""

    Swiglu = 40
    Identity = 9
    Silu = 2


class OtherQuantization(enum.IntEnum):
    MxFp8 = 1
    DeepSeekFp8 = 2


# Ways to say the defaults.
SPELLINGS: list[dict[str, Any]] = [
    {"activation_type": 3},
    {"activation_type": ActivationType.Swiglu},
    {"activation_type": OtherActivation.Swiglu},
    {"fp8_quantization_type": 1},
    {"fp8_quantization_type": Fp8QuantizationType.DeepSeekFp8},
    {"fp8_quantization_type": OtherQuantization.DeepSeekFp8},
    {"weight_layout": WeightLayout.MajorK},
    {"routing_method_type": RoutingMethodType.Renormalize},
    {"use_shuffled_weight": 0},
    {"do_finalize": 1},
]


def tensor(array: NDArray) -> torch.Tensor:
    """A torch copy of a numpy array, of the same dtype and strides."""
    bits, dtype = {
        "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
        "bfloat16": (np.int16, torch.bfloat16),
        E8M0: (np.uint8, getattr(torch, E8M0, None)),
    }.get(array.dtype.name, (array.dtype, None))
    source = torch.from_numpy(array.view(bits).copy())
    strides = tuple(stride // array.itemsize for stride in array.strides)
    result = torch.empty_strided(array.shape, strides, dtype=source.dtype).copy_(source)
    return result if dtype is None else result.view(dtype)


def array(given: torch.Tensor) -> NDArray:
    """The reverse, for results."""
    if given.dtype == torch.bfloat16:
        return given.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return given.numpy()


def arguments(case: cases.Case, **changes: Any) -> dict[str, Any]:
    """Every argument without a default, by name, and what the case's options add; `changes` replace or add some."""
    inputs: dict[str, Any] = {
        name: None if given is None else tensor(given) for name, given in cases.arrays(case).items()
    }
    if "topk_weights" in inputs:
        inputs["topk_ids"] = (inputs["topk_ids"], inputs.pop("topk_weights"))
    return inputs | {
        "routing_bias": None,
        "num_experts": case.experts,
        "top_k": case.top_k,
        "n_group": None,
        "topk_group": None,
        "intermediate_size": case.inter,
        "local_expert_offset": case.offset,
        "local_num_experts": case.local,
        "routed_scaling_factor": None,
        **case.options,
        **changes,
    }


def call(case: cases.Case, **changes: Any) -> Any:
    return function(**arguments(case, **changes))


def named(case: cases.Case, result: Any) -> dict[str, torch.Tensor]:
    """The results by name. Fails when they are not of the form that is documented."""
    names = RETURNED[case.do_finalize, case.lora]
    if len(names) == 1:
        assert isinstance(result, torch.Tensor)
        return {"output": result}
    assert type(result) is list and len(result) == len(names)
    return dict(zip(names, result, strict=True))


def defined(case: cases.Case, result: Any) -> dict[str, torch.Tensor]:
    """The results by name without the rows that the map does not name: those are the last ones."""
    by_name = named(case, result)
    if "expanded_idx_to_permuted_idx" in by_name:
        rows = int((by_name["expanded_idx_to_permuted_idx"] >= 0).sum())
        for name in ("gemm2_output", "gemm1_activation_output"):
            if name in by_name:
                by_name[name] = by_name[name][:rows]
    return by_name
