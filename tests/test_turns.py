"""benchmarks/turns.py: builds beside each other in one process, here the installed one beside a copy of itself."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scripts

from jax_moe import native


@pytest.fixture(scope="module")
def turns() -> ModuleType:
    return scripts.load(scripts.ROOT / "benchmarks" / "turns.py")


@pytest.fixture
def library() -> Path:
    file = native.load().__file__
    assert file is not None
    return Path(file)


@pytest.mark.filterwarnings("ignore:nanobind")  # the same types twice
def test_a_copy_of_a_build_gives_the_same_bits(
    turns: ModuleType, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / library.name
    shutil.copy(library, copy)
    wheel = tmp_path / "jax_moe-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(library, f"jax_moe/{library.name}")
    turns.main([str(copy), str(wheel), "--cells", "256x128x4x2:5", "--device", "cpu", "--rounds", "1"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("256x128x4x2:5"))
    assert row.count("(") == 2 and "(1.000)" in row and "*" not in row


def test_other_bits_are_seen(turns: ModuleType) -> None:
    assert turns.same_bits([np.arange(3)], [np.arange(3)])
    assert not turns.same_bits([np.arange(3), np.arange(3)], [np.arange(3), np.array([0, 1, 3])])


def test_a_wheel_without_the_extension_is_refused(turns: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("jax_moe/__init__.py", "")
    with pytest.raises(ValueError, match=r"turns: .*other.whl must be a wheel with jax_moe/_native"):
        turns.load_build(wheel, tmp_path)


def test_layouts_are_for_a_gpu_and_known(turns: ModuleType, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        turns.main([str(library), "--weights", "MxFp8 1x32", "--device", "cpu"])
    assert "--weights must be plain on a CPU, got MxFp8 1x32" in capsys.readouterr().err
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"turns: --weights must be one of plain, .*, got MxFp4"):
        turns.laid_out({}, "MxFp4")


def test_copies_between_calls_are_for_a_gpu(
    turns: ModuleType, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        turns.main([str(library), "--between", "64", "--device", "cpu"])
    assert "--between must be 0 on a CPU, got 64" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        turns.main([str(library), "--between", "-1", "--device", "cpu"])
    assert "--between must be 0 or more, got -1" in capsys.readouterr().err


def test_what_is_between_calls_follows_each(turns: ModuleType) -> None:
    done: list[str] = []
    both = turns.followed_by(lambda: done.append("copy"), lambda: done.append("call"))
    both()
    both()
    assert done == ["call", "copy", "call", "copy"]
