"""A real disk of a few pages, full to its last, last but one, ... page while each kind of change is made."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from seqlora_core.adapter import load_adapter, save_adapter
from seqlora_core.editing import refit
from seqlora_core.errors import UserError
from seqlora_core.library import Library

from .toy import ToyDenoiser, start, teach

PAGE = 4096
SIZE = 200  # pages


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """An empty file system of SIZE pages; skipped with the reason where none can be mounted."""
    place = tmp_path_factory.mktemp("disk")
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE * PAGE}", "tmpfs", str(place)]
        said = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no small disk to fill: {error}")
    if said.returncode:
        pytest.skip(f"no small disk to fill: {said.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="module")
def model():
    return ToyDenoiser()


@pytest.fixture
def library(disk, model):
    """Two concepts on the small disk, with nothing else there"""
    for left in disk.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    library = start(disk / "library", model)
    for name in ("fox", "owl"):
        teach(model, library, name, steps=1)
    return library


def train_new(model, library):
    teach(model, library, "bee", 3, steps=2, every=1)


def train_again(model, library):
    _, fit = teach(model, library, "fox", 5, steps=2, every=1, replace_existing=True)
    if fit.stopped:  # the concept that was there stays, and whoever asked for another one tells why
        raise fit.stopped


def reorder(model, library):
    library.reorder(["owl", "fox"])


def remove(model, library):
    library.remove("fox")


def rebase(model, library):
    refit([library], library.folder.parent / "rebased")


def export(model, library):
    save_adapter(library.folder.parent / "exported.safetensors", library.load("owl").adapter)


def fill(disk: Path, free: int) -> None:
    """Leave so many pages"""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    found = os.statvfs(disk)
    filler.write_bytes(b"x" * (found.f_bavail - free) * found.f_bsize)
    assert os.statvfs(disk).f_bavail == free


def contents(folder: Path) -> dict[str, str]:
    """What a reader gets: the order of the concepts, and the hashes of their files"""
    library = Library(folder)
    assert library.verify() == []
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for n in library.names for p in library.paths(n)}
    return {"names": ", ".join(library.names), **files}


@pytest.mark.parametrize("change", [train_new, train_again, reorder, remove, rebase, export], ids=lambda f: f.__name__)
def test_a_change_on_a_full_disk_is_whole_or_told(disk, model, library, change):
    """With every number of free pages from none to enough"""
    before, told = contents(library.folder), 0
    for free in range(SIZE):
        fill(disk, free)
        try:
            change(model, Library(library.folder))
        except UserError as error:
            assert "free some space" in str(error) and "\n" not in str(error)
            told += 1
            assert contents(library.folder) == before, f"{free} pages free"
            assert not (disk / "rebased").exists() and not (disk / "exported.safetensors").exists()
            continue
        break
    assert told >= 1 and free == told
    (disk / "filler").unlink()
    after = contents(library.folder)
    if change is rebase:
        assert contents(disk / "rebased")["names"] == "fox, owl"
    elif change is export:
        assert load_adapter(disk / "exported.safetensors").layers.keys() == library.load("owl").adapter.layers.keys()
    else:
        assert after != before
    assert not [p for p in disk.rglob("*.part")]
