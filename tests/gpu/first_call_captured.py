"""A program whose first call of the library is captured in a CUDA graph: nothing may need a warm-up.

python tests/gpu/first_call_captured.py CASE      exits with 1 when the replay's result is wrong
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from call import Call
from cases import CASES
from memory import Cuda
from results import assert_matches


def main(name: str) -> None:
    call = Call(CASES[name], memory=Cuda())
    call.poison()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call.launch(torch.cuda.current_stream().cuda_stream)
    graph.replay()
    assert_matches(call.case, call.given, call.results(), on_hopper=True)


if __name__ == "__main__":
    main(sys.argv[1])
