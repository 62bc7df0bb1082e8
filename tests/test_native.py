"""The compiled module: its contract is that of problem.py, it loads alone, and its errors are plain sentences."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jax_moe import native, problem
from jax_moe.enums import ActivationType, DataType, Fp8QuantizationType, WeightLayout

ROOT = Path(__file__).parent.parent
MOE_H = (ROOT / "ffi" / "moe.h").read_text()

SMALL = problem.Problem(
    num_tokens=4,
    hidden_size=256,
    intermediate_size=128,
    num_experts=4,
    top_k=2,
    local_num_experts=4,
    local_expert_offset=0,
    topk_weights_dtype=DataType.NONE,
    hidden_states_dtype=DataType.FLOAT8_E4M3,
    hidden_states_scale_block_stride=4,
    hidden_states_scale_token_stride=1,
    weights_scale_rows=128,
    fp8_quantization_type=Fp8QuantizationType.DeepSeekFp8,
    activation_type=ActivationType.Swiglu,
    weight_layout=WeightLayout.MajorK,
    use_shuffled_weight=False,
    has_gemm1_lora_delta=False,
    do_finalize=True,
    batch_invariant=False,
    enable_pdl=True,
)
NUM_BUFFERS = len(problem.INPUTS) + len(problem.OUTPUTS)
NO_BUFFERS = [0] * NUM_BUFFERS


def run_python(code: str, folder: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# ---- the contract ----------------------------------------------------------------------------------------------------
def test_the_library_was_built_with_the_contract_of_problem_py() -> None:
    assert native.load().abi_text() == problem.abi_text()


@pytest.mark.parametrize("change", [("num_tokens", "num_rows"), ("topk_ids topk_weights", "topk_weights topk_ids")])
def test_another_contract_is_an_import_error(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    changed = problem.abi_text().replace(*change)
    monkeypatch.setattr(problem, "abi_text", lambda: changed)
    with pytest.raises(ImportError, match=r"does not belong to these Python files; reinstall"):
        native.load.__wrapped__()


def test_a_longer_contract_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="reinstall"):
        native.check_abi(problem.abi_text() + "\nmore: 1")


def header_enum(name: str) -> dict[str, int]:
    body = re.search(rf"enum (?:class )?{name} : \w+ {{(.*?)}}", MOE_H, re.DOTALL)
    assert body
    return {key: int(value) for key, value in re.findall(r"k(\w+) = (\d+)", body[1])}


@pytest.mark.parametrize("kind", [DataType, Fp8QuantizationType, ActivationType, WeightLayout])
def test_enums_of_moe_h_are_those_of_enums_py(kind: type[DataType]) -> None:
    ours = {member.name.replace("_", "").lower(): member.value for member in kind}
    assert {key.lower(): value for key, value in header_enum(kind.__name__).items()} == ours


def test_stages_of_moe_h_are_those_of_native_py() -> None:
    assert header_enum("Stage") == {
        "Route": native.ROUTE,
        "Permute": native.PERMUTE,
        "Gemm1": native.GEMM1,
        "Gemm2": native.GEMM2,
        "Finalize": native.FINALIZE,
        "AllStages": native.ALL_STAGES,
    }


def test_limits_of_moe_h_are_those_of_problem_py() -> None:
    limits = dict(re.findall(r"constexpr int64_t k(\w+) = (\d+);", MOE_H))
    assert (int(limits["ScaleBlock"]), int(limits["MxScaleBlock"])) == (problem.SCALE_BLOCK, problem.MX_SCALE_BLOCK)
    assert int(limits["MaxTopK"]) == problem.MAX_TOP_K


def test_attributes_of_the_handler_are_those_of_problem_py() -> None:
    handlers = (ROOT / "ffi" / "xla_handlers.cc").read_text()
    read = re.findall(r'StructMember<int64_t>\("(\w+)"\)', handlers)
    assert read == [*SMALL.attributes(), "hidden_states_scale_token_major"]


def test_every_target_is_on_each_platform_whatever_was_built() -> None:
    registrations = native.load().registrations()
    found = {platform: list(targets) for platform, targets in registrations.items()}
    assert found == {"cpu": list(native.TARGETS), "CUDA": list(native.TARGETS)}


# ---- loading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import jax_moe", ["jax", "jaxlib", "torch"]),
        ("from jax_moe import native; native.load()", ["jax", "jaxlib", "torch"]),
        ("import torch_facade", ["jax", "jaxlib"]),
    ],
)
def test_importing_stays_light(statement: str, absent: list[str], tmp_path: Path) -> None:
    if "torch_facade" in statement and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    code = f"{statement}\nimport sys\nprint([name for name in {absent} if name in sys.modules])"
    assert run_python(code, tmp_path) == "[]"


def test_the_source_folder_finds_the_installed_library() -> None:
    assert run_python("from jax_moe import native; print(native.load().__name__)", ROOT) == "jax_moe._native"


def test_public_names_are_there() -> None:
    import jax_moe

    pytest.importorskip("jax")
    assert all(getattr(jax_moe, name) is not None for name in jax_moe.__all__)
    assert set(jax_moe.__all__) <= set(dir(jax_moe))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jax_moe.nothing


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_EXTENSION", "jax_moe._absent")
    monkeypatch.setattr(native, "_installed_extension", lambda: None)
    with pytest.raises(ImportError, match="the compiled library is missing; build it with"):
        native.load.__wrapped__()


def test_a_runtime_of_the_same_or_a_newer_minor_version_is_taken() -> None:
    major, minor = native.load().ffi_api_version()
    native.check_ffi_version((major, minor))
    native.check_ffi_version((major, minor + 2))


@pytest.mark.parametrize(("d_major", "d_minor"), [(0, -1), (1, 0), (-1, 9)])
def test_another_runtime_is_an_import_error(d_major: int, d_minor: int) -> None:
    major, minor = native.load().ffi_api_version()
    with pytest.raises(ImportError, match=rf"needs XLA FFI API {major}\.{minor} or newer"):
        native.check_ffi_version((major + d_major, minor + d_minor))


def test_the_library_needs_nothing_but_the_system() -> None:
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    listing = subprocess.run(["readelf", "-d", native.load().__file__], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", listing.stdout))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}
    assert needed and needed <= system


# ---- calls -----------------------------------------------------------------------------------------------------------
def test_workspace_is_affine_in_the_number_of_tokens() -> None:
    def at(num_tokens: int) -> int:
        return native.workspace_bytes(dataclasses.replace(SMALL, num_tokens=num_tokens))

    assert at(0) > 0 and at(7) - at(0) == 7 * (at(1) - at(0)) > 0


def test_wrong_numbers_of_fields_and_buffers_are_value_errors() -> None:
    with pytest.raises(ValueError, match=f"fields must be {len(SMALL.fields())} integers, got 2"):
        native.load().Problem([1, 2])
    with pytest.raises(ValueError, match=f"must have {NUM_BUFFERS} entries, got 1 and {NUM_BUFFERS}"):
        native.forward(SMALL, [0], NO_BUFFERS)


def test_each_status_has_its_exception() -> None:
    with pytest.raises(ValueError, match="topk_ids must hold 32 bytes, got 0"):
        native.forward(SMALL, NO_BUFFERS, NO_BUFFERS)
    if native.load().build_info()["cuda"]:
        mx = dataclasses.replace(SMALL, fp8_quantization_type=Fp8QuantizationType.MxFp8, weights_scale_rows=1)
        assert "gemm1" in native.explain(mx)


def test_a_build_without_cuda_says_so() -> None:
    if native.load().build_info()["cuda"]:
        pytest.skip("this build has CUDA kernels")
    assert not native.load().cuda_report()["built"]
    for call in (lambda: native.forward(SMALL, NO_BUFFERS, NO_BUFFERS, device=0), lambda: native.explain(SMALL)):
        with pytest.raises(NotImplementedError, match="this build has no CUDA kernels"):
            call()
