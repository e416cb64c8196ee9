"""The method against every rival, as the number of concepts grows: docs/results/method.json.

    python -m benchmarks.method --quick               minutes: three concepts, short training, every row
    python -m benchmarks.method --counts 2 5 10 32    hours; resumes where it was stopped
    python -m benchmarks.method --model pixel_unet    the same on a model of another kind: docs/results/method_unet.json

Protocol: docs/RESULTS.md, "Protocol".  Every row's learning rate is the best of RATES, or one BEYOND where that is at an end, by
the same search on the tuning concepts, by what its own stack keeps (of ordinary LoRAs by what each gains alone), unless --rates
gives it; the table's concepts are others (`benchmarks.concepts`).  What is
trained is kept in the cache, and the results file keeps every run (count, planned, seed, row) that it holds: seeds and
counts can be added on other days and machines.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import concepts
from benchmarks.pixel_unet import PixelUNet
from benchmarks.rivals import ABLATIONS, COMBINED, TRAINED
from seqlora_core import evaluation
from seqlora_core.adapter import Adapter, load_adapter, save_adapter
from seqlora_core.calibration import Calibration, calibrate
from seqlora_core.config import TrainingConfig
from seqlora_core.demo import Subject, load_generic, load_pairs, load_subject, moments_of
from seqlora_core.demo_model import DemoModel
from seqlora_core.errors import UserError
from seqlora_core.evaluation import Stack, held_out_loss, measure, row, summed
from seqlora_core.identity import Identity
from seqlora_core.library import Library
from seqlora_core.ordinary import combined, train_ordinary
from seqlora_core.storage import written_aside
from seqlora_core.tables import markdown, meta
from seqlora_core.teach import train_concept
from seqlora_core.trainer import Fit

ROOT = Path(__file__).resolve().parent.parent
# what --model may name: (what opens it, its results)
MODELS = {"demo": (DemoModel, "method.json"), "pixel_unet": (PixelUNet, "method_unet.json")}
RATES = (3e-4, 1e-3, 3e-3)
BEYOND = {3e-4: 1e-4, 3e-3: 1e-2}  # tried too where the best of RATES is at an end
REFITTED = "_closed_form"  # ends rows of libraries that are stacked by the closed form instead of by addition
SUBSETS = 32  # concepts that random subsets are drawn for: of larger libraries the first ones
SEARCH = 3  # tuning concepts that the search of learning rates uses


def runs_folder(cache: Path, model: str, steps: int, tokens: int = 0) -> Path:
    return cache / ("" if model == "demo" else model) / (f"own-triggers-{tokens}" if tokens else "") / f"runs-{steps}"


def given_rates(pairs: list[str]) -> dict[str, float]:
    """["seqlora=0.003"] -> {"seqlora": 0.003}"""
    return {row: float(rate) for row, rate in (pair.split("=") for pair in pairs)}


@dataclass(frozen=True)
class Taught:
    """What a row makes of concepts: each alone, what stacks those that are asked for, and the means of what each cost"""

    alone: list[Adapter]
    stack: Stack
    costs: dict[str, float]


class Bench:
    """Everything trained so far, by row, rate, seed and planned count; trains what is missing.

    Seconds are the processor's, so that other work on the machine is not counted.
    """

    def __init__(self, cache: Path, steps: int, model: str = "demo", tokens: int = 0):
        """model: one of MODELS; tokens: that each trigger shall have of its own (0: as the concepts come).  Each keeps its
        runs apart."""
        self.steps, self.folder = steps, runs_folder(cache, model, steps, tokens)
        self.model = MODELS[model][0]()
        self.command = "python -m benchmarks.method" + ("" if model == "demo" else f" --model {model}")
        own = concepts.with_own_triggers(cache, tokens) if tokens else None
        self.pictures = own / "concepts" if own else concepts.ensure(cache)
        self.pairs_folder = (own or cache) / "pairs"
        self.text_encoder = False  # whether its attention is adapted too
        self.measuring()
        self.generic = load_generic(self.model)
        self.generic_base = held_out_loss(self.model, self.generic)
        self.subjects: dict[str, Subject] = {}
        self.rates: dict[str, float] = {}
        self.options = TRAINED | ABLATIONS
        self.series: dict[str, list[dict]] = {}  # what each concept of a row's longest library cost

    def measuring(self) -> None:
        """From here on learnt triggers act in whatever is measured; training sets that anew"""
        self.model.adapt_text(self.text_encoder, tokens=bool(self.model.token_tables()))

    def subject(self, name: str) -> Subject:
        if name not in self.subjects:
            self.measuring()
            self.subjects[name] = load_subject(self.model, name, self.pictures / name)
        return self.subjects[name]

    def calibration(self) -> Calibration:
        path = self.folder / "calibration.safetensors"
        if not path.exists():
            calibrate(self.model, (self.model.size,) * 2).save(path, self.model.fingerprint())
        return Calibration.load(path)

    def ordinary(self, name: str, rate: float, seed: int) -> Adapter:
        path = self.folder / f"ordinary-{rate:g}" / str(seed) / f"{name}.safetensors"
        if not path.exists():
            start = time.process_time()
            adapter = train_ordinary(self.model, self.subject(name).references, 4, self.steps, rate, seed=seed)
            adapter.metadata["seconds"] = f"{time.process_time() - start:.2f}"
            save_adapter(path, adapter)
        return load_adapter(path)

    def chain(self, row: str, rate: float, seed: int, names: list[str], planned: int) -> Library:
        """A library of these concepts, taught in this order; goes on from what is there."""
        folder = self.folder / f"{row}-{rate:g}" / f"{seed}-{planned}-{names[0]}"
        library = Library(folder, self.model.fingerprint(), planned, create=True)
        if library.calibration() is None:
            library.keep_calibration(self.calibration())
        if library.names[: len(names)] != names[: len(library)]:
            raise SystemExit(f"{folder} holds other concepts ({', '.join(library.names)}): remove it")
        config = TrainingConfig(steps=self.steps, learning_rate=rate, seed=seed, planned=planned)
        config = replace(config, **self.options[row])
        for name in names[len(library) :]:
            self.subject(name)  # whose pictures are no part of the cost
            start = time.process_time()
            try:
                fit = self.teach(library, name, config)
            except UserError as error:  # of many triggers made by chance, some consist of the others' tokens
                if not config.learn_trigger:
                    raise
                print(f"{name}: {error}", flush=True)
                fit = self.teach(library, name, replace(config, learn_trigger=False))
            seconds = time.process_time() - start
            with open(folder / "costs.jsonl", "a", encoding="utf-8") as f:
                size = sum(p.stat().st_size for p in library.paths(name))
                f.write(json.dumps({"name": name, "seconds": seconds, "bytes": size, "weight": fit.weights[-1]}) + "\n")
            print(f"{row} {rate:g} seed {seed} of {planned}: {name} in {seconds:.0f} s", flush=True)
        return library

    def teach(self, library: Library, name: str, config: TrainingConfig, **given) -> Fit:
        """One more concept into a library; given: as `train_concept` takes it"""
        s = self.subject(name)
        told = s.images, name, s.trigger, s.class_noun, s.references.captions
        return train_concept(self.model, library, *told, config, **given)[1]

    def costs(self, library: Library) -> list[dict]:
        lines = (library.folder / "costs.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    # --- rows and their rates ------------------------------------------------------------------------------------

    def taught(self, row: str, rate: float, seed: int, names: list[str], planned: int) -> Taught:
        """The concepts of a row: ordinary LoRAs together, or a library, added or stacked by the closed form"""
        general = self.calibration().moments
        if row in COMBINED:
            alone, moments = [self.ordinary(n, rate, seed) for n in names], [None] * len(names)
            if row == "closed_form":  # minutes for a hundred, and no other row reads them
                moments = [moments_of(self.model, self.subject(n), a, seed) for n, a in zip(names, alone)]
            costs = {"seconds": evaluation.mean([float(a.metadata["seconds"]) for a in alone])}
            return Taught(alone, combined(COMBINED[row], alone, moments, general), costs)
        row_of = row.removesuffix(REFITTED)
        library = self.chain(row_of, rate, seed, names, planned)
        concepts_of, series = [library.load(n) for n in names], self.costs(library)
        self.series[row_of], alone = series, [c.adapter for c in concepts_of]
        stack = summed(alone)
        if row != row_of:
            stack = combined(COMBINED["closed_form"], alone, [c.moments for c in concepts_of], general)
        costs = {k: evaluation.mean([c[k] for c in series[: len(names)]]) for k in ("seconds", "bytes", "weight")}
        return Taught(alone, stack, costs)

    def rate(self, row: str, planned: int = SEARCH) -> float:
        """The one given, or the best on tuning concepts, seed 0: of "ordinary" by what each gains alone, of a row by what its
        stack keeps, in a library planned as the table's is.  The method's ablations take the method's, but for `seqlora_budget_*`."""
        if row in self.rates:
            return self.rates[row]
        if row in ABLATIONS and not row.startswith("seqlora_budget"):
            return self.rate("seqlora", planned)
        scores = {r: self.score(row, r, planned) for r in RATES}
        best = max(scores, key=scores.get)
        if best in BEYOND:
            scores[BEYOND[best]] = self.score(row, BEYOND[best], planned)
        self.rates[row] = max(scores, key=scores.get)
        print(f"{row}: learning rate {self.rates[row]:g}, of {scores}", flush=True)
        return self.rates[row]

    def score(self, row: str, rate: float, planned: int) -> float:
        """How well a row does on the tuning concepts: minus the held-out loss"""
        names = concepts.names("tuning")[:SEARCH]
        if row == "ordinary":
            return -evaluation.mean([self.loss(n, self.ordinary(n, rate, 0)) for n in names])
        stack = self.taught(row, rate, 0, names, planned).stack(list(range(len(names))))
        return -evaluation.mean([self.loss(n, stack) for n in names])

    def loss(self, name: str, adapter: Adapter | None) -> float:
        self.measuring()
        return held_out_loss(self.model, self.subject(name).held_out, adapter)

    def drift(self, stack: Adapter) -> float:
        """How much worse it makes unrelated prompts, as a share of the bare model's loss on them"""
        self.measuring()
        return held_out_loss(self.model, self.generic, stack) / self.generic_base - 1

    # --- one table -----------------------------------------------------------------------------------------------

    def table(self, names: list[str], planned: int, seed: int, rows: list[str]) -> Iterator[dict]:
        """One row after another of `rows` over these concepts, taught in this order."""
        held_outs = [self.subject(n).held_out for n in names]
        base = [held_out_loss(self.model, h) for h in held_outs]
        best = [self.loss(n, self.ordinary(n, self.rate("ordinary"), seed)) for n in names]
        self.measuring()
        pairs = load_pairs(self.model, names, self.pairs_folder)
        bank = torch.cat([self.subject(n).images for n in names])
        identity = Identity(self.model, [self.subject(n) for n in names], bank, drawn=4)
        of_each: dict[tuple, tuple[list[float], dict]] = {}  # of concepts alone, which several rows may stack
        for name in rows:
            rate = self.rate(name, planned)
            taught = self.taught(name, rate, seed, names, planned)
            self.measuring()
            each = ("ordinary" if name in COMBINED else name.removesuffix(REFITTED), rate)
            if each not in of_each:
                alone = [held_out_loss(self.model, h, a) for h, a in zip(held_outs, taught.alone)]
                of_each[each] = alone, identity.scores(taught.alone, "alone")
            alone, identity_alone = of_each[each]
            losses = measure(
                self.model, taught.alone, taught.stack, held_outs, self.generic, pairs, seed=seed, subsets=SUBSETS,
                alone_losses=alone,
            )  # fmt: skip
            result = row(name, losses, base, best, self.generic_base) | taught.costs | identity_alone
            result |= {"learning_rate": rate, "seed": seed, "planned": planned}
            result |= identity.scores([taught.stack(list(range(len(names))))] * len(names), "stack")
            print(markdown([result]).splitlines()[-1], flush=True)
            yield result


def summary(runs: list[dict]) -> list[dict]:
    """Rows of the contract: mean over seeds, and the spread (standard deviation) beside it."""
    out = []
    plans = {r["planned"] for r in runs}
    for key in dict.fromkeys((r["n"], r["row"], r["planned"]) for r in runs):
        same = [r for r in runs if (r["n"], r["row"], r["planned"]) == key]
        numbers = [k for k, v in same[0].items() if isinstance(v, float)]
        mean = {k: evaluation.mean([r[k] for r in same]) for k in numbers}
        spread = {k: statistics.stdev([r[k] for r in same]) for k in numbers} if len(same) > 1 else {}
        name = key[1] if len(plans) == 1 else f"{key[1]}, planned for {key[2]}"  # libraries of other plans are no other seeds
        out.append({"row": name, "n": key[0], "seeds": len(same)} | mean | {"spread": spread})
    return out


class Ledger:
    """The results file: every run so far, with what they have in common."""

    def __init__(self, path: Path, common: dict):
        self.path, self.common, self.runs, self.rates, self.costs = path, common, [], {}, {}
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            differ = [k for k, v in common.items() if held["meta"].get(k) != v]
            if differ:
                raise SystemExit(f"{path} is of another {', '.join(differ)}: remove it or give another --output")
            self.runs, self.rates, self.costs = held["runs"], held["meta"]["rates"], held["costs"]

    def missing(self, count: int, planned: int, seed: int, rows: list[str]) -> list[str]:
        done = {r["row"] for r in self.runs if (r["n"], r["planned"], r["seed"]) == (count, planned, seed)}
        return [r for r in rows if r not in done]

    def add(self, runs: list[dict], bench: Bench) -> None:
        self.runs += runs
        self.rates |= bench.rates
        self.costs |= {k: v for k, v in bench.series.items() if len(v) >= len(self.costs.get(k, []))}
        seeds = sorted({r["seed"] for r in self.runs})
        about = meta(bench.command, bench.model.device, seeds) | self.common | {"rates": self.rates}
        result = {"meta": about, "rows": summary(self.runs), "runs": self.runs, "costs": self.costs}
        with written_aside(self.path) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three concepts, 40 steps, one seed")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 5, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=[*COMBINED, *TRAINED])
    parser.add_argument("--ablations", action="store_true", help="the method's ablations too")
    parser.add_argument("--concepts", choices=["tuning", "final", "all"], default="final")
    parser.add_argument("--steps", type=int, default=TrainingConfig().steps)
    parser.add_argument("--rates", nargs="+", default=[], metavar="ROW=RATE", help="not to be searched for: seqlora=0.003")
    parser.add_argument("--trigger-tokens", type=int, default=0, metavar="N", help="that each trigger has of its own")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / "cache")
    parser.add_argument("--model", choices=list(MODELS), default="demo")
    parser.add_argument("--output", type=Path, help="default: docs/results/method.json, or method_unet.json")
    args = parser.parse_args(arguments)
    args.output = args.output or ROOT / "docs" / "results" / MODELS[args.model][1]
    if args.quick:
        args.counts, args.seeds, args.steps, args.concepts = [3], [0], 40, "tuning"
        args.output = args.cache / "quick.json"
        args.output.unlink(missing_ok=True)
        shutil.rmtree(runs_folder(args.cache, args.model, args.steps, args.trigger_tokens), ignore_errors=True)
    bench = Bench(args.cache, args.steps, args.model, args.trigger_tokens)
    model = bench.model.fingerprint()
    common = {"steps": args.steps, "concepts": args.concepts, "model": model}
    common |= {"trigger_tokens": args.trigger_tokens} if args.trigger_tokens else {}
    ledger = Ledger(args.output, common)
    bench.rates = (
        dict.fromkeys(["ordinary", *COMBINED], 3e-3) | dict.fromkeys(bench.options, 1e-3) if args.quick else dict(ledger.rates)
    )
    bench.rates |= given_rates(args.rates)
    rows, names = args.rows + (list(ABLATIONS) if args.ablations else []), concepts.names(args.concepts)
    longest = max(args.counts)
    if longest > len(names):
        parser.error(f"the {args.concepts} set holds {len(names)} concepts: ask for fewer, or --concepts all")
    for seed in args.seeds:
        for count in args.counts:
            if missing := ledger.missing(count, longest, seed, rows):
                for result in bench.table(names[:count], longest, seed, missing):
                    ledger.add([result], bench)
    print(markdown(summary(ledger.runs)))


if __name__ == "__main__":
    main()
