"""The sweeps that look for cliffs: their cells, and what in the measured times of neighbours is a cliff.

A sweep is a list of series. The cells of a series are timed by turns and judged beside each other: against what the
bytes of their neighbours let expect, and by the sweep's own rule. benchmarks/sweeps.py measures and shows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

from ..shapes import SHAPES, LayerShape
from .cost import Ceilings, Cost, expert_bytes
from .draws import Draw, balanced, one_in_half, uniform, zipf
from .workload import Cell, number_of_sets, parse_shape

TOLERANCE = 0.10  # more than that above or below what the neighbours let expect is flagged
CHOICE_TOLERANCE = 0.03  # so much slower than the grouped kernels may chosen ones be
LARGE = 1024  # tokens from which a skewed routing is judged by its useful operations, and pauses are longer
MOST_SETS = 48
HEAVY_BYTES, HEAVY_SETS = 1e9, 8  # a call that reads so much rotates over fewer sets
HUGE_TOKENS, HUGE_SETS = 16384, 2


@dataclasses.dataclass(frozen=True)
class Point:
    """A cell at a row and in a group of columns of its sweep's table."""

    row: str
    group: str
    cell: Cell
    draw: Draw = uniform


@dataclasses.dataclass(frozen=True)
class Result:
    """What one point took, and how that compares. `relative` and `step` are what the sweep's rule makes of them."""

    sweep: str
    row: str
    group: str
    shape: str
    tokens: int
    kernels: str  # "decode" or "grouped"
    us: float
    floor_us: float  # the roofline
    memory_bound: bool  # by the roofline
    active_experts: float
    local_slots: float
    bytes: float
    flops: float
    predicted_us: float | None = None
    relative: float | None = None
    step: float | None = None
    flags: tuple[str, ...] = ()

    @property
    def off(self) -> float | None:
        """How far from the interpolation of its neighbours."""
        return self.us / self.predicted_us - 1 if self.predicted_us else None


Series = list[Point]
Rule = Callable[[list[Result]], list[Result]]


@dataclasses.dataclass(frozen=True)
class Sweep:
    title: str
    series: list[Series]
    rule: Rule


def result_of(sweep: str, point: Point, kernels: str, seconds: float, cost: Cost, ceilings: Ceilings) -> Result:
    memory_bound = cost.bytes / ceilings.bytes_per_second >= cost.flops / ceilings.flops_per_second
    facts = dataclasses.asdict(cost)
    where = (sweep, point.row, point.group, point.cell.shape.name, point.cell.tokens)
    return Result(*where, kernels, 1e6 * seconds, 1e6 * ceilings.seconds(cost), memory_bound, **facts)


# ---- how a cell is rotated -------------------------------------------------------------------------------------------
def turns_of_weights(cell: Cell, rotation_bytes: float) -> int:
    """Calls after which what this one read is in no cache."""
    return math.ceil(rotation_bytes / _active_bytes(cell))


def sets_of(cell: Cell, rotation_bytes: float) -> int:
    """Calls in a rotation."""
    if cell.tokens >= HUGE_TOKENS:
        return HUGE_SETS
    usual = number_of_sets(cell.tokens)
    if _active_bytes(cell) > HEAVY_BYTES:
        return min(HEAVY_SETS, usual)
    return max(usual, min(turns_of_weights(cell, rotation_bytes), MOST_SETS))


def _active_bytes(cell: Cell) -> float:
    """Of the weights that a call with uniform routing reads."""
    s = cell.shape
    return s.local_num_experts * (1 - (1 - s.top_k / s.num_experts) ** cell.tokens) * expert_bytes(s)


def experts_to_make(cells: Iterable[Cell], rotation_bytes: float, most_bytes: float) -> dict[tuple[int, int], int]:
    """By hidden and intermediate size, how many experts serve all cells: as many as the largest layer has, or as it
    takes for small ones to take turns, but for these no more than `most_bytes`.
    """
    experts: dict[tuple[int, int], int] = {}
    for cell in cells:
        s = cell.shape
        sizes = s.hidden_size, s.intermediate_size
        wanted = s.local_num_experts * turns_of_weights(cell, rotation_bytes)
        few = max(s.local_num_experts, min(wanted, int(most_bytes / expert_bytes(s))))
        experts[sizes] = max(experts.get(sizes, 0), few)
    return experts


# ---- rules -----------------------------------------------------------------------------------------------------------
def judge(rule: Rule, results: list[Result]) -> list[Result]:
    """The results of a series with what their neighbours say of them."""
    return rule(interpolated(results))


def interpolated(results: list[Result]) -> list[Result]:
    """Memory-bound results with the time that the two neighbours in their group let expect for their bytes."""
    done = {}
    for group in dict.fromkeys(result.group for result in results):
        places = [i for i, result in enumerate(results) if result.group == group]
        for before, at, after in zip(places, places[1:], places[2:], strict=False):
            if results[at].memory_bound:
                done[at] = _with_prediction(results[before], results[at], results[after])
    return [done.get(i, result) for i, result in enumerate(results)]


def _with_prediction(before: Result, result: Result, after: Result) -> Result:
    """Between two neighbours the time is linear in the roofline's time: some overhead and some rate. Neighbours with
    nearly the same bytes, or both with less or more than this one, give their rate only.
    """
    gap = after.floor_us - before.floor_us
    flat = abs(gap) < 0.02 * result.floor_us
    share = 0.5 if flat else min(1.0, max(0.0, (result.floor_us - before.floor_us) / gap))
    us, floor_us = ((1 - share) * a + share * b for a, b in ((before.us, after.us), (before.floor_us, after.floor_us)))
    result = dataclasses.replace(result, predicted_us=us * result.floor_us / floor_us)
    assert result.off is not None
    return _flagged(result, abs(result.off) > TOLERANCE, f"{result.off:+.0%} of its neighbours' interpolation")


def no_rule(results: list[Result]) -> list[Result]:
    return results


def beside_the_first(results: list[Result]) -> list[Result]:
    """relative: time per byte, of many tokens per useful operation, against the first of the series."""

    def unit(result: Result) -> float:
        return result.us / (result.flops if result.tokens >= LARGE else result.bytes)

    what = "useful operation" if results[0].tokens >= LARGE else "byte"
    judged = []
    for result in results:
        ratio = unit(result) / unit(results[0])
        result = dataclasses.replace(result, relative=ratio)
        judged.append(_flagged(result, ratio > 1 + TOLERANCE, f"{ratio:.2f} times {results[0].group}'s time a {what}"))
    return judged


def per_row(results: list[Result]) -> list[Result]:
    """relative: time per row against the best of the series. step: how much more than the neighbour before."""
    costs = [result.us / result.local_slots for result in results]
    judged = []
    for i, result in enumerate(results):
        step = costs[i] / costs[i - 1] - 1 if i else None
        result = dataclasses.replace(result, relative=costs[i] / min(costs), step=step)
        above = step is not None and step > TOLERANCE
        judged.append(_flagged(result, above, f"{step:+.0%} a row over the one before" if above else ""))
    return judged


def beside_the_grouped(results: list[Result]) -> list[Result]:
    """relative: a chosen call against the grouped one of the same row, which follows it."""
    grouped = {result.row: result for result in results if result.group.endswith(GROUPED)}
    judged = []
    for result in results:
        if not result.group.endswith(GROUPED):
            ratio = result.us / grouped[result.row].us
            result = dataclasses.replace(result, relative=ratio)
            slower = result.kernels == "decode" and ratio > 1 + CHOICE_TOLERANCE
            result = _flagged(result, slower, f"{ratio:.2f} times the grouped kernels' time")
        judged.append(result)
    return judged


def _flagged(result: Result, wrong: bool, words: str) -> Result:
    return dataclasses.replace(result, flags=(*result.flags, words)) if wrong else result


# ---- the sweeps ------------------------------------------------------------------------------------------------------
GROUPED = ", grouped"
TOKENS = (2, 3, 4, 6, 7, 8, 48, 53, 64, 96, 100, 128, 192, 200, 256)
ROUTINGS: dict[str, Draw] = {"uniform": uniform, "Zipf 1.2": zipf, "one in half": one_in_half}
SKEWED_TOKENS = (16, 64, 256, 4096, 8192)
EXPERTS = (8, 16, 32, 64, 128, 256, 512)
INTERMEDIATE = (256, 512, 1024, 2048, 4096, 8192, 14336)
TOP_K = (1, 2, 4, 6, 8, 10, 16, 22)
ROWS = (64, 96, 127, 128, 129, 160, 192, 255, 256, 257, 320, 384, 512, 1024)
MANY_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
CROSSING = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16)


def _bf16(shape: LayerShape | str, tokens: int, batch_invariant: bool = False) -> Cell:
    return Cell(parse_shape(shape) if isinstance(shape, str) else shape, tokens, True, batch_invariant)


def _over_tokens(shape: str, tokens: Sequence[int]) -> Series:
    return [Point(f"T={number}", shape, _bf16(shape, number)) for number in tokens]


def _over_shapes(shape: str, name: str, values: Sequence[int], tokens: int) -> Series:
    """`shape` with a value in the place of {}."""
    return [Point(f"{name}={value}", f"T={tokens}", _bf16(shape.format(value), tokens)) for value in values]


def _skewed(shape: str, tokens: int) -> Series:
    cell = _bf16(shape, tokens)
    return [Point(f"{shape} T={tokens}", name, cell, draw) for name, draw in ROUTINGS.items()]


def _over_rows(name: str) -> Series:
    """Balanced. Where rows E / K tokens cannot be balanced, the next number that can, with its rows in brackets."""
    shape = parse_shape(name)
    step = shape.num_experts // math.gcd(shape.num_experts, shape.top_k)
    series = []
    for rows in ROWS:
        tokens = math.ceil(rows * shape.num_experts / shape.top_k / step) * step
        got = tokens * shape.top_k // shape.num_experts
        series.append(Point(f"{rows}" if got == rows else f"{rows} ({got})", name, _bf16(shape, tokens), balanced))
    return series


def _crossing(shape: str) -> Series:
    return [
        Point(f"T={tokens}", f"{shape}{GROUPED if invariant else ''}", _bf16(shape, tokens, invariant))
        for tokens in CROSSING
        for invariant in (False, True)
    ]


@functools.cache
def sweeps() -> dict[str, Sweep]:
    """By the names that the command line has."""
    by_rows = [_over_rows(name) for name in ("2048x768x128x8", "7168x2048x16x4")]
    skewed = [_skewed(shape, tokens) for shape in ("dsv3_e32", "qwen3_30b") for tokens in SKEWED_TOKENS]
    experts = [_over_shapes("2048x768x{}x8", "E", EXPERTS, tokens) for tokens in (1, 64)]
    widths = [_over_shapes("4096x{}x8x2", "I", INTERMEDIATE, tokens) for tokens in (1, 16, 64)]
    top_k = [_over_shapes("2048x768x128x{}", "K", TOP_K, tokens) for tokens in (1, 8, 16, 64)]
    tokens = [_over_tokens(shape, TOKENS) for shape in ("qwen3_30b", "dsv3_ep8")]
    many = [_over_tokens("qwen3_30b", MANY_TOKENS)]
    return {
        "tokens": Sweep("Numbers of tokens, odd beside even", tokens, no_rule),
        "skew": Sweep(
            "Skewed routing: time a byte (T >= 1024: a useful operation), to uniform", skewed, beside_the_first
        ),
        "experts": Sweep("Experts, all local, H=2048 I=768 K=8", experts, no_rule),
        "intermediate": Sweep("Intermediate size, H=4096 E=8 K=2", widths, no_rule),
        "top_k": Sweep("Experts a token, H=2048 I=768 E=128", top_k, no_rule),
        "rows": Sweep("Rows an expert, balanced", by_rows, per_row),
        "large": Sweep("Many tokens", many, per_row),
        "crossing": Sweep(
            "Chosen kernels (d: decode) beside the grouped ones", [_crossing(s) for s in SHAPES], beside_the_grouped
        ),
    }
