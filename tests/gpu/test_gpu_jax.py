"""The JAX function on a GPU: the backend's bits, inside command buffers, and from a program exported without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from call import Call
from cases import CASES, Case
from compare import assert_same_bits
from memory import Cuda
from results import assert_same_results

jax = pytest.importorskip("jax")
jax_calls = pytest.importorskip("jax_calls")
jax_quantize = pytest.importorskip("test_jax_quantize")

import jax_moe  # noqa: E402

PROGRAMS = Path(__file__).with_name("jax_programs.py")
NAMES = (
    "t0 t1 t7 t129 k32 e300 bf16_t0 bf16_t53 routing_mixed_window window_1_2 unfinalized_t0 unfinalized_window "
    "unfinalized_bf16 extreme_nan_x geglu relu2 alpha_beta_clamp_e300 blocked_shuffled apart_bf16 apart_f32_t257 "
    "apart_garbage lora lora_t0 lora_unfinalized mx_t129 mx_shuffled_t257 mx_shuffled_grid mx_bf16 mx_block_major "
    "mx_e8m0 mx_relu2_shuffled mx_lora_unfinalized"
).split()
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=lambda case: case.name)
CASE = CASES["t53"]


@pytest.fixture
def device(cuda: Cuda) -> Any:
    """JAX's name of the GPU."""
    try:
        return jax.devices("gpu")[cuda.device]
    except RuntimeError as error:
        pytest.skip(f"this JAX has no GPU backend: {error}")


def program(name: str, path: Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAMS), name, str(path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def jitted(case: Case, given: cases.Arrays, device: Any, **changes: Any) -> dict[str, np.ndarray]:
    on_device = jax.device_put(given, device)
    return jax_calls.named(case, jax.jit(lambda inputs: jax_calls.call(case, inputs, **changes))(on_device))


@some_cases
def test_jit_gives_the_bits_of_the_backend(cuda: Cuda, device: Any, case: Case) -> None:
    call = Call(case, memory=cuda)
    assert_same_results(jitted(case, call.given, device), call.run())


def test_jit_gives_the_bits_of_the_torch_facade(cuda: Cuda, device: Any) -> None:
    torch_calls = pytest.importorskip("torch_calls")
    given = torch_calls.arguments(CASE)
    tensors = {name: value.to(cuda.device) for name, value in given.items() if hasattr(value, "to")}
    output = torch_calls.function(**(given | tensors))
    facade = {"output": torch_calls.array(output.cpu())}
    assert_same_results(jitted(CASE, cases.arrays(CASE), device), facade)


def test_token_major_scales(cuda: Cuda, device: Any) -> None:
    given = cases.arrays(CASE)
    expected = Call(CASE, given, cuda).run()
    given["hidden_states_scale"] = np.ascontiguousarray(given["hidden_states_scale"].T)
    assert_same_results(jitted(CASE, given, device, hidden_states_scale_order="token_major"), expected)


@pytest.mark.parametrize("name", jax_quantize.NAMES)
def test_quantised_activations_follow_the_rule_bit_for_bit(device: Any, name: str) -> None:
    """XLA divides approximately on a GPU. Denormal elements are numbers there, so that there are none in `x`."""
    x = jax_quantize.rows(name)
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
    codes, scale = jax.jit(jax_moe.quantize_activations)(jax.device_put(x, device))
    expected_codes, expected_scale = jax_quantize.expected_blocks(x)
    assert_same_bits(np.asarray(scale)[0], expected_scale, "scale")
    jax_quantize.assert_same_codes(codes, expected_codes, "codes")


def test_an_offset_traced_on_the_device(cuda: Cuda, device: Any) -> None:
    case = CASES["routing_mixed_window"]
    given = cases.arrays(case)
    run = jax.jit(lambda inputs, offset: jax_calls.call(case, inputs, local_expert_offset=offset))
    output = run(jax.device_put(given, device), jax.device_put(np.int32(case.offset), device))
    assert_same_results({"output": np.asarray(output)}, Call(case, given, cuda).run())


def test_calls_are_captured_in_a_command_buffer(cuda: Cuda, device: Any, tmp_path: Path) -> None:
    """XLA puts the custom calls into a command buffer, and what the replays compute is right."""
    dumps, output = tmp_path / "dumps", tmp_path / "output"
    flags = f"--xla_dump_to={dumps} --xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=+CUSTOM_CALL"
    program("capture", output, XLA_FLAGS=flags)
    thunks = [path for path in dumps.iterdir() if "thunk" in path.name]
    assert thunks, f"XLA dumped no thunk sequence, only {sorted(path.name for path in dumps.iterdir())}"
    assert any("kCommandBuffer" in path.read_text(errors="replace") for path in thunks), "no command buffer was made"
    expected = Call(CASE, memory=cuda).run()["output"]
    captured = np.frombuffer(output.read_bytes(), expected.dtype).reshape(expected.shape)
    assert_same_results({"output": captured}, {"output": expected})


def test_a_program_exported_without_a_gpu_runs_here(cuda: Cuda, device: Any, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    from jax import export

    path = tmp_path / "program"
    program("export", path, JAX_PLATFORMS="cpu")
    given = cases.arrays(CASE)
    loaded = export.deserialize(bytearray(path.read_bytes()))
    output = jax.jit(loaded.call)(jax.device_put(given, device))
    assert list(output.devices()) == [device]
    assert_same_results({"output": np.asarray(output)}, Call(CASE, given, cuda).run())


def test_a_compiled_executable_survives_serialization(cuda: Cuda, device: Any) -> None:
    from jax.experimental import serialize_executable

    given = jax.device_put(cases.arrays(CASE), device)
    compiled = jax.jit(lambda inputs: jax_calls.call(CASE, inputs)).lower(given).compile()
    loaded = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    assert_same_results({"output": np.asarray(loaded(given))}, Call(CASE, memory=cuda).run())


def test_torch_and_jax_take_turns_in_one_process(cuda: Cuda, device: Any) -> None:
    torch_calls = pytest.importorskip("torch_calls")
    given = torch_calls.arguments(CASE)
    given |= {name: value.to(cuda.device) for name, value in given.items() if hasattr(value, "to")}
    expected = Call(CASE, memory=cuda).run()
    for _ in range(3):
        assert_same_results({"output": torch_calls.array(torch_calls.function(**given).cpu())}, expected)
        assert_same_results(jitted(CASE, cases.arrays(CASE), device), expected)
