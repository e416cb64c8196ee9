"""An ordered folder of concepts that were trained to stand beside one another.

    LIBRARY/library.json               order, base model, planned size (can be rebuilt from the other files)
    LIBRARY/calibration.safetensors    what the base model sees: the metric, and pictures for replay
    LIBRARY/NAME.safetensors           the concept: an ordinary LoRA file
    LIBRARY/NAME.stats.safetensors     its moments, basis and kept references
    LIBRARY/.checkpoints/NAME/         of a run that is not done

Adding a concept writes the statistics, then the LoRA, then the manifest, each aside and renamed: whatever is
killed when, a concept that the manifest names is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from .adapter import check_useful, json_metadata, load_adapter, read_safetensors, save_adapter, write_safetensors
from .calibration import Calibration
from .checkpoint import FOLDER, SUFFIX
from .concept import Concept
from .errors import UserError
from .names import safe_name
from .statistics import Moments, moments_from_tensors

FORMAT = 1
LOCK_SECONDS = 10


class Library:
    """Open (or, with `create`, start) the library in a folder; `base` is the base model's fingerprint.

    Raises UserError if the folder is missing, its manifest is damaged, or it belongs to another base model.
    """

    def __init__(self, folder: Path | str, base: str | None = None, planned: int = 32, create: bool = False):
        self.folder = Path(folder)
        if not self.manifest_path.exists():
            if not create:
                raise UserError(f"no library at {self.folder}: train a concept into it first, or check the path")
            self._make(base or "", planned)
        self.reload()
        if base and self.manifest["base"] and base != self.manifest["base"]:
            raise UserError(
                f"the library {self.folder.name!r} was trained on another base model ({self.manifest['base']}, not {base}): "
                "load that model, or start a new library"
            )

    @property
    def manifest_path(self) -> Path:
        return self.folder / "library.json"

    @property
    def names(self) -> list[str]:
        """Concepts in the order of their training"""
        return [c["name"] for c in self.manifest["concepts"]]

    @property
    def planned(self) -> int:
        return self.manifest["planned"]

    def __len__(self) -> int:
        return len(self.manifest["concepts"])

    def _make(self, base: str, planned: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the library {self.folder}: {error.strerror}; choose another folder") from error
        with self.lock():
            if not self.manifest_path.exists():
                self._write_manifest({"format": FORMAT, "base": base, "planned": planned, "concepts": []})

    def reload(self) -> None:
        try:
            self.manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
            if self.manifest["format"] > FORMAT:
                raise UserError(f"{self.manifest_path} was written by a newer SeqLoRA: update this pack")
            for index, concept in enumerate(self.manifest["concepts"]):
                safe_name(concept["name"], "concept name")
                concept.setdefault("order", index)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{self.manifest_path} is damaged ({error}): rebuild it with 'seqlora library repair {self.folder}'"
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One writer at a time, over all processes; waits LOCK_SECONDS, then says so."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(str(self.folder / ".lock"), timeout=LOCK_SECONDS):
                yield
        except Timeout as error:
            raise UserError(f"another process is writing to the library {self.folder.name!r}: wait until it is done") from error

    def _write_manifest(self, manifest: dict) -> None:
        part = self.manifest_path.with_name(f".library.json.{os.getpid()}.part")
        with open(part, "w", encoding="utf-8") as f:
            json.dump(manifest, f, indent=1, ensure_ascii=False)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, self.manifest_path)
        self.manifest = manifest

    def paths(self, name: str) -> tuple[Path, Path]:
        """The concept's LoRA file and its statistics file"""
        name = safe_name(name, "concept name")
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.stats.safetensors"

    def checkpoints(self, name: str) -> Path:
        """The folder of the concept's unfinished run"""
        return self.folder / FOLDER / safe_name(name, "concept name")

    def unfinished(self, name: str) -> bool:
        """Whether a run of this name was stopped before its end"""
        return any(self.checkpoints(name).glob(f"*{SUFFIX}"))

    def state(self, without: str = "") -> str:
        """Names what a new concept is trained on top of: the calibration, and all concepts but one, in their order."""
        names = [n for n in self.names if n != without]
        return digest(self.identity().encode(), *(path.read_bytes() for n in names for path in self.paths(n)))

    def identity(self) -> str:
        """Names the library by what it rests on, its calibration, whatever its folder is called"""
        path = self.folder / "calibration.safetensors"
        return digest(path.read_bytes()) if path.exists() else ""

    def require(self, name: str) -> str:
        if name not in self.names:
            known = ", ".join(self.names) or "none yet"
            raise UserError(f"no concept {name!r} in the library {self.folder.name!r}: it holds {known}")
        return name

    def calibration(self) -> Calibration | None:
        path = self.folder / "calibration.safetensors"
        return Calibration.load(path) if path.exists() else None

    def keep_calibration(self, calibration: Calibration) -> None:
        with self.lock():
            calibration.save(self.folder / "calibration.safetensors", self.manifest["base"])

    def check_free(self, name: str, replace_existing: bool = False) -> None:
        """UserError if the name is taken (in any case: file systems differ)."""
        taken = next((n for n in self.names if n.lower() == name.lower()), None)
        if taken is not None and not (replace_existing and taken == name):
            raise UserError(
                f"the library {self.folder.name!r} has a concept {taken!r} already: remove it first, or use another name"
            )

    def add(self, concept: Concept, replace_existing: bool = False) -> None:
        """Write a concept and append it to the order, or put it in the place of the one it replaces."""
        name = safe_name(concept.name, "concept name")
        lora, stats = self.paths(name)
        with self.lock():
            self.reload()
            self.check_free(name, replace_existing)
            entries = list(self.manifest["concepts"])
            place = self.names.index(name) if name in self.names else len(entries)
            order = entries[place]["order"] if place < len(entries) else 1 + max((e["order"] for e in entries), default=-1)
            concept.adapter.metadata |= {
                "ss_output_name": name,
                "modelspec.title": name,
                "modelspec.trigger_phrase": concept.trigger,
                "seqlora.name": name,
                "seqlora.trigger": concept.trigger,
                "seqlora.class_noun": concept.class_noun,
                "seqlora.library": self.identity(),
                "seqlora.order": str(order),
                "seqlora.base": self.manifest["base"],
            }
            check_useful(lora, concept.adapter)
            write_safetensors(stats, _stats_tensors(concept), _stats_metadata(concept, order, self.manifest))
            save_adapter(lora, concept.adapter)
            entries[place : place + 1] = [
                {"name": name, "trigger": concept.trigger, "class_noun": concept.class_noun, "order": order}
            ]
            self._write_manifest({**self.manifest, "concepts": entries})

    def load(self, name: str) -> Concept:
        """A concept with everything that training on top of it needs."""
        lora, stats = self.paths(self.require(name))
        adapter = load_adapter(lora)
        moments, tensors, metadata = read_statistics(stats)
        captions = json.loads(metadata.get("seqlora.captions", "[]"))
        bases = {k.removeprefix("basis."): v for k, v in tensors.items() if k.startswith("basis.")}
        entry = next(c for c in self.manifest["concepts"] if c["name"] == name)
        latents = tensors.get("latents", torch.zeros(0))
        return Concept(name, entry["trigger"], entry["class_noun"], adapter, moments, bases, latents, captions)

    def concepts(self) -> list[Concept]:
        return [self.load(name) for name in self.names]

    def remove(self, name: str) -> str:
        """Take a concept out; the others stay valid, and later ones may use its space.  Returns what it cost."""
        with self.lock():
            self.reload()
            entry_paths = self.paths(self.require(name))
            later = self.names[self.names.index(name) + 1 :]
            self._write_manifest({**self.manifest, "concepts": [c for c in self.manifest["concepts"] if c["name"] != name]})
            for path in entry_paths:
                path.unlink(missing_ok=True)
            shutil.rmtree(self.checkpoints(name), ignore_errors=True)
        trained_on_it = f"; {', '.join(later)} were trained beside it and stay valid" if later else ""
        return f"removed {name}; its directions are free for the next concept{trained_on_it}"

    def reorder(self, names: list[str]) -> None:
        """Put the concepts in this order, in which nodes and reports list them; the sum does not depend on it."""
        with self.lock():
            self.reload()
            if sorted(names) != sorted(self.names):
                raise UserError(f"give every concept once: {', '.join(self.names)}")
            entries = {e["name"]: e for e in self.manifest["concepts"]}
            self._write_manifest({**self.manifest, "concepts": [entries[n] for n in names]})

    def verify(self) -> list[str]:
        """Problems found, one sentence each; empty if all is well."""
        problems = []
        for name in self.names:
            try:
                self.load(name)
            except (UserError, KeyError, ValueError) as error:
                problems.append(f"{name}: {error}")
        try:
            self.calibration()
        except (UserError, KeyError, ValueError) as error:
            problems.append(f"calibration: {error}")
        stray = [p.name for p in self.folder.glob("*.safetensors") if p.stem not in self._known_stems()]
        return problems + [f"{name} is not in the manifest" for name in sorted(stray)]

    def _known_stems(self) -> set[str]:
        return {"calibration", *self.names, *(f"{n}.stats" for n in self.names)}


def digest(*parts: bytes) -> str:
    """Names some contents"""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:16]


def read_statistics(path: Path) -> tuple[Moments, dict[str, torch.Tensor], dict[str, str]]:
    """A concept's moments, and everything in its statistics file"""
    tensors, metadata = read_safetensors(path)
    return moments_from_tensors(tensors, json.loads(metadata.get("seqlora.shared", "{}"))), tensors, metadata


def repair(folder: Path | str) -> Library:
    """Rebuild the manifest from the concept files that are whole, in the order they were trained."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: check the path")
    found, base, planned = [], "", 32
    for stats in sorted(folder.glob("*.stats.safetensors")):
        name = stats.name.removesuffix(".stats.safetensors")
        try:
            load_adapter(folder / f"{safe_name(name)}.safetensors")
            _, metadata = read_safetensors(stats)
            entry = {k: metadata[f"seqlora.{k}"] for k in ("trigger", "class_noun")}
            order = int(metadata["seqlora.order"])
            found.append((order, name, {"name": name, **entry, "order": order}))
            base, planned = metadata.get("seqlora.base", base), int(metadata.get("seqlora.planned", planned))
        except (UserError, KeyError, ValueError):
            continue
    manifest = {"format": FORMAT, "base": base, "planned": planned, "concepts": [e for _, _, e in sorted(found)]}
    library = Library.__new__(Library)
    library.folder = folder
    with library.lock():
        library._write_manifest(manifest)
    return library


def _stats_tensors(concept: Concept) -> dict[str, torch.Tensor]:
    tensors = concept.moments.tensors() | {f"basis.{n}": b for n, b in concept.bases.items()}
    if len(concept.latents):
        tensors["latents"] = concept.latents.float()
    return tensors


def _stats_metadata(concept: Concept, order: int, manifest: dict) -> dict[str, str]:
    return json_metadata(
        {
            "seqlora.name": concept.name,
            "seqlora.trigger": concept.trigger,
            "seqlora.class_noun": concept.class_noun,
            "seqlora.order": str(order),
            "seqlora.base": manifest["base"],
            "seqlora.planned": str(manifest["planned"]),
            "seqlora.shared": concept.moments.shared(),
            "seqlora.captions": concept.captions,
        }
    )
