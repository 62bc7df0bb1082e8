"""A program that writes the exported function kept in tests/golden: python tests/golden_export.py.

Run it with jax 0.10.2, and only before the first release of a target's version: from then on the file must keep loading
and running with every jax, so neither the attributes nor the size of the workspace may change under that name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import jax
import jax.export
from jax_calls import TOKEN_INPUTS, call, shapes

import jax_moe

CASE = cases.Case("golden", 7, 128, 128, 2, 2, weights="signed")
PATH = Path(__file__).with_name("golden") / "fp8_block_scale_routed_moe.v1.jax_export"


def export(case: cases.Case, platforms: tuple[str, ...] = ("cpu", "cuda")) -> jax.export.Exported:
    """The function of one argument, a dictionary of the inputs, for any number of tokens."""
    (tokens,) = jax.export.symbolic_shape("tokens")
    arguments: dict[str, Any] = shapes(cases.arrays(case))
    for name in TOKEN_INPUTS:
        if (given := arguments.get(name)) is not None:
            second = name == "hidden_states_scale" and not case.scale_is_token_major
            shape = (given.shape[0], tokens) if second else (tokens, *given.shape[1:])
            arguments[name] = jax.ShapeDtypeStruct(shape, given.dtype)
    function = jax.jit(lambda given: call(case, given))
    return jax.export.export(function, platforms=platforms, disabled_checks=jax_moe.export_checks())(arguments)


if __name__ == "__main__":
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")  # no folders of this machine in the file
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_bytes(export(CASE).serialize())
