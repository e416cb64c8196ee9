"""Run by ComfyUI's own python (not by pytest): training on and stacking onto models whose weights are fp8 or stay offloaded.

argv: ComfyUI checkout, this pack, a folder to train into, output file (JSON).
"""

import json
import sys
from pathlib import Path

comfy_root, pack, folder, output = map(Path, sys.argv[1:5])
sys.path.insert(0, str(pack / "benchmarks"))

from comfy_process import start  # noqa: E402

start(comfy_root, pack)

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from seqlora_pack.nodes.comfy_demo import load_demo_model  # noqa: E402
from seqlora_pack.nodes.comfy_denoiser import ComfyDenoiser  # noqa: E402
from seqlora_pack.nodes.comfy_patches import Part, patch_model  # noqa: E402
from seqlora_pack.nodes.comfy_weights import Weights  # noqa: E402
from seqlora_pack.seqlora_core.adapter import load_adapter  # noqa: E402
from seqlora_pack.seqlora_core.calibration import calibrate  # noqa: E402
from seqlora_pack.seqlora_core.config import TrainingConfig  # noqa: E402
from seqlora_pack.seqlora_core.demo_model import DEMO_MODEL  # noqa: E402
from seqlora_pack.seqlora_core.library import Library  # noqa: E402
from seqlora_pack.seqlora_core.teach import train_concept  # noqa: E402

_, clip, vae = load_demo_model(DEMO_MODEL)
weights = comfy.utils.load_torch_file(str(DEMO_MODEL), safe_load=True)
out = {}


FP8, SCALED = torch.float8_e4m3fn, "scaled"


def model_of(dtype):
    """The demo's denoiser with weights of this type, as Load Diffusion Model makes it"""
    given = scaled(weights) if dtype is SCALED else dict(weights)
    options = {"dtype": dtype} if isinstance(dtype, torch.dtype) else {}
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(given, model_options=options)


def scaled(weights):
    """As files of scaled fp8 have them: each matrix over a number of its own, which stands beside it"""
    prefix = "model.diffusion_model."
    out = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    for name in [n for n, w in out.items() if n.endswith(".weight") and w.ndim == 2]:
        scale = out[name].float().abs().max() / torch.finfo(FP8).max
        out[name], out[name.removesuffix("weight") + "scale_weight"] = (out[name].float() / scale).to(FP8), scale
    return out | {"scaled_fp8": torch.tensor([], dtype=FP8)}


class Offloaded(ComfyDenoiser):
    """As on a small card: on a processor ComfyUI would load all.  Remembers what was asked of ComfyUI"""

    asked = []

    def _load(self):
        original = comfy.model_management.load_models_gpu
        comfy.model_management.load_models_gpu = lambda models, room=0, **more: self.asked.append((room, more))
        super()._load()
        comfy.model_management.load_models_gpu = original
        if not self.base.model_lowvram:
            with torch.inference_mode():
                self.patcher.patch_model(device_to=self.device, lowvram_model_memory=200_000)


def train(name, model, host=ComfyDenoiser, **options):
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    with torch.inference_mode(False), torch.enable_grad(), host(model, clip, vae, **options) as denoiser:
        opened = Library(folder / name, denoiser.fingerprint(), 4, create=True)
        read = max(far(s.read(*s.modules), f"model.{s.name}.weight") for s in denoiser.sites())
        opened.keep_calibration(calibrate(denoiser, (64, 64), 16))
        images = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
        config = TrainingConfig(
            steps=30, batch=4, replay_batch=4, drift_budget=0.0, replay_weight=1.0, gradient_checkpointing=bool(options)
        )
        concept, fit = train_concept(denoiser, opened, images, "toy", "octzu", "animal", config=config)
    after = model.model.state_dict()
    out[name] = {
        "read": read,
        "first": sum(fit.losses[:6]) / 6,
        "last": sum(fit.losses[-6:]) / 6,
        "trained": all(bool(d.up.any()) and d.up.dtype == torch.float32 for d in concept.adapter.layers.values()),
        "untouched": all(same(before[k], after[k]) for k in before),
        "offloaded": sum(hasattr(m, "prev_comfy_cast_weights") for m in model.model.modules()),
        "types": sorted({str(v.dtype) for k, v in after.items() if k.endswith("qkv.weight")}),
    }


def far(found, name):
    """Of a weight from what it is in the file, as a share of that"""
    wanted = weights[name].float()
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


@torch.inference_mode()
def prediction(patched, memory=0):
    """memory: bytes of weights that may be loaded; what is above stays offloaded and is patched when it is used"""
    generator = torch.Generator().manual_seed(5)
    x, sigma = torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([0.25, 0.75])
    tokens = clip.encode_from_tokens(clip.tokenize("an octzu animal"), return_pooled=True, return_dict=True)
    context, pooled = tokens["cond"].expand(2, -1, -1), tokens["pooled_output"].expand(2, -1)
    patched.patch_model(device_to=patched.load_device, lowvram_model_memory=memory)
    conditions = patched.model.extra_conds(cross_attn=context, noise=x, device=x.device, pooled_output=pooled)
    found = patched.model.apply_model(x, sigma, **{k: c.cond for k, c in conditions.items()}).float()
    offloaded = sum(bool(getattr(m, "weight_function", None)) for m in patched.model.modules())
    patched.detach()
    return found, offloaded


def stack(name, dtype, memory):
    """Ours and the stock loader's patches on one and the same model"""
    model, loras = model_of(dtype), [folder / kind / "toy.safetensors" for kind in ("float32", "fp8")]
    parts = [Part(path.parent.name, 1.0, load_adapter(path)) for path in loras]
    ours, _, missing = patch_model(model, None, parts, Weights(model, None))
    assert not missing, missing
    stock = model
    for path in loras:
        file = comfy.utils.load_torch_file(str(path), safe_load=True)
        stock = comfy.sd.load_lora_for_models(stock, None, file, 1.0, 0.0)[0]
    (plain, _), (theirs, _), (found, offloaded) = prediction(model), prediction(stock, memory), prediction(ours, memory)
    effect = (theirs - plain).square().mean().item()
    out[name] = {"effect": effect, "difference": (found - theirs).square().mean().item(), "offloaded": offloaded}


train("float32", model_of(None))
train("fp8", model_of(FP8))
train("scaled_fp8", model_of(SCALED))
train("offloaded", model_of(None), Offloaded, offloads=8)
out["asked"] = {
    "rooms": [room for room, _ in Offloaded.asked], "full": [more["force_full_load"] for _, more in Offloaded.asked],
    "drawing": model_of(None).model.memory_required((8, 16, 8, 8)),
}  # fmt: skip
stack("stack", None, 0)
stack("stack_offloaded", None, 200_000)
stack("stack_fp8", FP8, 0)
stack("stack_fp8_offloaded", FP8, 200_000)
stack("stack_scaled_fp8", SCALED, 0)
stack("stack_scaled_fp8_offloaded", SCALED, 200_000)
output.write_text(json.dumps(out))
