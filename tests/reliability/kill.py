"""kill -9 while concepts are trained, saved, replaced, removed, reordered and rebased.

    python -m tests.reliability.kill --count 300

Each round forks a worker that changes one library at random and reports each change once it is done.  Half of the workers
are killed at a random time, half kill themselves at a random file operation (open, rename, unlink ...).  Then: every
concept reported as saved is there bit for bit, every one reported as removed is gone, the change that was under way is
either whole or has not happened, the library opens and verifies, and a run that was killed goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import torch

from seqlora_core.editing import refit
from seqlora_core.errors import UserError
from seqlora_core.library import Library

from . import ledger
from .toy import ToyDenoiser, start, teach

NAMES = ("fox", "owl", "bee", "yak")
STEPS, EVERY = 6, 2
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir")


def contents(library: Library, name: str) -> list[str]:
    """Hashes of the concept's files, as they are on the disk"""
    import hashlib

    return [hashlib.sha256(p.read_bytes()).hexdigest() for p in library.paths(name)]


def worker(model: ToyDenoiser, folder: Path, seed: int, report) -> None:
    """Change the library until it is killed; report(line) before and after each change."""
    rng = random.Random(seed)
    library = Library(folder)
    unfinished = [name for name in NAMES if library.checkpoints(name).exists()]
    while True:
        name = unfinished.pop() if unfinished else rng.choice(NAMES)
        todo = rng.choice(("train", "train", "train", "remove", "reorder", "rebase"))
        if todo == "train":
            report(["begin", "train", name])
            report(["done", "train", name, train(model, library, name), contents(library, name)])
        elif name in library.names and todo == "remove":
            report(["begin", "remove", name])
            library.remove(name)
            report(["done", "remove", name])
        elif todo == "reorder":
            report(["begin", "reorder", ""])
            library.reorder(rng.sample(library.names, len(library)))
            report(["done", "reorder", ""])
        elif todo == "rebase" and len(library):
            target = folder.parent / f"rebased_{rng.randrange(10**9)}"
            report(["begin", "rebase", target.name])
            refit([library], target)
            report(["done", "rebase", target.name])


def train(model: ToyDenoiser, library: Library, name: str) -> str:
    """How it went: new, resumed, or told, if the run that was killed cannot be gone on with"""
    steps, how = [], "new"
    # one state of the library, one run: the same again goes on, another begins anew
    options = dict(seed=zlib.crc32(library.state(name).encode()), steps=STEPS, every=EVERY, replace_existing=True)
    try:
        teach(model, library, name, **options, on_step=steps.append)
    except UserError as error:
        if "the unfinished run of" not in str(error):
            raise
        how = "told"
        teach(model, library, name, **options, resume=False)
    return "resumed" if steps and steps[0].number > 1 else how


def die_at(event_number: int) -> None:
    """SIGKILL to this very process at its n-th file operation"""
    seen = [0]

    def hook(event, arguments):
        if event in EVENTS:
            seen[0] += 1
            if seen[0] == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def one_round(model: ToyDenoiser, folder: Path, rng: random.Random) -> list[list]:
    """Fork, kill; what the worker reported"""
    at_file_operation, seed = rng.random() < 0.5, rng.randrange(2**31)
    delay, event = rng.uniform(0.0, 1.2), rng.randrange(1, 150)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if at_file_operation:
                die_at(event)
            worker(model, folder, seed, lambda line: os.write(writing, json.dumps(line).encode() + b"\n"))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
            os.write(writing, json.dumps(["error", repr(error)]).encode() + b"\n")
        os._exit(3)
    os.close(writing)
    if not at_file_operation:
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as pipe:
        lines = pipe.read().splitlines()
    os.waitpid(child, 0)
    return [json.loads(line) for line in lines]


def run(count: int, seed: int, folder: Path, minutes: float = 1e9) -> dict:
    """Totals of `count` rounds, or of those that `minutes` allow; `failures` holds a sentence for each broken promise."""
    torch.set_num_threads(1)  # a forked child has none of its parent's threads, and would wait for them
    rng, model = random.Random(seed), ToyDenoiser()
    start(folder, model)
    teach(model, Library(folder), "fox", 1, 2)  # the first run of a process imports what others need
    known = {"fox": contents(Library(folder), "fox")}
    totals = {
        "runs": {"new": 0, "resumed": 0, "told": 0},
        "kills": 0,
        "in": {},
        "saved": 0,
        "removed": 0,
        "rebased": 0,
        "finished_changes": 0,
        "failures": [],
    }
    end = time.time() + 60 * minutes
    for number in range(count):
        if time.time() > end:
            break
        lines = one_round(model, folder, rng)
        totals["kills"] += 1
        open_change = None
        for kind, *rest in lines:
            if kind == "error":
                totals["failures"].append(f"round {number}: the worker ended by {rest[0]}")
            elif kind == "begin":
                open_change = rest
            else:
                open_change = None
                what, name, *more = rest
                if what == "train":
                    known[name] = more[1]
                    totals["saved"] += 1
                    totals["runs"][more[0]] += 1
                elif what == "remove":
                    known.pop(name, None)
                    totals["removed"] += 1
                elif what == "rebase":
                    totals["rebased"] += 1
        at = open_change[0] if open_change else "between"
        totals["in"][at] = totals["in"].get(at, 0) + 1
        totals["failures"] += [f"round {number}, {at}: {s}" for s in check(folder, known, open_change, totals)]
    return totals


def check(folder: Path, known: dict[str, list[str]], open_change: list | None, totals: dict) -> list[str]:
    """What is broken after a kill; brings `known` up to date with the change that was under way."""
    wrong = []
    pending = "pending" in json.loads((folder / "library.json").read_text(encoding="utf-8"))
    totals["finished_changes"] += pending
    library = Library(folder)
    under_way = open_change[1] if open_change and open_change[0] in ("train", "remove") else None
    for name in NAMES:
        there = name in library.names
        found = contents(library, name) if there else None
        if name == under_way:
            if open_change[0] == "remove" and there and found != known.get(name):
                wrong.append(f"{name} was half removed")
            if open_change[0] == "train" and not there and name in known:
                wrong.append(f"{name} was there before it was trained anew, and is lost")
            known.pop(name, None)
            if there:
                known[name] = found
        elif found != known.get(name):
            wrong.append(f"{name} was reported as {'saved' if name in known else 'removed'}, and is not")
    wrong += [f"verify: {p}" for p in library.verify()]
    if open_change and open_change[0] == "rebase":
        target = folder.parent / open_change[1]
        if target.exists() and (Library(target).names != library.names or Library(target).verify()):
            wrong.append("a rebase was half done")
    for target in folder.parent.glob("*rebased_*"):
        shutil.rmtree(target)
    return wrong


if __name__ == "__main__":
    ledger.main("kill", 300, "kills", run)
