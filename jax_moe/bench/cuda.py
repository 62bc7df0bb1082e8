"""A CUDA GPU as a device of the benchmark: data in torch tensors made on the device, CUDA graphs, measured ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import native
from ..problem import SCALE_BLOCK, Problem
from ..shapes import LayerShape
from .cost import Ceilings
from .timing import CudaGraph, Program
from .workload import Cell

E4M3_MAX = 448.0
MIN_SCALE = torch.finfo(torch.float32).tiny


class Cuda:
    kind = "gpu"
    states: tuple[str, ...] = ("cool", "sustained")

    def __init__(self, index: int) -> None:
        torch.cuda.set_device(index)
        self._index = index
        self._device = torch.device("cuda", index)

    def random_weights(self, shape: LayerShape, seed: int) -> Iterator[int | dict[str, torch.Tensor]]:
        generator = torch.Generator(self._device).manual_seed(seed)
        hidden, inter, local = shape.hidden_size, shape.intermediate_size, shape.local_num_experts
        tensors = {}
        for name, rows, columns in (("gemm1_weights", 2 * inter, hidden), ("gemm2_weights", hidden, inter)):
            blocks = rows // SCALE_BLOCK, columns // SCALE_BLOCK
            tensors[name] = torch.empty((local, rows, columns), dtype=torch.float8_e4m3fn, device=self._device)
            tensors[f"{name}_scale"] = torch.empty((local, *blocks), dtype=torch.float32, device=self._device)
        for expert in range(local):
            for name in ("gemm1_weights", "gemm2_weights"):
                rows, columns = tensors[name].shape[1:]
                w = torch.randn((rows, columns), generator=generator, device=self._device)
                blocks = w.view(rows // SCALE_BLOCK, SCALE_BLOCK, columns // SCALE_BLOCK, SCALE_BLOCK)
                magnitude = torch.randn((len(blocks), 1, blocks.shape[2], 1), generator=generator, device=self._device)
                blocks *= torch.exp(0.5 * magnitude) / columns**0.5
                codes, scale = quantize_blocks(blocks, (1, 3))
                tensors[name][expert] = codes.view(rows, columns)
                tensors[f"{name}_scale"][expert] = scale[:, 0, :, 0]
            yield expert + 1
        yield tensors

    @property
    def rotation_bytes(self) -> int:
        """Bytes to read until what was read before is in no cache."""
        return 3 * torch.cuda.get_device_properties(self._device).L2_cache_size

    @property
    def num_sms(self) -> int:
        return torch.cuda.get_device_properties(self._device).multi_processor_count

    def weight_copies(self, weights: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        total = sum(tensor.nbytes for tensor in weights.values())
        copies = min(16, -(-self.rotation_bytes // total))
        return [weights] + [{name: tensor.clone() for name, tensor in weights.items()} for _ in range(copies - 1)]

    def random_tokens(self, cell: Cell, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator(self._device).manual_seed(seed)
        shape = (cell.tokens, cell.shape.hidden_size)
        x = torch.randn(shape, generator=generator, device=self._device).to(torch.bfloat16)
        if cell.bf16_input:
            return {"hidden_states": x}
        codes, scale = quantize_blocks(x.float().view(len(x), -1, SCALE_BLOCK), (2,))
        return {"hidden_states": codes.view(shape), "hidden_states_scale": scale[:, :, 0].t().contiguous()}

    def put(self, array: NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def native_call(
        self,
        problem: Problem,
        buffers: Sequence[torch.Tensor | None],
        stages: int,
        extension: ModuleType | None = None,
    ) -> Callable[[], None]:
        def call() -> None:
            pointers = [0 if tensor is None else tensor.data_ptr() for tensor in buffers]
            sizes = [0 if tensor is None else tensor.nbytes for tensor in buffers]
            stream = torch.cuda.current_stream(self._device).cuda_stream
            native.forward(
                problem, pointers, sizes, device=self._index, stream=stream, stages=stages, extension=extension
            )

        return call

    def stages(self, problem: Problem) -> int:
        return native.launched_stages(problem, self.num_sms)

    def program(self, calls: Sequence[Callable[[], Any]]) -> Program:
        return CudaGraph(calls)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def release(self) -> None:
        torch.cuda.empty_cache()

    def ceilings(self, repeats: int = 20) -> Ceilings:
        from .cuda_ceilings import measure_ceilings

        return measure_ceilings(self._device, repeats)


def quantize_blocks(blocks: torch.Tensor, axes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 codes of float32 `blocks`, whose `axes` share a scale, and the scales with `axes` kept as 1."""
    scale = (blocks.abs().amax(axes, keepdim=True) / E4M3_MAX).clamp(min=MIN_SCALE)
    return (blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale
