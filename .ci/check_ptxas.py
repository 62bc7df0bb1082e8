"""Reads a build log and fails on what makes a kernel slow without a word: register spills, serialised wgmma (C75xx).

Usage: check_ptxas.py LOG. The log is that of a whole build, with ptxas -v.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def complaints(log: str) -> list[str]:
    """One sentence for each kernel that spills, each C75xx line, and a log without kernels."""
    found = []
    kernel = ""
    kernels = set()
    for line in log.splitlines():
        if match := re.search(r"(?:Function properties for|Compiling entry function) '?([\w$]+)", line):
            kernel = match[1]
            kernels.add(kernel)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spills and any(map(int, spills.groups())):
            found.append(f"{kernel} spills registers: {line.strip()}")
        if re.search(r"\bC75\d\d\b", line):
            found.append(line.strip())
    if not kernels:
        found.append("the log tells of no kernel: it is not that of a whole build with ptxas -v")
    return found


def main() -> int:
    log = Path(sys.argv[1]).read_text(errors="replace")
    found = complaints(log)
    print("\n".join(found) or "ptxas: no spills, no C75xx warnings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
