"""JSON from files of others: no doubled keys, no NaN, no deep nesting, and no more memory than was allowed."""

from __future__ import annotations

import json
from typing import Any

ITEM = 100  # bytes that Python takes for an item or an escaped character, about
SMALL = 8 << 20  # bytes that any text may take


def parse(text: bytes, memory: int) -> Any:
    """Raises ValueError, in a few words, for what is not strictly JSON and for what would take more than `memory` bytes."""
    if ITEM * sum(text.count(mark) for mark in b"{[:,\\") > memory:
        raise ValueError("it holds more items than it should")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list) -> dict:
    table = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"it names {name[:80]!r} twice")
        table[name] = value
    return table


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
