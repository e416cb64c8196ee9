"""The weights of a ComfyUI model, and every name that LoRA files call them by (`comfy.lora`)."""

from __future__ import annotations

import hashlib
from functools import cached_property

import comfy.lora
import comfy.utils
import torch
from torch import Tensor

from ..seqlora_core.denoiser import fingerprint, first_site
from .comfy_sites import attention_sites, file_names, numbers

# a weight's key, or with it the rows that are meant and how a change is laid out in them
Target = str | tuple
SAMPLE = 4096


class Weights:
    """The weights of a model and its text encoder: their shapes, and every name that files call them by."""

    def __init__(self, model, clip):
        self.model, self.clip = model, clip
        self.targets: dict[str, Target] = _more_names(model.model, comfy.lora.model_lora_keys_unet(model.model, {}))
        self.shapes = _shapes(model.model)
        self._of_model = set(self.shapes)
        if clip is not None:
            self.targets = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, self.targets)
            self.shapes |= _shapes(clip.cond_stage_model)
            first = {n.removeprefix("text_encoder."): t for n, t in self.targets.items() if n.startswith("text_encoder.")}
            self.targets = {f"base_model.model.{n}": t for n, t in first.items()} | self.targets  # as PEFT writes it
        names = {f"diffusion_model.{path}.weight": name for path, name in file_names(model.model).items()}
        texts = [n for n in self.targets if n.startswith("lora_te")]
        if any(n.startswith("lora_te2_") for n in texts):  # then kohya numbers the first one too
            texts.sort(key=lambda n: n.startswith("lora_te_"))
        for name in texts:
            if isinstance(self.targets[name], str):
                names.setdefault(self.targets[name], name)
        for key in self.shapes:
            if key.endswith(".weight"):
                stem = key.removesuffix(".weight")
                names.setdefault(key, stem if key.startswith("diffusion_model.") else f"text_encoders.{stem}")
        self.name_of = names
        self.key_of = {name: key for key, name in names.items()}
        # what the files read so far are, by their keys: files of the same keys are read alike
        self.places: dict[tuple[str, ...], list] = {}
        # equal for models of one kind: a LoRA that was fitted to one of them fits the others
        self.signature = hash(tuple(self.shapes.items()))

    def key(self, name: str) -> str | None:
        """The weight that a layer's name means"""
        target = self.key_of.get(name, self.targets.get(name))
        return target if isinstance(target, str) else None

    def of_text(self, target: Target) -> bool:
        """Whether it is a weight of the text encoder's"""
        return parts(target)[0] not in self._of_model

    def original(self, key: str) -> Tensor:
        """The unpatched weight, in float64, on the processor, where all that is read from LoRA files is, whatever holds the model"""
        layer, kept = self._kept(key)
        return (numbers(layer, kept) if key.endswith(".weight") else kept).cpu().double()

    def digest(self, keys: list[str]) -> str:
        """Tells these unpatched weights from those of another model, by `SAMPLE` numbers or more of each: reading them whole
        would take seconds of a large model, and training or merging leaves no weight's numbers as they were"""
        total = hashlib.sha256()
        for key in keys:
            weight = self._kept(key)[1].detach().flatten()
            some = weight[:: max(1, len(weight) // SAMPLE)].cpu().contiguous()
            total.update(some.view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """`ComfyDenoiser.fingerprint`, whatever patches a clone of the model that is loaded has put into it"""
        sites = attention_sites(self.model.model)
        modules = first_site(sites).modules
        keys = {m: f"{name}.weight" for name, m in self.model.model.named_modules() if any(m is one for one in modules)}
        return fingerprint(sites, [self._kept(keys[m])[1] for m in modules])

    def _kept(self, key: str):
        """The layer of a weight, and that as it is without patches; as `ModelPatcher.get_key_patches` finds it, which lists
        all of a model's weights each time"""
        patcher = self.model if key in self._of_model else self.clip.patcher
        layer, _, name = key.rpartition(".")
        layer = comfy.utils.get_attr(patcher.model, layer)
        if key in patcher.hook_backup:
            return layer, patcher.hook_backup[key][0]
        return layer, patcher.backup[key].weight if key in patcher.backup else getattr(layer, name)


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
    """Of a packed weight the one that it is used in, which its place in the model knows and a state dict does not"""
    held = dict(module.named_parameters(remove_duplicate=False))
    return {k: tuple(held.get(k, v).shape) for k, v in module.state_dict().items()}


def parts(target: Target):
    """Key, rows (dimension, start, length) or None, layout function or None"""
    if isinstance(target, str):
        return target, None, None
    return target[0], target[1], target[2] if len(target) > 2 else None
