"""LoRA files of any trainer and kind on a ComfyUI model, through its own key maps and weight adapters.

What a key means, ComfyUI says (`comfy.lora`), once for all files of the same keys; a plain low-rank change becomes an `Adapter`
layer under the weight's one name, and whatever else stays the patch that ComfyUI made of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import comfy.lora
import comfy.lora_convert
import torch
from comfy.weight_adapter import BOFTAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter
from torch import Tensor

from ..seqlora_core.adapter import FLOATS, Adapter, LayerDelta, joined, layer_delta
from ..seqlora_core.errors import UserError
from ..seqlora_core.live_prompts import is_text
from ..seqlora_core.low_rank import factorised
from ..seqlora_core.spelling import Factors, alpha_of, canonical, factors, other_kind
from .comfy_patch_checks import DAMAGED, check_patch, check_size, failure, reads_weight, rows_shape
from .comfy_weights import Target, Weights, parts

READ_PLAINLY = (".diff", ".diff_b", ".set_weight", ".w_norm", ".b_norm", ".alpha")  # keys that no weight adapter lists


@dataclass
class Fitted:
    """A LoRA on one model: what is plain low-rank, by layer name (in the file's own precision), and ComfyUI's own patches for the rest, by target."""

    adapter: Adapter
    patches: dict[Target, object] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)  # keys of the file that have no place in this model

    @property
    def acts(self) -> bool:
        return bool(self.adapter.layers or self.patches)

    @property
    def unread_texts(self) -> list[str]:
        """Those of its unknown keys that are a text encoder's, as all are where only a model is at hand"""
        return [key for key in self.unknown if is_text(canonical(key))]

    def only(self, text: bool) -> Fitted:
        """What it does to the text encoder, or to all else"""
        layers = {n: d for n, d in self.adapter.layers.items() if is_text(n) == text}
        patches = {t: p for t, p in self.patches.items() if parts(t)[0].startswith("diffusion_model.") != text}
        return Fitted(Adapter(layers, self.adapter.metadata), patches, self.unknown)

    def names(self, weights: Weights) -> list[str]:
        """Layers that it changes, in whatever way"""
        changed = (weights.name_of.get(parts(target)[0]) for target in self.patches)
        return list(dict.fromkeys([*self.adapter.layers, *filter(None, changed)]))

    def bends_at(self, strength: float) -> float:
        """The strength at which its change is to be measured: 1, but where twice the strength is not twice the change"""
        bent = any(isinstance(p, (OFTAdapter, BOFTAdapter)) or _is_whole_weight(p) for p in self.patches.values())
        return strength or 1.0 if bent else 1.0

    def read_weights(self) -> list[str]:
        """Keys of the weights that decide what its patches change"""
        return sorted({parts(target)[0] for target, patch in self.patches.items() if reads_weight(patch)})


@dataclass(frozen=True)
class Place:
    """Where one plain low-rank change of a file goes, and the file's keys of its parts.

    rows: as ComfyUI has them, (0, start, length) of a fused weight; None of all of it.
    """

    name: str
    key: str
    rows: tuple | None
    down: str
    up: str
    mid: str | None
    alpha: str | None


def fit(tensors: dict[str, Tensor], metadata: dict[str, str], weights: Weights, source: str) -> Fitted:
    """What a file of any trainer and kind does to these weights.  source: its name, for messages."""
    places = weights.places.get(tuple(tensors))
    if places is None:
        return _fit_by_comfyui(tensors, metadata, weights, source)
    return Fitted(Adapter(_layers(places, tensors, weights, source), metadata))


def _fit_by_comfyui(tensors: dict[str, Tensor], metadata: dict[str, str], weights: Weights, source: str) -> Fitted:
    factors(tensors, source)  # tells of a missing half, which ComfyUI would leave out
    keys, tensors = tuple(tensors), comfy.lora_convert.convert_lora(tensors)
    stems = {key: _stem(key, weights.targets) for key in tensors}
    stems = {key: stem if stem and _exists(key, weights.targets[stem], weights.shapes) else None for key, stem in stems.items()}
    # of plain LoRAs `layer_delta` looks at every number; alphas are looked at where they count, in `check_patch`
    unusual = other_kind(tensors)
    for key, tensor in tensors.items():
        if not (unusual and stems[key]) or key.endswith((".alpha", ".reshape_weight")):
            continue
        if tensor.dtype not in FLOATS and tensor.numel() > 1:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{source}: {key} is of {kind}: convert the LoRA to float16 or float32 first")
        if not tensor.float().isfinite().all():
            raise UserError(f"{source}: {key} holds values that are not finite; the file is damaged, get it again")
    used = {stem: weights.targets[stem] for stem in stems.values() if stem}
    unknown = [key for key, stem in stems.items() if not stem]
    if not used:
        first = next(iter(tensors), "nothing at all")
        if weights.clip is None and tensors and all(is_text(canonical(key)) for key in tensors):
            raise UserError(f"{source} changes text encoders alone, first {first}: connect the clip that it is for")
        raise UserError(
            f"{source} does not fit this model: none of its {len(tensors)} tensors has a place in it, first {first}; load "
            "the model it was trained on"
        )
    try:
        loaded = comfy.lora.load_lora({k: t for k, t in tensors.items() if stems[k]}, used, log_missing=False)
    except DAMAGED as error:
        raise UserError(f"{source} is incomplete or damaged ({error}); get it again") from error
    if not loaded:
        kind = other_kind(tensors) or "a file of layers"
        raise UserError(f"{source} is {kind}, which ComfyUI cannot read: convert it to a LoRA, or have it trained as one")
    consumed = {key for key in tensors if key.endswith(READ_PLAINLY)}.union(
        *(p.loaded_keys for p in loaded.values() if hasattr(p, "loaded_keys"))
    )
    unknown += [key for key in tensors if key not in consumed and key not in unknown]
    fitted = Fitted(Adapter({}, metadata), unknown=unknown)
    places, key_of, stem_of = [], {id(t): k for k, t in tensors.items()}, {t: s for s, t in used.items()}
    for target, patch in loaded.items():
        key, rows, layout = parts(target)
        name = weights.name_of.get(key)
        check_patch(patch, rows_shape(weights.shapes[key], rows), f"{source}: {name or key}")
        plain = isinstance(patch, LoRAAdapter) and patch.weights[4] is None and patch.weights[5] is None and layout is None
        if not plain or name is None or (rows and rows[0] != 0):
            if isinstance(patch, LoRAAdapter):  # whose alpha and numbers are looked at nowhere else
                up, down, alpha, mid = patch.weights[:4]
                layer_delta(Factors(down, up, mid, alpha), f"{source}: {name or key}")
            failed = failure(patch, rows_shape(weights.shapes[key], rows))
            if failed and not (isinstance(patch, LoKrAdapter) and patch.weights[7] is not None):
                raise UserError(
                    f"{source}: {name or key} has parts that do not fit one another or this weight ({failed}); get the file again"
                )
            if failed:  # ComfyUI reads LoKr's cores, and fails on them
                unknown.append(f"{stem_of[target]}.lokr_t2")
            else:
                fitted.patches[target] = patch
            continue
        up, down, alpha, mid = patch.weights[:4]
        names = [None if part is None else key_of[id(part)] for part in (down, up, mid)]
        places.append(Place(name, key, rows, *names, None if alpha is None else f"{stem_of[target]}.alpha"))
    fitted.adapter.layers = _layers(places, tensors, weights, source)
    if not (fitted.patches or unknown) and keys == tuple(tensors):
        weights.places[keys] = places
    return fitted


def _layers(places: list[Place], tensors: dict[str, Tensor], weights: Weights, source: str) -> dict[str, LayerDelta]:
    """The changes of whole weights; those of slices, such as q of qkv, side by side in their rows"""
    found: dict[str, list[LayerDelta]] = {}
    for place in places:
        shape, where = weights.shapes[place.key], f"{source}: {place.name}"
        mid = None if place.mid is None else tensors[place.mid]
        alpha = None if place.alpha is None else alpha_of(tensors[place.alpha], where)
        delta = layer_delta(Factors(tensors[place.down], tensors[place.up], mid, alpha), where, as_stored=True)
        delta.kernel = shape[2:]
        check_size(tuple(delta.shape), rows_shape(shape, place.rows), where)
        if place.rows:
            whole = delta.up.new_zeros(shape[0], delta.rank)
            whole[place.rows[1] : place.rows[1] + place.rows[2]] = delta.up
            delta = replace(delta, up=whole)
        found.setdefault(place.name, []).append(delta)
    return {name: d[0] if len(d) == 1 else _side_by_side(d) for name, d in found.items()}


def _side_by_side(parts: list[LayerDelta]) -> LayerDelta:
    """Changes of one weight's rows together; a fused layer that was taken apart has one and the same lora_down in all"""
    first = parts[0]
    if all(p.down.shape == first.down.shape and torch.equal(p.down, first.down) for p in parts):
        return replace(first, up=sum(p.up.float() for p in parts), down=first.down.float())
    return joined(parts)


def _stem(key: str, names: dict) -> str | None:
    """The layer's name at the start of a file's key"""
    stem = key
    while stem:
        for candidate in (stem, stem.removesuffix("_lora")):
            if candidate in names:
                return candidate
        stem = stem.rpartition(".")[0]
    return None


def _exists(key: str, target: Target, shapes: dict) -> bool:
    """Whether what a file's key changes is in the model: a layer may have no bias, which the stock loader leaves out too"""
    if key.endswith((".diff_b", ".b_norm")):
        return isinstance(target, str) and f"{target.removesuffix('.weight')}.bias" in shapes
    return parts(target)[0] in shapes


def _is_whole_weight(patch) -> bool:
    """Of `.set_weight`: whatever the strength, ComfyUI puts all of it in the weight's place"""
    return isinstance(patch, tuple) and patch[0] == "set"


def in_low_rank(fitted: Fitted, weights: Weights, exact: bool = False, strength: float = 1.0) -> Fitted:
    """The LoRA with those of its patches that are nearly low-rank as layers of the adapter; the others stay patches.

    Done weight by weight in float64: what ComfyUI makes of the weight, less the weight.  exact: every matrix becomes
    factors, of full rank if need be.  strength: at which the LoRA will act; the change is taken there and is told at strength
    1, for ComfyUI's OFT does not do twice as much at twice the strength.
    """
    layers, left, changes = dict(fitted.adapter.layers), {}, {}
    for target, patch in fitted.patches.items():
        key, rows, layout = parts(target)
        shape = weights.shapes[key]
        if key not in weights.name_of or len(shape) < 2:
            left[target] = patch
            continue
        before = weights.original(key)
        after = comfy.lora.calculate_weight([(strength, patch, 1.0, rows, layout)], before.clone(), key)
        if after.shape != before.shape:
            left[target] = patch
            continue
        changes.setdefault(key, []).append((target, patch, (after - before) / strength))
    for key, made in changes.items():
        name = weights.name_of[key]
        total = sum(change for *_, change in made)
        delta = factorised(total, *((1e-12, True) if exact else ()))
        if delta is None:
            left |= {target: patch for target, patch, _ in made}
        elif name in layers:
            layers[name] = joined([layers[name], delta])
        else:
            layers[name] = delta
    return Fitted(Adapter(layers, fitted.adapter.metadata), left, fitted.unknown)
