"""Nodes that only benchmarks/training.py installs in a server, beside the pack."""

import importlib
import json
import sys

import comfy.model_management as management
import torch

from . import comfy_sd15
from .training_steps import CAPTION, ours, random_latents

PACK = next(name.removesuffix(".nodes.comfy_denoiser") for name in sys.modules if name.endswith(".nodes.comfy_denoiser"))
hosts = importlib.import_module(f"{PACK}.nodes.comfy_denoiser")
demo = importlib.import_module(f"{PACK}.nodes.comfy_demo")
core = f"{PACK}.seqlora_core"


def open_model(settings: dict):
    """(model, clip or None, latents)"""
    count, side = settings["pictures"], settings["side"]
    if settings["model"] == "demo":
        path = importlib.import_module(f"{core}.demo_model").DEMO_MODEL
        model, clip, _ = demo.load_demo_model(path)
        return model, clip, random_latents(count, 16, side)
    return comfy_sd15.build(torch.float32), None, random_latents(count, 4, side)


class Fed(hosts.ComfyDenoiser):
    """Latents are there already, and SD1.5's text encoder, which takes no part in a step, is left out"""

    def __init__(self, model, clip, side: int):
        super().__init__(model, clip, None)
        self._shapes[(8 * side, 8 * side)] = (16 if clip else 4, side, side)

    def encode_prompts(self, prompts):
        if self.clip is not None:
            return super().encode_prompts(prompts)
        return hosts.Conditioning.cat([hosts._conditioning(random_text(), None, {}) for _ in prompts])


def random_text() -> torch.Tensor:
    return torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(0))


class SeqLoRABenchmarkInputs:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"settings": ("STRING", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "LATENT", "CONDITIONING"), "make", "benchmarks"

    def make(self, settings):
        settings = json.loads(settings)
        # the native node cannot train the demo model as ComfyUI loads it (RMSNorm weights that are inference tensors)
        with torch.inference_mode(False), torch.no_grad():
            model, clip, latents = open_model(settings)
        text = [[random_text(), {}]] if clip is None else clip.encode_from_tokens_scheduled(clip.tokenize(CAPTION))
        management.load_models_gpu([model])
        return model, {"samples": latents}, text * len(latents)


class SeqLoRABenchmarkOurs:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"settings": ("STRING", {})}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "train", True, "benchmarks"

    def train(self, settings):
        settings = json.loads(settings)
        model, clip, latents = open_model(settings)
        with torch.inference_mode(False), torch.enable_grad(), Fed(model, clip, settings["side"]) as denoiser:
            size = (8 * settings["side"],) * 2
            found = ours(core, denoiser, latents.clone(), size, settings)
        return {"ui": {"text": [json.dumps(found)]}}


NODE_CLASS_MAPPINGS = {c.__name__: c for c in (SeqLoRABenchmarkInputs, SeqLoRABenchmarkOurs)}
