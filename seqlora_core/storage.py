"""Files that are whole or not there, whatever is killed when: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from .errors import UserError

PART = ".part"  # ends the name of a file that is being written; one that is found later is of a writer that was killed


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` at the end.  UserError if the disk is full or read-only."""
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
            ) from error
        raise


@contextlib.contextmanager
def locked(path: Path, seconds: float, kind: str) -> Iterator[None]:
    """One process at a time; others wait, and then hear that one is `kind` the library.  A killed process holds no lock."""
    from filelock import FileLock, Timeout

    lock, folder = FileLock(str(path), timeout=seconds), path.parent
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"another process is {kind} the library {folder.name!r}: wait until it is done") from error
    except (OSError, NotImplementedError) as error:
        raise UserError(f"cannot write to the library {folder}: {error}; make the folder writable") from error
    try:
        yield
    finally:
        lock.release()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def stamp(path: Path) -> tuple:
    """Changes whenever the file does, whatever the clock does; () if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


class Kept:
    """What was last made of some files, `most` of them and `most_bytes` of tensors, the latest used; the very last in any case.

    What was made of a file's earlier state is let go when the file changes: a concept that is trained again and again would
    otherwise stay in memory as often.  So is what was made of files that are gone.
    """

    def __init__(self, most: int, most_bytes: int = 2 << 30):
        self.most, self.most_bytes, self._held = most, most_bytes, OrderedDict()

    def get(self, key: tuple, state: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned for this key in this state.  Paths in the key are the files that it is made of."""
        if key not in self._held or self._held[key][0] != state:
            self._held.pop(key, None)
            for gone in [k for k in self._held if any(isinstance(part, Path) and not stamp(part) for part in k)]:
                del self._held[gone]
            made = make()
            self._held[key] = (state, made, tensor_bytes(made, set()))
        self._held.move_to_end(key)
        while len(self._held) > 1 and (len(self._held) > self.most or self._bytes() > self.most_bytes):
            self._held.popitem(last=False)
        return self._held[key][1]

    def _bytes(self) -> int:
        return sum(size for *_, size in self._held.values())


def tensor_bytes(value: Any, seen: set[int]) -> int:
    """What the tensors in it take in memory, however deep they are, those that share it once.  seen: addresses counted before"""
    place = value.untyped_storage().data_ptr() if isinstance(value, Tensor) else id(value)
    if place in seen:
        return 0
    seen.add(place)
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return sum(tensor_bytes(part, seen) for part in value.values())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(part, seen) for part in value)
    return tensor_bytes(value.__dict__, seen) if hasattr(value, "__dict__") else 0


def digest(*parts: bytes) -> str:
    """Names some contents"""
    return digest_of(parts)


def digest_of(parts: Iterable[bytes]) -> str:
    """The same of contents that come one after another"""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:16]
