"""The prompts of the server's soak: tiny ones of every kind, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..nodes.test_training import BASE, draw, images, train
from .fuzz import mutant

LIBRARY = "soak"
CONCEPTS = {"octopus": "octzu", "penguin": "pengvo"}  # always there
PASSING = {"fox": "foxqi"}  # comes and goes
TEXTS = ("an octzu animal", "a pengvo animal beside a castle", "a fish", "a tree, red background")
MANY = 20_000  # steps that nobody waits for


@dataclass
class Prompt:
    """graph: for POST /prompt.  wanted: outcomes that are right."""

    kind: str
    graph: dict
    wanted: tuple[str, ...] = ("success",)


class Prompts:
    """`loras`: the server's folder of LoRA files, with the library in it."""

    def __init__(self, rng: random.Random, loras: Path):
        self.rng, self.loras = rng, loras
        self.kinds: list[Callable[[], Prompt]] = [
            self.teach, self.stack, self.stack, self.bare, self.report, self.cut_training, self.cut_drawing,
            self.bad_input, self.bad_stack, self.broken_drawing, self.broken_training, self.foreign_file,
        ]  # fmt: skip

    def next(self) -> Prompt:
        return self.rng.choice(self.kinds)()

    def teach(self) -> Prompt:
        known = CONCEPTS | PASSING
        name = self.rng.choice(list(known))
        return Prompt("teach", self._train(name, known[name], steps=2))

    def stack(self) -> Prompt:
        mode, amount = self.rng.choice((("sum", 1.0), ("weights", 0.5), ("data", 1.0)))
        return Prompt("stack", self._stacked(self._some(), mode=mode, amount=amount))

    def bare(self) -> Prompt:
        return Prompt("bare", draw(dict(BASE), ["1", 0], ["1", 1], self._text()))

    def report(self) -> Prompt:
        graph = BASE | {"4": _library(self._some())}
        return Prompt("report", graph | {"6": {"class_type": "SeqLoRAInterferenceReport", "inputs": {"stack": ["4", 0]}}})

    def cut_training(self) -> Prompt:
        return Prompt("cut training", self._train("cut", "foxqi", "fox", steps=MANY), ("interrupted",))

    def cut_drawing(self) -> Prompt:
        graph = self._stacked(self._some())
        graph["23"]["inputs"]["steps"] = MANY // 2
        return Prompt("cut drawing", graph, ("interrupted",))

    def bad_input(self) -> Prompt:
        change = self.rng.choice([
            dict(name="../x"), dict(trigger="nowhere"), dict(library="C:\\x"), dict(rank=0), dict(name="con"), dict(trigger="a\nb"),
        ])  # fmt: skip
        return Prompt("bad input", train(**({"library": LIBRARY, "name": "bad"} | change)), ("error", "refused"))

    def bad_stack(self) -> Prompt:
        graph = self._stacked(self.rng.choice(("nobody", "octopus: much", "octopus: 0.5\nnobody")))
        if self.rng.random() < 0.3:
            graph = self._stacked("octopus", layers="no_such_layer")
        return Prompt("bad stack", graph, ("error",))

    def broken_drawing(self) -> Prompt:
        """The model fails after some steps, with the stack in its weights"""
        graph = self._stacked(self._some())
        graph["7"] = {"class_type": "SoakBrokenModel", "inputs": {"model": ["5", 0], "calls": self.rng.randrange(10)}}
        graph["23"]["inputs"]["model"] = ["7", 0]
        return Prompt("broken drawing", graph, ("error",))

    def broken_training(self) -> Prompt:
        """The first preview fails, in the middle of the run"""
        graph = self._train("broken", "foxqi", "fox", steps=4, preview_every=1, vae=["7", 0])
        graph["7"] = {"class_type": "SoakBrokenVAE", "inputs": {"vae": ["1", 2]}}
        return Prompt("broken training", graph, ("error",))

    def foreign_file(self) -> Prompt:
        """A damaged LoRA of somebody else's, beside a sound concept"""
        data = (self.loras / "seqlora" / LIBRARY / "octopus.safetensors").read_bytes()
        (self.loras / "foreign.safetensors").write_bytes(mutant("adapter", data, self.rng))
        graph = self._stacked("foreign.safetensors")
        graph["4"]["inputs"] |= {"library": "", "stack": ["8", 0]}
        graph["8"] = _library("penguin")
        return Prompt("foreign file", graph, ("success", "error"))

    def _train(self, name: str, trigger: str, pictures: str = "", **change) -> dict:
        options = {"preview_every": 0, "if_trained": "train again", "batch_size": 2, "seed": self.rng.randrange(2**31)}
        return train(LIBRARY, name, trigger, **options | change) | {"2": images(f"demo/{pictures or name}")}

    def _stacked(self, concepts: str, mode: str = "sum", amount: float = 1.0, **options) -> dict:
        inputs = {"model": ["1", 0], "clip": ["1", 1], "stack": ["4", 0], "mode": mode, "amount": amount} | options
        graph = BASE | {"4": _library(concepts), "5": {"class_type": "SeqLoRAApplyStack", "inputs": inputs}}
        return draw(graph, ["5", 0], ["5", 1], self._text())

    def _some(self) -> str:
        """One or both concepts, each at a strength of its own"""
        names = self.rng.sample(list(CONCEPTS), self.rng.choice((1, 2)))
        return "\n".join(f"{name}: {self.rng.uniform(0.3, 1.2):.2f}" for name in names)

    def _text(self) -> str:
        return f"{self.rng.choice(TEXTS)}, {self.rng.randrange(10**6)}"


def _library(concepts: str) -> dict:
    return {"class_type": "SeqLoRALibrary", "inputs": {"library": LIBRARY, "concepts": concepts, "strength": 1.0}}
