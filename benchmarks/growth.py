"""What one more concept costs as its library grows: docs/results/growth.json and docs/images/growth.png.

    python -m benchmarks.growth --library FOLDER        of many concepts, as benchmarks.method leaves in its cache

A few steps of a fit beside none of the library's concepts, then beside its first 20, 40 ..., one after another in one process;
seconds are the process's own.  Bytes are those of each concept's files, statistics included.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.plots import new_figure, save
from seqlora_core.config import TrainingConfig
from seqlora_core.demo import load_subject
from seqlora_core.demo_model import DemoModel
from seqlora_core.library import Library
from seqlora_core.tables import meta
from seqlora_core.trainer import fit

ROOT = Path(__file__).resolve().parent.parent
EVERY, STEPS, REPEATS = 20, 12, 3
RUN = TrainingConfig.steps


def measure(model: DemoModel, library: Library, every: int, steps: int, repeats: int) -> list[dict]:
    """Of each number of concepts the quickest repeat: seconds of a step, and of the start before the first"""
    subject, concepts, calibration = load_subject(model, "octopus"), library.concepts(), library.calibration()
    model.adapt_text(False, tokens=True)  # as libraries with learnt triggers do
    found: dict[int, list[dict]] = {}
    for _ in range(repeats):
        for count in [*range(0, len(concepts), every), len(concepts)]:
            begin, ends = time.process_time(), []
            config = TrainingConfig(steps=steps, planned=max(library.planned, len(concepts) + 1))
            fit(
                model, subject.references, subject.trigger, concepts[:count], calibration, config,
                lambda _, ends=ends: ends.append(time.process_time()),
            )  # fmt: skip
            step = (ends[-1] - ends[0]) / (len(ends) - 1)
            found.setdefault(count, []).append({"step": step, "start": ends[0] - begin - step})
    return [{"concepts": n, **min(runs, key=lambda r: r["step"])} for n, runs in found.items()]


def draw(result: dict, path: Path) -> None:
    figure, axes = new_figure(11, 4, 2)
    counts = [r["concepts"] for r in result["rows"]]
    axes[0].plot(counts, [RUN * r["step"] + r["start"] for r in result["rows"]], "o-")
    axes[0].set(title=f"seconds to teach one more ({RUN} steps)", xlabel="concepts that the library holds")
    axes[1].plot(range(1, len(result["bytes"]) + 1), [b / 2**20 for b in result["bytes"]], ".-")
    axes[1].set(title="MiB on disk, statistics included", xlabel="the concept's number in its library")
    for plot in axes:
        plot.set_ylim(0, 1.15 * plot.get_ylim()[1])
        plot.grid(alpha=0.3)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--every", type=int, default=EVERY)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    library = Library(args.library)
    rows = measure(DemoModel(), library, args.every, args.steps, args.repeats)
    seconds = [RUN * r["step"] + r["start"] for r in rows]
    slope, first = np.polyfit([r["concepts"] for r in rows], seconds, 1)
    result = {
        "meta": meta("python -m benchmarks.growth", "cpu, one thread", [0]) | {"steps": args.steps, "run": RUN},
        "rows": rows,
        "seconds": {"first": float(first), "for_each_more": float(slope)},
        "bytes": [sum(p.stat().st_size for p in library.paths(n)) for n in library.names],
    }
    draw(result, save(args.output, "growth", result))
    for row, total in zip(rows, seconds):
        print(f"{row['concepts']} concepts: {row['step']:.3f} s a step, {row['start']:.1f} s to start, {total:.0f} s in all")


if __name__ == "__main__":
    main()
