"""Disks that are full, read-only or change under one's feet; two processes in one library."""

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from pathlib import Path

import pytest

from seqlora_core.adapter import save_adapter
from seqlora_core.checkpoint import SUFFIX
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.references import load_pictures

from .toy import start, teach

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX")
fork = multiprocessing.get_context("fork") if os.name != "nt" else None


def state(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file() and ".lock" not in p.name
    }


def in_child(work, *arguments):
    """What `work` returned in a process of its own, or the sentence of its UserError"""
    receiving, sending = fork.Pipe(False)

    def body():
        try:
            sending.send(("done", work(*arguments)))
        except UserError as error:
            sending.send(("told", str(error)))
        except BaseException as error:  # noqa: BLE001 - the test shows whatever it is
            sending.send(("failed", repr(error)))
        os._exit(0)

    child = fork.Process(target=body)
    child.start()
    answer = receiving.recv() if receiving.poll(120) else ("failed", "no answer")
    child.join(10)
    return answer


@posix
def test_a_disk_that_fills_up_at_any_byte_loses_nothing(model, library):
    """The largest size that a file may have is set lower and lower, so that each file in turn cannot be written."""
    before, told = state(library.folder), 0

    def attempt(limit):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        teach(model, library, "fox", 5, steps=2, replace_existing=True)

    sizes = sorted(p.stat().st_size for p in library.folder.glob("fox*"))
    for limit in (0, 300, sizes[0] - 1, sizes[0] + 1, sizes[1] - 1):
        kind, text = in_child(attempt, limit)
        assert kind == "told" and "cannot write" in text and "free some space" in text and "\n" not in text, (limit, text)
        assert state(library.folder) == before and Library(library.folder).verify() == []
        told += 1
    assert told == 5
    teach(model, library, "fox", 5, steps=2, replace_existing=True)
    assert state(library.folder) != before and library.verify() == []


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_device_that_is_full_is_told(library, tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        save_adapter(tmp_path / "no" / "such" / ("x" * 300) / "a.safetensors", library.load("fox").adapter)
    with open("/dev/full", "wb") as full, pytest.raises(OSError) as error:
        full.write(b"x" * 100_000)
        full.flush()
    assert error.value.errno == errno.ENOSPC


@posix
def test_a_folder_that_cannot_be_written_is_read_and_told(model):
    """By a user who is not root: root may write anywhere."""
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)
        library = start(Path(scratch) / "library", model)
        teach(model, library, "fox", steps=1)
        for lock in library.folder.glob(".*lock"):
            lock.unlink()
        os.chmod(library.folder, 0o555)

        def attempt():
            if os.getuid() == 0:
                os.setuid(65534)
            names = [c.name for c in Library(library.folder).concepts()]
            try:
                library.remove("fox")
            except UserError as error:
                return names, str(error)

        kind, answer = in_child(attempt)
        os.chmod(library.folder, 0o755)
    assert kind == "done" and answer[0] == ["fox"] and "make the folder writable" in answer[1]


def test_files_that_vanish_after_they_were_listed_are_told(library):
    opened = Library(library.folder)
    library.paths("fox")[1].unlink()
    with pytest.raises(UserError, match="has lost .*: put the file back, or run 'seqlora library remove"):
        opened.load("fox")
    assert any("fox" in p for p in opened.verify())
    (library.folder / "library.json").unlink()
    with pytest.raises(UserError, match="repair"):
        opened.reload()


def test_a_clock_that_goes_backwards_changes_nothing(model, library):
    for path in library.folder.iterdir():
        os.utime(path, (0, 0))
    teach(model, library, "owl", steps=2)
    for path in library.folder.iterdir():
        os.utime(path, (4e9, 4e9))
    teach(model, library, "bee", steps=2)
    opened = Library(library.folder)
    assert opened.names == ["fox", "owl", "bee"] and opened.verify() == []


@pytest.mark.parametrize(
    "name", ["with spaces and 😀", "ünï cödé 猫", "x" * 200, "percent %20 #hash", "quote'\"" if os.name != "nt" else "quote'"]
)
def test_awkward_folders_work(model, tmp_path, name):
    library = start(tmp_path / name, model)
    teach(model, library, "fox", steps=1)
    assert Library(tmp_path / name).verify() == []


@posix
def test_symlink_loops_are_told(model, library, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="no library|cannot"):
        Library(tmp_path / "loop")
    with pytest.raises(UserError, match="cannot create"):
        Library(tmp_path / "loop", create=True)
    with pytest.raises(UserError):
        load_pictures(tmp_path / "loop", 64)
    lora = library.paths("fox")[0]
    lora.unlink()
    lora.symlink_to(lora)
    with pytest.raises(UserError):
        library.load("fox")


@posix
def test_one_name_trained_twice_at_once_is_trained_once_and_told_once(model, library, monkeypatch):
    monkeypatch.setattr("seqlora_core.library.LOCK_SECONDS", 0.2)
    reading, writing = os.pipe()

    def first_step(step):
        if step.number == 1:
            os.write(writing, b"x")
            time.sleep(3)

    child = fork.Process(target=lambda: teach(model, Library(library.folder), "owl", 1, steps=3, on_step=first_step))
    child.start()
    assert os.read(reading, 1) == b"x"
    with pytest.raises(UserError, match="another process is training into"):
        teach(model, library, "owl", 2, steps=3)
    child.join(60)
    assert child.exitcode == 0 and Library(library.folder).names == ["fox", "owl"] and Library(library.folder).verify() == []


@posix
def test_a_library_is_read_while_it_grows_and_changes(model, library):
    """Whatever a reader gets is whole: of a concept that is replaced all the time, the two files belong together."""

    def grow():
        mine = Library(library.folder)
        for number in range(12):
            teach(model, mine, ("owl", "fox")[number % 2], number, steps=1, replace_existing=True)
            if number % 4 == 3:
                mine.remove("owl")

    child = fork.Process(target=grow)
    child.start()
    reads = 0
    while child.is_alive():
        opened = Library(library.folder)
        concept = opened.load("fox")
        assert set(concept.bases) == set(concept.adapter.layers) and "fox" in opened.names
        reads += 1
    child.join()
    assert child.exitcode == 0 and reads > 3 and Library(library.folder).verify() == []


@posix
def test_a_killed_run_goes_on_or_says_what_was_lost(model, library):
    def die():
        teach(
            model, library, "owl", 1, steps=9, every=2, on_step=lambda s: s.number == 5 and os.kill(os.getpid(), signal.SIGKILL)
        )

    child = fork.Process(target=die)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL and list(library.checkpoints("owl").glob(f"*{SUFFIX}"))
    steps = []
    with pytest.raises(UserError, match="stopped after step 4, began with seed 1, not 2"):
        teach(model, library, "owl", 2, steps=9, every=2)
    teach(model, library, "owl", 1, steps=9, every=2, on_step=steps.append)
    assert steps[0].number == 5 and library.names == ["fox", "owl"]
    assert json.loads((library.folder / "library.json").read_text())["concepts"][1]["name"] == "owl"


@posix
def test_what_is_saved_is_flushed_before_it_takes_its_place(model, library, monkeypatch):
    """Each file before its rename, the folder after it; the manifest that names the change before the change."""
    events, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (events.append(("flush", os.fstat(f).st_ino)), sync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append((Path(b).name, os.stat(a).st_ino)), rename(a, b)))
    teach(model, library, "fox", 5, steps=1, replace_existing=True)
    library.remove("fox")
    renames = [(i, name, inode) for i, (name, inode) in enumerate(events) if name != "flush"]
    folder = ("flush", library.folder.stat().st_ino)
    for i, name, inode in renames:
        assert ("flush", inode) in events[:i], name
        assert folder in events[i:], name
    order = [name for _, name, _ in renames if not name.startswith(".")]
    written = ["library.json", "fox.safetensors", "fox.stats.safetensors", "library.json"]
    assert order == [f"step-000001{SUFFIX}", *written, "library.json", "library.json"]


def test_a_concept_in_the_middle_goes_or_is_trained_anew_at_a_price_that_is_told(model, library):
    teach(model, library, "owl", 1, steps=2)
    before, fox, owl = state(library.folder), library.load("fox").bases, library.load("owl").bases
    _, fit = teach(model, library, "fox", 5, steps=2, replace_existing=True)
    assert "fox was trained anew, beside all others; owl was trained beside it and stay valid" in fit.notes
    assert library.remove("fox") == ("removed fox; its directions are free for the next concept")
    after = state(library.folder)
    assert all(after[p.name] == before[p.name] for p in library.paths("owl")) and library.verify() == []
    teach(model, library, "bee", 2, steps=2)
    bee = library.load("bee").bases
    for layer in bee:
        assert (bee[layer].mT @ owl[layer]).abs().max() < 1e-5 < (bee[layer].mT @ fox[layer]).abs().max()
