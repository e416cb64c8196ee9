"""A LoRA of SD3, SD3.5 or Flux.1 under diffusers' names: its loaders know no layer that fuses what they keep apart.

diffusers reads files of U-Nets as they are.
"""

from __future__ import annotations

import re

from torch import Tensor

from .adapter import Adapter, LayerDelta
from .errors import UserError
from .transformer_names import family_of, parts, turned

_CLIP = re.compile(r"lora_te([12]?)_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(\w+)")


def as_diffusers(adapter: Adapter) -> dict[str, Tensor]:
    """Tensors of a file that `load_lora_weights` of StableDiffusion3Pipeline and FluxPipeline reads.

    UserError for a layer that none of these models has.
    """
    tensors: dict[str, Tensor] = {}
    family = family_of(adapter.layers)
    for name, delta in adapter.layers.items():
        text = _of_text_encoder(name)
        modules = [text] if text else [name] if name.startswith("transformer.") else parts(name, family)
        if not modules:
            raise UserError(
                f"{name} is no layer of SD3 or Flux.1: diffusers reads other models' files as they are, "
                "and token tables not at all (leave them out with --layers=-token_embedding)"
            )
        for module, up in zip(modules, _rows(delta, len(modules))):
            up = turned(module, up, delta.down.shape[1])
            used = up.any(0)  # of what was joined from three modules each reads its own directions alone
            down = delta.down if used.all() or not used.any() else delta.down[used]
            up = up if len(down) == delta.rank else up[:, used]
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = down.clone(), up.clone()
    return tensors


def _of_text_encoder(name: str) -> str | None:
    """The module that kohya's name of a CLIP's layer means; None of another name"""
    found = _CLIP.fullmatch(name)
    return found and f"text_encoder{'_2' if found[1] == '2' else ''}.text_model.encoder.layers.{found[2]}.{found[3]}.{found[4]}"


def _rows(delta: LayerDelta, modules: int) -> list[Tensor]:
    """lora_up of each module; q, k and v have as many rows as the layer has inputs, what comes after them the rest"""
    width = delta.down.shape[1]
    sizes = [len(delta.up)] if modules == 1 else [width] * 3 + [len(delta.up) - 3 * width] * (modules - 3)
    return list(delta.up.split(sizes))
