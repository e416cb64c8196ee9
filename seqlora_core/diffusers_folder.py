"""Opens a model that diffusers saved as a folder, whichever of the supported kinds it is."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .errors import UserError
from .transformer_model import TransformerModel
from .unet_model import UNetModel


def open_folder(folder: Path | str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> UNetModel | TransformerModel:
    """Nothing is downloaded.  UserError if it holds another kind of pipeline."""
    from diffusers import DiffusionPipeline

    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder} is no diffusers folder (no model_index.json): save the model there with save_pretrained")
    try:
        left_out = {name: None for name, kind in json.loads(index.read_text(encoding="utf-8")).items() if kind == [None, None]}
        pipeline = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, **left_out
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} cannot be opened as a diffusers pipeline: {error}") from error
    kind = type(pipeline).__name__
    if kind in ("StableDiffusion3Pipeline", "FluxPipeline"):
        return TransformerModel(pipeline.to(device))
    if not hasattr(pipeline, "unet") or not hasattr(pipeline, "encode_prompt"):
        raise UserError(
            f"{folder} holds a {kind}: the command line takes SD1.5, SD2, SDXL, SD3, SD3.5 and Flux.1; use the ComfyUI nodes for other models"
        )
    return UNetModel(pipeline.to(device))
