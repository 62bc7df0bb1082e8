"""What the benchmark asks of a device; cpu.py and cuda.py are the two. Arrays are numpy's or torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

from ..problem import Problem
from ..shapes import LayerShape
from .cost import Ceilings
from .timing import Program
from .workload import Cell

Set = dict[str, Any]  # arrays by their names in problem.INPUTS; hidden_states_scale may be absent


class Device(Protocol):
    kind: str  # "cpu" or "gpu"
    states: tuple[str, ...]  # of timing.STATES, the first for every cell, others for large ones

    def random_weights(self, shape: LayerShape, seed: int) -> Iterator[int | Set]:
        """Yields the number of experts made so far, last the weights of a layer."""
        ...

    def weight_copies(self, weights: Set) -> list[Set]:
        """As many sets of the weights as it takes that a call's are in no cache when their turn comes again."""
        ...

    def random_tokens(self, cell: Cell, seed: int) -> Set: ...

    def put(self, array: Any) -> Any:
        """A numpy int32 array as an array of the device."""
        ...

    def empty(self, nbytes: int) -> Any: ...

    def native_call(
        self, problem: Problem, buffers: Sequence[Any], stages: int, extension: ModuleType | None = None
    ) -> Callable[[], None]:
        """Runs `stages` on the buffers of INPUTS then OUTPUTS (None where absent), which live as long as the call.
        `extension`: by another build's module.
        """
        ...

    def stages(self, problem: Problem) -> int:
        """The stages, a mask, in which a call of the problem does something."""
        ...

    def program(self, calls: Sequence[Callable[[], Any]]) -> Program:
        """The calls, ready to be timed."""
        ...

    def synchronize(self) -> None: ...

    def release(self) -> None:
        """Gives cached memory back, so that the other front end can have it."""
        ...

    def ceilings(self) -> Ceilings: ...
