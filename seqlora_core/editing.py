"""Libraries made from libraries, without training: merged, or refitted to one another's stored inputs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from .adapter import Adapter, LayerDelta, is_token_table, json_metadata
from .composition import project
from .concept import Concept
from .errors import UserError
from .interference import energies
from .library import Library
from .linalg import orthonormal_basis
from .live_prompts import is_text
from .statistics import Moments
from .storage import PART, sync_folder
from .subspace import Metric

# what a file says of the layers that were refitted
CONSTRAINT = {"lora_down": "projected by the closed form from the concepts' stored moments"}


@dataclass
class Price:
    """What a refit did, as shares.  before, after: energy that concepts add on one another's inputs, over the energy
    of their own effects; lost: share of each concept's own effect that the refit changed, mean."""

    names: list[str]
    before: float
    after: float
    lost: float
    warnings: list[str]

    def text(self) -> str:
        """In sentences"""
        said = (
            f"{len(self.names)} concepts: what they do to one another went from {self.before:.1%} of their own effect to "
            f"{self.after:.1%}; {self.lost:.1%} of a concept's own effect was changed for it"
        )
        return "\n".join([said, *self.warnings])


def rename(library: Library, old: str, new: str) -> None:
    """The same concept under another name, at its place and trained when it was; its trigger stays.  Killed meanwhile it may
    stand under both."""
    concept, names = library.load(old), library.names
    order = library.manifest["concepts"][names.index(old)]["order"]
    library.check_free(new)
    if library.unfinished(new):
        raise UserError(f"a run of {new!r} was stopped before its end: finish it first, or use another name")
    library.add(replace(concept, name=new), order=order)
    if library.checkpoints(old).exists():  # its stopped run goes on under the new name
        library.checkpoints(old).rename(library.checkpoints(new))
    library.remove(old)
    library.reorder([new if name == old else name for name in names])


def refit(sources: list[Library], folder: Path | str, beta: float = 1.0) -> tuple[Library, Price]:
    """A new library in `folder` of all concepts of `sources`, each lora_down projected by the closed form.

    One source: its concepts are refitted to all that the library now holds ("rebase").  Several: libraries that were
    trained apart are merged.  Needs only stored moments, no pictures; the sources stay as they are.  Raises UserError
    for libraries of different base models, or with and without the text encoder, for a name that two of them use, and for
    a folder that is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose a new folder for the library")
    bases = {s.manifest["base"] for s in sources}
    if len(bases) > 1:
        raise UserError("the libraries were trained on different base models: concepts of one do nothing sensible on the other")
    concepts = [c for s in sources for c in s.concepts()]
    names = [c.name for c in concepts]
    double = _double(names)
    if double:
        raise UserError(f"two of the libraries hold a concept {double!r}: rename one of them with 'seqlora library rename'")
    if not concepts:
        raise UserError("nothing to refit: the library is empty")
    calibration = sources[0].calibration()
    if calibration is None:
        raise UserError(f"the library {sources[0].folder.name!r} has no calibration: the refit needs what the base model sees")
    if len({_with_text(s) for s in sources if s.calibration()}) > 1:
        raise UserError(
            "some of the libraries adapt the text encoder, others do not: their concepts were not made to be summed"
        )
    adapters, moments = [c.adapter for c in concepts], [c.moments for c in concepts]
    fitted = project(adapters, "data", 1.0, moments, calibration.moments, beta)
    metrics: dict[int, Metric] = {}  # by moment: the calibration holds them all meanwhile, so no id is given twice

    def bases_of(adapter: Adapter) -> dict:
        out = {}
        for name, delta in adapter.without_token_tables().layers.items():
            moment = calibration.moments.layers[name]
            if id(moment) not in metrics:
                metrics[id(moment)] = Metric.of(moment)
            out[name] = orthonormal_basis(metrics[id(moment)].basis(delta.down))
        return out

    # made beside its place and renamed: there is a whole library or none
    part = folder.with_name(f".{folder.name}{PART}")
    shutil.rmtree(part, ignore_errors=True)
    library = Library(part, bases.pop(), max(max(s.planned for s in sources), len(concepts)), create=True)
    library.keep_calibration(calibration)
    for concept, adapter in zip(concepts, fitted):
        adapter.metadata = concept.adapter.metadata | json_metadata({"seqlora.constraint": CONSTRAINT | {"to": names}})
        library.add(replace(concept, adapter=adapter, bases=bases_of(adapter)))
    if folder.exists():
        folder.rmdir()
    part.rename(folder)
    sync_folder(folder.parent)
    return Library(folder), _price(concepts, fitted)


def _double(names: list[str]) -> str | None:
    """A name that is there twice, in whatever case: file systems differ"""
    alike = [n.casefold() for n in names]
    return next((n for n, a in zip(names, alike) if alike.count(a) > 1), None)


def _sharing_tokens(concepts: list[Concept]) -> list[tuple[str, str]]:
    """Pairs whose learnt triggers, of other words, move one and the same token"""
    moved = [
        {(name, token) for name, d in c.adapter.layers.items() if is_token_table(name) for token in _tokens(d)}
        for c in concepts
    ]
    pairs = combinations(zip(concepts, moved), 2)
    return [(a.name, b.name) for (a, ours), (b, theirs) in pairs if ours & theirs and _double([a.trigger, b.trigger]) is None]


def _tokens(learnt: LayerDelta) -> list[int]:
    return learnt.up[:, learnt.down.any(1)].any(1).nonzero().flatten().tolist()


def _with_text(library: Library) -> bool:
    return any(is_text(layer) for layer in library.calibration().moments.layers)


def _price(concepts: list[Concept], fitted: list[Adapter]) -> Price:
    adapters, moments = [c.adapter for c in concepts], [c.moments for c in concepts]
    changes = [
        Adapter({n: LayerDelta(after.layers[n].down - d.down, d.up) for n, d in before.layers.items()})
        for before, after in zip(adapters, fitted)
    ]
    plain, refitted, changed = (_energies(stack, moments) for stack in (adapters, fitted, changes))
    own = plain.diagonal().clamp_min(1e-30)
    lost = (changed.diagonal() / own).mean().item()

    def crosstalk(found: Tensor) -> float:
        return ((found.sum() - found.trace()) / own.sum()).item()

    double = _double([c.trigger for c in concepts])
    warnings = [f"two concepts share the trigger {double!r}: a prompt with it calls both; use one at a time"] if double else []
    for both in _sharing_tokens(concepts):
        warnings.append(
            f"the learnt triggers of {' and '.join(both)} have tokens in common, which each moves in the other's prompts too: use one "
            "at a time, or train one anew in the merged library"
        )
    names = [c.name for c in concepts]
    return Price(names, crosstalk(plain), crosstalk(refitted), lost, warnings)


def _energies(adapters: list[Adapter], moments: list[Moments]) -> Tensor:
    """[i, j]: energy that each adds on the inputs of each, all layers together; in float64"""
    doubled = [a.without_token_tables().to(torch.float64) for a in adapters]
    layers = dict.fromkeys(n for a in doubled for n in a.layers)
    of_each = (energies([a.layers.get(n) for a in doubled], [m.layers.get(n) for m in moments]) for n in layers)
    return sum(of_each, torch.zeros(len(adapters), len(moments), dtype=torch.float64))
