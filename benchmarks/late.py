"""What limits a concept that is taught late into a large library?  docs/results/late.json.

    python -m benchmarks.late

Goes on from a finished chain of 101 (`benchmarks.method --trigger-tokens 4 --counts 101 ... --rows seqlora_learnt_trigger`): its
first `--after` concepts, and then the next ones taught in several ways, each from the same library.  Ordinary LoRAs of as many
steps stand beside them.
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
from seqlora_core.evaluation import mean, summed
from seqlora_core.library import Library
from seqlora_core.ordinary import train_ordinary
from seqlora_core.storage import written_aside
from seqlora_core.tables import meta

ROW, RATE, PLANNED, CHAIN_STEPS, TOKENS = "seqlora_learnt_trigger", 3e-3, 101, 160, 4
WAYS = {"as usual": {}, "without orthogonality": {"orthogonal": False}}


class Late:
    def __init__(self, cache: Path, after: int, count: int):
        self.bench, names = Bench(cache, CHAIN_STEPS, tokens=TOKENS), concepts.names("all")
        self.chain = self.bench.folder / f"{ROW}-{RATE:g}" / f"0-{PLANNED}-{names[0]}"
        self.earlier, self.names = names[:after], names[after : after + count]
        if len(Library(self.chain)) < after:
            raise SystemExit(f"{self.chain} holds fewer than {after} concepts: run benchmarks.method first")
        self.base = [self.bench.loss(n, None) for n in self.names]
        self.before = self.drift(Library(self.chain), self.earlier)

    def drift(self, library: Library, names: list[str]) -> float:
        return self.bench.drift(summed([library.load(n).adapter for n in names])(list(range(len(names)))))

    def gains(self, adapters: list) -> list[float]:
        """What each takes off the base model's loss"""
        return [b - self.bench.loss(n, a) for n, b, a in zip(self.names, self.base, adapters)]

    def ordinary(self, steps: int) -> list[float]:
        return self.gains(
            [train_ordinary(self.bench.model, self.bench.subject(n).references, 4, steps, RATE) for n in self.names]
        )

    def taught(self, steps: int, options: dict) -> tuple[list[float], float, float]:
        """Gains alone, mean last weight of the budget, and what these concepts added to the library's drift"""
        config = TrainingConfig(steps=steps, learning_rate=RATE, planned=PLANNED)
        config, weights = replace(config, **self.bench.options[ROW], **options), []
        with tempfile.TemporaryDirectory() as folder:
            library = Library(shutil.copytree(self.chain, Path(folder) / "library"))
            for name in reversed(library.names[len(self.earlier) :]):
                library.remove(name)
            for name in self.names:
                weights.append(self.bench.teach(library, name, config).weights[-1])
            drift = self.drift(library, library.names)
            return self.gains([library.load(n).adapter for n in self.names]), mean(weights), drift - self.before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--after", type=int, default=60, help="concepts that the library holds by then")
    parser.add_argument("--count", type=int, default=2, help="concepts that are taught")
    parser.add_argument("--steps", type=int, nargs="+", default=[160, 320])
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / "cache")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "late.json")
    args = parser.parse_args()
    late, rows = Late(args.cache, args.after, args.count), []
    for steps in args.steps:
        ordinary = late.ordinary(steps)
        rows.append({"row": "ordinary LoRAs", "steps": steps, "gain": mean(ordinary)})
        for way, options in WAYS.items():
            gains, weight, drift = late.taught(steps, options)
            share = sum(gains) / sum(ordinary)
            rows.append({"row": way, "steps": steps, "gain": mean(gains), "share": share, "weight": weight, "drift": drift})
            print(rows[-1], flush=True)
    about = meta("python -m benchmarks.late", late.bench.model.device, [0]) | {"after": args.after, "concepts": late.names}
    with written_aside(args.output) as file:
        file.write((json.dumps({"meta": about, "base": mean(late.base), "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
