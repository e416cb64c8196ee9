"""The state of a run on disk: all that a fit needs to go on as if it had never stopped.

    LIBRARY/.checkpoints/NAME/step-000050.checkpoint

Each is a safetensors file, under a suffix that ComfyUI does not list among LoRAs, written aside and renamed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bilevel import Group, LowerLevel, UpperLevel
from .budget import Budget
from .errors import UserError
from .learnt_trigger import LearntTrigger
from .tensor_file import read_metadata, read_safetensors, write_safetensors

FOLDER, SUFFIX = ".checkpoints", ".checkpoint"
FORMAT = 1
CURVES = ("losses", "energies", "weights")
LIBRARY = "the state of the library"
# of what a run rests on and no one can read: what to say where it is another
OTHER = {
    "pictures": "pictures other than these, or masks or repeats: give it those",
    "captions": "captions other than these: give it those",
    LIBRARY: f"{LIBRARY} before concepts were added, removed, reordered or trained anew: take that back",
}


@dataclass
class Checkpoints:
    """The last `keep` checkpoints of one run; every: steps between them, 0 for none.

    run: what must be the same for a run to be gone on with (options, pictures, the library), each as text.
    resume: else an earlier run's are passed over, and give way to the first of this one.
    """

    folder: Path
    run: dict[str, str]
    every: int = 0
    keep: int = 2
    resume: bool = True

    def due(self, number: int) -> bool:
        """Whether one is to be written after this step"""
        return self.every > 0 and number % self.every == 0

    def save(self, number: int, state: dict[str, Any]) -> None:
        """state: nested dicts and lists of tensors and of what JSON can say.  UserError if the disk is full."""
        tensors: dict[str, Tensor] = {}
        outline = _outline(state, "", tensors)
        metadata = {"format": str(FORMAT), "run": json.dumps(self.run), "state": json.dumps(outline)}
        path = self.folder / f"step-{number:06d}{SUFFIX}"
        write_safetensors(path, tensors, metadata)
        # those after this one could not be read, or the run would have gone on from them
        kept = [p for p in self._files() if p <= path][-self.keep :] if self.resume else [path]
        for old in set(self._files()) - set(kept):
            old.unlink(missing_ok=True)
        self.resume = True

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest checkpoint that is whole; None if there is none.

        Raises UserError if it is of a run with other options, other pictures, or on another state of the library.
        """
        for path in reversed(self._files() if self.resume else []):
            try:
                tensors, metadata = read_safetensors(path)
            except UserError:
                continue
            number = int(path.stem.removeprefix("step-"))
            self._check(number, json.loads(metadata["run"]))
            return number, _restored(json.loads(metadata["state"]), tensors)
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"step-*{SUFFIX}"))

    def _check(self, number: int, begun: dict[str, str]) -> None:
        for key in {**begun, **self.run}:
            was, now = begun.get(key, "not set"), self.run.get(key, "not set")
            if was != now:
                what = OTHER.get(key, f"{key} {was}, not {now}: give it as it was")
                keep = f"; to keep the concept as it was saved, delete {self.folder}" if key == LIBRARY else ""
                raise UserError(
                    f"the unfinished run of {self.folder.name!r}, stopped after step {number}, began with {what}, or start anew, with "
                    f"--no-resume or, in ComfyUI, with if_trained 'start anew'{keep}"
                )


def remove_run(folder: Path) -> None:
    """All checkpoints of a concept's run, LIBRARY/.checkpoints/NAME; and .checkpoints with the last of them"""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # where there are runs of other concepts
        folder.parent.rmdir()


def begun_with(folder: Path) -> dict[str, str]:
    """What the run whose checkpoints are there was begun with, as the newest that can be read says; {} if there is none."""
    for path in sorted(folder.glob(f"step-*{SUFFIX}"), reverse=True):
        with contextlib.suppress(UserError):
            return json.loads(read_metadata(path)["run"])
    return {}


def _outline(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value with each tensor moved into `tensors` and its name left in its place"""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, _outline(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_outline(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _restored(outline: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(outline, list):
        return [_restored(item, tensors) for item in outline]
    if isinstance(outline, dict):
        if "tensor" in outline:
            return tensors[outline["tensor"]]
        return {key: _restored(item, tensors) for key, item in outline["dict"]}
    return outline


def _copy(targets: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)


@dataclass
class Progress:
    """Everything in a fit that changes from step to step: factors, optimisers, random numbers, budget, curves."""

    groups: list[Group]
    lower: LowerLevel
    upper: UpperLevel
    learnt: LearntTrigger | None
    generator: torch.Generator
    objective: Any  # whose weight the budget sets
    budget: Budget | None
    result: Any  # with the curves

    def state(self) -> dict[str, Any]:
        """All of it, as `Checkpoints.save` takes it"""
        budget = self.budget and {"weight": self.budget.weight, "ratio": self.budget.ratio}
        return {
            "up": [g.up for g in self.groups],
            "basis": [g.basis for g in self.groups],
            "lower": self.lower.optimiser and self.lower.optimiser.state_dict(),
            "upper": {"count": self.upper.count, "first": self.upper.first, "second": self.upper.second},
            "trigger": self.learnt and {"shift": self.learnt.parameters, "optimiser": self.learnt.optimiser.state_dict()},
            "generator": self.generator.get_state(),
            "weight": self.objective.weight,
            "budget": budget,
            "curves": {name: torch.tensor(getattr(self.result, name), dtype=torch.float64) for name in CURVES},
        }

    def resume(self, checkpoints: Checkpoints) -> int:
        """Take the newest checkpoint's state, if there is one; returns the number of steps it holds."""
        found = checkpoints.latest()
        if found is None:
            return 0
        number, state = found
        _copy([g.up for g in self.groups], state["up"])
        _copy([g.basis for g in self.groups], state["basis"])
        if self.lower.optimiser is not None:
            self.lower.optimiser.load_state_dict(state["lower"])
        self.upper.count = state["upper"]["count"]
        _copy(self.upper.first, state["upper"]["first"])
        _copy(self.upper.second, state["upper"]["second"])
        if self.learnt is not None:
            _copy(self.learnt.parameters, state["trigger"]["shift"])
            self.learnt.optimiser.load_state_dict(state["trigger"]["optimiser"])
        self.generator.set_state(state["generator"])
        self.objective.weight = state["weight"]
        if self.budget is not None:
            self.budget.weight, self.budget.ratio = state["budget"]["weight"], state["budget"]["ratio"]
        for name in CURVES:
            setattr(self.result, name, state["curves"][name].tolist())
        return number
