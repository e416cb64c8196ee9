"""LoRAs that were read -> what each of them does in the stack, projected as asked for and kept until something changes."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..seqlora_core.adapter import Adapter, joined
from ..seqlora_core.calibration import FILE as CALIBRATION
from ..seqlora_core.composition import Wishes, norm_shares, project, shared
from ..seqlora_core.concept import Concept
from ..seqlora_core.errors import UserError
from ..seqlora_core.library import Library
from ..seqlora_core.lora_moments import general_folders, general_near, kept_general, kept_moments
from ..seqlora_core.same_layers import moments_under, unseen
from ..seqlora_core.spectrum import spikes
from ..seqlora_core.statistics import Moments
from ..seqlora_core.storage import Kept, stamp
from .comfy_lora_files import Fitted, in_low_rank
from .comfy_patches import Part
from .comfy_weights import Weights, parts
from .folders import file_stamps, libraries_folder, library_folder, lora_file, open_library
from .loading import KEPT, Member, entry_file, load_members
from .types import Entry, Stack


@dataclass
class Composed:
    """A stack ready for a model.  members: those that act.  unrecorded: of mode "data", `unrecorded`.  chained: keys of
    weights that several of the LoRAs read before they change them.  late: name -> keys of weights that it reads in its own steps
    only, when others have changed them."""

    members: list[Member]
    parts: list[Part]
    unrecorded: str = ""
    chained: list[str] = field(default_factory=list)
    late: dict[str, list[str]] = field(default_factory=dict)

    @property
    def concepts(self) -> list[Concept]:
        """With their layers as they were before the projection"""
        return [replace(m.concept, adapter=m.fitted.adapter) for m in self.members]

    @property
    def triggers(self) -> str:
        return ", ".join(filter(None, dict.fromkeys(f"{c.trigger} {c.class_noun}".strip() for c in self.concepts)))

    def notes(self, mode: str, cap: float | None = None, exact: bool = False) -> list[str]:
        """What of the files does not act as one might think, a sentence each.  exact: of a file, which has all weights"""
        out = [self.unrecorded] if self.unrecorded else []
        for member in self.members:
            name, unknown = member.concept.name, member.fitted.unknown
            if unknown:
                out.append(f"{name}: {len(unknown)} tensors have no place in this model, first {unknown[0]}.")
            left = [t if isinstance(t, str) else t[0] for t in member.fitted.patches]
            if left and not exact:
                what = (
                    "change in more than low rank and are summed unprojected"
                    if mode != "sum" or cap
                    else "are no plain low rank"
                )
                out.append(f"{name}: {len(left)} weights {what}; no figure of the report counts them, first {left[0]}.")
            late = self.late.get(name)
            if late:
                out.append(
                    f"{name}: {len(late)} weights, which it looks at first as DoRA does, have been changed by others when its steps "
                    f"come: there it does not do what it does alone, first {late[0]}."
                )
            cut = spikes(member.fitted.adapter, cap) if cap else []
            if cut:
                out.append(f"{name}: {len(cut)} layers cut to {cap:g} times its middle layer, the worst {cut[0].layer}.")
        return out


_low_rank, _projected = Kept(KEPT), Kept(2)


def compose_stack(
    stack: Stack, mode: str, amount: float, wishes: Wishes | None = None, weights: Weights | None = None,
    norm_control: bool = False, exact: bool = False, compared: bool = False,
) -> Composed:  # fmt: skip
    """The stack projected, for a model's weights or, without them, of plain LoRAs for any.

    exact: every change of a matrix becomes low-rank factors, for a file.  compared: what is nearly low-rank becomes so in mode
    "sum" too, as in the others, for a report.  With a new strength everything else is found kept.
    """
    members, wishes, read = load_members(that_acts(stack), weights), wishes or Wishes(), []
    groups = by_file(members)
    if amount == 0 or (mode == "weights" and len(groups) == 1):  # nothing gives way, so nothing need become low-rank
        mode = "sum"
    protected = frozenset(n for n, g in enumerate(groups) if any(members[i].entry.protected for i in g))
    wishes = replace(wishes, protected=protected, undivided=norm_control)
    shares = _shares(members, wishes) if norm_control else [1.0] * len(members)
    readers = Counter(key for m in members for key in m.fitted.read_weights())
    projects = mode != "sum" or wishes.cap is not None
    for member, share in zip(members, shares):
        if member.fitted.patches and (exact or compared or projects):
            strength = member.entry.strength * share
            read.append((weights.digest(member.fitted.read_weights()), member.fitted.bends_at(strength)))
            member.fitted = _as_low_rank(member, weights, exact and not projects, *read[-1])
    states = tuple(
        (
            file_stamps(entry_file(m.entry)),
            *(getattr(m.entry, k) for k in ("base", "layers", "part", "protected", "start", "end")),
        )
        for m in members
    )
    files = (entry_file(m.entry) for m in members)
    key = (*files, states, _general_state(members), mode, amount, wishes, exact, weights and weights.signature, tuple(read))
    projected = _projected.get(key, None, lambda: _project(members, mode, amount, wishes, exact))
    pieces = [
        Part(m.concept.name, m.entry.strength, shared(a, share), m.fitted.patches, m.entry.start, m.entry.end, share)
        for m, a, share in zip(members, projected, shares)
    ]
    if exact and projects:
        pieces = [_as_factors(piece, weights) for piece in pieces]
    chained = [key for key, count in readers.items() if count > 1]
    late = _late(members, weights) if readers else {}
    return Composed(members, pieces, unrecorded(members) if mode == "data" else "", chained, late)


def _late(members: list[Member], weights: Weights) -> dict[str, list[str]]:
    """Name -> keys of weights that a LoRA reads in its own steps only, when others have changed them: ComfyUI changes weights for
    all steps first (`patch_model`)"""
    found: dict[str, list[str]] = {}
    for_all = [m.fitted for m in members if m.entry.always]
    changed = {weights.key(n) for f in for_all for n in f.adapter.layers} | {parts(t)[0] for f in for_all for t in f.patches}
    for member in members:
        keys = changed.intersection(member.fitted.read_weights())
        if keys and not member.entry.always:
            found[member.concept.name] = sorted(keys)
    return found


def _shares(members: list[Member], wishes: Wishes) -> list[float]:
    """What norm control multiplies each entry by: those that never act at the same time do not count"""
    shares, groups = [1.0] * len(members), by_file(members)
    for some in _at_once(meeting(members)):
        whole = [n for n, i in enumerate(some) if i in wishes.protected]
        for i, share in zip(some, norm_shares(len(some), whole)):
            for place in groups[i]:
                shares[place] = share
    return shares


def that_acts(stack: Stack) -> Stack:
    """Without what has strength 0, which is not even read: nothing gives way to it.  As it is if all has that"""
    return Stack([_as_concept(e) for e in stack.entries if e.strength] or stack.entries)


def _as_concept(entry: Entry) -> Entry:
    """A library's concept that was chosen among the files of models/loras, with what its library knows of it; others as they are"""
    path = None if entry.library or entry.base else lora_file(entry.name)
    if path and path.parent.parent == libraries_folder():
        with contextlib.suppress(UserError):
            return replace(entry, library=path.parent.name, name=open_library(path.parent.name).require(path.stem))
    return entry


def _as_low_rank(member: Member, weights: Weights, exact: bool, read: str, strength: float) -> Fitted:
    """`in_low_rank`, which decomposes every weight, done once for all strengths where the LoRA allows.

    read: digest of the weights that it rests on.  strength: at which it is measured.
    """
    path, entry, fitted = entry_file(member.entry), member.entry, member.fitted
    key = (path, weights.signature, entry.layers, entry.part, exact, read, strength)
    found = _low_rank.get(key, stamp(path), lambda: in_low_rank(fitted, weights, exact, strength))
    return replace(found, adapter=Adapter(found.adapter.layers, fitted.adapter.metadata))  # what calls it may be new


def _as_factors(part: Part, weights: Weights | None) -> Part:
    """A part for a file: its patches of matrices as factors too, unprojected as a model would have them"""
    if not part.patches:
        return part
    found = in_low_rank(Fitted(Adapter({}), part.patches), weights, exact=True, strength=part.patch_strength)
    layers = shared(found.adapter, part.share).layers
    for name, delta in part.adapter.layers.items():
        layers[name] = joined([delta.float(), layers[name]]) if name in layers else delta
    return replace(part, adapter=Adapter(layers, part.adapter.metadata), patches=found.patches)


def _project(members: list[Member], mode: str, amount: float, wishes: Wishes, exact: bool) -> list[Adapter]:
    """The adapters as they go into the stack.

    What is there several times, for other layers, steps or parts of the model each, is one LoRA to the projection: it does not
    give way to itself.
    """
    groups = by_file(members)
    adapters, moments = [_whole([members[i] for i in g]) for g in groups], [members[g[0]].concept.moments for g in groups]
    if exact or mode != "sum" or wishes.cap:
        adapters = [a.to(torch.float32) for a in adapters]
    silent = [m.concept.name for m in members if m.concept.moments is None]
    if mode == "data" and silent:
        raise UserError(f"mode 'data' needs to know what {silent[0]!r} sees: put a Calibrate node before, or use 'weights'")
    general = general_moments([m.entry for m in members]) if mode == "data" else None
    if general is not None:
        general = moments_under(general, [n for a in adapters for n in a.layers])
    projected: list[Adapter] = [None] * len(groups)
    for some in _at_once(meeting(members)):  # what never acts at the same time need not give way
        own = replace(wishes, protected=frozenset(n for n, i in enumerate(some) if i in wishes.protected))
        known = None if silent else [moments[i] for i in some]
        for i, adapter in zip(some, project([adapters[i] for i in some], mode, amount, known, general, wishes=own)):
            projected[i] = adapter
    pieces: list[Adapter] = [None] * len(members)
    for group, whole in zip(groups, projected):
        for place in group:
            own = members[place].fitted.adapter.layers
            pieces[place] = whole if len(group) == 1 else Adapter({n: whole.layers[n] for n in own}, whole.metadata)
    return pieces


def meeting(members: list[Member]) -> torch.Tensor:
    """[N, N] of the LoRAs, as `by_file` has them: whether two ever act at the same time"""
    entries = [[members[i].entry for i in group] for group in by_file(members)]
    return torch.tensor([[any(a.start < b.end and b.start < a.end for a in x for b in y) for y in entries] for x in entries])


def _at_once(meet: torch.Tensor) -> list[list[int]]:
    """Those that meet, or are met by one that does, together"""
    reached = meet.double()
    for _ in range(len(meet).bit_length()):
        reached = (reached @ reached).clamp_max(1.0)
    return [list(group) for group in dict.fromkeys(tuple(row.nonzero().flatten().tolist()) for row in reached)]


def by_file(members: list[Member]) -> list[list[int]]:
    """Places of the entries that are of one file each, in the stack's order"""
    found: dict[Path, list[int]] = {}
    for place, member in enumerate(members):
        found.setdefault(entry_file(member.entry), []).append(place)
    return list(found.values())


def unrecorded(members: list[Member]) -> str:
    """Layers of which the moments that are known say nothing, as `unseen` puts it; UserError for a LoRA of all of whose layers"""
    wholes = [[members[i] for i in group] for group in by_file(members)]
    known = [whole for whole in wholes if whole[0].concept.moments is not None]
    return unseen([_whole(w) for w in known], [w[0].concept.moments for w in known], [w[0].concept.name for w in known])


def _whole(members: list[Member]) -> Adapter:
    """All layers of one LoRA that any of its entries has"""
    first, *others = (m.fitted.adapter for m in members)
    return first if not others else Adapter({n: d for a in (first, *others) for n, d in a.layers.items()}, first.metadata)


def _general_state(members: list[Member]) -> tuple:
    """Changes whenever what `general_moments` reads does"""
    libraries = {library_folder(m.entry.library) / CALIBRATION for m in members if m.entry.library}
    folders = {libraries_folder()}.union(*(general_folders(entry_file(m.entry)) for m in members))
    return tuple(stamp(path) for path in sorted(libraries.union(*(f.glob("general.*.safetensors") for f in folders))))


def general_moments(entries: list[Entry]) -> Moments | None:
    """What the base model sees while it draws other things, from the first entry by name that has it, whatever the stack's order;
    libraries go before files"""
    for entry in sorted(entries, key=lambda e: (not e.library, e.library, e.name)):
        if entry.library:
            calibration = Library(library_folder(entry.library)).calibration()
            found = calibration.moments if calibration else None
        else:
            path = lora_file(entry.name)
            kept = kept_moments(path, entry.base or None)
            found = kept and (kept_general(libraries_folder(), kept[1]) or general_near(path, kept[1]))
        if found is not None:
            return found
    return None


def names_of(concepts: list[Concept]) -> list[str]:
    """The concepts' names, those that are there twice with a number"""
    out: list[str] = []
    for concept in concepts:
        count = sum(n == concept.name or n.startswith(f"{concept.name} (") for n in out)
        out.append(f"{concept.name} ({count + 1})" if count else concept.name)
    return out
