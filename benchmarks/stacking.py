"""Ten ordinary LoRAs, trained apart by diffusers and peft, stacked in every way: docs/results/stacking.json.

    python -m benchmarks.stacking

Each LoRA then draws its own trigger (`lora_moments`), which is all that mode `data` learns of it: no references, no training.
LoRAs and rows that are done are kept: a stopped run goes on where it was; --again measures the rows asked for anew.  Nothing was
chosen on these ten; the learning rate is the best of RATES on two others, whose losses stand in the result.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from pathlib import Path

from benchmarks.peft_lora import STEPS, train_peft
from benchmarks.rivals import COMBINED
from seqlora_core import evaluation
from seqlora_core.adapter import Adapter, concatenate, load_adapter, save_adapter
from seqlora_core.composition import project
from seqlora_core.demo import Subject, load_generic, load_pairs, load_subject
from seqlora_core.demo_model import SIZE, DemoModel
from seqlora_core.evaluation import held_out_loss, mean, measure
from seqlora_core.identity import Identity
from seqlora_core.lora_moments import general_calibration, keep_moments, kept_moments, see_trigger
from seqlora_core.ordinary import Combine, combined
from seqlora_core.statistics import Moments
from seqlora_core.tables import markdown, meta

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "benchmarks" / "cache" / "stacking"
TUNING = ("alien", "crab", "parrot", "pumpkin", "squid", "ufo")
TEN = ("octopus", "penguin", "fox", "ghost", "rocket", "monkey", "panda", "robot", "unicorn", "dragon")
RATES = (3e-4, 1e-3, 3e-3)
# row -> (adapters, moments, general moments) to one adapter
ROWS: dict[str, Combine] = {
    "base": lambda a, m, g: Adapter({}),
    **COMBINED,
    "weights": lambda a, m, g: concatenate(project(a, "weights")),
    "closed_form": lambda a, m, g: concatenate(project(a, "data", 1.0, m, g)),
}


class Loras:
    """Ordinary LoRAs in the cache, trained and calibrated when they are asked for."""

    def __init__(self, model: DemoModel, cache: Path = CACHE):
        self.model, self.cache, self.base = model, cache, model.fingerprint()
        self._tried: dict[float, float] | None = None

    def path(self, name: str, rate: float) -> Path:
        path = self.cache / f"{rate:g}" / f"{name}.safetensors"
        if not path.exists():
            # each user has a seed of their own: with one for all, all would start from the same lora_down
            adapter = train_peft(load_subject(self.model, name).references, rate, seed=zlib.crc32(name.encode()))
            save_adapter(path, adapter)
            print(f"{name}: {STEPS} steps at {rate:g} in {adapter.metadata['seconds']} s", flush=True)
        return path

    def tried(self) -> dict[float, float]:
        """Rate -> mean held-out loss alone of two tuning concepts"""
        if self._tried is None:
            seen = {n: load_subject(self.model, n).held_out for n in TUNING[:2]}
            self._tried = {r: mean([held_out_loss(self.model, h, self._load(n, r)) for n, h in seen.items()]) for r in RATES}
            print(f"learning rate {self.rate:g}, of {self._tried}", flush=True)
        return self._tried

    @property
    def rate(self) -> float:
        """The best of RATES"""
        tried = self.tried()
        return min(tried, key=tried.get)

    def _load(self, name: str, rate: float) -> Adapter:
        return load_adapter(self.path(name, rate))

    def adapter(self, name: str) -> Adapter:
        return self._load(name, self.rate)

    def moments(self, subject: Subject) -> Moments:
        path = self.path(subject.name, self.rate)
        kept = kept_moments(path, self.base)
        if kept is not None:
            return kept[0]
        trigger = f"{subject.trigger} {subject.class_noun}"
        keep_moments(path, self.base, see_trigger(self.model, load_adapter(path), trigger, (SIZE, SIZE)), trigger)
        return kept_moments(path, self.base)[0]

    def general(self) -> Moments:
        return general_calibration(self.model, self.path(TUNING[0], self.rate).parent, (SIZE, SIZE)).moments


class Table:
    """Rows over these concepts, one after another."""

    def __init__(self, model: DemoModel, loras: Loras, names: tuple[str, ...]):
        self.model, self.names = model, names
        self.subjects = [load_subject(model, n) for n in names]
        self.held_outs = [s.held_out for s in self.subjects]
        self.adapters = [loras.adapter(n) for n in names]
        self.moments, self.general = [loras.moments(s) for s in self.subjects], loras.general()
        self.generic, self.pairs = load_generic(model), load_pairs(model, list(names))
        self.base = [held_out_loss(model, h) for h in self.held_outs]
        self.best = [held_out_loss(model, h, a) for h, a in zip(self.held_outs, self.adapters)]
        self.base_generic = held_out_loss(model, self.generic)
        self._identity: tuple[Identity, dict] | None = None

    def row(self, name: str, combine) -> dict:
        start = time.process_time()
        combine(self.adapters, self.moments, self.general)
        seconds = time.process_time() - start
        stack = combined(combine, self.adapters, self.moments, self.general)
        alone = [Adapter({})] * len(self.names) if name == "base" else self.adapters
        losses = measure(self.model, alone, stack, self.held_outs, self.generic, self.pairs)
        result = evaluation.row(name, losses, self.base, self.best, self.base_generic) | {"seconds": seconds}
        return result | {"losses": dict(zip(self.names, losses.stack))}

    def identity(self, combine) -> dict:
        whole = combine(self.adapters, self.moments, self.general)
        if self._identity is None:
            import torch

            judge = Identity(self.model, self.subjects, torch.cat([s.images for s in self.subjects]), drawn=4)
            self._identity = judge, judge.scores(self.adapters, "alone")
        judge, alone = self._identity
        return alone | judge.scores([whole] * len(self.subjects), "stack")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--again", action="store_true", help="measure these rows although they are in the file")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "stacking.json")
    args = parser.parse_args(arguments)
    model = DemoModel()
    loras = Loras(model)
    table = Table(model, loras, TEN)
    about = meta("python -m benchmarks.stacking", model.device, [0]) | {"rate": loras.rate, "steps": STEPS}
    about |= {
        "rates": {f"{r:g}": loss for r, loss in loras.tried().items()},
        "concepts": list(TEN),
        "base": dict(zip(TEN, table.base)),
        "alone": dict(zip(TEN, table.best)),
    }
    done = {}
    if args.output.exists():
        kept = json.loads(args.output.read_text(encoding="utf-8"))
        done = {r["row"]: r for r in kept["rows"]} if kept["meta"]["alone"] == about["alone"] else {}
    if args.again:
        done = {name: r for name, r in done.items() if name not in args.rows}
    for key, add in (("row", table.row), ("identity_stack", lambda name, combine: table.identity(combine))):
        for name in args.rows:
            if key not in done.get(name, {}):
                done[name] = done.get(name, {}) | add(name, ROWS[name])
                print(markdown([done[name]]).splitlines()[-1], flush=True)
                rows = won_back([done[r] for r in ROWS if r in done])
                args.output.write_text(json.dumps({"meta": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def won_back(rows: list[dict]) -> list[dict]:
    """With the share of what plain summing loses that each row wins back, on the mean loss"""
    lost = next((r for r in rows if r["row"] == "ordinary_sum"), None)
    if lost is None:
        return rows
    return [r | {"won_back": (lost["stack"] - r["stack"]) / (lost["stack"] - lost["alone"])} for r in rows]


if __name__ == "__main__":
    main()
