"""The roofline of a benchmark run as a picture: achieved rate over arithmetic intensity, and the share of
the roofline over the number of tokens. One marker a cell."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by everybody
MARKERS = "osD^vPX"


def draw(result: dict[str, Any], file: Path) -> None:
    """`result` is what `bench --json` writes. `file` is a PNG."""
    cells = [cell for cell in result["cells"] if "error" not in cell]
    dense = result["ceilings"]["flops_per_second"]
    unit, prefix = (1e12, "T") if dense >= 1e12 else (1e9, "G")
    by_shape: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["tokens"]):
        by_shape.setdefault(cell["shape"]["name"], []).append(cell)
    figure = Figure(figsize=(14, 6.2), layout="constrained")
    roofline, share = figure.subplots(1, 2, width_ratios=(3, 2))
    _scale(roofline, ("x", "y"))
    _scale(share, ("x",))
    points = [(cell["intensity"], cell["tflops"] * 1e12 / unit) for cell in cells]
    _ceilings(roofline, result["ceilings"], points, unit, prefix)
    for i, (name, of_shape) in enumerate(by_shape.items()):
        style = {
            "marker": MARKERS[i % len(MARKERS)],
            "color": COLOURS[i % len(COLOURS)],
            "linewidth": 0.9,
            "alpha": 0.85,
        }
        rates = [cell["tflops"] * 1e12 / unit for cell in of_shape]
        roofline.plot([cell["intensity"] for cell in of_shape], rates, label=name, zorder=3, **style)
        shares = [100 * cell["share_of_roofline"] for cell in of_shape]
        share.plot([cell["tokens"] for cell in of_shape], shares, label=name, zorder=3, **style)
    roofline.set_xlabel("arithmetic intensity: operations per byte that must be moved")
    roofline.set_ylabel(f"achieved {prefix}FLOP/s")
    roofline.legend(loc="lower right", frameon=False)
    tokens = sorted({cell["tokens"] for cell in cells})
    share.set_xticks(tokens, [str(number) for number in tokens], rotation=45)
    share.set_xlabel("tokens a call")
    share.set_ylabel("share of the roofline, %")
    share.set_ylim(0, max([100.0, *(105 * cell["share_of_roofline"] for cell in cells)]))
    share.axhline(100, color="0.2", linewidth=1.6)
    input_type = result["settings"]["input"]
    figure.suptitle(f"jax-moe on {result['device']}, {input_type} hidden states, the faster front end of each cell")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _scale(axes: Axes, logarithmic: tuple[str, ...]) -> None:
    for name in logarithmic:
        axis = getattr(axes, f"{name}axis")
        getattr(axes, f"set_{name}scale")("log")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(True, color="0.92", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _ceilings(
    axes: Axes, ceilings: dict[str, Any], points: list[tuple[float, float]], unit: float, prefix: str
) -> None:
    """The line that no cell can pass, and the other measured matrix rates of a GPU below it."""
    memory, dense = ceilings["bytes_per_second"] / unit, ceilings["flops_per_second"] / unit
    ridge = dense / memory
    left = 0.5 * min([ridge, *(x for x, _ in points)])
    right = 3 * max([ridge, *(x for x, _ in points)])
    axes.plot([left, ridge, right], [memory * left, dense, dense], color="0.2", linewidth=1.6, zorder=2)
    axes.set_xlim(left, right)
    axes.set_ylim(0.5 * min([memory * left, *(y for _, y in points)]), 2.2 * dense)
    x, y = 1.2 * left, 1.25 * memory * 1.2 * left  # a little above the line
    axes.text(
        x,
        y,
        f"memory {memory:.3g} {prefix}B/s",
        rotation=math.degrees(math.atan(y / x)),  # the direction of the line at that place, in data coordinates
        transform_rotates_text=True,
        rotation_mode="anchor",
        fontsize=9,
    )
    above = {"dense": dense} | {
        name.replace("TFLOP/s", "").strip(): value * 1e12 / unit
        for name, value in ceilings["measured"].items()
        if name.startswith("bf16")
    }
    for name, value in above.items():
        axes.annotate(
            f"{name} {value:.4g} {prefix}FLOP/s",
            (left, value),
            xytext=(8, 4),
            textcoords="offset points",
            fontsize=9,
        )
        if name != "dense":
            axes.axhline(value, color="0.5", linewidth=1, linestyle="--", zorder=1)
        else:
            axes.plot([left, ridge], [dense, dense], color="0.2", linewidth=0.8, linestyle=":", zorder=1)
