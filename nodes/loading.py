"""A stack of names -> adapters and what is known of them, read once and kept while the files are unchanged."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..seqlora_core.adapter import Adapter
from ..seqlora_core.composition import compose
from ..seqlora_core.concept import Concept
from ..seqlora_core.errors import UserError
from ..seqlora_core.library import Library
from .folders import library_folder
from .types import Stack


@lru_cache(maxsize=128)
def _read(folder: Path, name: str, changed: int) -> Concept:
    return Library(folder).load(name)


def load_concepts(stack: Stack) -> list[Concept]:
    out = []
    for entry in stack.entries:
        folder = library_folder(entry.library)
        lora = Library(folder).paths(entry.name)[0]
        if not lora.exists():
            raise UserError(f"the concept {entry.name!r} of library {entry.library!r} is gone: {lora.name} does not exist")
        out.append(_read(folder, entry.name, lora.stat().st_mtime_ns))
    return out


def compose_stack(stack: Stack, mode: str, amount: float) -> tuple[Adapter, list[Concept]]:
    """The stack as one adapter, and its concepts."""
    if not stack.entries:
        raise UserError("the stack is empty: add a concept")
    concepts = load_concepts(stack)
    general = None
    if mode == "data":
        calibration = Library(library_folder(stack.entries[0].library)).calibration()
        general = calibration.moments if calibration else None
    composed = compose(
        [c.adapter for c in concepts], [e.strength for e in stack.entries], mode, amount,
        [c.moments for c in concepts], general,
    )  # fmt: skip
    composed.metadata = {"seqlora.trigger": ", ".join(c.trigger for c in concepts), "modelspec.title": "SeqLoRA stack"}
    return composed, concepts
