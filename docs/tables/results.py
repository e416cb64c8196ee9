"""What tables are made of: a results file, and rows of two columns."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def values(lines: list[str], head: str = "| measured | value |") -> str:
    """A table of two columns from its rows"""
    return "\n".join([head, "|---|---|", *lines])
