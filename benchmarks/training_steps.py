"""What training costs in one process: seconds a step, peak memory, and the share of each part.  See benchmarks/training.py.

    python -m benchmarks.training_steps WAY SETTINGS_JSON OUTPUT

`core` is the name that this pack's core has in the process: another one inside ComfyUI.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import torch

CAPTION = "a ohwx cat"
SD15_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
# part -> what is timed of it: module of the core, holder in it or "", function
PARTS = {
    "decoys": [("replay", "", "draw")],
    "statistics": [("trainer", "", "record_moments")],
    "first bases": [("trainer", "", "starting_groups")],
    "replay's targets": [("replay", "Replay", "batch")],
    "projection": [("bilevel", "", "tangent")],
    "retraction": [("bilevel", "", "retract")],
    "optimiser": [("bilevel", "LowerLevel", "step")],
}


class Memory:
    """Peak of this process's resident set since the object was made, bytes; Linux only"""

    def __init__(self, process: int | str = "self"):
        self.folder = Path("/proc") / str(process)
        (self.folder / "clear_refs").write_text("5")

    def peak(self) -> int:
        lines = (self.folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextlib.contextmanager
def timed(core: str):
    """Within the block: part -> seconds of the processor spent in it so far"""
    spent, undo = defaultdict(float), []

    def watched(function, part):
        def run(*args, **kwargs):
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - start

        return run

    for part, places in PARTS.items():
        for module, holder, name in places:
            owner = import_module(f"{core}.{module}")
            owner = getattr(owner, holder) if holder else owner
            undo.append((owner, name, getattr(owner, name)))
            setattr(owner, name, watched(getattr(owner, name), part))
    try:
        yield spent
    finally:
        for owner, name, function in undo:
            setattr(owner, name, function)


def ours(core: str, denoiser, latents: torch.Tensor, size: tuple[int, int], settings: dict) -> dict:
    """A fit of our own: the method whole, or without replay"""
    load = lambda name: import_module(f"{core}.{name}")  # noqa: E731
    config = load("config").TrainingConfig(
        rank=settings["rank"], steps=settings["steps"], batch=settings["batch"], replay_batch=settings["replay_batch"],
        replay_weight=load("config").TrainingConfig.replay_weight if settings["replay"] else 0.0, use_decoys=settings["decoys"],
    )  # fmt: skip
    references = load("concept").References(latents, [CAPTION] * len(latents), size)
    prompts, memory, begin = load("prompts").generic_prompts(settings["calibration"]), Memory(), time.process_time()
    drawn = load("drawing").draw(denoiser, prompts, 0, size)
    calibration = load("calibration").Calibration(drawn.moments, prompts, drawn.latents, visited=drawn.visited)
    calibrated, ends = time.process_time(), []
    with timed(core) as spent:
        load("trainer").fit(denoiser, references, "ohwx", [], calibration, config, lambda _: ends.append(time.process_time()))
        once = time.process_time() - calibrated - (ends[-1] - ends[0]) * len(ends) / (len(ends) - 1)
    inside = ("replay's targets", "projection", "retraction", "optimiser")
    return {
        "seconds": (ends[-1] - ends[0]) / (len(ends) - 1),
        "peak": memory.peak(),
        "drawn": calibrated - begin,
        "once": once,
        "step_parts": {part: spent[part] / len(ends) for part in inside},
        "once_parts": {part: spent[part] for part in PARTS if part not in inside},
    }


def peft(denoiser, latents: torch.Tensor, settings: dict) -> dict:
    """The steps of diffusers' LoRA scripts: peft's adapters, AdamW, gradients clipped"""
    from peft import LoraConfig

    from benchmarks.peft_lora import TARGETS

    network, generator = denoiser.network(), torch.Generator().manual_seed(0)
    memory, rank, batch = Memory(), settings["rank"], settings["batch"]
    prompts = denoiser.encode_prompts([CAPTION] * len(latents))
    network.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian",
            target_modules=TARGETS if settings["model"] == "demo" else SD15_TARGETS,
        )
    )  # fmt: skip
    own = [p for p in network.parameters() if p.requires_grad]
    optimiser, ends = torch.optim.AdamW(own, 1e-4), []
    for _ in range(settings["steps"]):
        pick = torch.randint(len(latents), (batch,), generator=generator)
        sigma, noise = denoiser.draw_sigmas(batch, generator), torch.randn(latents[pick].shape, generator=generator)
        prediction = denoiser.predict(denoiser.noised(latents[pick], noise, sigma), sigma, prompts[pick])
        (prediction - denoiser.target(latents[pick], noise, sigma)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        ends.append(time.process_time())
    return {"seconds": (ends[-1] - ends[0]) / (len(ends) - 1), "peak": memory.peak()}


def diffusers_model(settings: dict):
    """(denoiser, latents, size in pixels) of the demo model, or of SD1.5's real UNet with random weights"""
    if settings["model"] == "demo":
        from seqlora_core.demo_model import DemoModel

        denoiser, channels, pixels = DemoModel(), 16, 8
    else:
        from diffusers import UNet2DConditionModel

        from benchmarks.tiny import make_pipeline, text_encoder
        from seqlora_core.unet_model import UNetModel

        pipeline = make_pipeline("sd15")
        pipeline.register_modules(
            unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768), text_encoder=text_encoder(768)
        )
        denoiser, channels, pixels = UNetModel(pipeline), 4, pipeline.vae_scale_factor
    side = settings["side"]
    return denoiser, random_latents(settings["pictures"], channels, side), (side * pixels, side * pixels)


def random_latents(count: int, channels: int, side: int) -> torch.Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def main() -> None:
    way, settings, output = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    denoiser, latents, size = diffusers_model(settings)
    found = ours("seqlora_core", denoiser, latents, size, settings) if way == "ours" else peft(denoiser, latents, settings)
    output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
