"""A library's manifest: which concepts there are and in which order.

    {"format": 2, "base": fingerprint, "planned": 32, "concepts": [{"name", "trigger", "class_noun", "order", "lora", "stats"}]}

`lora` and `stats` are hashes of the concept's two files.  While these are replaced or removed the manifest names the change
as `"pending": {"write": NAME}` or `{"remove": NAME}`: whoever writes next, or finds it so, finishes the change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import strict_json
from .errors import UserError
from .names import concept_name
from .storage import written_aside

FORMAT = 2
FILE = "library.json"
LONGEST = 1 << 20  # bytes; about three thousand concepts


def read(folder: Path) -> dict[str, Any]:
    """The manifest, as today's format has it.  UserError if it is damaged or newer than this pack."""
    path = folder / FILE
    try:
        if path.stat().st_size > LONGEST:
            raise ValueError(f"it is larger than {LONGEST:,} bytes")
        found = strict_json.parse(path.read_bytes(), strict_json.SMALL)
        if isinstance(found["format"], int) and found["format"] > FORMAT:
            raise UserError(f"{path} was written by a newer SeqLoRA: update this pack")
        return _checked(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError) and "newer SeqLoRA" in str(error):
            raise
        raise UserError(f"{path} is damaged ({error}): rebuild it with 'seqlora library repair {folder}'") from error


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Whole or not at all, in today's format"""
    text = json.dumps({**manifest, "format": FORMAT}, indent=1, ensure_ascii=False)
    with written_aside(folder / FILE) as f:
        f.write(text.encode("utf-8"))


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """Every field of its type; what older formats lack filled in (format 1 had no hashes, its first no order)."""
    concepts, names = [], set()
    for index, entry in enumerate(_typed(found["concepts"], list)):
        name = concept_name(entry["name"])
        if name.casefold() in names:
            raise ValueError(f"it names {name!r} twice")
        names.add(name.casefold())
        texts = {key: _typed(entry[key], str) for key in ("trigger", "class_noun")}
        hashes = {key: _typed(entry[key], str) for key in ("lora", "stats") if key in entry}
        concepts.append({"name": name, **texts, "order": _typed(entry.get("order", index), int), **hashes})
    if _typed(found["format"], int) < 1 or _typed(found["planned"], int) < 1:
        raise ValueError("format or planned is less than 1")
    manifest = {"format": FORMAT, "base": _typed(found["base"], str), "planned": found["planned"], "concepts": concepts}
    if "pending" in found:
        ((kind, name),) = _typed(found["pending"], dict).items()
        if kind not in ("write", "remove"):
            raise ValueError(f"it holds an unknown change {kind!r}")
        manifest["pending"] = {kind: concept_name(name)}
    return manifest


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is not of type {kind.__name__}")
    return value
