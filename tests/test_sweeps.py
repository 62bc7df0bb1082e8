"""What the sweeps draw, which cells they have, and what in given times they call a cliff. No GPU is asked."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from jax_moe.bench import sweep, timing
from jax_moe.bench.cost import Ceilings, call_cost, expert_bytes
from jax_moe.bench.draws import Draw, balanced, one_in_half, uniform, zipf
from jax_moe.bench.workload import Cell, draw_routings, parse_shape
from jax_moe.shapes import SHAPES

RNG = np.random.default_rng
CEILINGS = Ceilings(4e12, 1.2e15, {})
ROTATION_BYTES = 150e6
POINTS = [point for one in sweep.sweeps().values() for series in one.series for point in series]


# ---- draws -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("draw", [uniform, zipf, one_in_half, balanced], ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("name", ["qwen3_30b", "dsv3_ep8", "256x128x8x8", "256x128x8x1", "256x128x12x8"])
def test_every_token_names_distinct_experts(draw: Draw, name: str) -> None:
    shape = parse_shape(name)
    for tokens in (48, 96, 3072):
        if draw is balanced and tokens * shape.top_k % shape.num_experts:
            continue
        ids = draw(shape, tokens, RNG(1))
        assert ids.shape == (tokens, shape.top_k) and ids.dtype == np.int64
        assert ids.min() >= 0 and ids.max() < shape.num_experts
        assert all(len(set(of_token)) == shape.top_k for of_token in ids.tolist())


def counts(ids: NDArray, experts: int) -> NDArray:
    return np.bincount(ids.ravel(), minlength=experts)


@pytest.mark.parametrize(("name", "tokens"), [("qwen3_30b", 16 * 65), ("256x128x12x8", 3 * 7), ("256x128x7x3", 14)])
def test_balanced_is_exact_and_in_no_order(name: str, tokens: int) -> None:
    shape = parse_shape(name)
    ids, others = (balanced(shape, tokens, RNG(seed)) for seed in (1, 2))
    assert (counts(ids, shape.num_experts) == tokens * shape.top_k // shape.num_experts).all()
    assert not np.array_equal(ids, others)
    if tokens > 100:  # not the same few companies of experts again and again
        assert len({frozenset(of_token) for of_token in ids.tolist()}) > 0.9 * tokens


def test_balanced_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^tokens \* top_k must be a multiple of 128 experts, got 17 \* 8"):
        balanced(SHAPES["qwen3_30b"], 17, RNG(0))


def test_zipf_falls_with_the_rank_and_ranks_are_dealt() -> None:
    shape = dataclasses.replace(SHAPES["qwen3_30b"], top_k=1)
    ids, others = (zipf(shape, 20000, RNG(seed)) for seed in (1, 2))
    share = np.sort(counts(ids, 128))[::-1] / 20000
    expected = np.arange(1, 9) ** -1.2 / sum(rank**-1.2 for rank in range(1, 129))
    np.testing.assert_allclose(share[:8], expected, rtol=0.15)
    assert counts(ids, 128).argmax() != counts(others, 128).argmax()


@pytest.mark.parametrize("tokens", [1, 16, 33, 4096])
@pytest.mark.parametrize("name", ["qwen3_30b", "dsv3_ep8"])
def test_one_local_expert_is_first_in_every_second_token(name: str, tokens: int) -> None:
    shape = SHAPES[name]
    ids = one_in_half(shape, tokens, RNG(3))
    (hot,) = set(ids[::2, 0].tolist())
    assert 0 <= hot - shape.local_expert_offset < shape.local_num_experts
    assert (ids == hot).sum() == (tokens + 1) // 2


def test_sets_that_share_weights_have_few_experts_in_common() -> None:
    cell = Cell(parse_shape("2048x768x128x1"), 1, True)
    for copies in (1, 4):
        active = [routing.active for routing in draw_routings(cell, 32, 0, uniform, 32, copies)]
        for i in range(32):
            assert not any(active[i] & active[j] for j in range(i - copies, -1, -copies))
    assert draw_routings(cell, 4, 0)[0].active == draw_routings(cell, 4, 0, uniform, 9, 9)[0].active


# ---- cells -----------------------------------------------------------------------------------------------------------
def test_every_point_has_a_place_of_its_own_and_can_be_drawn() -> None:
    for one in sweep.sweeps().values():
        places = [(point.row, point.group) for series in one.series for point in series]
        assert len(places) == len(set(places))
    for point in POINTS:
        if point.cell.tokens <= 256:
            (routing,) = draw_routings(point.cell, 1, 0, point.draw)
            assert routing.topk_ids.shape == (point.cell.tokens, point.cell.shape.top_k)
            point.cell.problem()


def test_rows_an_expert_are_those_that_the_sweep_names() -> None:
    for series in sweep.sweeps()["rows"].series:
        for point in series:
            shape = point.cell.shape
            assert point.cell.tokens * shape.top_k == int(point.row) * shape.num_experts


def test_the_weights_of_all_sweeps_fit_into_memory() -> None:
    """And every layer has its experts; small layers take turns until nothing of them is in a cache."""
    experts = sweep.experts_to_make((point.cell for point in POINTS), ROTATION_BYTES, 3e9)
    total = 0.0
    for (hidden, inter), number in experts.items():
        total += number * expert_bytes(
            dataclasses.replace(SHAPES["qwen3_30b"], hidden_size=hidden, intermediate_size=inter)
        )
    assert total < 60e9
    for point in POINTS:
        shape = point.cell.shape
        assert shape.local_num_experts <= experts[shape.hidden_size, shape.intermediate_size]
    one_expert_a_call = Cell(parse_shape("2048x768x128x1"), 1, True)
    assert sweep.turns_of_weights(one_expert_a_call, ROTATION_BYTES) == 32
    assert sweep.sets_of(one_expert_a_call, ROTATION_BYTES) == 32
    assert sweep.sets_of(Cell(SHAPES["qwen3_30b"], 65536, True), ROTATION_BYTES) == 2


# ---- rules -----------------------------------------------------------------------------------------------------------
def judged(name: str, series: Sequence[sweep.Point], us: Callable[[int, float], float]) -> list[sweep.Result]:
    """With uniform costs and `us` of (place in the series, microseconds of the roofline)."""
    results = []
    for i, point in enumerate(series):
        shape, tokens = point.cell.shape, point.cell.tokens
        active = shape.local_num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** tokens)
        cost = call_cost(shape, tokens, active, tokens * shape.top_k, True)
        seconds = us(i, 1e6 * CEILINGS.seconds(cost)) / 1e6
        kernels = "decode" if tokens <= 16 and not point.cell.batch_invariant else "grouped"
        results.append(sweep.result_of(name, point, kernels, seconds, cost, CEILINGS))
    return sweep.judge(sweep.sweeps()[name].rule, results)


@pytest.mark.parametrize("name", ["tokens", "experts", "intermediate", "top_k", "rows", "large"])
def test_an_overhead_and_a_rate_are_no_cliff(name: str) -> None:
    for series in sweep.sweeps()[name].series:
        results = judged(name, series, lambda _, floor_us: 9 + 1.2 * floor_us)
        assert not [result.flags for result in results if result.flags]
        assert all(r.off is None or math.isclose(r.off, 0, abs_tol=0.05) for r in results)
        assert name == "large" or sum(r.off is not None for r in results if r.memory_bound) >= len(series) // 3


def test_a_slow_cell_is_flagged() -> None:
    (series, _) = sweep.sweeps()["tokens"].series
    place = next(i for i, point in enumerate(series) if point.cell.tokens == 53)
    results = judged("tokens", series, lambda i, floor_us: (1.3 if i == place else 1) * (9 + 1.2 * floor_us))
    assert results[place].flags == ("+30% of its neighbours' interpolation",)
    assert [r.row for r in results if r.off and r.off > 0.1] == ["T=53"]


def test_a_step_of_a_row_is_flagged() -> None:
    (series, _) = sweep.sweeps()["rows"].series
    results = judged("rows", series, lambda i, floor_us: (1.5 if i >= 3 else 1) * (9 + 1.2 * floor_us))
    assert [r.row for r in results if any("a row" in words for words in r.flags)] == ["128"]
    assert min(r.relative for r in results if r.relative) == 1


def test_a_skewed_routing_is_held_against_uniform() -> None:
    for series in sweep.sweeps()["skew"].series:
        results = judged("skew", series, lambda i, floor_us: (1, 1.05, 1.2)[i] * floor_us)
        assert [round(r.relative or 0, 2) for r in results] == [1, 1.05, 1.2]
        large = series[0].cell.tokens >= 1024
        assert [r.flags for r in results] == [
            (),
            (),
            (f"1.20 times uniform's time a {'useful operation' if large else 'byte'}",),
        ]


def test_a_wrong_choice_of_kernels_is_flagged() -> None:
    series = sweep.sweeps()["crossing"].series[0]
    slow = next(i for i, point in enumerate(series) if point.row == "T=14")
    results = judged("crossing", series, lambda i, floor_us: (1.05 if i == slow else 1) * (9 + 1.2 * floor_us))
    assert [(r.row, r.flags) for r in results if r.flags] == [("T=14", ("1.05 times the grouped kernels' time",))]
    assert [r.relative is None for r in results] == [point.cell.batch_invariant for point in series]


# ---- turns -----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Recorded:
    """A program that says which ones ran before it."""

    name: str
    seconds: float
    log: list[tuple[str, int]]
    calls: int = 2
    ahead: int = 0

    def time(self, repeats: int) -> list[float]:
        self.log.append((self.name, repeats))
        return [self.seconds] * repeats


def test_programs_take_turns_in_short_bursts() -> None:
    log: list[tuple[str, int]] = []
    programs = [Recorded("short", 1e-4, log), Recorded("long", 1e-2, log), Recorded("longest", 1.0, log)]
    assert timing.medians_by_turns(programs, 2, 4, 0) == [1e-4, 1e-2, 1.0]
    assert log == [("short", 1), ("long", 1), ("longest", 1)] + 2 * [("short", 4), ("long", 2), ("longest", 1)]


# ---- the program -----------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
def test_the_program_shows_tables_and_names_what_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import sweeps
    from rich.console import Console

    for name, one in sweep.sweeps().items():
        series = [judged(name, its, lambda i, floor_us: (1.4 if i == 3 else 1) * (9 + floor_us)) for its in one.series]
        results = [result for its in series for result in its]
        console = Console(width=200, file=io.StringIO(), record=True)
        console.print(sweeps.table_of(name, results))
        text = console.export_text()
        assert text.startswith(one.title) and all(result.row in text for result in results)
        assert len(sweeps.flag_lines(results)) == sum(bool(result.flags) for result in results)
    assert sweeps.names("skew,rows") == ["skew", "rows"]
