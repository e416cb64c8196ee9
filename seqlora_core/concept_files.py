"""The two files of a concept: NAME.safetensors, an ordinary LoRA, and NAME.stats.safetensors, what later concepts need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from .adapter import json_metadata, load_adapter
from .concept import Concept
from .errors import UserError
from .statistics import json_of, read_statistics
from .tensor_file import read_metadata, write_safetensors


def read_concept(entry: dict[str, Any], lora: Path, stats: Path) -> Concept:
    """entry: the concept's in the manifest.  UserError for files that are damaged or do not belong together."""
    adapter = load_adapter(lora)
    moments, tensors, metadata = read_statistics(stats)
    captions = json_of(stats, metadata, "seqlora.captions", list)
    stored = {k.removeprefix("basis."): v for k, v in tensors.items() if k.startswith("basis.")}
    # fits once kept those of layers that no gradient reaches too, which a LoRA leaves out
    bases = {n: b for n, b in stored.items() if n in adapter.layers}
    latents = tensors.get("latents", torch.zeros(0))
    unfit = any(b.ndim != 2 or len(b) != adapter.layers[n].down.shape[1] for n, b in bases.items())
    unfit = unfit or bool(stored) and not bases
    if unfit or latents.ndim == 0 or len(captions) != len(latents) or not all(isinstance(c, str) for c in captions):
        raise UserError(f"{stats} does not belong to {lora.name}: one of them is damaged or from another run, get both again")
    return Concept(entry["name"], entry["trigger"], entry["class_noun"], adapter, moments, bases, latents, captions)


def is_whole(lora: Path) -> bool:
    """Whether a concept's LoRA file is of a run that came to its end; one that does not say is."""
    try:
        said = read_metadata(lora)
    except UserError:
        return False
    return said.get("seqlora.steps_done", said.get("seqlora.steps")) == said.get("seqlora.steps")


def holds_concepts(folder: Path) -> bool:
    """Whether a concept's statistics are there; NAME.BASE.stats.safetensors are of someone's LoRA (`lora_moments`)."""
    return any(not re.search(r"\.[0-9a-f]{16}\.stats", p.name) for p in folder.glob("[!.]*.stats.safetensors"))


def lora_metadata(entry: dict[str, Any], library: dict[str, Any], identity: str) -> dict[str, str]:
    """What a concept's LoRA file says of its place in the library, whose manifest and `identity` these are"""
    return {
        "ss_output_name": entry["name"],
        "modelspec.title": entry["name"],
        "modelspec.trigger_phrase": entry["trigger"],
        "seqlora.name": entry["name"],
        "seqlora.trigger": entry["trigger"],
        "seqlora.class_noun": entry["class_noun"],
        "seqlora.library": identity,
        "seqlora.order": str(entry["order"]),
        "seqlora.base": library["base"],
    }


def write_concept_statistics(path: Path, concept: Concept, entry: dict[str, Any], library: dict[str, Any]) -> None:
    """library: its manifest; all that a lost manifest is rebuilt from is written into the file."""
    tensors = concept.moments.tensors() | {f"basis.{n}": b for n, b in concept.bases.items()}
    if len(concept.latents):
        tensors["latents"] = concept.latents.float()
    metadata = {
        "seqlora.name": entry["name"],
        "seqlora.trigger": entry["trigger"],
        "seqlora.class_noun": entry["class_noun"],
        "seqlora.order": str(entry["order"]),
        "seqlora.lora": entry["lora"],
        "seqlora.base": library["base"],
        "seqlora.planned": str(library["planned"]),
        "seqlora.shared": concept.moments.shared(),
        "seqlora.captions": concept.captions,
    }
    write_safetensors(path, tensors, json_metadata(metadata))
