"""Stacks onto ComfyUI's models, as its own patches and hooks: one patch a weight for all low-rank changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import comfy.hooks
import comfy.model_management as management
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ..seqlora_core.adapter import Adapter, LayerDelta
from ..seqlora_core.errors import UserError
from .comfy_patch_checks import reads_weight
from .comfy_weights import Target, Weights
from .types import ALWAYS


class StackPatch(WeightAdapterBase):
    """Many low-rank changes of one weight as one patch.

    The factors stay where they are; they are joined while the weight is being patched, in one product that is added in
    place.  So composing copies nothing, and a new strength needs no new factors.
    """

    name = "seqlora"

    def __init__(self, parts: list[tuple[float, LayerDelta]]):
        self.parts = parts
        self.loaded_keys: set[str] = set()

    @property
    def weights(self) -> list[Tensor]:
        return [t for _, d in self.parts for t in d.stored()[:2]]

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32, original_weight=None
    ):
        height, width = self.parts[0][1].shape
        if weight.ndim == 2 and weight.numel() > height * width:  # padded by a patch before, as control LoRAs of Flux.1 do
            self.calculate_weight(weight[:height, :width], key, strength, strength_model, offset, function, intermediate_dtype)
            return weight

        def joined(tensors: list[Tensor], dim: int) -> Tensor:
            return management.cast_to_device(torch.cat(tensors, dim), weight.device, intermediate_dtype)

        in_place = weight.dtype == intermediate_dtype and weight.is_contiguous()
        total = weight.view(len(weight), -1) if in_place else None
        for parts in self._pieces(min(len(weight), weight[0].numel())):
            downs, ups, scales = zip(*(d.stored() for _, d in parts))
            down, up = joined(downs, 0), joined(ups, 1)
            # once for all: many small products would take longer than all the rest
            columns = [s * strength * scale for (s, d), scale in zip(parts, scales) for _ in range(d.rank)]
            up = up * torch.tensor(columns, dtype=up.dtype, device=up.device)
            total = up @ down if total is None else total.addmm_(up, down)
        return weight if in_place else weight.add_(total.reshape(weight.shape).to(weight.dtype))

    def _pieces(self, most: int) -> Iterator[list[tuple[float, LayerDelta]]]:
        """Parts whose ranks' sum passes `most` one group after another, so that factors never take more room than the weight:
        from there on the sum is the dense change"""
        piece, rank = [], 0
        for part in self.parts:
            if piece and rank + part[1].rank > most:
                yield piece
                piece, rank = [], 0
            piece, rank = [*piece, part], rank + part[1].rank
        yield piece


@dataclass
class Part:
    """One LoRA as it goes onto the model.  start, end: shares of the sampling between which it acts.  share: of its strength at
    which its patches act, by norm control; the adapter has that in it."""

    source: str
    strength: float
    adapter: Adapter
    patches: dict[Target, object] = field(default_factory=dict)
    start: float = 0.0
    end: float = 1.0
    share: float = 1.0

    @property
    def patch_strength(self) -> float:
        return self.strength * self.share


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
    # in this order those that look at the weight see it as it was, whatever stands before them in the stack; but what acts in all
    # steps has changed it before hooks do
    ordered = [(when, *some) for stage in range(3) for when, stages in made.items() for some in stages[stage] if some[1]]
    if missing and not ordered:
        raise UserError("the stack does not fit this model: none of its layers is in it; load the model it was trained on")
    model, clip = model.clone(), clip.clone() if clip is not None else None
    hooks, texts = comfy.hooks.HookGroup(), False
    for when, strength, patches in ordered:
        if when != ALWAYS:
            hooks.add(_scheduled_hook(patches, strength, *when))
            texts = texts or any(map(weights.of_text, patches))
            continue
        model.add_patches(patches, strength)
        if clip is not None:
            clip.add_patches(patches, strength)
    if hooks.hooks:
        if clip is None:
            raise UserError("a schedule needs the clip: connect it, and encode the prompts with the clip that comes out")
        _set_hooks(clip, hooks, texts)
    return model, clip, list(dict.fromkeys(missing))


def _patches(group: list[Part], weights: Weights, missing: list[str]):
    """Patches by target with their strengths, in three stages: ComfyUI's own that look at the weight, others of its own, and one
    StackPatch a weight"""
    joined: dict[str, list[tuple[float, LayerDelta]]] = {}
    for part in group:
        for name, delta in part.adapter.layers.items():
            key = weights.key(name)
            if key is None:
                missing.append(name)
                continue
            shape = weights.shapes[key]
            if delta.shape != [shape[0], int(torch.Size(shape[1:]).numel())]:
                raise UserError(
                    f"{part.source}: {name} is for a weight of {delta.shape}, this model's is "
                    f"{list(shape)}: it was trained on another kind of model, load that one"
                )
            joined.setdefault(key, []).append((part.strength, delta))
    looking, others = (
        [(part.patch_strength, {t: p for t, p in part.patches.items() if reads_weight(p) == looks}) for part in group]
        for looks in (True, False)
    )
    return looking, others, [(1.0, {key: StackPatch(deltas) for key, deltas in joined.items()})]


def _scheduled_hook(patches: dict, strength: float, start: float, end: float):
    hook = comfy.hooks.WeightHook(strength, strength)
    hook.weights, hook.weights_clip, hook.need_weight_init = patches, patches, False
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, at in ((0.0, 0.0), (1.0, start), (0.0, end)):
        if (strength, at) != (0.0, start) and at < 1:
            frames.add(comfy.hooks.HookKeyframe(strength, at, guarantee_steps=0))
    hook.hook_keyframe = frames
    return hook


def _set_hooks(clip, hooks, texts: bool) -> None:
    """As ComfyUI's Set CLIP Hooks does: prompts that this clip encodes carry the hooks to the sampler.  texts: they change the
    text encoder too, so a prompt is encoded anew for each part of the sampling."""
    if clip.apply_hooks_to_conds is not None:
        hooks = clip.apply_hooks_to_conds.clone_and_combine(hooks)
    clip.apply_hooks_to_conds = hooks
    clip.patcher.forced_hooks = hooks.clone()
    clip.use_clip_schedule = clip.use_clip_schedule or texts
    if not clip.use_clip_schedule:
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
            whole = target if kind not in ("weight", "bias") else weights.name_of.get(f"{stem}.weight", stem)
            key = f"{whole}.{'diff_b' if kind == 'bias' else 'diff'}"
            found[key] = found.get(key, 0) + part.patch_strength * patch[1][0].float()
    return found, left
