"""How a call is timed: programs that run it many times, and the state of the device in which they are asked.

A program's time(repeats) runs it `repeats` times in a row and gives the seconds a call of each.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

# cool: in bursts of BURST seconds after pauses, less the first WARM of each, in which clocks rise. NOTE: a GPU at its
# power limit holds its clocks for 40 to 60 ms after a pause; a longer burst is of neither state.
# sustained: after LOAD seconds of load. steady: in a row, for a host without such states.
STATES = ("cool", "sustained", "steady")
PAUSE, WARM, BURST, LOAD = 0.7, 0.015, 0.04, 1.0
STEADY_BUDGET = 4.0  # seconds for all repeats; at least three are made


class Program(Protocol):
    calls: int  # a repeat
    ahead: int  # repeats that time() makes before those that it measures

    def time(self, repeats: int) -> list[float]: ...


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, over `samples` repeats."""

    median: float
    fastest: float
    slowest: float
    samples: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        return Timing(statistics.median(samples), min(samples), max(samples), len(samples))


def measure(program: Program, state: str, repeats: int, pause: float = PAUSE) -> Timing:
    """The median of `repeats` repeats with the device in `state` (one of STATES)."""
    repeat_seconds = program.calls * min(program.time(2))

    def repeats_in(seconds: float) -> int:
        return max(1, round(seconds / repeat_seconds))

    if state == "steady":
        return Timing.of(program.time(min(repeats, max(3, int(STEADY_BUDGET / repeat_seconds)))))
    if state == "sustained":
        program.time(repeats_in(LOAD))
        return Timing.of(program.time(repeats))
    warm = max(0, repeats_in(WARM) - program.ahead)
    most = max(warm + 1, int(BURST / repeat_seconds) - program.ahead)
    samples: list[float] = []
    while len(samples) < repeats:
        time.sleep(pause)
        samples += program.time(min(most, warm + repeats - len(samples)))[warm:]
    return Timing.of(samples)


def medians_by_turns(programs: Sequence[Program], rounds: int, repeats: int, pause: float) -> list[float]:
    """Median seconds a call of each, in bursts of at most `repeats` repeats after pauses. All take turns, so that
    clocks and heat are the same for all.
    """
    fitting = [min(repeats, max(1, int(BURST / (program.calls * min(program.time(1)))))) for program in programs]
    samples: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for program, its, most in zip(programs, samples, fitting, strict=True):
            time.sleep(pause)
            its += program.time(most)
    return [statistics.median(seconds) for seconds in samples]


class WallClock:
    """Calls that return when they are done, one a repeat, in rotation."""

    calls, ahead = 1, 0

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self._rotation = itertools.cycle(calls)

    def time(self, repeats: int) -> list[float]:
        seconds = []
        for call in itertools.islice(self._rotation, repeats):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds


class Dispatches:
    """A function that starts `calls` calls on a device and returns at once; `wait` blocks on what it returned.

    A repeat is one dispatch that is waited for, and then one and `further` more in a row, likewise: the difference is
    what `further` take where the device is never idle, without what starting and waiting cost once.
    """

    ahead = 0

    def __init__(self, dispatch: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> None:
        self._dispatch, self._wait, self._calls = dispatch, wait, calls
        wait(dispatch())
        self._further = min(32, max(1, round(8e-3 / min(self._seconds(1) for _ in range(3)))))
        self.calls = calls * (2 + self._further)

    def time(self, repeats: int) -> list[float]:
        seconds = []
        for _ in range(repeats):
            one, several = self._seconds(1), self._seconds(1 + self._further)
            seconds.append(max(several - one, 1e-9) / (self._calls * self._further))
        return seconds

    def _seconds(self, dispatches: int) -> float:
        start = time.perf_counter()
        result = None
        for _ in range(dispatches):
            result = self._dispatch()
        self._wait(result)
        return time.perf_counter() - start


class CudaGraph:
    """Calls captured one after another in a CUDA graph; events around each replay.

    One more replay runs ahead of the first event, so that the host is always ahead of the device.
    """

    ahead = 1

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        import torch

        self.calls = len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: what JAX's threads do meanwhile is none of this capture's business.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            for call in calls:
                call()

    def time(self, repeats: int) -> list[float]:
        import torch

        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        self._graph.replay()
        events[0].record()
        for event in events[1:]:
            self._graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 / self.calls for a, b in itertools.pairwise(events)]
