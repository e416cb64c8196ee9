"""Where files are: libraries under models/loras/seqlora, reference pictures under ComfyUI's input folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from glob import escape
from pathlib import Path

import folder_paths

from ..seqlora_core.demo_model import DEMO_FOLDER
from ..seqlora_core.errors import UserError
from ..seqlora_core.library import Library
from ..seqlora_core.names import safe_name
from ..seqlora_core.storage import stamp

DEMO_PREFIX = "demo/"
# files that are no LoRAs: what is kept beside them, and in the folder of libraries
BESIDE = re.compile(
    r"\.stats\.safetensors$|^seqlora[\\/](.*[\\/])?calibration\.safetensors$|(^|[\\/])general\.[0-9a-f]{16}\.safetensors$"
)


def offer_sample_loras() -> None:
    """ComfyUI lists demo/loras with its own loras: every node finds them by name, and writes go to the first folder still."""
    folder_paths.add_model_folder_path("loras", str(DEMO_FOLDER / "loras"))


def libraries_folder() -> Path:
    return Path(folder_paths.get_folder_paths("loras")[0]) / "seqlora"


def library_folder(library: str) -> Path:
    return libraries_folder() / safe_name(library, "library name")


def lora_file(name: str) -> Path:
    """A file of models/loras by its name there, with or without .safetensors."""
    name = name.strip().replace("\\", "/")
    for spelled in (name, f"{name}.safetensors"):
        found = folder_paths.get_full_path("loras", spelled) if name else None
        if found is not None:
            return Path(found)
    raise UserError(f"no LoRA {name!r} in models/loras: check the name, with its folder below models/loras")


def listed(path: Path) -> str:
    """A file of models/loras as ComfyUI lists it: one name for it, however it was spelt"""
    homes = [Path(home) for home in folder_paths.get_folder_paths("loras")]
    return str(path.relative_to(next(home for home in homes if path.is_relative_to(home))))


def lora_files() -> list[str]:
    """ComfyUI's list of them without what libraries and calibrations keep beside theirs"""
    return [name for name in folder_paths.get_filename_list("loras") if not BESIDE.search(name)]


def file_stamps(path: Path) -> tuple:
    """Changes whenever the LoRA does, or its moments: the stamp of the file, then those of what is kept beside it"""
    return tuple(stamp(p) for p in [path, *sorted(path.parent.glob(f"{escape(path.stem)}.*stats.safetensors"))])


def file_state(name: str) -> str:
    """Changes whenever the LoRA file does, or its moments: for fingerprint_inputs."""
    try:
        return str(file_stamps(lora_file(name)))
    except UserError:
        return "none"


def open_library(library: str) -> Library:
    return Library(library_folder(library))


def library_state(library: str) -> str:
    """Changes whenever the library does: for fingerprint_inputs."""
    try:
        return str(stamp(library_folder(library) / "library.json") or "none")
    except UserError:
        return "none"


class TakenOut:
    """How often each thing was found gone that had been there at the look before"""

    def __init__(self):
        self.there, self.times = set(), Counter()

    def look(self, what: tuple, there: bool) -> int:
        self.times[what] += what in self.there and not there
        (self.there.add if there else self.there.discard)(what)
        return self.times[what]


def pictures_folder(folder: str) -> Path:
    """A folder below ComfyUI's input folder, or one of the pack's sample concepts as `demo/NAME`."""
    folder = folder.strip().replace("\\", "/")
    if folder.startswith(DEMO_PREFIX):
        return DEMO_FOLDER / "concepts" / safe_name(folder.removeprefix(DEMO_PREFIX), "sample concept")
    path = inside = Path(folder_paths.get_input_directory())
    for part in filter(None, folder.split("/")):
        # a name that is there is taken as it is, "photos (2024)" too: no list of a folder's names has one that leaves it
        there = path.is_dir() and part in os.listdir(path)
        path = path / (part if there else safe_name(part, "folder"))
    if path == inside:
        raise UserError("no folder given: name a folder inside ComfyUI's input folder, or connect images")
    return path
