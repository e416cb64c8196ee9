"""Damaged and hostile files: each must end in one clear sentence or in a correct read.

    python -m tests.reliability.fuzz --count 20000

Seeds are a LoRA, a statistics file, a calibration and manifests of every format; a mutant is a few random bytes changed,
cut, doubled or moved, or a header rewritten with wrong sizes, shapes, types, names and nesting.  Each is read by the same
functions as the command line and the nodes use, in a child whose address space is limited to what the promise allows.
"""

from __future__ import annotations

import contextlib
import copy
import json
import mmap
import os
import random
import resource
import time
import tracemalloc
from pathlib import Path

import torch
from safetensors.torch import load as library_load

from seqlora_core import manifest
from seqlora_core.adapter import load_adapter
from seqlora_core.calibration import Calibration
from seqlora_core.errors import UserError
from seqlora_core.lora_moments import see_trigger  # noqa: F401 - imports what the readers need before the limit is set
from seqlora_core.statistics import read_statistics
from seqlora_core.tensor_file import read_safetensors
from seqlora_core.triggers import trigger_of

from . import ledger

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
SLACK = 64 << 20  # bytes of address space that allocators take in one piece
SMALL = 16 << 20  # bytes that any file may take
SLOW = 1.0  # seconds
WORDS = [
    0, -1, 1, 7, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 0.5, 1e308, None, True, "", "F32", "F64", "BOOL", "Q4", [], [[]], {}, "../x",
    "a" * 300, "\x00", [2**62, 4], [0, 2**62], [1] * 40, {"__class__": "x"},
]  # fmt: skip


def seeds() -> list[tuple[str, bytes]]:
    """(kind, contents); the kind says who reads it"""
    new = SAMPLES / f"format_{manifest.FORMAT}"
    found = [("adapter", new / "fox.safetensors"), ("statistics", new / "fox.stats.safetensors")]
    found += [("calibration", new / "calibration.safetensors")]
    found += [("manifest", p) for p in sorted(SAMPLES.glob("*/library.json"))]
    return [(kind, path.read_bytes()) for kind, path in found]


def mutant(kind: str, data: bytes, rng: random.Random) -> bytes:
    if kind == "manifest" and rng.random() < 0.6:
        return _json(_rewritten(json.loads(data), rng))
    if kind != "manifest" and rng.random() < 0.6:
        length = int.from_bytes(data[:8], "little")
        text = _json(_rewritten(json.loads(data[8 : 8 + length]), rng))
        size = rng.choice([len(text)] * 12 + [0, 2**63, 2**64 - 1, len(text) + rng.randrange(-9, 9)])
        return (size % 2**64).to_bytes(8, "little") + text + data[8 + length :]
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        # most of a file is data: the header is hit half of the time
        at = rng.randrange(min(len(out), 2000) if rng.random() < 0.5 else len(out)) if out else 0
        how = rng.randrange(6)
        if how == 0 and out:
            out[at] = rng.randrange(256)
        elif how == 1:
            del out[at:]
        elif how == 2:
            out[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif how == 3:
            del out[at : at + rng.randrange(1, 40)]
        elif how == 4:
            out[at:at] = out[at : at + rng.randrange(1, 400)]
        else:
            out[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"[[[[[[[[", b'"\\"\\"\\"', b"{" * 8))
    return bytes(out)


def _json(value) -> bytes:
    return json.dumps(value, allow_nan=True).encode()


def _rewritten(value: dict, rng: random.Random) -> dict:
    """Some entries changed, somewhere"""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        node = value
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            how = rng.randrange(5)
            if how == 0:
                node[key] = copy.deepcopy(rng.choice(WORDS))  # what is put in may be changed itself
            elif how == 1:
                del node[key]
            elif how == 2 and isinstance(node, dict):
                node[rng.choice(("../up", "x\0", "con", "é" * 50, "a.lora_up.weight", str(rng.random())))] = copy.deepcopy(
                    node[key]
                )
            elif how == 3 and isinstance(node[key], int):
                node[key] = node[key] + rng.choice((-1, 1, 4, 2**31))
            elif how == 4:
                deep: list = []
                for _ in range(rng.choice((3, 50, 300))):
                    deep = [deep]
                node[key] = deep if rng.random() < 0.02 else str(node[key])
            break
    return value


def read(kind: str, path: Path) -> None:
    """As the pack reads it; UserError is the one thing that may come out."""
    if kind == "manifest":
        manifest.read(path.parent)
        return
    if kind == "adapter":
        trigger_of(load_adapter(path).metadata)
    elif kind == "statistics":
        read_statistics(path)
    else:
        Calibration.load(path)


def agrees(path: Path) -> bool:
    """What is read strictly is what the safetensors library reads."""
    ours, theirs = read_safetensors(path)[0], library_load(path.read_bytes())
    same = ours.keys() == theirs.keys() and all(ours[k].shape == t.shape for k, t in theirs.items())
    return same and all(torch.equal(_bits(ours[k]), _bits(t)) for k, t in theirs.items())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # NaN equals itself, types that numpy has not compare as well


def one(kind: str, data: bytes, folder: Path) -> tuple[str, str]:
    """(outcome, what is wrong if something is)"""
    path = folder / ("library.json" if kind == "manifest" else "x.safetensors")
    path.write_bytes(data)
    base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (base + 2 * len(data) + SMALL + SLACK, hard))
    start = time.process_time()
    try:
        read(kind, path)
        outcome, wrong = "read", ""
    except UserError as error:
        outcome, text = "told", str(error)
        wrong = "" if "\n" not in text and len(text) < 1000 else f"not one sentence: {text[:200]!r}"
    except BaseException as error:  # noqa: BLE001 - anything else is what is looked for
        outcome, wrong = "failed", f"{type(error).__name__}: {error}"[:300]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    if time.process_time() - start > SLOW:
        wrong = wrong or f"took {time.process_time() - start:.1f} s"
    if outcome == "read" and kind != "manifest" and not agrees(path):
        wrong = "read otherwise than the safetensors library does"
    return outcome, wrong


def python_peak(kind: str, data: bytes, folder: Path) -> float:
    """Python's own largest allocation over the file's size"""
    path = folder / ("library.json" if kind == "manifest" else "x.safetensors")
    path.write_bytes(data)
    tracemalloc.start()
    with contextlib.suppress(UserError):
        read(kind, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / max(len(data), 1)


def bombs() -> list[tuple[str, bytes]]:
    """Files made to take far more than they weigh"""
    out = []
    for text in (
        b"[" * 900_000, b"[" + b"[]," * 300_000 + b"[]]", b'{"a":' * 150_000, b'{"' + b"\\u1234" * 150_000 + b'":1}',
        b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 200_000 + b'1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 100_000 + b"]}}",
        b'{"__metadata__":{' + b",".join(b'"k%d":""' % i for i in range(90_000)) + b"}}",
        b"{" + b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(17_000)) + b"}",
        b'{"' + b'\\"' * 450_000,
    ):  # fmt: skip
        out += [("adapter", len(text).to_bytes(8, "little") + text), ("manifest", text)]
    return out


def run(count: int, seed: int, folder: Path, minutes: float = 1e9) -> dict:
    """Totals of `count` files, or of those that `minutes` allow; children read so that a crash ends one of them and is counted."""
    torch.set_num_threads(1)  # a forked child has none of its parent's threads, and would wait for them
    known, shared = seeds(), mmap.mmap(-1, 8)
    totals = {"files": 0, "read": 0, "told": 0, "crashes": 0, "slowest": 0.0, "failures": []}
    totals["bombs_over_size"] = round(max(python_peak(k, d, folder) for k, d in bombs() if len(d) > 300_000), 1)
    cases = [(k, d) for k, d in bombs()]
    position = 0
    end = time.time() + 60 * minutes
    while position < count and time.time() < end:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 9
            try:
                for number in range(position, min(position + 250, count)):
                    shared[:8] = number.to_bytes(8, "little")
                    kind, data = cases[number] if number < len(cases) else known[number % len(known)]
                    if number >= len(cases):
                        data = mutant(kind, data, random.Random(f"{seed} {number}"))
                    start = time.process_time()
                    outcome, wrong = one(kind, data, folder)
                    line = [number, outcome, wrong, round(time.process_time() - start, 3)]
                    os.write(writing, json.dumps(line).encode() + b"\n")
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            lines = [json.loads(line) for line in pipe.read().splitlines()]
        status = os.waitpid(child, 0)[1]
        for number, outcome, wrong, seconds in lines:
            totals["files"] += 1
            totals[outcome] = totals.get(outcome, 0) + 1
            totals["slowest"] = max(totals["slowest"], seconds)
            if wrong:
                totals["failures"].append(f"file {number}: {wrong}")
        position += len(lines)
        if status:
            totals["crashes"] += 1
            totals["failures"].append(f"file {int.from_bytes(shared[:8], 'little')}: the process ended with {status}")
            position += 1
    return totals


if __name__ == "__main__":
    ledger.main("fuzz", 20_000, "mutated files", run)
