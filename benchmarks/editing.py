"""What editing a library costs: docs/results/editing.json.

    python -m benchmarks.editing

Ten concepts of the final set that were taught one after another (seed 0 of benchmarks.method, whose cache and options are
used): as they are, without the first, with the first trained anew beside the others, refitted by the closed form; and the
first five merged with the other five taught apart from them, by plain addition and by the closed form.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import concepts
from benchmarks.method import ROOT, Bench
from seqlora_core.config import TrainingConfig
from seqlora_core.editing import Price, refit
from seqlora_core.evaluation import held_out_loss, mean, summed
from seqlora_core.library import Library
from seqlora_core.storage import written_aside
from seqlora_core.tables import meta

ROW, COUNT = "seqlora_learnt_trigger", 10


class Measured:
    """Gains and drift of stacks of these concepts, against an ordinary LoRA alone"""

    def __init__(self, bench: Bench, names: list[str], rate: float):
        self.bench, self.rows = bench, []
        self.base = {n: held_out_loss(bench.model, bench.subject(n).held_out) for n in names}
        self.best = {n: bench.loss(n, bench.ordinary(n, rate, 0)) for n in names}

    def add(self, row: str, libraries: list[Library], left_out: tuple[str, ...] = (), price: Price | None = None) -> None:
        taught = {n: library.load(n).adapter for library in libraries for n in library.names if n not in left_out}
        stack = summed(list(taught.values()))(list(range(len(taught))))
        alone, kept = ([self.gain(n, a) for n, a in some] for some in (taught.items(), zip(taught, [stack] * len(taught))))
        told = {"row": row, "concepts": len(taught), "alone": mean(alone), "kept": mean(kept), "worst": min(kept)}
        told |= {"crosstalk_before": price.before, "crosstalk_after": price.after, "lost": price.lost} if price else {}
        self.rows.append(told | {"generic_drift": self.bench.drift(stack)})
        print(self.rows[-1], flush=True)

    def gain(self, name: str, adapter) -> float:
        return (self.base[name] - self.bench.loss(name, adapter)) / (self.base[name] - self.best[name])


def trained_anew(bench: Bench, library: Library, name: str, rate: float) -> None:
    config = replace(TrainingConfig(steps=bench.steps, learning_rate=rate), **bench.options[ROW])
    bench.teach(library, name, config, replace_existing=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=TrainingConfig.steps)
    parser.add_argument(
        "--rate", type=float, default=1e-3, help="what benchmarks.method found best for the row and for ordinary LoRAs"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / "cache")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "editing.json")
    args = parser.parse_args()
    bench, names = Bench(args.cache, args.steps), concepts.names("final")[:COUNT]
    second = names[COUNT // 2 :]
    measured = Measured(bench, names, args.rate)
    library = bench.chain(ROW, args.rate, 0, names, COUNT)
    apart = bench.chain(ROW, args.rate, 0, second, COUNT)
    with tempfile.TemporaryDirectory() as folder:
        anew, half = Path(folder) / "anew", Path(folder) / "half"
        measured.add("as they were taught", [library])
        measured.add("without the first", [library], left_out=tuple(names[:1]))
        shutil.copytree(library.folder, anew)
        trained_anew(bench, Library(anew), names[0], args.rate)
        measured.add("the first trained anew", [Library(anew)])
        rebased, price = refit([library], Path(folder) / "rebased")
        measured.add("refitted by the closed form", [rebased], price=price)
        shutil.copytree(library.folder, half)
        for name in second:
            Library(half).remove(name)
        measured.add("two halves taught apart, added", [Library(half), apart])
        merged, price = refit([Library(half), apart], Path(folder) / "merged")
        measured.add("two halves taught apart, merged", [merged], price=price)
    about = meta("python -m benchmarks.editing", bench.model.device, [0]) | {"row": ROW, "steps": args.steps}
    with written_aside(args.output) as file:
        file.write((json.dumps({"meta": about, "rows": measured.rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
