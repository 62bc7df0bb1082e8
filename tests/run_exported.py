"""A program that runs an exported function on a case's inputs, knowing of jax_moe only that it has to be imported.

Arguments: file, name of the case, number of tokens. Writes the bits of the first result as hexadecimal.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import cases
import jax.export
import jax_calls
import numpy as np

import jax_moe.moe  # noqa: F401  (registers the targets)

if __name__ == "__main__":
    path, name, tokens = sys.argv[1:]
    case = dataclasses.replace(getattr(jax_calls, name), tokens=int(tokens))
    exported = jax.export.deserialize(bytearray(Path(path).read_bytes()))
    result = np.asarray(jax.tree.leaves(exported.call(cases.arrays(case)))[0])
    sys.stdout.write(result.view(np.uint16).tobytes().hex())
