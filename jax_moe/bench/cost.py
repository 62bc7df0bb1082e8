"""What a call must move and compute at least, and the time that a device's ceilings allow for it (the roofline)."""

from __future__ import annotations

import dataclasses

from ..problem import SCALE_BLOCK
from ..shapes import LayerShape


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one call. active_experts and local_slots (token x top_k pairs with a local expert) may be means."""

    active_experts: float
    local_slots: float
    bytes: float
    flops: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device: the two that bound a call, and all that was measured, by name with units."""

    bytes_per_second: float
    flops_per_second: float
    measured: dict[str, float]

    def seconds(self, cost: Cost) -> float:
        """The roofline: no call of this cost is faster."""
        return max(cost.bytes / self.bytes_per_second, cost.flops / self.flops_per_second)


def expert_bytes(shape: LayerShape) -> float:
    """One expert's weights in float8 and their float32 scales."""
    weights = 3 * shape.hidden_size * shape.intermediate_size
    return weights + 4 * weights / SCALE_BLOCK**2


def call_cost(shape: LayerShape, tokens: int, active_experts: float, local_slots: float, bf16_input: bool) -> Cost:
    """Active experts' weights once, hidden states once, output once; 6 H I operations a local slot."""
    elements = tokens * shape.hidden_size
    x_bytes = 2 * elements if bf16_input else elements + 4 * elements / SCALE_BLOCK
    total = active_experts * expert_bytes(shape) + x_bytes + 2 * elements
    return Cost(active_experts, local_slots, total, 6 * shape.hidden_size * shape.intermediate_size * local_slots)
