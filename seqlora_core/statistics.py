"""Second moments of layer inputs: what a layer sees while something is drawn.

`S = E[x x^T]` over all tokens, pictures and timesteps.  Layers that read one and the same tensor (q, k, v of an
attention) share one moment.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .attach import Attachment, flat
from .errors import UserError
from .sketch import Sketch, Stream, added, sketch
from .tensor_file import read_safetensors

SKETCH_FROM = 513  # inputs of a layer from which its moment is recorded, kept and written as a sketch


@dataclass
class Moments:
    """Layer name -> E[x x^T] [in, in] in float32, or a sketch of it; layers of one group hold the same object."""

    layers: dict[str, Tensor | Sketch] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        moment = self.layers[name]
        return moment.dense() if isinstance(moment, Sketch) else moment

    def loaded(self) -> Moments:
        """Itself, in memory"""
        return self

    def plus(self, other: Moments, weight: float = 1.0) -> Moments:
        """Layer by layer this one and `weight` times the other; layers that the other lacks stay as they are"""
        both = Moments({n: s for n, s in self.layers.items() if n in other.layers})
        return Moments(self.layers | _sum([both, other], [1.0, weight], lambda a, b: a + weight * b).layers)

    def tensors(self) -> dict[str, Tensor]:
        """For a file: `moment.<layer>`, of wide layers `sketch.<layer>.vectors`, `.values` and `.rest`.

        A shared moment is written once, under its first layer's name.
        """
        seen, out = set(), {}
        for name, moment in self.layers.items():
            if id(moment) in seen:
                continue
            seen.add(id(moment))
            if not isinstance(moment, Sketch) and moment.shape[0] >= SKETCH_FROM:
                moment = sketch(moment)
            if isinstance(moment, Sketch):
                parts = {"vectors": moment.vectors, "values": moment.values, "rest": moment.rest}
                out |= {f"sketch.{name}.{part}": tensor for part, tensor in parts.items()}
            else:
                out[f"moment.{name}"] = moment
        return out

    def shared(self) -> dict[str, str]:
        """Layer -> the layer under whose name its moment is written, for those that share one."""
        first: dict[int, str] = {}
        return {n: first[id(m)] for n, m in self.layers.items() if first.setdefault(id(m), n) != n}


def moments_from_tensors(tensors: dict[str, Tensor], shared: dict[str, str]) -> Moments:
    """Back from `Moments.tensors` and `Moments.shared`.  KeyError if a part of a sketch is missing"""
    layers = {k.removeprefix("moment."): v for k, v in tensors.items() if k.startswith("moment.")}
    for key in tensors:
        if key.startswith("sketch.") and key.endswith(".rest"):
            name = key.removeprefix("sketch.").removesuffix(".rest")
            layers[name] = Sketch(*(tensors[f"sketch.{name}.{part}"] for part in ("vectors", "values", "rest")))
    layers.update({name: layers[owner] for name, owner in shared.items() if owner in layers})
    return Moments(layers)


def read_statistics(path: Path) -> tuple[Moments, dict[str, Tensor], dict[str, str]]:
    """The moments that a statistics or calibration file holds, with everything else in it, whose tensors are finite."""
    tensors, metadata = read_safetensors(path)
    bad = next((n for n, t in tensors.items() if not t.is_floating_point() or not t.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"{path}: {bad[:80]!r} holds values that are not finite; the file is damaged, get it again")
    shared = json_of(path, metadata, "seqlora.shared", dict)
    if not all(isinstance(owner, str) for owner in shared.values()):
        raise UserError(f"{path}: its 'seqlora.shared' does not name layers; the file is damaged, get it again")
    try:
        moments = moments_from_tensors(tensors, shared)
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing; the file is incomplete, get it again") from error
    for name, moment in moments.layers.items():
        parts = (moment.vectors.mT, moment.vectors) if isinstance(moment, Sketch) else (moment, moment)
        if any(p.ndim != 2 for p in parts) or not isinstance(moment, Sketch) and moment.shape[0] != moment.shape[1]:
            raise UserError(f"{path}: the moment of {name[:80]!r} is not square; the file is damaged, get it again")
    return moments, tensors, metadata


def json_of(path: Path, metadata: dict[str, str], key: str, kind: type):
    """What a metadata text holds: a dict or a list, empty if there is none.  UserError if it is something else."""
    try:
        found = json.loads(metadata.get(key) or json.dumps(kind()))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise UserError(f"{path}: its {key!r} cannot be read; the file is damaged, get it again")
    return found


class StoredMoments(Moments):
    """Those of a statistics file, read whenever they are asked for and not kept: a library's may be larger than memory."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def layers(self) -> dict[str, Tensor | Sketch]:
        return read_statistics(self.path)[0].layers

    def loaded(self) -> Moments:
        return Moments(self.layers)


def average(moments: Iterable[Moments]) -> Moments | None:
    """Plain mean of several moments over the same layers; None of none.  One is held at a time, beside their sum."""
    total, count = None, 0
    for one in moments:
        count += 1
        total = one.loaded() if total is None else _sum([total, one.loaded()], [1.0, 1.0], lambda a, b: a + b)
    return total and _sum([total], [1 / count], lambda a: a / count)


def weighted(moments: list[Moments], weights: list[float]) -> Moments:
    """Weighted mean of several moments over the same layers."""
    shares = [w / sum(weights) for w in weights]
    return _sum(moments, shares, lambda *parts: sum(w * p for w, p in zip(shares, parts)))


def _sum(moments: list[Moments], weights: list[float], dense: Callable[..., Tensor]) -> Moments:
    """Over the layers of the first; `dense` adds up matrices, sketches stay sketches.

    Layers that share a moment in all of them share the sum.
    """
    made: dict[tuple[int, ...], Tensor | Sketch] = {}
    out = {}
    for name in moments[0].layers:
        parts = [m.layers[name] for m in moments]
        key = tuple(map(id, parts))
        if key not in made:
            sketches = all(isinstance(p, Sketch) for p in parts)
            made[key] = added(parts, weights) if sketches else dense(*(m[name] for m in moments))
        out[name] = made[key]
    return Moments(out)


class Recorder:
    """Accumulates second moments during forward passes, one per distinct input tensor.

    Each tensor's sum is formed in float32 by one matrix product, on its device, and added up in float64 in main memory, where
    moments that are read from files are: Apple's GPUs have no float64.
    """

    def __init__(self, attachment: Attachment):
        self.attachment = attachment
        self.sums: dict[str, Tensor] = {}
        self.streams: dict[str, Stream] = {}  # of inputs too wide to be squared
        self.counts: dict[str, int] = {}
        self.owner: dict[str, str] = {}
        self._this_pass: list[tuple[weakref.ref, str]] = []  # they are not kept: all of a pass would take much room

    def __enter__(self) -> Recorder:
        self.attachment.record = self._record
        return self

    def __exit__(self, *_) -> None:
        self.attachment.record = None
        self._this_pass.clear()

    def next_pass(self) -> None:
        """Call before each forward pass: inputs are compared by identity within one pass only."""
        self._this_pass.clear()

    def _record(self, name: str, x: Tensor) -> None:
        if not x.is_floating_point():  # token ids
            return
        owner = self.owner.get(name)
        if owner is None:
            owner = next((n for seen, n in self._this_pass if seen() is x), name)
            self.owner[name] = owner
        self._this_pass.append((weakref.ref(x), owner))
        if owner != name:
            return
        rows = flat(x.detach()).float()
        if rows.shape[1] >= SKETCH_FROM:
            if name not in self.streams:
                self.streams[name] = Stream(rows.shape[1], rows.device)
            self.streams[name].add(rows)
        elif name in self.sums:
            self.sums[name] += (rows.mT @ rows).cpu()
        else:
            self.sums[name] = (rows.mT @ rows).cpu().double()
        self.counts[name] = self.counts.get(name, 0) + rows.shape[0]

    def moments(self) -> Moments:
        """Of all that was recorded; asked for once, for each sum is let go when its mean is made"""
        own: dict[str, Tensor | Sketch] = {n: (self.sums.pop(n) / self.counts[n]).float() for n in list(self.sums)}
        own |= {n: self.streams.pop(n).sketch(self.counts[n]) for n in list(self.streams)}
        return Moments({name: own[owner] for name, owner in self.owner.items()})
