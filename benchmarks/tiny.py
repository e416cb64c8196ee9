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


def autoencoder(channels: int = 4, **more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels, norm_num_groups=8, sample_size=32, **more,
    )  # fmt: skip


def make_pipeline(kind: str):
    """Random pipeline of about 0.2 M parameters: "sd15", "sd2" (of 768 pixels), "sdxl", "sd3", "sd35" or "flux"."""
    torch.manual_seed(0)
    return _unet_pipeline(kind) if kind in ("sd15", "sd2", "sdxl") else _transformer_pipeline(kind)


def _unet_pipeline(kind: str):
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    xl, velocity = kind == "sdxl", {"prediction_type": "v_prediction"} if kind == "sd2" else {}
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64 if xl else 32, use_linear_projection=kind != "sd15", **(more if xl else {}),
    )  # fmt: skip
    parts = {
        "unet": unet, "vae": autoencoder(), "text_encoder": text_encoder(), "tokenizer": tokenizer(),
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, **velocity,
        ),
    }  # fmt: skip
    if xl:
        return StableDiffusionXLPipeline(**parts, text_encoder_2=text_encoder(projection=True), tokenizer_2=tokenizer())
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _transformer_pipeline(kind: str):
    """SD3 without its T5, as many use it"""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import T5Config, T5EncoderModel

    vae = autoencoder(16, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)
    if kind == "flux":
        transformer = FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        t5 = T5EncoderModel(T5Config(vocab_size=49408, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2))
        return FluxPipeline(
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae, text_encoder(), tokenizer(), t5, tokenizer(),
            transformer,
        )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=16, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=64,
        caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=16,
        **({"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if kind == "sd35" else {}),
    )  # fmt: skip
    encoders = [text_encoder(projection=True), tokenizer(), text_encoder(projection=True), tokenizer(), None, None]
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, *encoders)


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
