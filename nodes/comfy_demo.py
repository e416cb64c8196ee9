"""Opens the embedded demo model as ComfyUI opens any checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.sd
import comfy.sd1_clip
import folder_paths

from ..seqlora_core.demo_model import CLIP_SIZE, CONTEXT_LENGTH


def load_demo_model(path: Path):
    """(model, clip, vae) of the embedded demo model."""
    config = {**CLIP_SIZE, "model_type": "clip_text_model"}
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(
        str(path),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        te_model_options={"clip_l_model_config": _full_clip_config(config)},
    )[:3]
    # at 64 px, SD3's 77 text tokens would be most of the work: the demo model was trained with fewer
    clip.tokenizer.clip_l.max_length = CONTEXT_LENGTH
    return model, clip, vae


def _full_clip_config(small: dict) -> dict:
    stock = Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json")
    return {**json.loads(stock.read_text(encoding="utf-8")), **small}
