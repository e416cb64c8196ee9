"""What a whole library keeps of each of its concepts: docs/results/by_concept.json.

    python -m benchmarks.by_concept --trigger-tokens 16 --steps 160 --rate 0.003

After `benchmarks.method` has taught them: a table's mean and worst say nothing of which concepts those are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import concepts
from benchmarks.method import ROOT, Bench
from seqlora_core.evaluation import mean, summed
from seqlora_core.storage import written_aside
from seqlora_core.tables import meta

ROW = "seqlora_learnt_trigger"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=101, help="of the concepts, and planned")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--trigger-tokens", type=int, default=16, metavar="N")
    parser.add_argument("--rate", type=float, default=3e-3, help="of both kinds of LoRAs")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / "cache")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "by_concept.json")
    args = parser.parse_args(arguments)
    bench, names = Bench(args.cache, args.steps, tokens=args.trigger_tokens), concepts.names("all")[: args.count]
    library = bench.chain(ROW, args.rate, 0, names, args.count)
    stack = summed([library.load(n).adapter for n in names])(list(range(args.count)))
    kept = {}
    for name in names:
        base, ordinary = bench.loss(name, None), bench.loss(name, bench.ordinary(name, args.rate, 0))
        kept[name] = (base - bench.loss(name, stack)) / (base - ordinary)
    rest = [share for name, share in kept.items() if name not in concepts.STYLES]
    about = meta("python -m benchmarks.by_concept", bench.model.device, [0]) | {
        "steps": args.steps,
        "tokens": args.trigger_tokens,
    }
    result = {"meta": about, "without_styles": {"kept": mean(rest), "worst": min(rest)}, "kept": kept}
    with written_aside(args.output) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    print(f"without styles: kept {mean(rest):.3f}, worst {min(rest):.3f}")


if __name__ == "__main__":
    main()
