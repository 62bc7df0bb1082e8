"""One call of jax_moe.native.forward in memory of its own, the way a front end makes it, with everything watched."""

from __future__ import annotations

from collections.abc import Mapping

import cases
import ml_dtypes
import numpy as np
from memory import INPUT_GUARD, OUTPUT_GUARD, POISON, Block, Cuda, Host, flat_bytes
from numpy.typing import NDArray

from jax_moe import native
from jax_moe.problem import INPUTS, OUTPUTS, Problem

# Buffers that may start at any multiple of their element; the others, and MxFp8's scales of weights, start at multiples
# of 16 bytes.
ALIGNED_TO_ELEMENTS = frozenset(
    "topk_ids topk_weights hidden_states_scale gemm1_weights_scale gemm2_weights_scale gemm1_alpha gemm1_beta "
    "gemm1_clamp_limit local_expert_offset expert_weights expanded_idx_to_permuted_idx workspace".split()
)
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "int32": np.int32, "float32": np.float32, "uint8": np.uint8}


class Call:
    """The buffers of one problem. `odd` starts each at its weakest alignment instead of at a multiple of 256 bytes;
    `offset_on_device` passes local_expert_offset as a buffer and leaves 0 in the Problem. Without `watched` there are
    no guards and no poison.
    """

    def __init__(
        self,
        case: cases.Case,
        given: Mapping[str, NDArray | None] | None = None,
        memory: Host | Cuda | None = None,
        odd: bool = False,
        offset_on_device: bool = False,
        watched: bool = True,
    ) -> None:
        self.case = case
        self.given = dict(cases.arrays(case) if given is None else given)
        self.problem: Problem = cases.problem(case, self.given, offset_on_device)
        self.memory = memory or Host()
        self.odd, self.watched = odd, watched
        self.alignment: dict[str, int] = {}  # the weakest that each buffer may have
        self.inputs: dict[str, Block] = {}
        self.written: dict[str, NDArray] = {}
        for name, array in self.given.items():
            if array is not None:
                self.write_input(name, array)
        if offset_on_device:
            self.write_input("local_expert_offset", np.array(case.offset, np.int32))
        self.outputs: dict[str, Block] = {}
        for name, shape in self.problem.outputs().items():
            if shape is not None:
                item = np.dtype(DTYPES[shape.dtype]).itemsize
                self.outputs[name] = self._block(name, int(np.prod(shape.shape)) * item, item, OUTPUT_GUARD)
        self.outputs["workspace"] = self._block("workspace", native.workspace_bytes(self.problem), 1, OUTPUT_GUARD)
        if watched:
            self.poison()

    def write_input(self, name: str, array: NDArray) -> None:
        """The next runs read this array; its buffer stays where it is when it has one."""
        data = self.written[name] = flat_bytes(array)
        if name not in self.inputs:
            self.inputs[name] = self._block(name, data.size, array.dtype.itemsize, INPUT_GUARD)
        self.inputs[name].write(data)

    def poison(self, byte: int = POISON) -> None:
        """Fills every output and the workspace; 0xFF is NaN in bfloat16 and float32, -1 in int32."""
        for block in self.outputs.values():
            block.fill(byte)

    def pointers_and_sizes(self) -> tuple[list[int], list[int]]:
        blocks = [(self.inputs | self.outputs).get(name) for name in (*INPUTS, *OUTPUTS)]
        return [block.pointer if block else 0 for block in blocks], [block.nbytes if block else 0 for block in blocks]

    def launch(self, stream: int = 0, stages: int = native.ALL_STAGES) -> None:
        pointers, sizes = self.pointers_and_sizes()
        native.forward(self.problem, pointers, sizes, device=self.memory.device, stream=stream, stages=stages)

    def results(self) -> dict[str, NDArray]:
        """The outputs without the workspace; fails when a byte beside one of the buffers was written."""
        self.outputs["workspace"].check_guards("workspace")
        return {
            name: self.outputs[name].read(DTYPES[expected.dtype], expected.shape, name)
            for name, expected in self.problem.outputs().items()
            if expected is not None
        }

    def run(self) -> dict[str, NDArray]:
        self.launch()
        return self.results()

    def changed_inputs(self) -> list[str]:
        """Names of the inputs whose bytes differ from what was written to them."""
        return [
            name
            for name, block in self.inputs.items()
            if not np.array_equal(block.read(np.uint8, (block.nbytes,), name), self.written[name])
        ]

    def _block(self, name: str, nbytes: int, item: int, guard: int) -> Block:
        any_place = name in ALIGNED_TO_ELEMENTS and not (self.case.mx and name.endswith("weights_scale"))
        self.alignment[name] = item if any_place else 16
        shift = self.alignment[name] if self.odd else 0
        return Block(self.memory, nbytes, shift, guard if self.watched else None)
