"""What a process sees of the torch facade: which modules it imports, and that it and the JAX function are one op."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the torch facade needs torch")

TESTS = Path(__file__).parent

NO_JAX = """
import sys
import cases, torch_calls
for name in ("t7", "unfinalized", "bf16_t7", "lora_unfinalized", "apart_f32", "blocked_shuffled"):
    torch_calls.call(cases.CASES[name])
found = sorted(name for name in sys.modules if name.partition(".")[0] in ("jax", "jaxlib") or name == "jax_moe.moe")
assert not found, found
"""

BOTH_NAMES = (
    "t0 t1 t7 e128 window_1_2 bf16_t53 scale_token_major_t7 unfinalized_window apart_f32 apart_unfinalized_t0 lora "
    "lora_unfinalized alpha_beta_clamp geglu relu2 identity shuffled blocked_shuffled"
).split()
# {imports} is one order of the two; both run the cases, interleaved, on one compiled library.
BOTH = """
{imports}
import cases, compare, numpy as np, torch, torch_calls
for name in {names}:
    case = cases.CASES[name]
    given = cases.arrays(case)
    if "topk_weights" in given:
        given["topk_ids"] = (given["topk_ids"], given.pop("topk_weights"))
    from_torch = torch_calls.defined(case, torch_calls.call(case))
    from_jax = jax_moe.fp8_block_scale_routed_moe(
        **given, **case.options, num_experts=case.experts, local_expert_offset=case.offset
    )
    if isinstance(from_jax, (tuple, list)):
        from_jax = list(from_jax)[: len(from_torch)]  # gemm1_activation_scale follows in JAX
    from_jax = torch_calls.defined(case, from_jax) if isinstance(from_jax, list) else dict(output=from_jax)
    for key, t in from_torch.items():
        t, j = torch_calls.array(t), np.asarray(from_jax[key])
        assert (t.shape, t.dtype) == (j.shape, j.dtype), (name, key)
        assert t.tobytes() == j.tobytes(), (name, key)
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=TESTS, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_jax_is_never_imported() -> None:
    run(NO_JAX)


def test_importing_the_facade_does_not_load_the_library() -> None:
    """Tracing with fake tensors works where the library does not."""
    run("import sys, torch_facade; assert 'jax_moe._native' not in sys.modules")


@pytest.mark.parametrize("first", ["torch", "jax"])
def test_torch_and_jax_agree_bit_for_bit(first: str) -> None:
    pytest.importorskip("jax", reason="compares with the JAX function")
    imports = ["import torch_facade", "import jax, jax_moe, jax_moe.moe"]
    run(BOTH.format(imports="\n".join(imports if first == "torch" else imports[::-1]), names=BOTH_NAMES))
