"""The tables that the benchmark prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from .cost import Ceilings
from .paths import STAGES


def ceilings_table(ceilings: Ceilings) -> Table:
    table = Table(title="Ceilings measured in this run", title_justify="left", box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in ceilings.measured.items():
        table.add_row(name, f"{value:.4g}")
    return table


def cells_table(cells: Sequence[dict[str, Any]]) -> Table:
    """One row a cell and state. Rates and the share of the roofline are those of the faster front end."""
    table = Table(title="Microseconds a call, medians", title_justify="left", box=None, pad_edge=False)
    for name in ("shape", "input"):
        table.add_column(name)
    counts = ("T", "active experts", "local slots")
    columns = (*counts, *STAGES, "state", "torch", "jax", "TFLOP/s", "GB/s", "roofline", "share")
    for name in columns:
        table.add_column(name, justify="right")
    for cell in cells:
        name = [cell["shape"]["name"], cell["input"], str(cell["tokens"])]
        if "error" in cell:
            table.add_row(*name, cell["error"].splitlines()[0][:60])
            continue
        name += [f"{cell['active_experts']:.0f}", f"{cell['local_slots']:.0f}"]
        name += [_us(cell["stages_us"].get(stage)) for stage in STAGES]
        states = next(iter(cell["whole_us"].values()))
        for row, state in enumerate(states):
            whole = [cell["whole_us"].get(through, {}).get(state) for through in ("torch", "jax")]
            best = min(timing["median"] for timing in whole if timing)
            table.add_row(
                *(name if row == 0 else [""] * len(name)),
                state,
                *map(_us, whole),
                f"{cell['flops'] / best / 1e6:.3g}",
                f"{cell['bytes'] / best / 1e3:.4g}",
                f"{cell['roofline_us']:.0f}",
                f"{100 * cell['roofline_us'] / best:.0f} %",
            )
    return table


def _us(timing: dict[str, float] | None) -> str:
    if timing is None:
        return "-"
    return f"{timing['median']:.1f}" if timing["median"] < 100 else f"{timing['median']:.0f}"
