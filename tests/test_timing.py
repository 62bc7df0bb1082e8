"""How the benchmarks time a call: states of a device, rotation, dispatches, on programs that only pretend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jax_moe.bench import timing


class FakeProgram:
    """Takes `seconds` a call, four calls a repeat; remembers the repeats that it was asked for."""

    calls, ahead = 4, 0

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked = seconds, []

    def time(self, repeats: int) -> list[float]:
        self.asked.append(repeats)
        return [self.seconds * (1 + i) for i in range(repeats)]


@pytest.mark.parametrize(
    ("state", "seconds", "asked"),
    [
        ("steady", 1e-3, [2, 20]),
        ("steady", 10.0, [2, 3]),
        ("sustained", 1e-2, [2, round(timing.LOAD / 4e-2), 20]),
    ],
)
def test_a_state_is_made_before_it_is_measured(state: str, seconds: float, asked: list[int]) -> None:
    program = FakeProgram(seconds)
    found = timing.measure(program, state, 20, pause=0)
    assert program.asked == asked
    assert found.samples == (3 if asked == [2, 3] else 20)
    assert found.fastest == seconds and found.fastest < found.median < found.slowest


@pytest.mark.parametrize(
    ("seconds", "ahead", "warm", "asked"),
    [
        (1e-4, 0, round(timing.WARM / 4e-4), [2, round(timing.WARM / 4e-4) + 20]),
        (timing.WARM / 4 / 3, 0, 3, [2, 8, 8, 8, 8]),  # five samples a burst
        (timing.WARM / 4 / 3, 1, 2, [2, 7, 7, 7, 7]),
        (timing.BURST, 0, 1, [2, *[2] * 20]),  # each longer than a burst
        (timing.BURST, 1, 0, [2, *[1] * 20]),
    ],
)
def test_cool_is_what_bursts_take_after_their_clocks_have_risen(
    seconds: float, ahead: int, warm: int, asked: list[int]
) -> None:
    program = FakeProgram(seconds)
    program.ahead = ahead
    found = timing.measure(program, "cool", 20, pause=0)
    assert program.asked == asked
    assert found.samples == 20
    assert found.fastest == pytest.approx(seconds * (1 + warm))
    assert found.slowest == pytest.approx(seconds * max(asked[1:]))


def test_wall_clock_rotates_its_calls() -> None:
    seen: list[int] = []
    calls: list[Callable[[], Any]] = [lambda i=i: seen.append(i) for i in range(3)]
    program = timing.WallClock(calls)
    assert len(program.time(2)) == 2 and len(program.time(5)) == 5
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_dispatches_wait_for_the_last_result_only() -> None:
    log: list[str] = []
    program = timing.Dispatches(lambda: log.append("start"), lambda _: log.append("wait"), calls=3)
    log.clear()
    assert len(program.time(2)) == 2
    further = program.calls // 3 - 2
    assert further >= 1
    assert log == ["start", "wait", *["start"] * (1 + further), "wait"] * 2


def test_dispatches_do_not_count_what_starting_and_waiting_cost_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes a millisecond a dispatch, one after the other, and a host that takes 20 more to wait."""
    now = done = 0.0

    def dispatch() -> None:
        nonlocal done
        done = max(done, now) + 1e-3

    def wait(_: None) -> None:
        nonlocal now
        now = max(done, now) + 20e-3

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    program = timing.Dispatches(dispatch, wait, calls=4)
    assert program.time(3) == pytest.approx([0.25e-3] * 3)
