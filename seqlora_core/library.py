"""An ordered folder of concepts that were trained to stand beside one another.

    LIBRARY/library.json               order, base model, planned size (can be rebuilt from the other files)
    LIBRARY/calibration.safetensors    what the base model sees: the metric, and pictures for replay
    LIBRARY/NAME.safetensors           the concept: an ordinary LoRA file
    LIBRARY/NAME.stats.safetensors     its moments, basis and kept references
    LIBRARY/.checkpoints/NAME/         of a run that is not done

A change of a concept is whole or has not happened, whatever is killed when: new files are written aside, the manifest names
the change, the files take their places, the manifest says that it is done (`manifest.py`).  A change that the manifest
names is finished by whoever opens the library next.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from . import manifest
from .adapter import check_useful, save_adapter
from .calibration import FILE, Calibration
from .checkpoint import FOLDER, SUFFIX, remove_run
from .concept import Concept
from .concept_files import holds_concepts, is_whole, lora_metadata, read_concept, write_concept_statistics
from .config import TrainingConfig
from .errors import UserError
from .names import concept_name, safe_text
from .statistics import StoredMoments
from .storage import PART, digest, locked, sync_folder
from .tensor_file import tensors_hash

LOCK_SECONDS = 10
NEW = ".new"  # ends the name of a file that waits to take its place
READS = 5  # a concept that is replaced while it is read is read again


class Library:
    """Open (or, with `create`, start) the library in a folder; `base` is the base model's fingerprint, `planned` how many
    concepts it is meant to hold (None: as it was begun, or 32), which changes only until it holds one.

    Raises UserError if the folder is missing, its manifest is lost or damaged, or it belongs to another base model.
    """

    note = ""  # a sentence for the user, of what was asked for and is not so

    def __init__(self, folder: Path | str, base: str | None = None, planned: int | None = None, create: bool = False):
        self.folder = Path(folder)
        if planned is not None:
            TrainingConfig(planned=planned).validate()
        if not self.manifest_path.exists():
            if holds_concepts(self.folder):
                raise UserError(f"the library {self.folder} has lost its manifest: run 'seqlora library repair {self.folder}'")
            if not create:
                raise UserError(f"no library at {self.folder}: train a concept into it first, or check the path")
            self._make(base or "", planned or TrainingConfig.planned)
        self.reload()
        if base and self.manifest["base"] and base != self.manifest["base"]:
            raise UserError(
                f"the library {self.folder.name!r} was trained on another base model ({self.manifest['base']}, not {base}): "
                "load that model, in that precision, or start a new library"
            )
        if planned not in (None, self.planned):
            self._plan(planned)

    @property
    def manifest_path(self) -> Path:
        """library.json"""
        return self.folder / manifest.FILE

    @property
    def names(self) -> list[str]:
        """Concepts in the order of their training"""
        return [c["name"] for c in self.manifest["concepts"]]

    @property
    def planned(self) -> int:
        """Concepts that it is meant to hold"""
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
                self.rewrite({"base": base, "planned": planned, "concepts": []})

    def _plan(self, planned: int) -> None:
        """Concepts that are there were given the room that they have by the number it was begun with"""
        if self.names:
            begun = f"was planned for {self.planned} when it was begun"
            self.note = f"the library {self.folder.name!r} {begun}; {planned} is ignored"
            return
        with self.training(), self.changing():  # the first concept, if it is being trained, goes by the number as it is
            if not self.names:
                self.rewrite({**self.manifest, "planned": planned})

    def reload(self) -> None:
        """Read the manifest anew; finish a change that a killed process left half done."""
        self.manifest = manifest.read(self.folder)
        if "pending" in self.manifest:
            with self.changing():
                pass

    def lock(self):
        """One writer at a time, over all processes"""
        return locked(self.folder / ".lock", LOCK_SECONDS, "writing to")

    def training(self):
        """Held for the length of a run: two at once in one library would not stand beside one another."""
        return locked(self.folder / ".training.lock", LOCK_SECONDS, "training into")

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """The lock, with the library as it is now and nothing half done in it"""
        with self.lock():
            self.manifest = manifest.read(self.folder)
            self.settle()
            for left in (*self.folder.glob(f".*{PART}"), *self.folder.glob(f".*{NEW}")):
                left.unlink(missing_ok=True)
            yield

    def settle(self) -> None:
        """Finish the change that the manifest names, if it names one; done twice it is done once.  The run of a concept that is
        whole now, or gone, ends with it: nothing is left to go on with."""
        pending = self.manifest.get("pending", {})
        for kind, name in pending.items():
            for path in self.paths(name):
                if kind == "remove":
                    path.unlink(missing_ok=True)
                elif _aside(path).exists():
                    os.replace(_aside(path), path)
            if kind == "remove" or self.whole(name):
                remove_run(self.checkpoints(name))
        if pending:
            sync_folder(self.folder)
            self.rewrite({k: v for k, v in self.manifest.items() if k != "pending"})

    def _change(self, kind: str, name: str, concepts: list[dict]) -> None:
        """From here on the change is made, at the latest by the next who opens the library."""
        self.rewrite({**self.manifest, "concepts": concepts, "pending": {kind: name}})
        self.settle()

    def rewrite(self, new: dict) -> None:
        """Only with the lock held"""
        manifest.write(self.folder, new)
        self.manifest = new

    def paths(self, name: str) -> tuple[Path, Path]:
        """The concept's LoRA file and its statistics file"""
        name = concept_name(name)
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.stats.safetensors"

    def checkpoints(self, name: str) -> Path:
        """The folder of the concept's unfinished run"""
        return self.folder / FOLDER / concept_name(name)

    def unfinished(self, name: str) -> bool:
        """Whether a run of this name was stopped before its end, and no whole concept has the name"""
        return any(self.checkpoints(name).glob(f"*{SUFFIX}")) and not self.whole(name)

    def whole(self, name: str) -> bool:
        """Whether it holds this concept, trained to the end"""
        return name in self.names and is_whole(self.paths(name)[0])

    def state(self, without: str = "") -> str:
        """Names what a new concept is trained on top of: the calibration, and the tensors of all concepts but one, in their
        order.  What files say beside them, such as when they were trained, moves no step."""
        others = [e for e in self.manifest["concepts"] if e["name"] != without]
        files = ((e, *file) for e in others for file in zip(("lora", "stats"), self.paths(e["name"])))
        hashes = (e.get(kind) or tensors_hash(path) for e, kind, path in files)  # format 1 had none
        return digest(self.identity().encode(), *(known.encode() for known in hashes))

    def identity(self) -> str:
        """Names the library by what it rests on, its calibration, whatever its folder is called"""
        path = self.folder / FILE
        return digest(path.read_bytes()) if path.exists() else ""

    def require(self, name: str) -> str:
        """The name; UserError, which says what there is, if it is none of its concepts"""
        if name not in self.names:
            known = ", ".join(self.names) or "none yet"
            raise UserError(f"no concept {name!r} in the library {self.folder.name!r}: it holds {known}")
        return name

    def calibration(self) -> Calibration | None:
        """What its base model sees; None if it has none yet.  UserError for a damaged file"""
        path = self.folder / FILE
        return Calibration.load(path) if path.exists() else None

    def keep_calibration(self, calibration: Calibration) -> None:
        """Write it as this library's; bases of concepts rest on it, so only before the first"""
        with self.changing():
            calibration.save(self.folder / FILE, self.manifest["base"])

    def check_free(self, name: str, replace_existing: bool = False) -> None:
        """UserError if the name is taken (in any case: file systems differ), or a file that is not this library's has it."""
        taken = next((n for n in self.names if n.casefold() == name.casefold()), None)
        if taken is not None and not (replace_existing and taken == name):
            raise UserError(
                f"the library {self.folder.name!r} has a concept {taken!r} already: remove it first, or use another name"
            )
        strange = next((p for p in self.paths(name) if os.path.lexists(p)), None)
        if taken is None and strange is not None:
            raise UserError(
                f"{strange} is not of this library: use another name, move it, or run 'seqlora library repair {self.folder}'"
            )

    def add(self, concept: Concept, replace_existing: bool = False, order: int | None = None) -> None:
        """Write a concept and append it to the list, or put it in the place of the one it replaces.

        order: when among the others it was trained; None: last.
        """
        name = concept_name(concept.name)
        trigger, class_noun = safe_text(concept.trigger, "trigger"), safe_text(concept.class_noun, "class noun")
        lora, stats = self.paths(name)
        check_useful(lora, concept.adapter)
        with self.changing():
            self.check_free(name, replace_existing)
            entries = list(self.manifest["concepts"])
            place = self.names.index(name) if name in self.names else len(entries)
            if order is None:  # what is trained anew comes last
                order = 1 + max((e["order"] for e in entries if e["name"] != name), default=-1)
            entry = {"name": name, "trigger": trigger, "class_noun": class_noun, "order": order}
            concept.adapter.metadata |= lora_metadata(entry, self.manifest, self.identity())
            try:
                save_adapter(_aside(lora), concept.adapter)
                entry["lora"] = tensors_hash(_aside(lora))
                write_concept_statistics(_aside(stats), concept, entry, self.manifest)
                entry["stats"] = tensors_hash(_aside(stats))
                entries[place : place + 1] = [entry]
                self._change("write", name, entries)
            except BaseException:
                if "pending" not in self.manifest:
                    for path in (lora, stats):
                        _aside(path).unlink(missing_ok=True)
                raise

    def load(self, name: str) -> Concept:
        """A concept with everything that training on top of it needs."""
        for _ in range(READS):
            entry, paths = self._entry(name), self.paths(name)
            lost = next((path.name for path in paths if not path.is_file()), None)
            try:
                if lost:
                    raise UserError(
                        f"the library {self.folder.name!r} has lost {lost}, of its concept {name!r}: put the file back, or run "
                        f"'seqlora library remove {self.folder} {name}'"
                    )
                found, error = read_concept(entry, *paths), None
            except UserError as caught:
                found, error = None, caught
            self.reload()
            if self._entry(name) == entry:
                break
        if error is not None:
            raise error
        return found

    def _entry(self, name: str) -> dict:
        return self.manifest["concepts"][self.names.index(self.require(name))]

    def concepts(self, without: str = "", stored_moments: bool = False) -> list[Concept]:
        """All but one, in their order; with `stored_moments` what is largest of them stays in their files."""
        found = []
        for name in (n for n in self.names if n != without):
            found.append(self.load(name))
            if stored_moments:
                found[-1].moments = StoredMoments(self.paths(name)[1])
        return found

    def remove(self, name: str) -> str:
        """Take a concept out; the others stay valid, and later ones may use its space.  Returns what it cost."""
        with self.changing():
            self._entry(name)
            cost = self.cost(name)
            self._change("remove", name, [c for c in self.manifest["concepts"] if c["name"] != name])
        return f"removed {name}; its directions are free for the next concept{cost}"

    def cost(self, name: str) -> str:
        """What it means for the others that this concept goes or is trained anew, as the end of a sentence"""
        own = self._entry(name)["order"]
        later = [e["name"] for e in self.manifest["concepts"] if e["order"] > own]
        return f"; {', '.join(later)} {'were' if later[1:] else 'was'} trained beside it and stay valid" if later else ""

    def reorder(self, names: list[str]) -> None:
        """Put the concepts in this order, in which nodes and reports list them; the sum does not depend on it."""
        with self.changing():
            if sorted(names) != sorted(self.names):
                raise UserError(f"give every concept once: {', '.join(self.names)}")
            entries = {e["name"]: e for e in self.manifest["concepts"]}
            self.rewrite({**self.manifest, "concepts": [entries[n] for n in names]})

    def verify(self) -> list[str]:
        """Problems found, one sentence each; empty if all is well."""
        problems = []
        for name in self.names:
            try:
                self.load(name)
                problems += [
                    f"{name}: {path.name} is not the file that was saved"
                    for path, key in zip(self.paths(name), ("lora", "stats"))
                    if tensors_hash(path) != self._entry(name).get(key, tensors_hash(path))
                ]
            except (UserError, OSError) as error:
                problems.append(f"{name}: {error}")
        try:
            self.calibration()
        except UserError as error:
            problems.append(f"calibration: {error}")
        known = {"calibration", *self.names, *(f"{n}.stats" for n in self.names)}
        stray = [p.name for p in self.folder.glob("*.safetensors") if p.stem not in known]
        return problems + [f"{name} is not in the manifest" for name in sorted(stray)]


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{NEW}")
