"""Every concept of a library drawn while all of them are on, beside pictures that no training saw: docs/images/crowd.png.

    python -m benchmarks.crowd

Teaches what `benchmarks.method` has not taught yet; each concept's first drawing, none is picked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import concepts
from benchmarks.method import ROOT, Bench
from seqlora_core.adapter import Adapter
from seqlora_core.config import TrainingConfig
from seqlora_core.identity import COLOURS
from seqlora_core.labelled import labelled_grid
from seqlora_core.preview import draw_with

OURS = "seqlora_learnt_trigger"
COLUMNS, TILE = 4, 60


def stacks(bench: Bench, names: list[str], rate: float) -> dict[str, Adapter]:
    """All of them on: ours by plain addition, ordinary LoRAs by the closed form and as they come"""
    count = len(names)
    heads = (f"SeqLoRA, all {count} on", "ordinary LoRAs\nby the closed form", "ordinary LoRAs added")
    rows = (OURS, "closed_form", "ordinary_sum")
    found = {h: bench.taught(r, rate, 0, names, count).stack(list(range(count))) for h, r in zip(heads, rows)}
    bench.measuring()
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=32, help="of the concepts, and planned")
    parser.add_argument("--concepts", choices=["tuning", "final", "all"], default="final")
    parser.add_argument("--steps", type=int, default=TrainingConfig.steps)
    parser.add_argument("--trigger-tokens", type=int, default=16, metavar="N")
    parser.add_argument("--rate", type=float, default=1e-3, help="of both kinds of LoRAs")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / "cache")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "crowd.png")
    args = parser.parse_args(arguments)
    bench, names = Bench(args.cache, args.steps, tokens=args.trigger_tokens), concepts.names(args.concepts)[: args.count]
    prompts = [bench.subject(n).prompt(COLOURS[i % len(COLOURS)]) for i, n in enumerate(names)]
    columns = {"held out": torch.stack([bench.subject(n).held_out_images[0] for n in names])}
    for head, adapter in stacks(bench, names, args.rate).items():
        columns[head] = draw_with(bench.model, adapter, prompts, (bench.model.size,) * 2)
    rows = list(zip(*(pictures.split(COLUMNS) for pictures in columns.values())))
    labelled_grid(rows, [""] * len(rows), list(columns), TILE).save(args.output)


if __name__ == "__main__":
    main()
