"""An ordinary LoRA of the demo model, trained by diffusers and peft: nothing of this pack's training takes part.

Loss and noise levels are those of diffusers' own SD3 LoRA script (flow matching, logit-normal, not weighted); plain AdamW at
a constant rate.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from seqlora_core.adapter import Adapter, LayerDelta
from seqlora_core.concept import References
from seqlora_core.demo_model import DemoModel
from seqlora_core.denoiser import SAMPLING_SHIFT

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
RANK, STEPS, BATCH = 4, 300, 8


def train_peft(references: References, rate: float, steps: int = STEPS, seed: int = 0) -> Adapter:
    """Rank 4, alpha 4, all attention projections.  Layers are named as everywhere here, q, k and v side by side in one."""
    start, model = time.perf_counter(), DemoModel()
    places = layer_paths(model)
    train_in_place(model, references, rate, steps, seed)
    adapter = adapter_of(model, places)
    adapter.metadata["seconds"] = f"{time.perf_counter() - start:.2f}"
    return adapter


def train_in_place(model: DemoModel, references: References, rate: float, steps: int = STEPS, seed: int = 0) -> None:
    """Leaves peft's trained layers inside the model's transformer"""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import compute_density_for_timestep_sampling
    from peft import LoraConfig

    prompts, latents = model.encode_prompts(references.captions), references.latents
    sigmas = FlowMatchEulerDiscreteScheduler(shift=SAMPLING_SHIFT).sigmas
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS)
        model.mmdit.add_adapter(config)
        optimiser = torch.optim.AdamW([p for p in model.mmdit.parameters() if p.requires_grad], rate)
        for _ in range(steps):
            pick = torch.randint(len(latents), (BATCH,))
            density = compute_density_for_timestep_sampling("logit_normal", BATCH, logit_mean=0.0, logit_std=1.0)
            sigma = sigmas[(density * len(sigmas)).long()]
            noise = torch.randn_like(latents[pick])
            prediction = model.predict(model.noised(latents[pick], noise, sigma), sigma, prompts[pick])
            optimiser.zero_grad()
            (prediction - (noise - latents[pick])).square().mean().backward()
            optimiser.step()


def layer_paths(model: DemoModel) -> dict[str, list[str]]:
    """Layer -> its modules' paths in diffusers' transformer; to be asked before peft wraps them"""
    paths = {module: path for path, module in model.mmdit.named_modules()}
    return {site.name: [paths[m] for m in site.modules] for site in model.sites()}


def adapter_of(model: DemoModel, places: dict[str, list[str]]) -> Adapter:
    """What peft has put into the transformer; alpha must be the rank"""
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(model.mmdit)
    return Adapter({name: fused([_factors(state, p) for p in parts]) for name, parts in places.items()})


def _factors(state: dict[str, Tensor], path: str) -> LayerDelta:
    return LayerDelta(*(state[f"{path}.{key}.weight"].detach().clone() for key in ("lora_A", "lora_B")))


def fused(parts: list[LayerDelta]) -> LayerDelta:
    """Changes of modules that read one input, as one change of their outputs side by side; ranks add up."""
    return LayerDelta(torch.cat([p.down for p in parts]), torch.block_diag(*(p.up for p in parts)))
