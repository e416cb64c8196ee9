"""Safetensors files, read strictly: a file from anywhere can be no more than tensors and text.

The header is checked before a byte of data is read: sizes, bounds, overlaps, gaps, types, doubled keys, and what it would
take in memory, which is at most twice the file's size (and `strict_json.SMALL` for small files).  Data is read, not mapped: a file
that another program cuts short later cannot take the process with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from . import strict_json
from .errors import UserError
from .storage import written_aside

SMALL = 1 << 20  # bytes of header that any file may have
MOST_DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Equal contents give equal bytes: the library writes metadata in an order of its own each time, so the header is
    put together here.  UserError if it is longer than our own reader takes."""
    blob = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    end = 8 + int.from_bytes(blob[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(blob[8:end])}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    size = 8 + len(text) + len(blob) - end
    if len(text) > SMALL + size // 8:  # as `_header` would
        raise UserError(
            f"cannot write {path}: what it says of itself would be {len(text):,} of its {size:,} bytes; shorten captions and names"
        )
    with written_aside(Path(path)) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.write(memoryview(blob)[end:])


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata.  Raises UserError for a file that is missing or is not strictly what it should be."""
    with _opened(Path(path)) as f:
        entries, metadata = _header(f)
        return {name: _tensor(f, *entry) for name, entry in entries.items()}, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The same without a byte of the tensors"""
    with _opened(Path(path)) as f:
        return _header(f)[1]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file; whatever is wrong with it, in one sentence"""
    try:
        if not path.is_file():
            raise UserError(f"no file at {path}: check the name")
        with open(path, "rb") as f:
            yield f
    except _Broken as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); download or export it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the file and its permissions") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError("the name of a file holds a NUL or another character that no file name has: check it") from error


def tensors_hash(path: Path) -> str:
    """SHA-256 of the tensors alone, as the community's AutoV3: it outlives edits of the metadata."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        header = int.from_bytes(f.read(8), "little")
        f.seek(min(8 + header, os.fstat(f.fileno()).st_size))
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Broken(Exception):
    """What is wrong with the file, in a few words"""


def _header(f: BinaryIO) -> tuple[dict[str, tuple[torch.dtype, list[int]]], dict[str, str]]:
    """Name -> (dtype, shape) in the order of the data, which the file stands at afterwards; and the metadata."""
    size = os.fstat(f.fileno()).st_size
    start = f.read(8)
    if not start:
        raise _Broken("it is empty")
    length = int.from_bytes(start, "little")
    # a header of 128, 384, ... bytes starts as a .ckpt does, but is no longer than the file
    if (start[:1] == b"\x80" and length > size) or start[:4] == b"PK\x03\x04":
        raise _Broken("it is a .pt or .ckpt, which can run code: convert it first")
    if len(start) < 8 or length > size - 8:
        # only here: the length of a good header may begin with the same bytes
        if start[:1] == b"\x80" or start[:4] == b"PK\x03\x04":
            raise _Broken("it is a .pt or .ckpt, which can run code: convert it first")
        raise _Broken("its header is longer than the file")
    if length > SMALL + size // 8:
        raise _Broken(f"its header is {length:,} of {size:,} bytes, too much of it")
    text = f.read(length)
    try:
        header = strict_json.parse(text, strict_json.SMALL + size)
    except ValueError as error:
        raise _Broken(f"its header: {error}") from error
    if not isinstance(header, dict) or text[:1] != b"{":
        raise _Broken("its header is not a table")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Broken("its metadata is not text")
    return _entries(header, size - 8 - length), metadata


def _entries(header: dict, size: int) -> dict[str, tuple[torch.dtype, list[int]]]:
    """The tensors in the order of their data.  size: of the data, bytes"""
    spans = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise _Broken(f"the entry of {name[:80]!r} is not dtype, shape and data_offsets")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in DTYPES:
            raise _Broken(f"{name[:80]!r} is of the type {str(kind)[:20]!r}, which LoRAs have not")
        if not (_whole_numbers(shape) and _whole_numbers(offsets) and len(offsets) == 2 and len(shape) <= MOST_DIMENSIONS):
            raise _Broken(f"shape or data_offsets of {name[:80]!r} are not whole numbers")
        dtype, (begin, end) = DTYPES[kind], offsets
        if max(shape, default=0) > max(size, 1 << 32) or end - begin != math.prod(shape) * dtype.itemsize:
            raise _Broken(f"the shape of {name[:80]!r} does not fit its bytes")
        spans.append((begin, end, name, dtype, shape))
    spans.sort(key=lambda span: span[:2])
    reached = 0
    for begin, end, name, _, _ in spans:
        if begin != reached or end > size:
            kind = "overlap others" if begin < reached else "leave a gap" if begin > reached else "lie outside the file"
            raise _Broken(f"the bytes of {name[:80]!r} {kind}")
        reached = end
    if reached != size:
        raise _Broken(f"{size - reached:,} of its bytes belong to no tensor")
    return {name: (dtype, shape) for _, _, name, dtype, shape in spans}


def _whole_numbers(values) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _tensor(f: BinaryIO, dtype: torch.dtype, shape: list[int]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel() and f.readinto(tensor.flatten().view(torch.uint8).numpy()) != tensor.nbytes:
        raise _Broken("it ends before its data does")
    return tensor
