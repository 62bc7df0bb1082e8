"""jax_moe/bench/layouts.py: the layouts that benchmarks compare hold the same values, and calls take them all."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch_facade as facade  # noqa: E402
from jax_moe.bench.layouts import LAYOUTS, weight_layouts  # noqa: E402

TOKENS, HIDDEN, INTER, EXPERTS, TOP_K = 5, 256, 384, 4, 2


def weights() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, rows, columns in (("gemm1_weights", 2 * INTER, HIDDEN), ("gemm2_weights", HIDDEN, INTER)):
        made[name] = torch.randn((EXPERTS, rows, columns), generator=generator).to(torch.float8_e4m3fn)
        made[f"{name}_scale"] = torch.rand((EXPERTS, rows // 128, columns // 128), generator=generator) / 16
    return made


def output(of: dict[str, Any], options: dict[str, Any]) -> Any:
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(TOKENS * TOP_K, dtype=torch.int32).view(TOKENS, TOP_K) % EXPERTS << 16 | 0x3F00  # weights 0.5
    return facade.trtllm_fp8_block_scale_routed_moe(
        **{"topk_ids": ids, "routing_bias": None, "hidden_states_scale": None, **of, **options},
        hidden_states=torch.randn((TOKENS, HIDDEN), generator=generator).to(torch.bfloat16),
        **{"num_experts": EXPERTS, "top_k": TOP_K, "n_group": None, "topk_group": None, "intermediate_size": INTER},
        **{"local_expert_offset": 0, "local_num_experts": EXPERTS, "routed_scaling_factor": None},
    )


def test_every_layout_gives_what_its_format_gives() -> None:
    outputs = {name: output(*layout) for name, layout in weight_layouts(weights()).items()}
    assert list(outputs) == list(LAYOUTS)
    same = {
        "plain": ("shuffled", "BlockMajorK", "shuffled BlockMajorK"),
        "MxFp8 1x32": ("MxFp8 shuffled",),
    }
    for name, others in same.items():
        for other in others:
            assert torch.equal(outputs[name], outputs[other]), (name, other)
    plain = outputs["plain"].float()
    for name in ("MxFp8 1x32", "MxFp8 prepared"):  # the weights rounded once more
        assert (outputs[name].float() - plain).norm() < 0.1 * plain.norm(), name
    assert outputs["MxFp8 32x32"].isfinite().all()
