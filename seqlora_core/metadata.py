"""What a LoRA file says about itself, in the words that other programs read.

`ss_*` and `sshs_*` are kohya's (sd-scripts), `modelspec.*` is Stability's ModelSpec 1.0.1, `seqlora.*` our own.  Dates
are left out: one seed gives one file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from .prompts import as_a_word

# family -> ModelSpec's architecture, kohya's name of the base
FAMILIES = {
    "sd1": ("stable-diffusion-v1", "sd_v1"),
    "sd2": ("stable-diffusion-v2-512", "sd_v2"),
    "sd2_v": ("stable-diffusion-v2-768-v", "sd_v2_v"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "sd3": ("stable-diffusion-3", "sd3"),
    "flux": ("flux-1-dev", "flux1"),
    "lumina2": ("lumina-2", "lumina2"),
    "qwen_image": ("qwen-image", "qwen_image"),
}
CURVE_POINTS = 500
MOST_TAGS = 1 << 18  # bytes; a quarter of what a header may be in a file of any size
HOME = "https://github.com/seqlora/seqlora"


@dataclass(frozen=True)
class Base:
    """What is known of a base model.  family: one of FAMILIES, or the host's own word; prediction: epsilon, v or "";
    file: where its weights are, None if the host does not say."""

    name: str
    family: str
    prediction: str = ""
    file: Path | None = None

    def metadata(self) -> dict[str, str]:
        """As kohya and ModelSpec call it; reads the whole of `file` for its hash"""
        architecture, version = FAMILIES.get(self.family, (self.family, self.family))
        said = {
            "ss_base_model_version": version,
            "ss_sd_model_name": self.name,
            "modelspec.architecture": f"{architecture}/lora",
        }
        if self.prediction:
            said["modelspec.prediction_type"] = self.prediction
        if self.file is not None and self.file.is_file():
            whole = hashlib.sha256()
            with open(self.file, "rb") as f:
                while part := f.read(1 << 20):
                    whole.update(part)
                f.seek(0x100000)
                said["ss_sd_model_hash"] = hashlib.sha256(f.read(0x10000)).hexdigest()[:8]
            said["ss_new_sd_model_hash"] = whole.hexdigest()
        return said


def tag_frequency(name: str, captions: list[str], phrase: str) -> dict[str, dict[str, int]]:
    """How often each comma-separated part of the captions occurs, as kohya counts it, and in how many of them the phrase that
    calls the LoRA does, in capitals or not: captions in sentences have no tag in common, and other programs show the most
    frequent ones."""
    small, found = phrase.lower(), [tag.strip() for caption in captions for tag in caption.split(",") if tag.strip()]
    tags = Counter(phrase if tag.lower() == small else tag for tag in found)
    tags[phrase] = max(tags[phrase], sum(bool(as_a_word(phrase, inflected=True).search(c)) for c in captions))
    return {name: {tag: count for tag, count in sorted(tags.items()) if count}}


def shortened(frequency: dict[str, dict[str, int]], phrase: str) -> dict[str, dict[str, int]]:
    """The same without its rarest tags where they are too many for a file's header; the phrase stays"""
    ((name, tags),) = frequency.items()
    room, kept = MOST_TAGS, {}
    for tag, count in sorted(tags.items(), key=lambda item: (item[0] != phrase, -item[1], item[0])):
        room -= len(json.dumps(json.dumps({tag: count}, ensure_ascii=False), ensure_ascii=False).encode())
        if room < 0:
            break
        kept[tag] = count
    return {name: dict(sorted(kept.items()))}


def datasets(name: str, phrase: str, count: int) -> list[dict]:
    """The part of kohya's `ss_datasets` that names the trigger.  count: of pictures."""
    return [{"subsets": [{"image_dir": name, "img_count": count, "class_tokens": phrase}]}]


def network(adapter) -> dict[str, str]:
    """Of any LoRA; the rank is the widest layer's"""
    layers = adapter.without_token_tables().layers or adapter.layers
    rank = str(max((d.rank for d in layers.values()), default=0))
    return {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank, "modelspec.sai_model_spec": "1.0.1",
            "modelspec.implementation": HOME}  # fmt: skip


def training(config, captions: list[str], size: tuple[int, int], steps_done: int) -> dict[str, str]:
    """How it was trained.  config: a TrainingConfig; size: height, width of the pictures, pixels."""
    height, width = size
    return {
        "ss_learning_rate": str(config.learning_rate),
        "ss_unet_lr": str(config.learning_rate),
        "ss_steps": str(steps_done),
        "ss_max_train_steps": str(config.steps),
        "ss_seed": str(config.seed),
        "ss_batch_size_per_device": str(config.batch),
        "ss_num_train_images": str(len(captions)),
        "ss_resolution": f"({width}, {height})",
        "modelspec.resolution": f"{width}x{height}",
    }


def curves(losses: list[float], energies: list[float]) -> dict:
    """A run's curves in a few kilobytes: each point is the mean of as many steps as bring it below CURVE_POINTS"""
    every = max(1, -(-len(losses) // CURVE_POINTS))

    def means(values: list[float]) -> list[float]:
        parts = [values[i : i + every] for i in range(0, len(values), every)]
        return [float(f"{sum(part) / len(part):.4g}") for part in parts]

    return {"every": every, "loss": means(losses), "interference": means(energies)}


def file_hashes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """`sshs_model_hash`, known as AutoV3: SHA-256 of a safetensors file after its header, so of the tensors alone.
    `sshs_legacy_hash`: of 64 KiB at the first megabyte of the file as it is with its `ss_*` metadata only.

    As sd-webui-additional-networks defined them and kohya's `precalculate_safetensors_hashes` writes them.
    """
    blob = save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(blob[:8], "little")
    model = hashlib.sha256(memoryview(blob)[start:]).hexdigest()
    legacy = hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": model, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{model}"}
