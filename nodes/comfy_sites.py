"""Which layers of ComfyUI's models adapters act on, and what files call them."""

from __future__ import annotations

import re
from collections.abc import Iterable

import comfy.lora
import comfy.utils
import torch

from ..seqlora_core.adapter import is_token_table
from ..seqlora_core.attach import Site
from ..seqlora_core.errors import UserError

# attention projections of every family: q, k, v, out, fused or not, in Flux and its kin with the MLP of a single block;
# modulation and norms are no adapter's place
_ATTENTION = re.compile(r"attn|attention|single_blocks\.\d+\.linear")
_NOT_ADAPTED = re.compile(r"mod|norm|adaln|embed", re.IGNORECASE)


def attention_sites(base) -> list[Site]:
    """All attention projections of a ComfyUI model, under the names that LoRA files use"""
    names, found = file_names(base), []
    for path, module in base.diffusion_model.named_modules():
        if _is_linear(module) and _ATTENTION.search(path) and not _NOT_ADAPTED.search(path):
            found.append(_site(names.get(path, f"diffusion_model.{path}"), module))
    return found


def clip_sites(clip, kind: str) -> list[Site]:
    """Attention projections of a CLIP link's CLIPs, under the names that kohya's files have for models of this kind.
    UserError if it has none."""
    encoder, found = clip.cond_stage_model, []
    numbered = not kind.startswith(("sd1", "sd2"))
    for name, key in comfy.lora.model_lora_keys_clip(encoder, {}).items():
        known = re.match(r"lora_te1?_|lora_te2_", name) and "_self_attn_" in name
        if known and (name.startswith("lora_te_") != numbered) and key.startswith("clip_"):
            found.append(_site(name, comfy.utils.get_attr(encoder, key.removesuffix(".weight"))))
    if not found:
        raise UserError(f"{type(encoder).__name__} has no CLIP that can be adapted: train without text_encoder")
    return found


def token_tables(clip) -> list[Site]:
    """Of every encoder of a CLIP link, under ComfyUI's own names for them"""
    tables = [
        Site(f"text_encoders.{name}", (module,), module.weight.shape[1], module.weight.shape[0])
        for name, module in clip.cond_stage_model.named_modules()
        if is_token_table(name) and isinstance(module, torch.nn.Embedding)
    ]
    if not tables:
        kind = type(clip.cond_stage_model).__name__
        raise UserError(f"{kind} has no table of tokens that can be learnt: train without learn_trigger")
    return tables


def named_sites(model, keys: dict, names: Iterable[str]) -> list[Site]:
    """Linear layers and convolutions of these names; keys: ComfyUI's map from names of a LoRA file to weights"""
    found = []
    for name in sorted(names):
        key = keys.get(name)
        key = key[0] if isinstance(key, tuple) else key  # a part of a fused layer
        if key is not None:
            module = comfy.utils.get_attr(model, key.removesuffix(".weight"))
            if _is_linear(module) or isinstance(module, torch.nn.Conv2d) and module.groups == 1:
                found.append(_site(name, module))
    return found


def file_names(base) -> dict[str, str]:
    """Module path -> the name that LoRA files use.  SD1.5 and SDXL: diffusers' spelling in kohya's form, which both
    ComfyUI and diffusers read, whose loader refuses a file for one layer of another form; other families: `diffusion_model.<path>`."""
    names = {}
    for name, target in comfy.lora.model_lora_keys_unet(base, {}).items():
        if isinstance(target, str) and re.match(r"lora_unet_((down|up|mid)_block|conv_(in|out)$|time_embedding_linear)", name):
            names[target.removeprefix("diffusion_model.").removesuffix(".weight")] = name
    return names


def _is_linear(module) -> bool:
    # quantised layers are not nn.Linear, but they are called Linear
    return type(module).__name__ == "Linear" and getattr(module, "weight", None) is not None


def _site(name: str, module) -> Site:
    out, width = module.weight.shape[:2]
    return Site(name, (module,), width, out, read=numbers)


@torch.no_grad()
def numbers(layer, weight: torch.Tensor | None = None) -> torch.Tensor:
    """A layer's weight, or another one in its place, as the numbers that it multiplies by: scaled ones (fp8) times their scale,
    packed ones (ComfyUI-GGUF) unpacked, without the LoRAs that hang on them"""
    weight = layer.weight if weight is None else weight
    if hasattr(layer, "convert_weight"):
        return layer.convert_weight(weight.to(torch.float32, copy=True), inplace=True)
    if hasattr(layer, "get_weight") and hasattr(weight, "patches"):
        bare = weight.to(weight.device, copy=True)
        bare.patches = []
        return layer.get_weight(bare, torch.float32)
    return weight
