"""LoRA files on ComfyUI's models, through its own key maps, weight adapters and patches.

What a key means, ComfyUI says (`comfy.lora`); a plain low-rank change becomes an `Adapter` layer under the weight's one name,
and whatever else stays the patch that ComfyUI made of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import comfy.hooks
import comfy.lora
import comfy.lora_convert
import comfy.model_management as management
import comfy.utils
import torch
from comfy.weight_adapter import BOFTAdapter, LoHaAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ..seqlora_core.adapter import Adapter, LayerDelta, layer_delta
from ..seqlora_core.errors import UserError
from ..seqlora_core.low_rank import factorised
from ..seqlora_core.spelling import Factors, factors, other_kind
from .comfy_denoiser import file_names

# a weight's key, or with it the rows that are meant and how a change is laid out in them
Target = str | tuple
TEXT_LAYERS = ("lora_te", "text_encoders.")  # how names of a text encoder's layers begin


@dataclass
class Fitted:
    """A LoRA on one model: what is plain low-rank, by layer name, and ComfyUI's own patches for the rest, by target."""

    adapter: Adapter
    patches: dict[Target, object] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)  # keys of the file that have no place in this model

    @property
    def acts(self) -> bool:
        return bool(self.adapter.layers or self.patches)

    def only(self, text: bool) -> Fitted:
        """What it does to the text encoder, or to all else"""
        layers = {n: d for n, d in self.adapter.layers.items() if n.startswith(TEXT_LAYERS) == text}
        patches = {t: p for t, p in self.patches.items() if _parts(t)[0].startswith("diffusion_model.") != text}
        return Fitted(Adapter(layers, self.adapter.metadata), patches, self.unknown)

    def names(self, weights: Weights) -> list[str]:
        """Layers that it changes, in whatever way"""
        changed = (weights.name_of.get(_parts(target)[0]) for target in self.patches)
        return list(dict.fromkeys([*self.adapter.layers, *filter(None, changed)]))


class Weights:
    """The weights of a model and its text encoder: their shapes, and every name that files call them by."""

    def __init__(self, model, clip):
        self.model, self.clip = model, clip
        self.targets: dict[str, Target] = _more_names(model.model, comfy.lora.model_lora_keys_unet(model.model, {}))
        self.shapes = _shapes(model.model)
        if clip is not None:
            self.targets = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, self.targets)
            self.shapes |= _shapes(clip.cond_stage_model)
            first = {n.removeprefix("text_encoder."): t for n, t in self.targets.items() if n.startswith("text_encoder.")}
            self.targets = {f"base_model.model.{n}": t for n, t in first.items()} | self.targets  # as PEFT writes it
        names = {f"diffusion_model.{path}.weight": name for path, name in file_names(model.model).items()}
        for name, target in self.targets.items():
            if isinstance(target, str) and name.startswith("lora_te"):
                names.setdefault(target, name)
        for key in self.shapes:
            if key.endswith(".weight"):
                stem = key.removesuffix(".weight")
                names.setdefault(key, stem if key.startswith("diffusion_model.") else f"text_encoders.{stem}")
        self.name_of = names
        self.key_of = {name: key for key, name in names.items()}
        # equal for models of one kind: a LoRA that was fitted to one of them fits the others
        self.signature = hash(tuple(self.shapes.items()))

    def key(self, name: str) -> str | None:
        """The weight that a layer's name means"""
        target = self.key_of.get(name, self.targets.get(name))
        return target if isinstance(target, str) else None

    def original(self, key: str) -> Tensor:
        """The unpatched weight, in float64"""
        patcher = self.model if key in self.model.model_state_dict() else self.clip.patcher
        weight, convert = patcher.get_key_patches(key)[key][0]
        return convert(weight.to(torch.float32, copy=True), inplace=True).double()


def _more_names(base, targets: dict[str, Target]) -> dict[str, Target]:
    """ComfyUI's names, and those that it leaves out: attention layers of a U-Net as diffusers and PEFT write them today, and
    PEFT's prefix on any dotted name"""
    more = {}
    for name, key in comfy.utils.unet_to_diffusers(base.model_config.unet_config).items():
        if name.endswith(".weight"):
            stem = name.removesuffix(".weight")
            more |= {stem: f"diffusion_model.{key}", f"unet.{stem}": f"diffusion_model.{key}"}
    dotted = {n.removeprefix("transformer.").removeprefix("unet."): t for n, t in (targets | more).items() if "." in n}
    return {f"base_model.model.{n}": t for n, t in dotted.items()} | more | targets


def _shapes(module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


def fit(tensors: dict[str, Tensor], metadata: dict[str, str], weights: Weights, source: str) -> Fitted:
    """What a file of any trainer and kind does to these weights.  source: its name, for messages."""
    factors(tensors, source)  # tells of a missing half, which ComfyUI would leave out
    # of plain LoRAs `layer_delta` looks at every number
    for key, tensor in tensors.items() if other_kind(tensors) else ():
        if not tensor.float().isfinite().all():
            raise UserError(f"{source}: {key} holds values that are not finite; the file is damaged, get it again")
    tensors = comfy.lora_convert.convert_lora(tensors)
    stems = {key: _stem(key, weights.targets) for key in tensors}
    used = {stem: weights.targets[stem] for stem in stems.values() if stem}
    unknown = [key for key, stem in stems.items() if not stem]
    if not used:
        first = next(iter(tensors), "nothing at all")
        raise UserError(
            f"{source} does not fit this model: none of its {len(tensors)} tensors has a place in it, first {first}; load "
            "the model it was trained on"
        )
    try:
        loaded = comfy.lora.load_lora(tensors, used, log_missing=False)
    except (KeyError, IndexError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(f"{source} is incomplete or damaged ({error}); get it again") from error
    fitted = Fitted(Adapter({}, metadata), unknown=unknown)
    sliced: dict[str, list[LayerDelta]] = {}
    for target, patch in loaded.items():
        key, rows, layout = _parts(target)
        name = weights.name_of.get(key)
        _check_shape(patch, _rows_shape(weights.shapes.get(key, ()), rows), f"{source}: {name or key}")
        plain = isinstance(patch, LoRAAdapter) and patch.weights[4] is None and patch.weights[5] is None and layout is None
        if not plain or name is None or (rows and rows[0] != 0):
            fitted.patches[target] = patch
            continue
        up, down, alpha, mid = patch.weights[:4]
        delta = layer_delta(Factors(down, up, mid, alpha), f"{source}: {name}")
        delta.kernel = weights.shapes[key][2:]
        if rows:
            # a slice of a fused weight, such as q of qkv: its rows of lora_up, zeros elsewhere
            whole = delta.up.new_zeros(weights.shapes[key][0], delta.rank)
            whole[rows[1] : rows[1] + rows[2]] = delta.up
            delta.up = whole
        sliced.setdefault(name, []).append(delta)
    for name, deltas in sliced.items():
        down, up = torch.cat([d.down for d in deltas]), torch.cat([d.up for d in deltas], 1)
        fitted.adapter.layers[name] = LayerDelta(down, up, deltas[0].kernel)
    return fitted


def _stem(key: str, names: dict) -> str | None:
    """The layer's name at the start of a file's key"""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        stem = ".".join(parts[:end])
        for candidate in (stem, stem.removesuffix("_lora")):
            if candidate in names:
                return candidate
    return None


def _parts(target: Target):
    """Key, rows (dimension, start, length) or None, layout function or None"""
    if isinstance(target, str):
        return target, None, None
    return target[0], target[1], target[2] if len(target) > 2 else None


def _rows_shape(shape: tuple[int, ...], rows) -> tuple[int, ...]:
    return tuple(rows[2] if rows and i == rows[0] else n for i, n in enumerate(shape))


def _check_shape(patch, shape: tuple[int, ...], source: str) -> None:
    found = _shape_of(patch, shape)
    if found is not None and found != (shape[0], int(torch.Size(shape[1:]).numel())):
        raise UserError(
            f"{source} is for a weight of {list(found)}, this model's is {list(shape)}: the file was trained on another kind "
            "of model, load that one"
        )


def _shape_of(patch, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of the weight that a patch was made for; None if it does not say"""
    if isinstance(patch, LoRAAdapter):
        up, down, _, mid, _, reshape = patch.weights[:6]
        if reshape is not None:
            return None
        if mid is not None:
            return up.shape[0], down.shape[1] * mid.shape[2:].numel()
        return up.shape[0], down.shape[1:].numel()
    if isinstance(patch, LoHaAdapter):
        a, b, _, _, _, core = patch.weights[:6]
        return (a.shape[0], b.shape[1:].numel()) if core is None else (a.shape[1], b.shape[1] * core.shape[2:].numel())
    if isinstance(patch, LoKrAdapter):
        w1, w2, _, w1_a, w1_b, w2_a, w2_b, core = patch.weights[:8]
        first = tuple(w1.shape) if w1 is not None else (w1_a.shape[0], w1_b.shape[1])
        if w2 is not None:
            second = (w2.shape[0], w2.shape[1:].numel())
        elif core is None:
            second = (w2_a.shape[0], w2_b.shape[1:].numel())
        else:
            second = (w2_a.shape[1], w2_b.shape[1] * core.shape[2:].numel())
        return first[0] * second[0], first[1] * second[1]
    if isinstance(patch, (OFTAdapter, BOFTAdapter)):
        blocks = patch.weights[0]
        return blocks.shape[-3] * blocks.shape[-1], int(torch.Size(shape[1:]).numel())
    if isinstance(patch, tuple) and isinstance(patch[-1], tuple):
        change = patch[-1][0]
        return (change.shape[0], change.shape[1:].numel()) if change.ndim else (1, 1)
    return None


def in_low_rank(fitted: Fitted, weights: Weights, exact: bool = False) -> Fitted:
    """The LoRA with those of its patches that are nearly low-rank as layers of the adapter; the others stay patches.

    Done weight by weight in float64: what ComfyUI makes of the weight, less the weight.  exact: every matrix becomes
    factors, of full rank if need be.
    """
    layers, left, changes = dict(fitted.adapter.layers), {}, {}
    for target, patch in fitted.patches.items():
        key, rows, layout = _parts(target)
        shape = weights.shapes[key]
        if key not in weights.name_of or len(shape) < 2:
            left[target] = patch
            continue
        before = weights.original(key)
        after = comfy.lora.calculate_weight([(1.0, patch, 1.0, rows, layout)], before.clone(), key)
        if after.shape != before.shape:
            left[target] = patch
            continue
        changes.setdefault(key, []).append((target, patch, after - before))
    for key, parts in changes.items():
        name = weights.name_of[key]
        total = sum(change for *_, change in parts)
        delta = factorised(total, *((1e-12, True) if exact else ()))
        if delta is None:
            left |= {target: patch for target, patch, _ in parts}
        elif name in layers:
            mine = layers[name]
            layers[name] = LayerDelta(torch.cat([mine.down, delta.down]), torch.cat([mine.up, delta.up], 1), mine.kernel)
        else:
            layers[name] = delta
    return Fitted(Adapter(layers, fitted.adapter.metadata), left, fitted.unknown)


class StackPatch(WeightAdapterBase):
    """Many low-rank changes of one weight as one patch.

    The factors stay where they are; they are joined while the weight is being patched, in one product that is added in
    place.  So composing copies nothing, and a new strength needs no new factors.
    """

    name = "seqlora"

    def __init__(self, parts: list[tuple[float, LayerDelta]]):
        self.parts = parts
        self.loaded_keys: set[str] = set()
        self.weights = [t for _, d in parts for t in (d.up, d.down)]

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32, original_weight=None
    ):
        def cast(tensor: Tensor) -> Tensor:
            return management.cast_to_device(tensor, weight.device, intermediate_dtype)

        down = torch.cat([cast(d.down) for _, d in self.parts])
        up = torch.cat([cast(d.up) * (s * strength) for s, d in self.parts], 1)
        if weight.dtype == intermediate_dtype and weight.is_contiguous():
            weight.view(len(weight), -1).addmm_(up, down)
            return weight
        return weight.add_((up @ down).reshape(weight.shape).to(weight.dtype))


@dataclass
class Part:
    """One LoRA as it goes onto the model.  start, end: shares of the sampling between which it acts."""

    source: str
    strength: float
    adapter: Adapter
    patches: dict[Target, object] = field(default_factory=dict)
    start: float = 0.0
    end: float = 1.0


def patch_model(model, clip, parts: list[Part], weights: Weights):
    """Patched clones of model and clip, and the layers that have no place in either.

    One patch a weight for all low-rank changes.  Parts with a schedule act through ComfyUI's hooks, which travel with what
    the clip encodes.
    """
    schedules: dict[tuple[float, float], list[Part]] = {}
    for part in parts:
        schedules.setdefault((part.start, part.end), []).append(part)
    missing: list[str] = []
    made = {when: _patches(group, weights, missing) for when, group in schedules.items()}
    if missing and not any(own or joined for own, joined in made.values()):
        raise UserError("the stack does not fit this model: none of its layers is in it; load the model it was trained on")
    model, clip = model.clone(), clip.clone() if clip is not None else None
    hooks = comfy.hooks.HookGroup()
    for (start, end), (own, joined) in made.items():
        # those that look at the weight come first, so that they see it as it was
        for strength, patches in [*own, (1.0, joined)]:
            if (start, end) != (0.0, 1.0):
                hooks.add(_scheduled_hook(patches, strength, start, end))
                continue
            model.add_patches(patches, strength)
            if clip is not None:
                clip.add_patches(patches, strength)
    if hooks.hooks:
        if clip is None:
            raise UserError("a schedule needs the clip: connect it, and encode the prompts with the clip that comes out")
        _set_hooks(clip, hooks)
    return model, clip, list(dict.fromkeys(missing))


def _patches(group: list[Part], weights: Weights, missing: list[str]):
    """ComfyUI's own patches with their strengths, and one StackPatch a weight"""
    joined: dict[str, list[tuple[float, LayerDelta]]] = {}
    for part in group:
        for name, delta in part.adapter.layers.items():
            key = weights.key(name)
            if key is None:
                missing.append(name)
                continue
            shape = weights.shapes[key]
            if (delta.up.shape[0], delta.down.shape[1]) != (shape[0], int(torch.Size(shape[1:]).numel())):
                raise UserError(
                    f"{part.source}: {name} is for a weight of {[delta.up.shape[0], delta.down.shape[1]]}, this model's is "
                    f"{list(shape)}: it was trained on another kind of model, load that one"
                )
            joined.setdefault(key, []).append((part.strength, delta))
    own = [(p.strength, p.patches) for p in group if p.patches]
    return own, {key: StackPatch(deltas) for key, deltas in joined.items()}


def _scheduled_hook(patches: dict, strength: float, start: float, end: float):
    hook = comfy.hooks.WeightHook(strength, strength)
    hook.weights, hook.weights_clip, hook.need_weight_init = patches, patches, False
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, at in ((0.0, 0.0), (1.0, start), (0.0, end)):
        if (strength, at) != (0.0, start) and at < 1:
            frames.add(comfy.hooks.HookKeyframe(strength, at, guarantee_steps=0))
    hook.hook_keyframe = frames
    return hook


def _set_hooks(clip, hooks) -> None:
    """As ComfyUI's Set CLIP Hooks does: prompts that this clip encodes carry the hooks to the sampler.  The text encoder
    itself has them on all the time."""
    if clip.apply_hooks_to_conds is not None:
        hooks = clip.apply_hooks_to_conds.clone_and_combine(hooks)
    clip.apply_hooks_to_conds = hooks
    clip.patcher.forced_hooks = hooks.clone()
    clip.use_clip_schedule = False
    clip.patcher.forced_hooks.set_keyframes_on_hooks(None)
    clip.patcher.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip))


def full_differences(parts: list[Part], weights: Weights | None) -> tuple[dict[str, Tensor], list[str]]:
    """What no low-rank factors can hold, such as changes of biases and norms, as a LoRA file's full differences; and the
    weights of changes that a file cannot hold at all."""
    found, left = {}, []
    for part in parts:
        for target, patch in part.patches.items():
            stem, _, kind = (target if isinstance(target, str) else target[0]).rpartition(".")
            if not (isinstance(target, str) and isinstance(patch, tuple) and patch[0] == "diff"):
                left.append(f"{stem}.{kind}")
                continue
            key = f"{weights.name_of.get(f'{stem}.weight', stem)}.{'diff_b' if kind == 'bias' else 'diff'}"
            found[key] = found.get(key, 0) + part.strength * patch[1][0].float()
    return found, left
