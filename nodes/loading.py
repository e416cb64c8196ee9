"""A stack of names -> adapters and what is known of them, read once and kept while the files are unchanged."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..seqlora_core.adapter import Adapter, joined, load_adapter, read_safetensors
from ..seqlora_core.calibration import FILE as CALIBRATION
from ..seqlora_core.composition import Wishes, check_strength, norm_shares, project, shared
from ..seqlora_core.concept import Concept
from ..seqlora_core.errors import UserError
from ..seqlora_core.library import Library
from ..seqlora_core.lora_moments import kept_general, kept_moments, kept_trigger, shared_base
from ..seqlora_core.same_layers import check_widths, moments_under, one_spelling, under_names, unseen
from ..seqlora_core.selection import acts, selected
from ..seqlora_core.spectrum import spikes
from ..seqlora_core.statistics import Moments
from ..seqlora_core.storage import Kept, stamp
from ..seqlora_core.triggers import trigger_of
from .comfy_lora_files import Fitted, fit, in_low_rank
from .comfy_patches import Part
from .comfy_weights import Weights, parts
from .folders import file_stamps, libraries_folder, library_folder, lora_file
from .types import TEXT, Entry, Stack

KEPT = 256  # LoRA files in memory


@dataclass
class Member:
    """One entry of a stack, read; of a file with moments the entry names the base model at hand, if there is one.

    fitted: what it does to a model, with what ComfyUI alone can read.
    """

    entry: Entry
    concept: Concept
    fitted: Fitted


@dataclass
class Composed:
    """A stack ready for a model.  members: those that act.  unrecorded: of mode "data", `unrecorded`.  chained: keys of
    weights that several of the LoRAs read before they change them."""

    members: list[Member]
    parts: list[Part]
    unrecorded: str = ""
    chained: list[str] = field(default_factory=list)

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
            cut = spikes(member.fitted.adapter, cap) if cap else []
            if cut:
                out.append(f"{name}: {len(cut)} layers cut to {cap:g} times its middle layer, the worst {cut[0].layer}.")
        return out


_concepts, _files, _moments, _low_rank, _projected = Kept(KEPT), Kept(KEPT), Kept(KEPT), Kept(KEPT), Kept(2)


def _read_moments(path: Path, base: str) -> tuple[Moments | None, str]:
    """A LoRA's moments on this base model, and the words that it was calibrated with, on whichever"""
    kept = kept_moments(path, base or None)
    called = kept or kept_moments(path)
    return kept and kept[0], kept_trigger(path, called[1]) if called else ""


def entry_file(entry: Entry) -> Path:
    if not entry.library:
        return lora_file(entry.name)
    path = Library(library_folder(entry.library)).paths(entry.name)[0]
    if not path.exists():
        raise UserError(f"the concept {entry.name!r} of library {entry.library!r} is gone: {path.name} does not exist")
    return path


def load_members(stack: Stack, weights: Weights | None = None) -> list[Member]:
    """What the stack's entries are and do to a model's weights.  Without those only plain LoRAs can be read."""
    if not stack.entries:
        raise UserError("the stack is empty: add a concept")
    for entry in stack.entries:
        check_strength(entry.name, entry.strength)
    entries = stack.entries
    if weights is None:
        base = shared_base([lora_file(e.name) for e in entries if not (e.library or e.base)]) or ""
        entries = [e if e.library or e.base else replace(e, base=base) for e in entries]
    members = [_load(entry, weights) for entry in entries]
    members = [m for m in members if m.fitted.acts or not m.entry.part]
    if not members:
        raise UserError(f"nothing of the stack acts: {stack.entries[0].name} changes no {stack.entries[0].part} layer")
    return _spelt_alike(members, weights)


def _spelt_alike(members: list[Member], weights: Weights | None) -> list[Member]:
    """The members with one name for each layer, in what they change and in what they see"""
    ask = "" if weights else "connect the model and the clip that they are for"
    adapters, moments = one_spelling([m.fitted.adapter for m in members], [m.concept.moments for m in members], ask)
    check_widths([m.concept.name for m in members], adapters)
    return [
        replace(m, fitted=replace(m.fitted, adapter=a), concept=replace(m.concept, moments=seen))
        for m, a, seen in zip(members, adapters, moments)
    ]


def _load(entry: Entry, weights: Weights | None) -> Member:
    path = entry_file(entry)
    if entry.library:
        library = library_folder(entry.library)
        concept = _concepts.get((path,), file_stamps(path), lambda: Library(library).load(entry.name))
        fitted = Fitted(concept.adapter)
    else:
        fitted = _files.get((path, weights and weights.signature), stamp(path), lambda: _read_file(path, weights))
        state = file_stamps(path)
        if weights and not entry.base and len(state) > 1:  # what it sees on another model is not what it sees here
            entry = replace(entry, base=weights.fingerprint)
        moments, called = _moments.get((path, entry.base), state, lambda: _read_moments(path, entry.base))
        if moments and not weights:  # which tell what the model that they were recorded on calls its layers
            fitted = replace(fitted, adapter=under_names(fitted.adapter, moments.layers))
        metadata = fitted.adapter.metadata
        if called and not metadata.get("seqlora.trigger"):
            metadata = metadata | {"modelspec.trigger_phrase": called}  # what the user says it is called goes before its file
            fitted = replace(fitted, adapter=Adapter(fitted.adapter.layers, metadata))
        trigger = trigger_of(metadata)
        concept = Concept(path.stem, trigger, "", fitted.adapter, moments, {}, torch.zeros(0), [])
    if entry.part:
        fitted = fitted.only(text=entry.part == TEXT)
    if entry.layers:
        found = replace(fitted, adapter=selected(fitted.adapter, entry.layers), patches=_selected(fitted, entry, weights))
        if fitted.acts and not found.acts:
            first = next(iter([*fitted.adapter.layers, *(parts(t)[0] for t in fitted.patches)]))
            raise UserError(
                f"the filter {entry.layers!r} leaves no layer of {concept.name}: use words of their names, as in {first}"
            )
        fitted = found
    return Member(entry, concept, fitted)


def _selected(fitted: Fitted, entry: Entry, weights: Weights | None) -> dict:
    """Those of its patches whose layers the entry's filter names"""
    names = {target: parts(target)[0] for target in fitted.patches}
    return {t: p for t, p in fitted.patches.items() if acts(weights.name_of.get(names[t], names[t]), entry.layers)}


def _read_file(path: Path, weights: Weights | None) -> Fitted:
    return fit(*read_safetensors(path), weights, path.name) if weights else Fitted(under_names(load_adapter(path)))


def compose_stack(
    stack: Stack, mode: str, amount: float, wishes: Wishes | None = None, weights: Weights | None = None,
    norm_control: bool = False, exact: bool = False, compared: bool = False,
) -> Composed:  # fmt: skip
    """The stack projected, for a model's weights or, without them, of plain LoRAs for any.

    exact: every change of a matrix becomes low-rank factors, for a file.  compared: what is nearly low-rank becomes so in mode
    "sum" too, as in the others, for a report.  With a new strength everything else is found kept.
    What has strength 0 takes no part: nothing gives way to it.
    """
    members, wishes, read = load_members(stack, weights), wishes or Wishes(), []
    members = [m for m in members if m.entry.strength] or members
    groups = by_file(members)
    if amount == 0 or (mode == "weights" and len(groups) == 1):  # nothing gives way, so nothing need become low-rank
        mode = "sum"
    wishes = replace(wishes, protected=frozenset(n for n, g in enumerate(groups) if any(members[i].entry.protected for i in g)))
    # what the projection divides by already norm control does not divide again; patches are not projected
    of_adapters, of_patches = (
        [s for _, s in sorted((i, share) for group, share in zip(groups, of_groups) for i in group)]
        for of_groups in (
            norm_shares(len(groups), how, amount, wishes) if norm_control else [1.0] * len(groups) for how in (mode, "sum")
        )
    )
    readers = Counter(key for m in members for key in m.fitted.read_weights())
    projects = mode != "sum" or wishes.cap is not None
    for member, share in zip(members, of_patches):
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
        Part(m.concept.name, m.entry.strength, shared(a, own), m.fitted.patches, m.entry.start, m.entry.end, share)
        for m, a, own, share in zip(members, projected, of_adapters, of_patches)
    ]
    if exact and projects:
        pieces = [_as_factors(piece, weights) for piece in pieces]
    chained = [key for key, count in readers.items() if count > 1]
    return Composed(members, pieces, unrecorded(members) if mode == "data" else "", chained)


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
    return tuple(stamp(path) for path in sorted({*libraries, *libraries_folder().glob("general.*.safetensors")}))


def general_moments(entries: list[Entry]) -> Moments | None:
    """What the base model sees while it draws other things, from the first entry that has it"""
    for entry in entries:
        if entry.library:
            calibration = Library(library_folder(entry.library)).calibration()
            found = calibration.moments if calibration else None
        else:
            kept = kept_moments(lora_file(entry.name), entry.base or None)
            found = kept_general(libraries_folder(), kept[1]) if kept else None
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
