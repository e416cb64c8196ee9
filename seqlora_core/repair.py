"""A manifest rebuilt from the files of its library."""

from __future__ import annotations

import contextlib
from pathlib import Path

from . import manifest
from .adapter import load_adapter
from .errors import UserError
from .library import Library
from .names import concept_name, safe_text
from .statistics import read_statistics
from .tensor_file import tensors_hash


def repair(folder: Path | str) -> Library:
    """Rebuild the manifest from the concepts that are whole, in the order they were trained; of a manifest that can be read
    a half done change is finished first and the order is kept.  Files that are not whole are left where they are, and so are
    those of a name that an earlier concept has in another case."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: check the path")
    library = Library.__new__(Library)  # an ordinary one opens what is not there
    library.folder = folder
    with library.lock():
        listed: list[str] = []
        with contextlib.suppress(UserError):
            library.manifest = manifest.read(folder)
            library.settle()
            listed = library.names
        concepts, base, planned = _whole_concepts(folder)
        places = {name: place for place, name in enumerate(listed)}
        concepts.sort(key=lambda e: places.get(e["name"], len(places)))
        library.rewrite({"base": base, "planned": planned, "concepts": concepts})
    return library


def _whole_concepts(folder: Path) -> tuple[list[dict], str, int]:
    """Entries of the concepts whose two files are whole and belong together; base model and planned size that they name"""
    found, base, planned = [], "", 32
    for stats in sorted(folder.glob("*.stats.safetensors")):
        name = stats.name.removesuffix(".stats.safetensors")
        lora = folder / f"{name}.safetensors"
        try:
            concept_name(name)
            load_adapter(lora)
            _, _, metadata = read_statistics(stats)
            hashes = {"lora": tensors_hash(lora), "stats": tensors_hash(stats)}
            if metadata.get("seqlora.lora", hashes["lora"]) != hashes["lora"]:
                continue
            said = {k: safe_text(metadata[f"seqlora.{k}"], k) for k in ("trigger", "class_noun")}
            found.append({"name": name, **said, "order": int(metadata["seqlora.order"]), **hashes})
            base, planned = metadata.get("seqlora.base", base), max(1, int(metadata.get("seqlora.planned", planned)))
        except (UserError, OSError, KeyError, ValueError):
            continue
    first: dict[str, dict] = {}
    for entry in sorted(found, key=lambda e: (e["order"], e["name"])):
        first.setdefault(entry["name"].casefold(), entry)
    return list(first.values()), base, planned
