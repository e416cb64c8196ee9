"""The header parser's caller under coverage-guided fuzzing: what reads a LoRA file, from its first byte on.

    python -m tests.reliability.header --count 200000

atheris (libFuzzer) keeps each input that takes a branch nobody took before and mutates it further, so that it finds its way
through checks that random bytes never pass.  Each input is read as the
pack reads it: it must end in one sentence or in a correct read, take at most a second and 512 MiB, and not end the process.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import re
import struct
from pathlib import Path

import torch

from seqlora_core import adapter, strict_json, tensor_file
from seqlora_core.errors import UserError

from . import ledger
from .fuzz import agrees, mutant

LONGEST = 1024  # bytes of an input
COUNTS = ("inputs", "read", "told")


def starts(folder: Path) -> None:
    """Small sound files that mutation begins with: a LoRA, one with everything that a file may have, an empty one"""
    down, up = torch.ones(1, 2), torch.ones(2, 1)
    lora = {"a.lora_down.weight": down, "a.lora_up.weight": up}
    more = {"a.alpha": torch.tensor(1.0), "b.lora_down.weight": down.bfloat16(), "b.lora_up.weight": up.bfloat16()}
    tensor_file.write_safetensors(folder / "1", lora, {})
    tensor_file.write_safetensors(folder / "2", lora | more, {"seqlora.trigger": "\u00e9x", "ss_output_name": "a"})
    tensor_file.write_safetensors(folder / "3", {}, {})


def reader(folder: Path, shared: mmap.mmap):
    """What atheris calls with each input"""
    path = folder / "x.safetensors"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        counts = list(struct.unpack("3q", shared[:24]))
        counts[0] += 1
        try:
            tensor_file.read_safetensors(path)
            counts[1] += 1
            if not agrees(path):
                raise AssertionError("read otherwise than the safetensors library does")
            adapter.load_adapter(path)
        except UserError as error:
            if "\n" in str(error) or len(str(error)) > 1000:
                raise AssertionError(f"not one sentence: {str(error)[:200]!r}") from error
            counts[2] += 1
        shared[:24] = struct.pack("3q", *counts)

    return read


def mutated(data: bytes, longest: int, seed: int) -> bytes:
    """libFuzzer's own mutation, or one that knows what a header is"""
    import atheris

    rng = random.Random(seed)
    if rng.random() < 0.5:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            return mutant("adapter", data, rng)[:longest]
    return atheris.Mutate(data, longest)


def fuzz(count: int, seed: int, folder: Path, seconds: int, shared: mmap.mmap) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    for module in (strict_json, tensor_file, adapter):
        for value in vars(module).values():
            if getattr(value, "__module__", None) == module.__name__ and hasattr(value, "__code__"):
                atheris.instrument_func(value)
    corpus = folder / "corpus"
    corpus.mkdir()
    starts(corpus)
    # few mutations at once: a header with many is no header any more
    limits = [
        "-mutate_depth=2",
        "-timeout=1",
        "-rss_limit_mb=0",
        "-malloc_limit_mb=512",
        f"-max_len={LONGEST}",
        "-print_final_stats=1",
    ]
    options = [f"-runs={count}", f"-seed={seed}", f"-max_total_time={seconds}", f"-artifact_prefix={folder}/"]
    atheris.Setup(["header", *limits, *options, str(corpus)], reader(folder, shared), custom_mutator=mutated)
    atheris.Fuzz()


def run(count: int, seed: int, folder: Path, minutes: float = 1e9) -> dict:
    """Totals of `count` inputs, or of those that `minutes` allow"""
    try:
        import atheris  # noqa: F401
    except ImportError as error:
        return {"skipped": f"no atheris: {error}", "failures": []}
    torch.set_num_threads(1)  # a forked child has none of its parent's threads, and would wait for them
    shared, log = mmap.mmap(-1, 24), folder / "log"
    child = os.fork()
    if child == 0:
        try:
            with open(log, "wb") as f:
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
            fuzz(count, seed, folder, min(int(60 * minutes), 2**31 - 1), shared)
        finally:
            os._exit(9)
    status = os.waitpid(child, 0)[1]
    said = log.read_text(encoding="utf-8", errors="replace")
    totals = dict(zip(COUNTS, struct.unpack("3q", shared[:24])))
    reached = re.findall(r"cov: (\d+) ft: \d+ corp: (\d+)", said)
    totals |= {"branches": int(reached[-1][0]), "kept": int(reached[-1][1])} if reached else {}
    return totals | {"failures": [f"input {totals['inputs']}, status {status}: {said[-600:]}"] if status else []}


if __name__ == "__main__":
    ledger.main("header", 200_000, "inputs", run)
