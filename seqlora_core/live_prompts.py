"""A text encoder that is adapted: its layers, its token table, and prompts that are encoded anew at each step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .attach import Site
from .denoiser import Conditioning

TEXT_LAYERS = ("lora_te", "text_encoders.")  # how their names begin in a LoRA file
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class LivePrompts:
    """Stands for prompts by their numbers until a prediction needs them: what is attached to the text encoder then, acts.

    sites: what is adapted of the text encoder; without any, prompts are encoded at once.
    """

    def __init__(self):
        self.numbers: dict[str, int] = {}
        self.sites: list[Site] = []

    def __bool__(self) -> bool:
        return bool(self.sites)

    def numbered(self, prompts: list[str], device: torch.device) -> Conditioning:
        """Conditioning whose context [n, 1, 1] is numbers"""
        found = [self.numbers.setdefault(p, len(self.numbers)) for p in prompts]
        return Conditioning(torch.tensor(found, device=device).view(-1, 1, 1))

    def encoded(self, conditioning: Conditioning, encode: Callable[[list[str]], Conditioning]) -> Conditioning:
        """What the numbers stand for, each prompt encoded once; what was encoded before is left as it is.

        encode: prompts -> Conditioning, differentiable wherever gradients are on.  Given with each call: kept here it would
        tie its model into a circle, which holds a model's memory until Python's collector comes by.
        """
        if conditioning.context.is_floating_point():
            return conditioning
        texts = list(self.numbers)
        different, rows = conditioning.context.flatten().unique(return_inverse=True)
        wanted = [texts[n] for n in different.tolist()]
        # by the alphabet: numbers are those of a process, and sums within a batch are rounded by the order of its rows
        order = sorted(range(len(wanted)), key=wanted.__getitem__)
        places = torch.tensor(order, device=rows.device).argsort()
        return encode([wanted[i] for i in order])[places[rows]]


def clip_sites(clip: nn.Module | None, prefix: str) -> list[Site]:
    """Attention projections of a CLIP from transformers, under kohya's names:
    `lora_te1_text_model_encoder_layers_0_self_attn_q_proj`; none of another kind of encoder."""
    inner = getattr(clip, "text_model", clip)
    layers = getattr(getattr(inner, "encoder", None), "layers", ())
    found = []
    for index, layer in enumerate(layers):
        for name in PROJECTIONS:
            linear = getattr(layer.self_attn, name)
            stem = f"{prefix}_text_model_encoder_layers_{index}_self_attn_{name}"
            found.append(Site(stem, (linear,), linear.in_features, linear.out_features))
    return found


def token_site(clip: nn.Module, encoder: str) -> Site:
    """The token table of a CLIP from transformers, under the name that ComfyUI has for it; encoder: its name there"""
    table = getattr(clip, "text_model", clip).embeddings.token_embedding
    name = f"text_encoders.{encoder}.transformer.text_model.embeddings.token_embedding"
    return Site(name, (table,), table.embedding_dim, table.num_embeddings)


def is_text(layer: str) -> bool:
    """Whether a layer of a LoRA file is a text encoder's"""
    return layer.startswith(TEXT_LAYERS)
