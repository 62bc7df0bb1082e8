"""Runs a few cases once, for compute-sanitizer (memcheck, racecheck, synccheck, initcheck).

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py [case ...]

Every buffer is an allocation of its own, of just its size. Outputs hold zeros, since rows that no slot names stay as
they are and are read back; the workspace is left as allocated. Exits with 1 when a result is wrong.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read by torch when it first allocates
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mx_decode
from call import Call
from cases import CASES
from memory import Cuda
from results import assert_matches

DEFAULT = (
    "t1 t7 t129 k32 h384_i896 bf16_t53 routing_mixed_window routing_none_local window_1_2 unfinalized_window "
    "scale_padded_t7 e300 geglu relu2_t257 alpha_beta_clamp blocked_shuffled_t257 apart_garbage lora_unfinalized "
    "mx_t1 mx_t7 mx_t16 mx_far_scales_t5 "
    "mx_t129 mx_shuffled_t257 mx_padded mx_bf16_t257 mx_shuffled_grid mx_relu2_shuffled mx_lora_unfinalized"
).split()


def main(names: list[str]) -> int:
    failed = 0
    for name in names or DEFAULT:
        case = (mx_decode.CASES | CASES)[name]
        call = Call(case, memory=Cuda(), watched=False)
        for output in call.problem.outputs():
            if output in call.outputs:
                call.outputs[output].fill(0)
        try:
            call.launch()
            assert_matches(case, call.given, call.results(), on_hopper=True)
        except AssertionError as error:
            failed += 1
            print(f"{name}: {error}")
        else:
            print(f"{name}: ok")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
