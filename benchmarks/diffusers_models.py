"""Which of diffusers' image models train, at tiny width with random weights; run by `benchmarks.models`.

    python -m benchmarks.diffusers_models OUTPUT.json [FAMILY ...]

One concept of two random latents in 20 steps, with calibration and replay, as comfy_models.py does in ComfyUI; what comes out is
written as PEFT spells it and read by the pipeline's own `load_lora_weights`.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
import traceback
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file

from benchmarks.diffusers_families import FAMILIES, TOKENS, WIDTH, Family, build
from seqlora_core.adapter import Adapter
from seqlora_core.attach import Attachment, Site, attached
from seqlora_core.calibration import Calibration
from seqlora_core.concept import References
from seqlora_core.config import TrainingConfig
from seqlora_core.denoiser import Conditioning, FlowMatching
from seqlora_core.drawing import draw
from seqlora_core.trainer import fit

PROMPTS = ["a first prompt", "a second prompt"]
ATTENTION, NOT_ADAPTED = re.compile(r"attn|attention"), re.compile(r"mod|norm|adaln|embed|ff|mlp|feed", re.IGNORECASE)


class Host(FlowMatching):
    """`denoiser.Denoiser` around one transformer, fed with random prompts: text encoders are not what is trained"""

    device = torch.device("cpu")

    def __init__(self, model: torch.nn.Module, family: Family):
        self.model, self.family = model, family

    def sites(self) -> list[Site]:
        return [
            Site(f"transformer.{path}", (m,), m.in_features, m.out_features)
            for path, m in self.model.named_modules()
            if isinstance(m, torch.nn.Linear) and ATTENTION.search(path) and not NOT_ADAPTED.search(path)
        ]

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        def numbers(prompt, *shape):
            return torch.randn(*shape, generator=torch.Generator().manual_seed(len(prompt)))

        context = torch.stack([numbers(p, TOKENS, WIDTH) for p in prompts])
        return Conditioning(context, torch.stack([numbers(p, WIDTH) for p in prompts]))

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return self.family.latent

    def draw_sigmas(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(count, generator=generator)

    def even_sigmas(self, count: int) -> torch.Tensor:
        return (torch.arange(count) + 0.5) / count

    def predict(self, noised, sigma, conditioning):
        return self.family.call(self.model, noised, sigma, conditioning)


def prove(family: Family, folder: Path) -> dict:
    model = build(family)
    host, before = Host(model, family), {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, *family.latent, generator=generator)
    prompts, noise = host.encode_prompts(PROMPTS), torch.randn(latents.shape, generator=generator)
    sigma, attachment = host.even_sigmas(4)[1:3], Attachment()

    @torch.no_grad()
    def prediction(adapter: Adapter | None = None) -> torch.Tensor:
        attachment.set_frozen(adapter)
        with attached(host.sites() if adapter else [], attachment):
            return host.predict(host.noised(latents, noise, sigma), sigma, prompts)

    drawn = draw(host, PROMPTS, 0, (64, 64), steps=2)
    calibration = Calibration(drawn.moments, PROMPTS, drawn.latents, visited=drawn.visited)
    config = TrainingConfig(
        rank=2, steps=20, learning_rate=3e-2, basis_rate=1e-3, batch=2, replay_batch=2, replay_weight=0.1,
        interference_weight=0.01, drift_budget=0.0, use_decoys=False, planned=4,
    )  # fmt: skip
    result = fit(host, References(latents, PROMPTS, (64, 64)), "first", [], calibration, config)
    plain, trained, target = prediction(), prediction(result.adapter), host.target(latents, noise, sigma)
    row = {
        "family": family.name, "model": family.model, "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(result.adapter.layers),
        "unused": sorted(s.name for s in host.sites() if s.name not in result.adapter.layers),
        "finite": bool(torch.tensor(result.losses).isfinite().all()),
        "loss_before": (plain - target).square().mean().item(), "loss_after": (trained - target).square().mean().item(),
        "weights_kept": all(torch.equal(v, before[k]) for k, v in model.state_dict().items()),
        "hooks_left": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "loader": bool(family.pipeline), "warnings": [],
    }  # fmt: skip
    if family.pipeline:
        loaded = load(family, model, result.adapter, folder)
        row["stock_layers"] = loaded
        row["stock_differs"] = ((prediction() - trained).abs().max() / (trained - plain).abs().max()).item()
    return row


def load(family: Family, model: torch.nn.Module, adapter: Adapter, folder: Path) -> int:
    """Into the model by its pipeline's own loader; returns how many layers it changed"""
    tensors = {f"{n}.lora_A.weight": d.down.contiguous() for n, d in adapter.layers.items()}
    tensors |= {f"{n}.lora_B.weight": d.up.contiguous() for n, d in adapter.layers.items()}
    save_file(tensors, folder / "adapter.safetensors")
    kind = getattr(diffusers, family.pipeline)
    nothing = dict.fromkeys(list(inspect.signature(kind.__init__).parameters)[1:])
    kind(**nothing | {"transformer": model}).load_lora_weights(folder, weight_name="adapter.safetensors")
    return sum(hasattr(m, "lora_A") and bool(m.lora_A) for m in model.modules())


def main() -> None:
    output, only, rows = Path(sys.argv[1]), sys.argv[2:], []
    torch.set_num_threads(1)
    for family in FAMILIES:
        if only and family.name not in only:
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(prove(family, Path(folder)))
        except Exception:  # noqa: BLE001 - the table says which failed
            rows.append({"family": family.name, "failed": traceback.format_exc()[-2000:]})
    version = {"host": f"diffusers {diffusers.__version__}", "torch": torch.__version__}
    output.write_text(json.dumps({"meta": version, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
