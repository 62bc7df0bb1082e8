"""The program jax-moe: info anywhere, demo and bench on a CPU with tiny layers, and what bench computes with."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_moe import demo, info, native, reference
from jax_moe.__main__ import main
from jax_moe.bench import command, cost, cpu, machine, workload
from jax_moe.bench.workload import Cell, parse_shape
from jax_moe.shapes import SHAPES

TINY = "256x128x8x2"
FRONT_ENDS = [name for name in ("torch", "jax") if importlib.util.find_spec(name)]
MAKE_LAYER = functools.cache(demo.make_layer)
needs_jax = pytest.mark.skipif("jax" not in FRONT_ENDS, reason="needs jax")
needs_front_end = pytest.mark.skipif(not FRONT_ENDS, reason="needs jax or torch")


@pytest.fixture
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "COPY_BYTES", 4 << 20)
    monkeypatch.setattr(cpu, "MATMUL_SIZE", 256)


# ---- info ------------------------------------------------------------------------------------------------------------
def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def test_info_is_json_in_a_new_process() -> None:
    done = run_python("-m", "jax_moe", "info", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["build"]["error"] == "" and report["build"]["ffi_api"]
    assert report["devices"][0]["kind"] == "cpu" and report["devices"][0]["cores"] >= 1
    assert report["usable"]["cpu_backend"] == {"usable": True, "reason": ""}
    for found in report["usable"].values():
        assert found["usable"] == (found["reason"] == "")


def test_info_without_jax_and_torch_says_so() -> None:
    script = (
        "import sys; sys.modules['jax'] = sys.modules['torch'] = None\n"
        "from jax_moe.__main__ import main; sys.exit(main(['info']))"
    )
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines() if line.startswith("from "))
    assert lines["from JAX"].strip().startswith("no, because")
    assert lines["from torch"].strip().startswith("no, because")


def test_info_without_the_library_gives_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> None:
        raise ImportError("the library is elsewhere\nsecond line")

    monkeypatch.setattr(native, "load", load)
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["build"]["error"] == "the library is elsewhere"
    assert report["usable"]["cpu_backend"] == {"usable": False, "reason": "the library is elsewhere"}
    assert not report["usable"]["hopper_kernels"]["usable"]
    assert main(["info"]) == 0
    assert "no, because the library is elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "error", "expected"),
    [
        ([("H100", 9, 0)], "", ""),
        ([("A100", 8, 0), ("H200", 9, 0)], "", ""),
        ([("A100", 8, 0)], "", "found: A100 (8.0)"),
        ([], "", "found: none"),
        ([], "no driver", "no driver"),
    ],
)
def test_hopper_kernels_need_a_hopper_gpu(gpus: list[tuple[str, int, int]], error: str, expected: str) -> None:
    found = [{"name": name, "major": major, "minor": minor} for name, major, minor in gpus]
    reason = info.why_no_hopper("", {"error": error, "gpus": found})
    assert reason.endswith(expected) and bool(reason) == bool(expected)


# ---- demo ------------------------------------------------------------------------------------------------------------
@needs_jax
def test_demo_prints_its_facts(small_ceilings: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", TINY, "--tokens", "5", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for fact in ("relative error (L2)", "within 0.04", "5 of 5 tokens", "us, jitted", "FLOP/s, ", "GB/s"):
        assert fact in out
    for fact in ("share of the roofline", "numpy copy", "numpy float32 matmul", "measured now"):
        assert fact in out
    assert ("bit for bit  yes" if "torch" in FRONT_ENDS else "not compared") in out


@needs_jax
def test_demo_says_that_a_cpu_gets_a_cut(small_ceilings: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", "128x128x64x2", "--tokens", "1", "--device", "cpu"]) == 0
    assert "a cut of 16 of its 64 experts" in capsys.readouterr().out


@needs_jax
@pytest.mark.parametrize(
    ("patched", "value"),
    [("error_on_a_sample", (0.05, 5)), ("error_on_a_sample", (float("nan"), 5)), ("same_bits", False)],
)
def test_demo_fails_on_an_error_or_on_other_bits(
    small_ceilings: None, monkeypatch: pytest.MonkeyPatch, patched: str, value: Any
) -> None:
    monkeypatch.setattr(demo, "make_layer", MAKE_LAYER)
    monkeypatch.setattr(demo, patched, lambda *_: value)
    monkeypatch.setattr(demo, "why_not_through", lambda *_: "")
    monkeypatch.setattr(demo, "torch_calls", lambda *_: [None])
    if patched != "same_bits":
        monkeypatch.setattr(demo, "same_bits", lambda *_: True)
    assert main(["demo", "--model", TINY, "--tokens", "5", "--device", "cpu"]) == 1


@needs_jax
@pytest.mark.parametrize("budget", [400e6, 3 * 256 * 128 * 4])
def test_demo_measures_the_error(monkeypatch: pytest.MonkeyPatch, budget: float) -> None:
    """Also with a small budget, where only the experts of a few tokens are read and get new numbers."""
    monkeypatch.setattr(demo, "REFERENCE_WEIGHTS", budget)
    shape = parse_shape("256x128x16x2")
    weights, routed = demo.make_layer(shape, 12, seed=3)
    arrays = {name: np.asarray(array) for name, array in {**weights, **routed}.items()}
    exact = reference.fp8_block_scale_routed_moe(**arrays, num_experts=16, requantize=False).output
    error, tokens = demo.error_on_a_sample(Cell(shape, 12, False), {**weights, **routed}, exact)
    assert error < 1e-6 and tokens == (12 if budget == 400e6 else 2)
    error, _ = demo.error_on_a_sample(Cell(shape, 12, False), {**weights, **routed}, 1.1 * exact)
    assert error == pytest.approx(0.1, rel=1e-4)


# ---- bench -----------------------------------------------------------------------------------------------------------
def run_bench(file: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["bench", "--device", "cpu", "--repeats", "3", "--json", str(file), *arguments])
    return status, json.loads(file.read_text())


@needs_front_end
@pytest.mark.parametrize("input_type", ["bf16", "fp8"])
def test_bench_writes_all_it_measured(
    small_ceilings: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], input_type: str
) -> None:
    status, result = run_bench(tmp_path / "b.json", "--shapes", TINY, "--tokens", "1,6", "--input", input_type)
    assert status == 0
    assert "which is a CPU" in capsys.readouterr().out
    assert result["settings"]["through"] == FRONT_ENDS and result["settings"]["input"] == input_type
    assert result["device"] and result["versions"]["jax_moe"] and "cuda" in result["driver"]
    assert set(result["ceilings"]) == {"bytes_per_second", "flops_per_second", "measured"}
    assert [cell["tokens"] for cell in result["cells"]] == [1, 6]
    for cell in result["cells"]:
        assert cell["shape"]["hidden_size"] == 256 and cell["input"] == input_type
        assert cell["local_slots"] == 2 * cell["tokens"] and 2 <= cell["active_experts"] <= 8
        assert set(cell["stages_us"]) == {"route", "permute", "gemm1", "gemm2", "finalize"}
        timings = [*cell["stages_us"].values()]
        for name in FRONT_ENDS:
            timings.append(cell["whole_us"][name]["steady"])
        for found in timings:
            assert 0 < found["fastest"] <= found["median"] <= found["slowest"] and found["samples"] == 3
        assert cell["best_us"] == min(cell["whole_us"][name]["steady"]["median"] for name in FRONT_ENDS)
        assert cell["tflops"] == pytest.approx(cell["flops"] / cell["best_us"] / 1e6)
        assert cell["gbytes_per_second"] == pytest.approx(cell["bytes"] / cell["best_us"] / 1e3)
        assert cell["share_of_roofline"] == pytest.approx(cell["roofline_us"] / cell["best_us"])
        assert cell["same_bits"] is (True if len(FRONT_ENDS) == 2 else None)


@needs_front_end
def test_bench_of_invariant_calls_leaves_out_stages_that_launch_nothing(
    small_ceilings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems: list[Any] = []
    monkeypatch.setattr(cpu.Cpu, "stages", lambda _, p: problems.append(p) or native.GEMM1 | native.GEMM2)
    status, result = run_bench(tmp_path / "b.json", "--shapes", TINY, "--tokens", "1", "--batch-invariant")
    assert status == 0 and result["settings"]["batch_invariant"]
    assert [problem.batch_invariant for problem in problems] == [True]
    assert set(result["cells"][0]["stages_us"]) == {"gemm1", "gemm2"}
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(TINY)]
    stages = row.split()[5:10]  # after shape, input, T, experts and slots
    assert [cell == "-" for cell in stages] == [True, True, False, False, True]


@needs_front_end
def test_bench_keeps_the_other_cells_when_one_fails(
    small_ceilings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = command.Bench.cell

    def cell(self: command.Bench, cell: Cell, weights: Any) -> dict[str, Any]:
        if cell.tokens == 2:
            raise MemoryError("too large")
        return whole(self, cell, weights)

    monkeypatch.setattr(command.Bench, "cell", cell)
    status, result = run_bench(tmp_path / "b.json", "--shapes", TINY, "--tokens", "1,2,3", "--no-stages")
    assert status == 1
    assert [cell.get("error") for cell in result["cells"]] == [None, "MemoryError: too large", None]


@needs_front_end
def test_bench_draws_the_roofline(small_ceilings: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "roofline.png"
    arguments = ("--shapes", f"{TINY},128x128x4x1", "--tokens", "1,3", "--no-stages", "--plot", str(file))
    status, _ = run_bench(tmp_path / "b.json", *arguments)
    assert status == 0
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 20_000


def test_bench_names_the_extra_when_matplotlib_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "jax_moe.bench.plot", raising=False)
    for name in ("matplotlib", "matplotlib.axes"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["bench", "--device", "cpu", "--plot", "x.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@needs_jax
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--shapes", "gpt2"], "shape must be one of dsv3_ep8"),
        (["bench", "--shapes", "100x128x8x2"], "multiples of 128"),
        (["bench", "--shapes", "qwen3_30b", "--experts", "4"], "experts must be in [8, 128]"),
        (["bench", "--tokens", "1,zero"], "--tokens must be positive integers"),
        (["bench", "--repeats", "-1"], "--repeats must be positive integers"),
        (["bench", "--plot", "roofline.txt"], "--plot must be a file named *.png, got 'roofline.txt'"),
        (["bench", "--through", "numpy"], "--through must be among torch,jax"),
        (["demo", "--model", "gpt2"], "shape must be one of dsv3_ep8"),
        (["demo", "--tokens", "0"], "--tokens must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith(f"jax-moe {arguments[0]}: ")


@needs_jax
@pytest.mark.parametrize("name", ["bench", "demo"])
def test_a_missing_gpu_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(info, "hopper_devices", lambda: ([], "there is none"))
    assert main([name, "--device", "gpu"]) == 2
    assert "--device gpu is not usable: there is none" in capsys.readouterr().err
    assert machine.open_device("auto").kind == "cpu"


# ---- cost ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "tokens", "active", "slots", "microseconds"),
    [  # worked out by hand for 3.138 TB/s and 1331 TFLOP/s
        ("qwen3_30b", 1, 8, 8, 12),
        ("qwen3_30b", 1024, 128, 8192, 195),
        ("qwen3_30b", 4096, 128, 32768, 232),
        ("qwen3_235b", 256, 128, 2048, 771),
        ("qwen3_235b", 8192, 128, 65536, 1859),
        ("dsv3_ep8", 1, 1, 1, 14),
        ("dsv3_ep8", 4096, 32, 4074, 487),
        ("dsv3_e32", 1, 8, 8, 112),
        ("dsv3_e256", 256, 256, 2048, 3596),
        ("dsv3_e256", 8192, 256, 65536, 4337),
    ],
)
def test_roofline_of_known_cells(shape: str, tokens: int, active: int, slots: int, microseconds: int) -> None:
    ceilings = cost.Ceilings(3.138e12, 1331e12, {})
    found = cost.call_cost(SHAPES[shape], tokens, active, slots, bf16_input=True)
    assert round(1e6 * ceilings.seconds(found)) == microseconds


def test_bytes_and_operations_of_a_call() -> None:
    shape = parse_shape("256x128x8x2")
    weights = 3 * (2 * 256 * 128 + 2 * 4 * 2 + 256 * 128 + 2 * 4)  # codes and scales of gemm1 and gemm2, three experts
    bf16 = cost.call_cost(shape, 5, 3, 10, bf16_input=True)
    assert (bf16.bytes, bf16.flops) == (weights + 2 * 5 * 256 + 2 * 5 * 256, 6 * 256 * 128 * 10)
    fp8 = cost.call_cost(shape, 5, 3, 10, bf16_input=False)
    assert fp8.bytes == weights + 5 * (256 + 2 * 4) + 2 * 5 * 256
    assert fp8.intensity == fp8.flops / fp8.bytes


# ---- workload --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("shape", "tokens"), [("qwen3_30b", 1), ("dsv3_ep8", 1), ("dsv3_ep8", 100), ("dsv3_e32", 7)])
def test_routing_is_valid_and_counted(shape: str, tokens: int) -> None:
    cell = Cell(SHAPES[shape], tokens, True)
    for routing in workload.draw_routings(cell, 4, seed=1):
        s = cell.shape
        ids = routing.topk_ids >> 16
        assert routing.topk_ids.shape == (tokens, s.top_k) and routing.topk_ids.dtype == np.int32
        assert all(len(set(row)) == s.top_k for row in ids.tolist())
        assert ids.min() >= 0 and ids.max() < s.num_experts
        local = reference.local_expert(ids, s.num_experts, s.local_expert_offset, s.local_num_experts)
        assert routing.local_slots == np.count_nonzero(local >= 0)
        assert routing.active == set(local[local >= 0].tolist())
        _, weights = reference.unpack_topk_ids(routing.topk_ids)
        np.testing.assert_allclose(weights.astype(np.float32).sum(axis=1), 1, rtol=0.02)


def test_small_sets_read_other_experts_than_the_set_before() -> None:
    routings = workload.draw_routings(Cell(SHAPES["qwen3_30b"], 1, True), 16, seed=0)
    assert not any(a.active & b.active for a, b in itertools.pairwise(routings))
    window = workload.draw_routings(Cell(SHAPES["dsv3_ep8"], 1, True), 16, seed=0)
    assert all(routing.local_slots == 1 for routing in window)


def test_weights_are_quantised_with_a_magnitude_for_each_block() -> None:
    shape = parse_shape("256x128x3x2")
    *made, weights = cpu.Cpu().random_weights(shape, seed=0)
    assert made == [1, 2, 3] and isinstance(weights, dict)
    for name, rows, columns in (("gemm1_weights", 256, 256), ("gemm2_weights", 256, 128)):
        codes, scale = weights[name].astype(np.float32), weights[f"{name}_scale"]
        assert codes.shape == (3, rows, columns) and scale.shape == (3, rows // 128, columns // 128)
        blocks = np.abs(codes).reshape(3, rows // 128, 128, columns // 128, 128).max(axis=(2, 4))
        np.testing.assert_array_equal(blocks, 448)
        assert scale.std() > 0.1 * scale.mean()


def test_the_gpu_quantiser_rounds_like_the_reference() -> None:
    torch = pytest.importorskip("torch")
    from jax_moe.bench.cuda import quantize_blocks

    x = np.random.default_rng(0).standard_normal((9, 384), np.float32)
    codes, scale = quantize_blocks(torch.from_numpy(x).view(9, 3, 128), (2,))
    expected, expected_scale = reference.quantize_1x128(x)
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy().reshape(9, 384), expected.view(np.uint8))
    np.testing.assert_array_equal(scale[:, :, 0].numpy(), expected_scale)
