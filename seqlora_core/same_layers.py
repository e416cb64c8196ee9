"""Layers that files call by different names and that are one: under the names of a model, of moments, or of one another.

Without ComfyUI's own key maps, which know a model's every name (`nodes/comfy_weights.py`).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import replace

import torch

from .adapter import Adapter, LayerDelta, joined
from .attach import Site
from .errors import UserError
from .spelling import plain
from .statistics import Moments
from .transformer_names import MLP_RATIO, family_of, guessed_family, place, turned

# how names begin that diffusers and text encoders' numbers give, and those that ComfyUI and the encoders' names give
_SYSTEMS = (
    r"(?P<model>transformer\.|lora_transformer_|lycoris_(?!(down|up|mid)_block))|lora_te\d?_",
    r"(?P<model>diffusion_model\.|lora_unet_(?!(down|up|mid)_block|conv_|time_emb))|text_encoders\.\w+\.(transformer\.)?",
)


def under_names(adapter: Adapter, names: Iterable[str] = ()) -> Adapter:
    """The adapter with its layers under those of the names that mean the same weights; others keep theirs.

    What diffusers' files of SD3 and Flux.1 keep apart, such as q, k and v, becomes the layer that fuses it, if the names or the
    file itself tell of which of the two it is.
    """
    wanted = {plain(n): n for n in names}
    family = family_of(wanted) or family_of(adapter.layers) or guessed_family(_widths(adapter))
    whole: dict[str, list[LayerDelta]] = {}
    pieces: dict[str, dict[int, LayerDelta]] = {}
    modules: dict[str, tuple[str, ...]] = {}
    for name, delta in adapter.layers.items():
        found = None if plain(name) in wanted else place(name, family)
        if found is None or found[1] < 0:
            own = found[0] if found else name
            whole.setdefault(wanted.get(plain(own), own), []).append(delta)
        else:
            own = wanted.get(plain(found[0]), found[0])
            modules[own] = found[2]
            whole.setdefault(own, [])
            if found[1] in pieces.setdefault(own, {}):
                raise UserError(f"the layer {name} is there twice, under two spellings; the file is damaged, get it again")
            pieces[own][found[1]] = delta
    if whole.keys() == adapter.layers.keys():
        return adapter
    for name, parts in pieces.items():
        whole[name].append(_fused(name, parts, modules[name]))
    return Adapter({n: d[0] if len(d) == 1 else joined(d) for n, d in whole.items()}, adapter.metadata)


def _widths(adapter: Adapter) -> dict[str, int]:
    return {n: d.down.shape[1] for n, d in adapter.layers.items()}


def _fused(name: str, parts: dict[int, LayerDelta], modules: tuple[str, ...]) -> LayerDelta:
    """The change of a layer whose rows are those of the modules, from the changes of some of them"""
    first = next(iter(parts.values()))
    width = first.down.shape[1]
    if len(modules) == 1:
        return replace(first, up=turned(modules[0], first.up, width))
    rows = [width * (MLP_RATIO if module == "proj_mlp" else 1) for module in modules]
    for i, delta in parts.items():
        if (found := delta.shape) != [rows[i], width]:
            raise UserError(
                f"{modules[i]} of {name} is for a weight of {found}, not {[rows[i], width]}: the file was trained on another kind "
                "of model, or it is damaged"
            )
    ordered = [parts[i] for i in sorted(parts)]
    ups = [d.up for d in ordered]
    if all(d.down.shape == first.down.shape and torch.equal(d.down, first.down) for d in ordered):
        down, up = first.down, torch.cat(ups)  # a fused layer that was taken apart
    else:
        down, up = torch.cat([d.down for d in ordered]), torch.block_diag(*ups)
    whole = up.new_zeros(sum(rows), up.shape[1])
    whole[torch.tensor([i in parts for i in range(len(rows))]).repeat_interleave(torch.tensor(rows))] = up
    return LayerDelta(down, whole)


def on_model(adapter: Adapter, sites: list[Site], source: str) -> tuple[Adapter, list[str]]:
    """The adapter under the names of a model's sites, and those of its layers that are none of them.

    UserError if all are, or if one is for a layer of another size.  source: the file's name, for messages.
    """
    adapter, places = under_names(adapter, [s.name for s in sites]), {s.name: s for s in sites}
    missing = [n for n in adapter.layers if n not in places]
    if len(missing) == len(adapter.layers):
        raise UserError(
            f"{source} has none of its {len(missing)} layers on this model, first {missing[0]}: give the model that it was trained on"
        )
    for name, delta in adapter.layers.items():
        if name in places and (found := delta.shape) != _size(places[name], delta):
            raise UserError(
                f"{source}: {name} is for a weight of {found}, this model's is {_size(places[name], delta)}: give the model that it "
                "was trained on"
            )
    return adapter, missing


def _size(site: Site, delta: LayerDelta) -> list[int]:
    return [site.out_features, site.in_features * math.prod(delta.kernel)]


def one_spelling(
    adapters: list[Adapter], moments: list[Moments | None], ask: str = ""
) -> tuple[list[Adapter], list[Moments | None]]:
    """Adapters and their moments with one name for each layer: ComfyUI's, if one of them has it.

    ask: how to give the model, whose own names would tell; with it UserError where layers of two adapters may be one and their
    names do not say.
    """
    known = [n for n in _all_names(adapters) if place(n, None)]
    adapters = [under_names(a, known) for a in adapters]
    chosen = _chosen(_all_names(adapters))
    spelt = [under_names(a, chosen.values()) for a in adapters]
    if ask:
        _check_apart(spelt, ask)
    return spelt, [m if m is None else moments_under(m, chosen.values()) for m in moments]


def _all_names(adapters: list[Adapter]) -> list[str]:
    """Each once"""
    return list(dict.fromkeys(n for a in adapters for n in a.layers))


def check_widths(names: list[str], adapters: list[Adapter]) -> None:
    """UserError for adapters of these names that have a layer of one name in different widths"""
    first: dict[str, tuple[str, list[int]]] = {}
    for name, adapter in zip(names, adapters):
        for layer, delta in adapter.layers.items():
            other, theirs = first.setdefault(layer, (name, delta.shape))
            if delta.shape != theirs:
                raise UserError(
                    f"{other} and {name} were trained on different kinds of models: layer {layer} is {theirs} in {other} and "
                    f"{delta.shape} in {name}; stack LoRAs of one kind"
                )


def moments_under(moments: Moments, names: Iterable[str]) -> Moments:
    """The moments with those of the names that mean the same layers"""
    wanted = {plain(n): n for n in names}
    layers = moments.layers
    if all(wanted.get(plain(n), n) == n for n in layers):
        return moments
    return Moments({wanted.get(plain(n), n): m for n, m in layers.items()})


def _chosen(names: Iterable[str]) -> dict[str, str]:
    """Plain name -> the one of the names that all are to have"""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(plain(name), []).append(name)
    numbered = any(n.startswith("lora_te2_") for n in groups)  # as files of SDXL have their encoders

    def rank(name: str) -> tuple[bool, ...]:
        return (
            not name.startswith("diffusion_model."),
            not name.startswith("transformer."),
            name.startswith("lora_te_") == numbered,
        )

    return {short: some[0] if len(some) == 1 else min(some, key=rank) for short, some in groups.items()}


def _check_apart(adapters: list[Adapter], ask: str) -> None:
    """UserError for layers of two adapters that may be one: of one size, and named by ComfyUI in one and by diffusers in the
    other, where these two share no name; or a text encoder's, which one calls by its number and the other by its name"""
    marked = [_marked(a) for a in adapters]
    for (one, by), (other, theirs) in itertools.permutations(zip(adapters, marked), 2):
        found = next((key for key in by if key in theirs and (key[0] or one.layers.keys().isdisjoint(other.layers))), None)
        if found is not None and (first := by[found][0]) and (second := theirs[found][1]):
            raise UserError(f"{first} and {second} may be one layer under two names, which the files do not say: {ask}")


def _marked(adapter: Adapter) -> dict[tuple, list[str]]:
    """What tells a layer, part of its name and its size -> a name of it by diffusers or by a text encoder's number, and one by
    ComfyUI or by an encoder's name; "" where there is none"""
    found: dict[tuple, list[str]] = {}
    for name, delta in adapter.layers.items():
        for system, pattern in enumerate(_SYSTEMS):
            if match := re.match(pattern, name):
                tail = "" if match["model"] else name[match.end() :].replace(".", "_")
                names = found.setdefault((tail, *delta.shape), ["", ""])
                names[system] = names[system] or name
    return found


def unseen(adapters: list[Adapter], moments: list[Moments], names: list[str]) -> str:
    """What the moments say nothing of, as a sentence; "" if nothing.  UserError for an adapter of whose layers
    none was recorded.  names: the adapters', for messages."""
    missing = {}
    for adapter, seen, name in zip(adapters, moments, names):
        layers, known = adapter.without_token_tables().layers, seen.layers
        own = [n for n in layers if n not in known]
        if layers and len(own) == len(layers):
            raise UserError(
                f"what was recorded with {name} is of none of its {len(own)} layers, first {own[0]}: calibrate it again, on the "
                "model that it was trained on"
            )
        missing |= dict.fromkeys(own)
    if not missing:
        return ""
    return (
        f"{len(missing)} layers were not recorded, first {next(iter(missing))}: mode 'data' projects these by their weights, and "
        "no share of a report is of them."
    )
