"""A stack of names -> adapters and what is known of them, read once and kept while the files are unchanged."""

from __future__ import annotations

from functools import lru_cache
from glob import escape
from pathlib import Path

import torch

from ..seqlora_core.adapter import Adapter, concatenate, load_adapter
from ..seqlora_core.composition import project
from ..seqlora_core.concept import Concept
from ..seqlora_core.errors import UserError
from ..seqlora_core.library import Library
from ..seqlora_core.lora_moments import kept_general, kept_moments, moments_path
from ..seqlora_core.statistics import Moments
from ..seqlora_core.triggers import trigger_of
from .folders import libraries_folder, library_folder, lora_file
from .types import Entry, Stack


@lru_cache(maxsize=128)
def _read(folder: Path, name: str, changed: int) -> Concept:
    return Library(folder).load(name)


@lru_cache(maxsize=128)
def _read_file(path: Path, base: str, changed: tuple) -> Concept:
    """A LoRA file as a concept that has no library, with its moments if it was calibrated"""
    adapter, kept = load_adapter(path), kept_moments(path, base or None)
    moments = kept[0] if kept else None
    return Concept(path.stem, trigger_of(adapter.metadata), "", adapter, moments, {}, torch.zeros(0), [])


def _changed(path: Path, base: str) -> tuple:
    stats = [moments_path(path, base)] if base else sorted(path.parent.glob(f"{escape(path.stem)}.*.stats.safetensors"))
    return tuple(p.stat().st_mtime_ns for p in [path, *stats] if p.exists())


def load_concepts(stack: Stack) -> list[Concept]:
    out = []
    for entry in stack.entries:
        if not entry.library:
            path = lora_file(entry.name)
            out.append(_read_file(path, entry.base, _changed(path, entry.base)))
            continue
        folder = library_folder(entry.library)
        lora = Library(folder).paths(entry.name)[0]
        if not lora.exists():
            raise UserError(f"the concept {entry.name!r} of library {entry.library!r} is gone: {lora.name} does not exist")
        out.append(_read(folder, entry.name, lora.stat().st_mtime_ns))
    return out


def general_moments(entries: list[Entry]) -> Moments | None:
    """What the base model sees while it draws other things, from the first entry that has it"""
    for entry in entries:
        if entry.library:
            calibration = Library(library_folder(entry.library)).calibration()
            found = calibration.moments if calibration else None
        else:
            kept = kept_moments(lora_file(entry.name), entry.base or None)
            found = kept_general(libraries_folder(), kept[1]) if kept else None
        if found is not None:
            return found
    return None


def project_stack(stack: Stack, mode: str, amount: float) -> tuple[list[Adapter], list[Concept]]:
    """Each of the stack's adapters as it is projected, at strength 1, and the concepts themselves."""
    if not stack.entries:
        raise UserError("the stack is empty: add a concept")
    concepts = load_concepts(stack)
    silent = [c.name for c in concepts if c.moments is None]
    if mode == "data" and silent:
        raise UserError(f"mode 'data' needs to know what {silent[0]!r} sees: put a Calibrate node before, or use 'weights'")
    general = general_moments(stack.entries) if mode == "data" else None
    moments = None if silent else [c.moments for c in concepts]
    return project([c.adapter for c in concepts], mode, amount, moments, general), concepts


def compose_stack(stack: Stack, mode: str, amount: float) -> tuple[Adapter, list[Concept]]:
    """The stack as one adapter, and its concepts."""
    projected, concepts = project_stack(stack, mode, amount)
    composed = concatenate([p.scaled(e.strength) for p, e in zip(projected, stack.entries)])
    composed.metadata = {"seqlora.trigger": ", ".join(c.trigger for c in concepts), "modelspec.title": "SeqLoRA stack"}
    return composed, concepts


def names_of(concepts: list[Concept]) -> list[str]:
    """The concepts' names, those that are there twice with a number"""
    out: list[str] = []
    for concept in concepts:
        count = sum(n == concept.name or n.startswith(f"{concept.name} (") for n in out)
        out.append(f"{concept.name} ({count + 1})" if count else concept.name)
    return out
