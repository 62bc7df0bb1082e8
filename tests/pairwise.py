"""Rows of choices in which every two choices of different factors meet at least once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def rows(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """For factors of `sizes` choices: rows that name a choice of each, the same ones every time.

    Each row starts with the first pair that has not met yet and takes, factor by factor, the choice that makes the most
    new pairs with it; of equal ones the choice that has been taken least.
    """
    factors = range(len(sizes))
    missing = {
        ((f, i), (g, j)): None
        for f, g in itertools.combinations(factors, 2)
        for i in range(sizes[f])
        for j in range(sizes[g])
    }
    taken = [[0] * size for size in sizes]
    result = []
    while missing:
        row = dict(next(iter(missing)))
        for factor in (factor for factor in factors if factor not in row):

            def gain(choice: int, factor: int = factor, row: dict[int, int] = row) -> tuple[int, int]:
                new = sum(_pair((factor, choice), other) in missing for other in row.items())
                return new, -taken[factor][choice]

            row[factor] = max(range(sizes[factor]), key=gain)
        for pair in itertools.combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        for factor, choice in row.items():
            taken[factor][choice] += 1
        result.append(tuple(row[factor] for factor in factors))
    return result


def _pair(a: tuple[int, int], b: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (a, b) if a < b else (b, a)
