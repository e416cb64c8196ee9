"""A whole library at other strengths than the 1 it is trained for: docs/results/strengths.json.

    python -m benchmarks.strengths

Ten concepts of the final set, as `benchmarks.method` trains them (and from its cache where it has): would a norm of lora_up
that is scaled afterwards, for all concepts alike, do better?
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import concepts
from benchmarks.method import ROOT, Bench
from seqlora_core.adapter import concatenate
from seqlora_core.config import TrainingConfig
from seqlora_core.evaluation import held_out_loss, mean
from seqlora_core.storage import written_aside
from seqlora_core.tables import meta

STRENGTHS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", default="seqlora_learnt_trigger")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--steps", type=int, default=TrainingConfig.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rate", type=float, default=1e-3, help="what benchmarks.method found best for the row and for ordinary LoRAs"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / "cache")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "strengths.json")
    args = parser.parse_args()
    bench, names = Bench(args.cache, args.steps), concepts.names("final")[: args.count]
    library = bench.chain(args.row, args.rate, args.seed, names, args.count)
    held_outs = [bench.subject(n).held_out for n in names]
    base = [held_out_loss(bench.model, h) for h in held_outs]
    best = [bench.loss(n, bench.ordinary(n, args.rate, args.seed)) for n in names]
    stack, rows = concatenate([library.load(n).adapter for n in names]), []
    for strength in STRENGTHS:
        scaled = stack.scaled(strength)
        kept = [(b - bench.loss(n, scaled)) / (b - o) for n, b, o in zip(names, base, best)]
        rows.append(
            {"strength": strength, "kept_mean": mean(kept), "kept_worst": min(kept), "generic_drift": bench.drift(scaled)}
        )
        print(rows[-1], flush=True)
    about = meta("python -m benchmarks.strengths", bench.model.device, [args.seed]) | {"row": args.row, "concepts": names}
    with written_aside(args.output) as file:
        file.write((json.dumps({"meta": about, "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
