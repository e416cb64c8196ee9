"""A learnt trigger as an embedding: vectors that stand for it where a text encoder cannot be adapted, or its words are too long.

ComfyUI and diffusers read such files (textual inversion); `embedding:NAME` in a prompt of ComfyUI then says the same as
the trigger does with the concept's LoRA loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adapter import Adapter, is_token_table
from .denoiser import Denoiser
from .errors import UserError
from .learnt_trigger import COMMON, token_ids


@torch.no_grad()
def trigger_embedding(denoiser: Denoiser, adapter: Adapter, trigger: str) -> dict[str, Tensor]:
    """Text encoder, by ComfyUI's name for it (clip_l, clip_g, t5xxl ...) -> [n, width]: the trigger's tokens in their order, as
    the adapter makes them.

    Of denoiser only `token_tables` and `read_prompts` are used.  UserError if the adapter's trigger was not learnt, or not on a
    text encoder as this one.
    """
    learnt = {name: delta for name, delta in adapter.layers.items() if is_token_table(name)}
    if not learnt:
        raise UserError("it has no trigger that was learnt: train it with learn_trigger")
    frame, out = token_ids(denoiser, [""]), {}
    texts = [token_ids(denoiser, [text]) for text in (trigger, COMMON, f"{COMMON} {trigger}")]
    for site in denoiser.token_tables():
        ids, first, both = ([i for i in said[site.name] if i not in frame[site.name]] for said in texts)
        delta, weight = learnt.pop(site.name, None), site.modules[0].weight
        if delta is None:
            rows = weight[ids].float().cpu()
        elif delta.shape != [site.out_features, site.in_features]:
            raise UserError(f"its trigger was learnt on another text encoder than this model's {site.name.split('.')[1]}")
        else:
            after = both[len(first) :] if both[: len(first)] == first else ids
            # as captions have it: with many text encoders a word has other tokens after a space than by itself
            ids, change = max(((i, delta.up[i].float() @ delta.down.float()) for i in (ids, after)), key=_learnt)
            rows = weight[ids].float().cpu() + change
        out[site.name.split(".")[1]] = rows
    if learnt:
        raise UserError(f"its trigger was learnt on another text encoder: this model has no {next(iter(learnt))}")
    return out


def _learnt(said: tuple[list[int], Tensor]) -> int:
    """How many of these tokens, with what is added to each, were learnt"""
    return int(said[1].any(1).sum())
