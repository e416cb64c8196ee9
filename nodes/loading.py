"""A stack of names -> LoRAs and what is known of them, read once and kept while the files are unchanged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..seqlora_core.adapter import Adapter, load_adapter, read_safetensors
from ..seqlora_core.composition import check_strength
from ..seqlora_core.concept import Concept
from ..seqlora_core.errors import UserError
from ..seqlora_core.library import Library
from ..seqlora_core.lora_moments import kept_moments, kept_trigger, shared_base
from ..seqlora_core.same_layers import check_widths, one_spelling, under_names
from ..seqlora_core.selection import acts, selected
from ..seqlora_core.statistics import Moments
from ..seqlora_core.storage import Kept, stamp
from ..seqlora_core.triggers import trigger_of
from .comfy_lora_files import Fitted, fit
from .comfy_weights import Weights, parts
from .folders import file_stamps, library_folder, lora_file
from .types import TEXT, Entry, Stack

KEPT = 256  # LoRA files in memory


@dataclass
class Member:
    """One entry of a stack, read; of a file with moments the entry names the base model at hand, if there is one.

    fitted: what it does to a model, with what ComfyUI alone can read.
    """

    entry: Entry
    concept: Concept
    fitted: Fitted


_concepts, _files, _moments = Kept(KEPT), Kept(KEPT), Kept(KEPT)


def _read_moments(path: Path, base: str) -> tuple[Moments | None, str]:
    """A LoRA's moments on this base model, and the words that it was calibrated with, on whichever"""
    kept = kept_moments(path, base or None)
    called = kept or kept_moments(path)
    return kept and kept[0], kept_trigger(path, called[1]) if called else ""


def entry_file(entry: Entry) -> Path:
    if not entry.library:
        return lora_file(entry.name)
    path = Library(library_folder(entry.library)).paths(entry.name)[0]
    if not path.exists():
        raise UserError(f"the concept {entry.name!r} of library {entry.library!r} is gone: {path.name} does not exist")
    return path


def load_members(stack: Stack, weights: Weights | None = None) -> list[Member]:
    """What the stack's entries are and do to a model's weights.  Without those only plain LoRAs can be read."""
    if not stack.entries:
        raise UserError("the stack is empty: add a concept")
    for entry in stack.entries:
        check_strength(entry.name, entry.strength)
    entries = stack.entries
    if weights is None:
        base = shared_base([lora_file(e.name) for e in entries if not (e.library or e.base)]) or ""
        entries = [e if e.library or e.base else replace(e, base=base) for e in entries]
    members = [_load(entry, weights) for entry in entries]
    members = [m for m in members if m.fitted.acts or not m.entry.part]
    if not members:
        raise UserError(f"nothing of the stack acts: {stack.entries[0].name} changes no {stack.entries[0].part} layer")
    return _spelt_alike(members, weights)


def _spelt_alike(members: list[Member], weights: Weights | None) -> list[Member]:
    """The members with one name for each layer, in what they change and in what they see"""
    ask = "" if weights else "connect the model and the clip that they are for"
    adapters, moments = one_spelling([m.fitted.adapter for m in members], [m.concept.moments for m in members], ask)
    check_widths([m.concept.name for m in members], adapters)
    return [
        replace(m, fitted=replace(m.fitted, adapter=a), concept=replace(m.concept, moments=seen))
        for m, a, seen in zip(members, adapters, moments)
    ]


def _load(entry: Entry, weights: Weights | None) -> Member:
    path = entry_file(entry)
    if entry.library:
        library = library_folder(entry.library)
        concept = _concepts.get((path,), file_stamps(path), lambda: Library(library).load(entry.name))
        fitted = Fitted(concept.adapter)
    else:
        fitted = _files.get((path, weights and weights.signature), stamp(path), lambda: _read_file(path, weights))
        state = file_stamps(path)
        if weights and not entry.base and len(state) > 1:  # what it sees on another model is not what it sees here
            entry = replace(entry, base=weights.fingerprint)
        moments, called = _moments.get((path, entry.base), state, lambda: _read_moments(path, entry.base))
        if moments and not weights:  # which tell what the model that they were recorded on calls its layers
            fitted = replace(fitted, adapter=under_names(fitted.adapter, moments.layers))
        metadata = fitted.adapter.metadata
        if called and not metadata.get("seqlora.trigger"):
            metadata = metadata | {"modelspec.trigger_phrase": called}  # what the user says it is called goes before its file
            fitted = replace(fitted, adapter=Adapter(fitted.adapter.layers, metadata))
        trigger = trigger_of(metadata)
        concept = Concept(path.stem, trigger, "", fitted.adapter, moments, {}, torch.zeros(0), [])
    if entry.part:
        fitted = fitted.only(text=entry.part == TEXT)
    if entry.layers:
        found = replace(fitted, adapter=selected(fitted.adapter, entry.layers), patches=_selected(fitted, entry, weights))
        if fitted.acts and not found.acts:
            first = next(iter([*fitted.adapter.layers, *(parts(t)[0] for t in fitted.patches)]))
            raise UserError(
                f"the filter {entry.layers!r} leaves no layer of {concept.name}: use words of their names, as in {first}"
            )
        fitted = found
    return Member(entry, concept, fitted)


def _selected(fitted: Fitted, entry: Entry, weights: Weights | None) -> dict:
    """Those of its patches whose layers the entry's filter names"""
    names = {target: parts(target)[0] for target in fitted.patches}
    return {t: p for t, p in fitted.patches.items() if acts(weights.name_of.get(names[t], names[t]), entry.layers)}


def _read_file(path: Path, weights: Weights | None) -> Fitted:
    return fit(*read_safetensors(path), weights, path.name) if weights else Fitted(under_names(load_adapter(path)))
