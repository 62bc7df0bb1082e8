"""Prints the gist of what gpu_suite.sh left in a folder: lines of benchmark cells, flags of sweeps, profiled kernels.

python benchmarks/short_table.py OUT
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

STAGES = ("route", "permute", "gemm1", "gemm2", "finalize")


def main(folder: Path) -> None:
    if (folder / "bench.json").is_file():
        _bench(json.loads((folder / "bench.json").read_text()))
    if (folder / "sweeps.json").is_file():
        _sweeps(json.loads((folder / "sweeps.json").read_text()))
    for log in sorted(folder.glob("ncu_*.log")):
        _ncu(log)


def _bench(result: dict[str, Any]) -> None:
    ceilings = ", ".join(f"{name} {value:.4g}" for name, value in result["ceilings"]["measured"].items())
    print(f"{result['device']}, {result['settings']['input']}: {ceilings}")
    print(f"us: {'shape':>12} {'T':>5}  {' '.join(f'{stage:>8}' for stage in STAGES)}    torch      jax roofline share")
    for cell in result["cells"]:
        head = f"{cell['shape']['name']:>16} {cell['tokens']:>5}  "
        if "error" in cell:
            print(head + cell["error"].splitlines()[0][:80])
            continue
        stages = " ".join(_median(cell["stages_us"].get(stage)) for stage in STAGES)
        states = next(iter(cell["whole_us"].values()))
        for state in states:
            whole = " ".join(_median(cell["whole_us"].get(name, {}).get(state)) for name in ("torch", "jax"))
            best = min(times[state]["median"] for times in cell["whole_us"].values())
            share = 100 * cell["roofline_us"] / best
            differ = "  BITS DIFFER" if cell["same_bits"] is False else ""
            print(f"{head}{stages} {whole} {cell['roofline_us']:8.1f} {share:4.0f} %  {state}{differ}")


def _sweeps(result: dict[str, Any]) -> None:
    for line in (*result["flagged"], *result["failed"]):
        print(line)
    print(f"sweeps: {len(result['flagged'])} of {len(result['cells'])} cells flagged, {len(result['failed'])} failed")


def _median(timing: dict[str, float] | None) -> str:
    return f"{timing['median']:8.1f}" if timing else f"{'-':>8}"


def _ncu(log: Path) -> None:
    """From the CSV of `ncu --csv --page raw`, which begins with the line of names, then that of units."""
    lines = log.read_text().splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return
    units, *kernels = csv.DictReader(lines[start:])
    for kernel in kernels:
        values = [f"{name.split('.')[0]} {kernel[name]} {unit}" for name, unit in units.items() if "__" in name]
        print(f"{log.stem} {kernel['Kernel Name'].split('(')[0]}: {', '.join(values)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
