"""Exported and cross-lowered programs: one custom call, any number of tokens, any process."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import cases
import jax
import jax.export
import numpy as np
import pytest
from compare import assert_same_bits
from golden_export import CASE, PATH, export
from jax_calls import OPTIONS, SMALL, SMALL_ALL, call, named, shapes
from results import assert_same_results

from jax_moe import native


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_one_export_serves_every_number_of_tokens(case: cases.Case) -> None:
    exported = jax.export.deserialize(export(case).serialize())
    for tokens in (1, 7, 64):
        sized = dataclasses.replace(case, tokens=tokens, routing="uniform")
        given = cases.arrays(sized)
        assert_same_results(named(case, exported.call(given)), named(case, call(sized, given)))


def test_an_export_for_two_platforms_has_one_custom_call() -> None:
    exported = export(SMALL)
    assert exported.platforms == ("cpu", "cuda")
    targets = re.findall(r"stablehlo\.custom_call @([\w.]+)", exported.mlir_module())
    assert [target for target in targets if target != "shape_assertion"] == [native.TARGET]
    assert "stablehlo.case" not in exported.mlir_module()


@pytest.mark.parametrize("case", (SMALL, SMALL_ALL), ids=lambda case: case.name)
def test_an_exported_file_runs_in_a_process_that_only_imports_jax_moe(case: cases.Case, tmp_path: Path) -> None:
    path = tmp_path / "exported"
    path.write_bytes(export(case).serialize())
    program = Path(__file__).with_name("run_exported.py")
    done = subprocess.run(
        [sys.executable, str(program), str(path), case.name, "7"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    given = cases.arrays(case)
    rows = np.count_nonzero(cases.expected(case, given).expanded_idx_to_permuted_idx >= 0)
    first, *_ = named(case, call(case, given)).values()
    actual = np.frombuffer(bytes.fromhex(done.stdout), first.dtype).reshape(first.shape)
    assert_same_bits(actual[:rows], first[:rows], case.name)


@pytest.mark.parametrize("tokens", (1, 7, 64))
def test_the_kept_export_of_an_older_jax_still_runs(tokens: int) -> None:
    case = dataclasses.replace(CASE, tokens=tokens)
    exported = jax.export.deserialize(bytearray(PATH.read_bytes()))
    given = cases.arrays(case)
    assert_same_bits(np.asarray(exported.call(given)), np.asarray(call(case, given)), f"{tokens} tokens")


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_lowering_for_cuda_works_on_any_machine(case: cases.Case) -> None:
    traced = jax.jit(lambda given: call(case, given)).trace(shapes(cases.arrays(case)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call") == text.count(f"@{native.TARGET}") == 1


RESULTS = {  # output, gemm2_output, expert_weights, map, gemm1_activation_output and _scale
    SMALL: "7x256xbf16 0xbf16 0xbf16 0xi32 0xui8 0xf32",
    SMALL_ALL: "0xbf16 21x256xbf16 0xbf16 21xi32 21x128xui8 1x24xf32",
}


@pytest.mark.parametrize("case", RESULTS, ids=lambda case: case.name)
def test_the_workspace_is_the_only_other_result(case: cases.Case) -> None:
    given = cases.arrays(case)
    text = jax.jit(lambda arrays: call(case, arrays)).lower(shapes(given)).as_text()
    size = native.workspace_bytes(cases.problem(case, given))
    results = ", ".join(f"tensor<{result}>" for result in (*RESULTS[case].split(), f"{size}xui8"))
    assert f"-> ({results})" in text


@pytest.mark.parametrize("name", ("topk_weights", "gemm1_lora_delta", "gemm1_alpha"))
def test_sizes_of_options_can_be_symbolic_in_the_number_of_tokens_only(name: str) -> None:
    (size,) = jax.export.symbolic_shape("size")
    arguments = shapes(cases.arrays(SMALL_ALL))
    given = arguments[name]
    arguments[name] = jax.ShapeDtypeStruct((*given.shape[:-1], size), given.dtype)
    with pytest.raises(NotImplementedError, match=f"{name} must be of constant sizes but for num_tokens"):
        jax.export.export(jax.jit(lambda given: call(SMALL_ALL, given)))(arguments)


def test_only_the_number_of_tokens_can_be_symbolic() -> None:
    (hidden,) = jax.export.symbolic_shape("hidden")
    arguments = shapes(cases.arrays(SMALL))
    arguments["hidden_states"] = jax.ShapeDtypeStruct((7, hidden), arguments["hidden_states"].dtype)
    with pytest.raises(NotImplementedError, match="hidden_states must be of constant sizes but for num_tokens"):
        jax.export.export(jax.jit(lambda given: call(SMALL, given)))(arguments)


def test_exporting_without_the_checks_tells_which_target_it_is_about() -> None:
    function = jax.jit(lambda given: call(SMALL, given))
    exported = jax.export.export(function, disabled_checks=())
    with pytest.raises(ValueError, match=native.TARGET.replace(".", r"\.")):
        exported(shapes(cases.arrays(SMALL)))
