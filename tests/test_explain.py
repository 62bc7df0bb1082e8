"""explain in both front ends: the text of the very problem that a call would be, without arrays' contents or a run."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import cases
import jax
import jax_calls
import ml_dtypes
import numpy as np
import pytest
from cases import CASES, Case

import jax_moe
from jax_moe import native

NAMES = "t1 t129 bf16_t53 unfinalized_window lora apart_f32 blocked_shuffled alpha_beta_clamp relu2 mx mx_grid".split()
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=lambda case: case.name)


needs_kernels = pytest.mark.usefixtures("cuda_build")


def shape_of(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def arguments(case: Case, **changes: Any) -> dict[str, Any]:
    """Of the JAX function, shapes in the place of arrays."""
    given = jax_calls.arguments({name: array for name, array in cases.arrays(case).items() if array is not None})
    shapes = jax.tree.map(shape_of, given)
    options = {"num_experts": case.experts, "local_expert_offset": case.offset, **case.options}
    return {"hidden_states_scale": None, **shapes, **options, **changes}


def layer(tokens: Any, hidden: int, inter: int, experts: int, top_k: int, mx: bool = False) -> dict[str, Any]:
    """Arguments of the JAX function for a layer without window, its arrays as shapes alone."""
    e4m3, scale_dtype = ml_dtypes.float8_e4m3fn, np.uint8 if mx else np.float32
    rows, columns = (1, 32) if mx else (128, 128)
    shapes = {
        "topk_ids": ((tokens, top_k), np.int32),
        "hidden_states": ((tokens, hidden), ml_dtypes.bfloat16),
        "gemm1_weights": ((experts, 2 * inter, hidden), e4m3),
        "gemm1_weights_scale": ((experts, 2 * inter // rows, hidden // columns), scale_dtype),
        "gemm2_weights": ((experts, hidden, inter), e4m3),
        "gemm2_weights_scale": ((experts, hidden // rows, inter // columns), scale_dtype),
    }
    kind = jax_moe.Fp8QuantizationType.MxFp8 if mx else jax_moe.Fp8QuantizationType.DeepSeekFp8
    given = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    return {**given, "hidden_states_scale": None, "num_experts": experts, "fp8_quantization_type": kind}


def large(tokens: Any) -> dict[str, Any]:
    """Qwen3-30B-A3B's layer."""
    return layer(tokens, 2048, 768, 128, 8)


@needs_kernels
@some_cases
@pytest.mark.parametrize("num_sms", [78, 132])
def test_jax_explains_the_problem_of_the_call(case: Case, num_sms: int) -> None:
    problem = cases.problem(case, cases.arrays(case))
    assert jax_moe.explain(**arguments(case), num_sms=num_sms) == native.explain(problem, num_sms)


@needs_kernels
def test_kernels_and_workspace_go_by_the_number_of_tokens() -> None:
    texts = {tokens: jax_moe.explain(**large(tokens)) for tokens in (1, 64, 8192, 16384)}
    assert "decode_gemm" in texts[1]
    assert all("grouped_gemm" in texts[tokens] for tokens in (64, 8192, 16384))
    assert "one half of the columns after the other" in texts[16384]
    assert "one half of the columns after the other" not in texts[8192]
    nbytes = {tokens: int(text.split("workspace: ")[1].split()[0]) for tokens, text in texts.items()}
    assert nbytes[1] < nbytes[64] < nbytes[8192] < nbytes[16384] < 1.5 * nbytes[8192]
    assert "batch invariant" in jax_moe.explain(**large(1), batch_invariant=True)


def test_jax_explain_refuses_what_the_call_refuses() -> None:
    wrong = arguments(CASES["t7"], gemm2_weights_scale=jax.ShapeDtypeStruct((8, 2, 2), np.float16))
    with pytest.raises(ValueError, match="fp8_block_scale_routed_moe: gemm2_weights_scale must be"):
        jax_moe.explain(**wrong)
    with pytest.raises(TypeError, match="num_experts"):
        jax_moe.explain(**{name: value for name, value in arguments(CASES["t7"]).items() if name != "num_experts"})
    for num_sms in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="explain: num_sms must be a positive integer"):
            jax_moe.explain(**arguments(CASES["t7"]), num_sms=num_sms)  # type: ignore[arg-type]


def test_jax_explain_refuses_a_symbolic_number_of_tokens() -> None:
    from jax import export

    (tokens,) = export.symbolic_shape("tokens")
    with pytest.raises(ValueError, match="explain: num_tokens must be known, got tokens"):
        jax_moe.explain(**large(tokens))


def test_a_build_without_kernels_says_so() -> None:
    if native.load().build_info()["cuda"]:
        pytest.skip("this build has CUDA kernels")
    with pytest.raises(NotImplementedError, match="this build has no CUDA kernels"):
        jax_moe.explain(**arguments(CASES["t7"]))


@needs_kernels
@some_cases
def test_torch_explains_the_problem_of_the_call(case: Case) -> None:
    pytest.importorskip("torch", reason="the torch facade needs torch")
    import torch_calls

    from torch_facade import explain

    given = torch_calls.arguments(case)
    expected = cases.problem(case, cases.arrays(case))
    assert explain(**given) == explain(**given, num_sms=132) == native.explain(expected, 132)
    assert explain(**given, num_sms=78) == native.explain(expected, 78)


def test_torch_explain_refuses_what_the_call_refuses() -> None:
    torch = pytest.importorskip("torch", reason="the torch facade needs torch")
    import torch_calls

    from torch_facade import explain

    given = torch_calls.arguments(CASES["t7"])
    with pytest.raises(ValueError, match="trtllm_fp8_block_scale_routed_moe: intermediate_size must be"):
        explain(**given | {"intermediate_size": 64})
    with pytest.raises(ValueError, match="output must be None with do_finalize=False"):
        explain(**given | {"do_finalize": False, "output": torch.empty(7, 256, dtype=torch.bfloat16)})
    for num_sms in (0, True, "many"):
        with pytest.raises(ValueError, match="explain: num_sms must be None or a positive integer"):
            explain(**given, num_sms=num_sms)


@needs_kernels
def test_few_rows_an_expert_take_small_blocks() -> None:
    """Of 8 T slots an expert of 128 can expect T / 16: 28 of them are the most for blocks of 32 rows."""
    texts = {tokens: jax_moe.explain(**large(tokens)) for tokens in (16, 448, 449)}
    assert all("grouped_gemm_few_pairs_sm90" in texts[t] and "8 to 32 tokens" in texts[t] for t in (16, 448))
    assert "grouped_gemm_sm90" in texts[449] and "16 to 128 tokens" in texts[449]


@needs_kernels
def test_l2_reads_more_at_a_time_where_row_blocks_share_weights() -> None:
    """1024 tokens with 8 of 128 experts each: 64 rows an expert, of which few have two row blocks."""
    texts = {tokens: jax_moe.explain(**large(tokens)) for tokens in (16, 1024, 1025)}
    assert all("128 bytes into L2 at a time" in texts[t] for t in (16, 1024))
    assert "256 bytes into L2 at a time" in texts[1025]


@needs_kernels
def test_long_rows_of_weights_that_are_read_once_come_in_pairs_of_k_blocks() -> None:
    """Up to 64 rows an expert; but not in BlockMajorK, where a K block's rows are neighbours."""
    text = "weights of two K blocks together"
    assert text in jax_moe.explain(**layer(64, 2048, 384, 32, 8))  # of 32 rows, from 16 K blocks on
    assert text not in jax_moe.explain(**layer(64, 1920, 384, 32, 8))
    assert text not in jax_moe.explain(**layer(64, 2944, 384, 32, 8, mx=True))  # all others, from 24
    assert text not in jax_moe.explain(**layer(256, 2944, 384, 32, 8))
    assert text in jax_moe.explain(**layer(64, 3072, 384, 32, 8, mx=True))
    assert text in jax_moe.explain(**layer(256, 3072, 384, 32, 8))
    assert text not in jax_moe.explain(**layer(257, 3072, 384, 32, 8))
    case = CASES["h3072_t33"]
    assert text in jax_moe.explain(**arguments(case))
    assert text not in jax_moe.explain(**arguments(dataclasses.replace(case, **cases.BLOCKED)))


@needs_kernels
def test_what_a_call_writes_for_itself_stays_in_l2_where_it_fits() -> None:
    """Up to 40 MB of h and y2, or of h; not where h is read twice, nor where y2 is a result. Values are twice h."""
    both, one = "h and y2 stay in L2", "slot order, h stays in L2"
    assert both in jax_moe.explain(**layer(1024, 2048, 768, 128, 8))  # 39.8 MB
    assert one in jax_moe.explain(**layer(1030, 2048, 768, 128, 8))
    assert one in jax_moe.explain(**layer(1024, 2048, 768, 128, 8, mx=True))  # 46 MB
    assert one in jax_moe.explain(**layer(6510, 2048, 768, 128, 8))
    assert "stay" not in jax_moe.explain(**layer(6511, 2048, 768, 128, 8))
    assert "stay" not in jax_moe.explain(**layer(8193, 2048, 128, 128, 8))
    case = dataclasses.replace(CASES["t53"], x_dtype="bfloat16", tokens=200, name="")
    assert both in jax_moe.explain(**arguments(case))
    assert "stay" not in jax_moe.explain(**arguments(dataclasses.replace(case, do_finalize=False)))


@needs_kernels
def test_one_launch_routes_up_to_8192_slots() -> None:
    """Of at most 1024 experts, else up to 1024."""
    assert "8 x 1024 indices, 1 launch(es)" in jax_moe.explain(**layer(1024, 1024, 512, 128, 8))
    assert "2 launch(es)" in jax_moe.explain(**layer(1025, 1024, 512, 128, 8))
    assert "1 launch(es)" in jax_moe.explain(**layer(128, 1024, 512, 1025, 8))
    assert "2 launch(es)" in jax_moe.explain(**layer(129, 1024, 512, 1025, 8))


@needs_kernels
def test_many_bytes_of_weights_take_the_grouped_kernels() -> None:
    """Four tokens, 32 slots: few for the decode kernels, unless experts are of 44 MB each. Fewer are many where
    tokens are two tiles: 16 slots as well. MxFp8 counts 64 slots alone up to eight tokens, one tile.
    """
    assert "decode_gemm" in jax_moe.explain(**layer(4, 1024, 512, 32, 8))
    assert "decode_gemm" in jax_moe.explain(**layer(2, 7168, 2048, 32, 8))
    assert "grouped_gemm" in jax_moe.explain(**layer(3, 7168, 2048, 32, 8))
    assert "grouped_gemm" in jax_moe.explain(**layer(4, 7168, 2048, 32, 8))
    assert "decode_gemm" in jax_moe.explain(**layer(8, 7168, 2048, 128, 2))
    assert "decode_gemm" in jax_moe.explain(**layer(8, 7168, 2048, 32, 8, mx=True))
    assert "grouped_gemm" in jax_moe.explain(**layer(8, 7168, 2048, 32, 9, mx=True))
    assert "decode_gemm" in jax_moe.explain(**layer(9, 1024, 512, 128, 1))
    assert "grouped_gemm" in jax_moe.explain(**layer(16, 7168, 2048, 128, 1))


@needs_kernels
def test_a_window_of_experts_is_part_of_the_choice() -> None:
    """Eight of 64 experts: an eighth of the slots is expected, few enough for the decode kernels."""
    case = dataclasses.replace(CASES["t1"], name="", tokens=16, hidden=1024, inter=512, experts=64, top_k=8)
    whole, window = (jax_moe.explain(**arguments(c)) for c in (case, dataclasses.replace(case, window=(8, 8))))
    assert "grouped_gemm" in whole
    assert "decode_gemm" in window


SIZES = (128, 384, 512, 768, 1024, 1536, 2048, 2304, 4096, 7168)


@needs_kernels
@pytest.mark.parametrize("mx", [False, True], ids=["DeepSeekFp8", "MxFp8"])
def test_rings_and_buffers_of_small_calls_are_multiples_of_the_teams(mx: bool) -> None:
    """Else a warp would take a phase of a barrier that only others have waited for, for the one after it."""
    teams_seen = set()
    for hidden, inter, tokens, num_sms in itertools.product(SIZES, SIZES, (1, 3, 6, 8, 16), (78, 132)):
        text = jax_moe.explain(**layer(tokens, hidden, inter, 16, 2, mx), num_sms=num_sms)
        if "decode_gemm" not in text:
            continue
        (stages1, teams1), (stages2, teams2) = re.findall(r"ring of (\d+) x \d+ bytes for (\d+) teams", text)
        (buffers,) = re.findall(r"h of (\d+) experts", text)
        assert int(stages1) >= int(teams1) and int(stages1) % int(teams1) == 0, text
        assert int(stages2) >= int(teams2) and int(stages2) % int(teams2) == 0, text
        assert int(teams2) == 2 or int(buffers) % int(teams2) == 0, text
        teams_seen.add(int(teams2))
    assert teams_seen >= {2, 4, 8}
