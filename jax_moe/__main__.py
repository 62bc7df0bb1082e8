"""The program jax-moe {info,demo,bench}; `python -m jax_moe` is the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__, demo, info
from .bench import command as bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 1 when it found something wrong, 2 when it could not be run."""
    parser = argparse.ArgumentParser(prog="jax-moe", description="FP8 mixture-of-experts on Hopper GPUs and CPUs.")
    parser.add_argument("--version", action="version", version=f"jax-moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in (("info", info), ("demo", demo), ("bench", bench)):
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except info.CannotRun as error:
        print(f"jax-moe {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
