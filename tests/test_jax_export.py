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
import jax_calls
import numpy as np
import pytest
from compare import assert_same_bits
from golden_export import CASE, PATH, export
from jax_calls import SMALL, SMALL_BF16, SMALL_ROWS, call, named, shapes

from jax_moe import native


@pytest.mark.parametrize("case", (SMALL, SMALL_BF16, SMALL_ROWS), ids=lambda case: case.name)
def test_one_export_serves_every_number_of_tokens(case: cases.Case) -> None:
    exported = jax.export.deserialize(export(case).serialize())
    for tokens in (1, 7, 64):
        sized = dataclasses.replace(case, tokens=tokens, routing="uniform")
        given = cases.arrays(sized)
        expected = named(case, call(sized, given))
        for name, actual in named(case, exported.call(given)).items():
            rows = slice(None)
            if name == "gemm2_output":
                rows = slice(np.count_nonzero(expected["expanded_idx_to_permuted_idx"] >= 0))
            assert_same_bits(actual[rows], expected[name][rows], f"{tokens} tokens: {name}")


def test_an_export_for_two_platforms_has_one_custom_call() -> None:
    exported = export(SMALL)
    assert exported.platforms == ("cpu", "cuda")
    targets = re.findall(r"stablehlo\.custom_call @([\w.]+)", exported.mlir_module())
    assert [target for target in targets if target != "shape_assertion"] == [native.TARGET]
    assert "stablehlo.case" not in exported.mlir_module()


def test_an_exported_file_runs_in_a_process_that_only_imports_jax_moe(tmp_path: Path) -> None:
    path = tmp_path / "exported"
    path.write_bytes(export(SMALL).serialize())
    program = Path(__file__).with_name("run_exported.py")
    done = subprocess.run(
        [sys.executable, str(program), str(path), "SMALL", "7"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    expected = np.asarray(call(SMALL, cases.arrays(SMALL)))
    assert done.stdout == expected.view(np.uint16).tobytes().hex()


@pytest.mark.parametrize("tokens", (1, 7, 64))
def test_the_kept_export_of_an_older_jax_still_runs(tokens: int) -> None:
    case = dataclasses.replace(CASE, tokens=tokens)
    exported = jax.export.deserialize(bytearray(PATH.read_bytes()))
    given = cases.arrays(case)
    assert_same_bits(np.asarray(exported.call(given)), np.asarray(call(case, given)), f"{tokens} tokens")


@pytest.mark.parametrize("name", ("SMALL", "SMALL_BF16", "SMALL_ROWS"))
def test_lowering_for_cuda_works_on_any_machine(name: str) -> None:
    case = getattr(jax_calls, name)
    traced = jax.jit(lambda given: call(case, given)).trace(shapes(cases.arrays(case)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call") == text.count(f"@{native.TARGET}") == 1


def test_the_workspace_is_the_only_other_result() -> None:
    given = cases.arrays(SMALL)
    text = jax.jit(lambda arrays: call(SMALL, arrays)).lower(shapes(given)).as_text()
    size = native.workspace_bytes(cases.problem(SMALL, given))
    results = f"(tensor<7x256xbf16>, tensor<0xbf16>, tensor<0xbf16>, tensor<0xi32>, tensor<{size}xui8>)"
    assert results in text


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
