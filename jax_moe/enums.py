"""The enums of the documented signature and how arguments become their members.

Values are FlashInfer's. Import neither jax nor torch here.
"""

from __future__ import annotations

import enum
import numbers
from typing import TypeVar


class RoutingMethodType(enum.IntEnum):
    """How routing weights were (or are to be) computed from logits."""

    Default = 0
    Renormalize = 1
    DeepSeekV3 = 2
    Llama4 = 3
    RenormalizeNaive = 4
    TopK = 5
    SigmoidRenorm = 6
    MiniMax2 = 7
    Sigmoid = 8
    Unspecified = 9


class WeightLayout(enum.IntEnum):
    """Order of a weight matrix in memory: MajorK is [experts, rows, K], BlockMajorK is [experts, K/128, rows, 128]."""

    MajorK = 0
    MajorMn = 1
    BlockMajorK = 2


class Fp8QuantizationType(enum.IntEnum):
    """DeepSeekFp8: float32 scales, 1x128 for activations and 128x128 for weights. MxFp8: E8M0 scales, 1x32."""

    NoneFp8 = 0
    DeepSeekFp8 = 1
    MxFp8 = 2


class ActivationType(enum.IntEnum):
    """Function between the two GEMMs. Swiglu and Geglu are gated, Relu2 and Identity are not."""

    Swiglu = 3
    Geglu = 4
    Relu2 = 6
    Identity = 7


class DataType(enum.IntEnum):
    """Element types that a problem may choose between (ffi/moe.h: DataType)."""

    NONE = 0
    FLOAT8_E4M3 = 1
    BFLOAT16 = 2
    FLOAT32 = 3


EnumType = TypeVar("EnumType", bound=enum.IntEnum)


def parse_enum(function: str, argument: str, kind: type[EnumType], value: object) -> EnumType:
    """`value` (a member, a member's integer, or another library's member of the same name) as a member of `kind`."""
    if isinstance(value, kind):
        return value
    if isinstance(value, enum.Enum) and value.name in kind.__members__:
        return kind[value.name]
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and not isinstance(value, enum.Enum):
        try:
            return kind(int(value))
        except ValueError:
            pass
    names = ", ".join(f"{member.name}={member.value}" for member in kind)
    raise ValueError(f"{function}: {argument} must be one of {kind.__name__} ({names}), got {value!r}")
