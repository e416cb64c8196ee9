"""Random models and a data set of CustomConcept101's layout, small enough to run that benchmark end to end anywhere.

    python -m benchmarks.tiny --output tiny

Nothing measured on them means anything: they show that the commands work.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from seqlora_core.demo_model import DEMO_FOLDER

NAMES = ("octopus", "penguin", "fox", "rocket")


def text_encoder(width: int = 32, projection: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def tokenizer():
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast(
        tokenizer_file=str(DEMO_FOLDER / "model" / "tokenizer.json"), unk_token="<|endoftext|>", bos_token="<|startoftext|>",
        eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=77,
    )  # fmt: skip


def make_pipeline(kind: str):
    """Random StableDiffusionPipeline ("sd15") or StableDiffusionXLPipeline ("sdxl") of about 0.2 M parameters."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    xl = kind == "sdxl"
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64 if xl else 32, **(more if xl else {}),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=8, sample_size=32,
    )  # fmt: skip
    parts = {
        "unet": unet, "vae": vae, "text_encoder": text_encoder(), "tokenizer": tokenizer(),
        "scheduler": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
    }  # fmt: skip
    if xl:
        return StableDiffusionXLPipeline(**parts, text_encoder_2=text_encoder(projection=True), tokenizer_2=tokenizer())
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def make_judges(folder: Path) -> None:
    """Random CLIP and DINO, as `customconcept101` opens them"""
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 49408},
        vision_config={**small, "image_size": 224, "patch_size": 32},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder / "clip")
    tokenizer().save_pretrained(folder / "clip")
    ViTModel(ViTConfig(**small, image_size=224, patch_size=32)).save_pretrained(folder / "dino")


def make_data(folder: Path) -> None:
    """dataset.json, benchmark_dataset/ and prompts/ of a few of the demo's concepts, as CustomConcept101 has them"""
    entries = []
    for name in NAMES:
        pictures = folder / "benchmark_dataset" / f"toy_{name}"
        pictures.mkdir(parents=True)
        for picture in sorted((DEMO_FOLDER / "concepts" / name).glob("*.png"))[:6]:
            shutil.copy(picture, pictures)
        prompts = folder / "prompts" / f"{name}.txt"
        prompts.parent.mkdir(exist_ok=True)
        prompts.write_text("photo of a {} on the beach\na {} in the snow\n", encoding="utf-8")
        entries.append(
            {
                "instance_prompt": f"photo of a <new1> {name}", "class_prompt": name,
                "instance_data_dir": f"./benchmark_dataset/toy_{name}", "class_data_dir": f"./regularization/{name}",
                "prompt_filename": f"prompts/{name}.txt",
            }
        )  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    for kind in ("sd15", "sdxl"):
        make_pipeline(kind).save_pretrained(args.output / kind)
    make_judges(args.output)
    make_data(args.output / "data")


if __name__ == "__main__":
    main()
