"""Proof that ComfyUI's image models train, family by family: run by ComfyUI's own python.

argv: ComfyUI checkout, output json, names of families (all if none).  See benchmarks/models.py.
"""

import json
import logging
import sys
import tempfile
import time
import traceback
from pathlib import Path

root, output, only = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import comfy_process  # noqa: E402

comfy_process.start(root)

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import comfyui_version  # noqa: E402
import torch  # noqa: E402
from comfy_families import FAMILIES, PROMPTS, SIZE, Family, Fed, build  # noqa: E402
from seqlora_pack.seqlora_core.adapter import save_adapter  # noqa: E402
from seqlora_pack.seqlora_core.attach import Attachment, attached  # noqa: E402
from seqlora_pack.seqlora_core.calibration import Calibration  # noqa: E402
from seqlora_pack.seqlora_core.concept import References  # noqa: E402
from seqlora_pack.seqlora_core.config import TrainingConfig  # noqa: E402
from seqlora_pack.seqlora_core.drawing import draw  # noqa: E402
from seqlora_pack.seqlora_core.trainer import fit  # noqa: E402

STEPS = 20


def prove(family: Family, model, folder: Path) -> dict:
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    with torch.inference_mode(False), torch.enable_grad(), Fed(model, family) as denoiser:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(2, *family.latent, generator=generator)
        prompts, noise = denoiser.encode_prompts(PROMPTS), torch.randn(latents.shape, generator=generator)
        sigma, attachment = denoiser.even_sigmas(4)[1:3], Attachment()

        @torch.no_grad()
        def prediction(adapter=None):
            attachment.set_frozen(adapter)
            with attached(denoiser.sites(), attachment):
                return denoiser.predict(denoiser.noised(latents, noise, sigma), sigma, prompts)

        def error(predicted):
            return (predicted - denoiser.target(latents, noise, sigma)).square().mean().item()

        drawn = draw(denoiser, PROMPTS, 0, SIZE, steps=2)
        calibration = Calibration(drawn.moments, PROMPTS, drawn.latents, visited=drawn.visited)
        config = TrainingConfig(
            rank=2, steps=STEPS, learning_rate=3e-2, basis_rate=1e-3, batch=2, replay_batch=2, replay_weight=0.1, interference_weight=0.01,
            drift_budget=0.0, use_decoys=False, planned=4,
        )  # fmt: skip
        result = fit(denoiser, References(latents, PROMPTS, SIZE), "first", [], calibration, config)
        drawn = denoiser.sample(prompts, seed=0, steps=2, guidance=2.0, size=SIZE)
        plain, trained = prediction(), prediction(result.adapter)
        row = {
            "family": family.name, "model": type(denoiser.base).__name__, "prediction": denoiser.base.model_type.name,
            "parameters": sum(p.numel() for p in denoiser.base.parameters()), "layers": len(result.adapter.layers),
            "unused": sorted(s.name for s in denoiser.sites() if s.name not in result.adapter.layers),
            "finite": bool(torch.tensor(result.losses).isfinite().all() and drawn.isfinite().all()),
            "loss_before": error(plain), "loss_after": error(trained),
        }  # fmt: skip
    path = folder / "adapter.safetensors"
    save_adapter(path, result.adapter)
    with _Warnings() as warnings:
        file = comfy.utils.load_torch_file(str(path), safe_load=True)
        patched = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)[0]
    row["stock_layers"], row["warnings"] = len(patched.patches), warnings.lines
    with torch.inference_mode(False), Fed(patched, family) as denoiser:
        stock = prediction_of(denoiser, latents, noise, sigma, prompts)
    patched.unpatch_model()
    row["stock_differs"] = ((stock - trained).abs().max() / (trained - plain).abs().max()).item()
    row["weights_kept"] = all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items() if v.is_floating_point())
    row["hooks_left"] = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())
    return row


@torch.no_grad()
def prediction_of(denoiser, latents, noise, sigma, prompts):
    return denoiser.predict(denoiser.noised(latents, noise, sigma), sigma, prompts)


class _Warnings(logging.Handler):
    """What ComfyUI logs while it loads a LoRA: a key that it does not know is a warning."""

    def __enter__(self):
        self.lines = []
        logging.getLogger().addHandler(self)
        return self

    def emit(self, record):
        if record.levelno >= logging.WARNING:
            self.lines.append(record.getMessage())

    def __exit__(self, *_):
        logging.getLogger().removeHandler(self)


rows = []
for family in FAMILIES:
    if only and family.name not in only:
        continue
    start = time.perf_counter()
    try:
        model = build(family)
        if model is not None:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(prove(family, model, Path(folder)))
                rows[-1]["seconds"] = time.perf_counter() - start
    except Exception:
        rows.append({"family": family.name, "failed": traceback.format_exc()[-2000:]})
version = {"host": f"ComfyUI {comfyui_version.__version__}", "torch": torch.__version__}
output.write_text(json.dumps({"meta": version, "rows": rows}, indent=1), encoding="utf-8")
