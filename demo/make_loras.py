"""Writes demo/loras/: ordinary LoRAs of the demo model, as somebody else would hand them out.

    python -m demo.make_loras

Trained one by one by diffusers and peft and saved by diffusers: nothing of this pack's training takes part, and no file says
what calls it.  Rate and steps are those of `benchmarks.stacking`, where the rate was the best of three.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from benchmarks.peft_lora import train_in_place
from seqlora_core.demo import load_subject
from seqlora_core.demo_model import DEMO_FOLDER, DemoModel

NAMES = ("penguin", "fox")
RATE = 1e-3
FOLDER = DEMO_FOLDER / "loras"


def make(name: str, folder: Path = FOLDER, **options) -> Path:
    """Trains one subject's LoRA and writes it in float16; returns the file.  options: of `train_in_place`."""
    from diffusers import StableDiffusion3Pipeline
    from peft.utils import get_peft_model_state_dict

    model = DemoModel()
    # a seed for each: from one seed all would start with the same lora_down
    train_in_place(model, load_subject(model, name).references, RATE, seed=zlib.crc32(name.encode()), **options)
    state = {key: value.detach().half() for key, value in get_peft_model_state_dict(model.mmdit).items()}
    file = f"seqlora_demo_{name}.safetensors"
    StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=state, weight_name=file)
    return folder / file


if __name__ == "__main__":
    for subject in NAMES:
        print(make(subject))
