"""One way of training tried on a few tuning concepts: what each gains alone, what the stack keeps, what it moves.

    python -m benchmarks.trial --planned 10 --option rank=8 --option learning_rate=0.002

Prints one line; writes nothing but the benchmark's cache.  What docs/RESULTS.md says of single options comes from here.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import fields, replace
from pathlib import Path

from benchmarks.method import MODELS, ROOT, Bench
from seqlora_core.calibration import calibrate
from seqlora_core.config import TrainingConfig
from seqlora_core.evaluation import held_out_loss, mean, summed
from seqlora_core.library import Library
from seqlora_core.options import from_recipe

CONCEPTS = ["octopus", "panda", "ghost"]


def option(text: str) -> tuple[str, object]:
    """ "rank=8" -> ("rank", 8)"""
    name, _, value = text.partition("=")
    kinds = {f.name: type(f.default) for f in fields(TrainingConfig)}
    kind = kinds.get(name, str)
    return name, value.lower() == "true" if kind is bool else kind(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--planned", type=int, default=10)
    parser.add_argument("--steps", type=int, default=TrainingConfig.steps)
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS)
    parser.add_argument("--option", type=option, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--trigger-tokens", type=int, default=0, metavar="N", help="that each trigger has of its own")
    parser.add_argument("--pictures", type=int, help="of the calibration, if not as many as usual")
    parser.add_argument("--model", choices=list(MODELS), default="demo")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / "cache")
    args = parser.parse_args()
    options = from_recipe(dict(args.option), {}, "--option")
    bench = Bench(args.cache, args.steps, args.model, args.trigger_tokens)
    config = replace(TrainingConfig(steps=args.steps, planned=args.planned), **options)
    model, subjects = bench.model, [bench.subject(n) for n in args.concepts]
    base = [held_out_loss(model, s.held_out) for s in subjects]
    best = [bench.loss(s.name, bench.ordinary(s.name, 1e-3, 0)) for s in subjects]
    calibration = bench.calibration()
    if config.text_encoder:  # the bare model and the ordinary LoRAs are measured; from here on its attention is adapted too
        bench.text_encoder, bench.subjects = True, {}
        subjects = [bench.subject(n) for n in args.concepts]
    if config.text_encoder or args.pictures:
        calibration = calibrate(model, (model.size, model.size), args.pictures)
    with tempfile.TemporaryDirectory() as folder:
        library = Library(folder, model.fingerprint(), args.planned, create=True)
        library.keep_calibration(calibration)
        for s in subjects:
            bench.teach(library, s.name, config)
        adapters = [c.adapter for c in library.concepts()]
    stack = summed(adapters)(list(range(len(subjects))))
    alone, kept = (
        mean([(b - bench.loss(s.name, a)) / (b - o) for s, a, b, o in zip(subjects, some, base, best)])
        for some in (adapters, [stack] * len(subjects))
    )
    drift = bench.drift(stack)
    options |= {k: v for k, v in (("pictures", args.pictures), ("trigger tokens", args.trigger_tokens)) if v}
    said = ", ".join(f"{k} {v}" for k, v in options.items()) or "as usual"
    print(f"{said}, planned for {args.planned}: alone {alone:.3f}, kept {kept:.3f}, drift {drift:+.2%}")


if __name__ == "__main__":
    main()
