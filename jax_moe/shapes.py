"""Layer shapes of real models, by the names that benchmarks and tests use."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Sizes of one mixture-of-experts layer as one device sees it."""

    name: str
    title: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    local_num_experts: int
    local_expert_offset: int


SHAPES: dict[str, LayerShape] = {
    shape.name: shape
    for shape in (
        LayerShape("dsv3_ep8", "DeepSeek-V3, one of 8 expert-parallel devices", 7168, 2048, 256, 8, 32, 96),
        LayerShape("dsv3_e32", "DeepSeek-V3 with 32 experts, all local", 7168, 2048, 32, 8, 32, 0),
        LayerShape("dsv3_e256", "DeepSeek-V3, all experts local", 7168, 2048, 256, 8, 256, 0),
        LayerShape("qwen3_30b", "Qwen3-30B-A3B, all experts local", 2048, 768, 128, 8, 128, 0),
        LayerShape("qwen3_235b", "Qwen3-235B-A22B, all experts local", 4096, 1536, 128, 8, 128, 0),
    )
}
