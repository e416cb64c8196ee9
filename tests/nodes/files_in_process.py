"""Run by ComfyUI's own python (not by pytest): LoRA files of every kind through our nodes' reading and the stock loader.

argv: ComfyUI checkout, this pack, folder of files, output file.  Writes what was found as JSON.
"""

import json
import sys
from pathlib import Path

comfy_root, pack, folder, output = map(Path, sys.argv[1:5])
sys.path.insert(0, str(pack / "benchmarks"))

from comfy_process import start  # noqa: E402

start(comfy_root, pack)

import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from seqlora_pack.nodes.comfy_demo import load_demo_model  # noqa: E402
from seqlora_pack.nodes.comfy_lora_files import fit, in_low_rank  # noqa: E402
from seqlora_pack.nodes.comfy_patches import Part, patch_model  # noqa: E402
from seqlora_pack.nodes.comfy_weights import Weights  # noqa: E402
from seqlora_pack.seqlora_core.adapter import read_safetensors  # noqa: E402
from seqlora_pack.seqlora_core.demo_model import DEMO_MODEL  # noqa: E402
from seqlora_pack.seqlora_core.errors import UserError  # noqa: E402


def small_unet():
    """ComfyUI's SD1.5 U-Net, 32 channels wide, with random weights"""
    config = comfy.supported_models.SD15(
        dict(
            image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2],
            transformer_depth=[1, 0], transformer_depth_middle=1, transformer_depth_output=[1, 1, 0, 0],
            context_dim=16, num_heads=-1, num_head_channels=8, use_spatial_transformer=True, use_linear_in_transformer=False,
            legacy=False, adm_in_channels=None, use_temporal_attention=False, dtype=torch.float32,
        )
    )  # fmt: skip
    model = config.get_model({}, "", "cpu")
    torch.manual_seed(9)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn_like(tensor) * 0.1)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def patched_weights(*patchers):
    found = {}
    for patcher in patchers:
        patcher.patch_model()
        found |= {k: comfy.utils.get_attr(patcher.model, k).detach().clone() for k in patcher.patches}
        patcher.unpatch_model()
    return found


def difference(ours, stock, plain):
    """Largest difference of a weight from the stock loader's, over the weight's largest value; least change of a weight that
    the file makes, likewise"""
    worst, least = 0.0, float("inf")
    for key, value in stock.items():
        scale = value.float().abs().max()
        worst = max(worst, float((ours[key].float() - value.float()).abs().max() / scale))
        least = min(least, float((value.float() - plain(key).float()).abs().max() / scale))
    return {"difference": worst, "change": least, "same_weights": set(ours) == set(stock), "weights": len(ours)}


def read(path, model, clip):
    weights = Weights(model, clip)
    fitted = fit(*read_safetensors(path), weights, path.name)
    return fitted, weights


def compare(path, model, clip, stock_tensors=None):
    states = [p.model.state_dict() for p in ([model] if clip is None else [model, clip.patcher])]
    before = {k: v.clone() for s in states for k, v in s.items()}
    fitted, weights = read(path, model, clip)
    again = fit(*read_safetensors(path), weights, path.name)  # by what the first reading found out, if it was plain
    ours = patch_model(model, clip, [Part(path.name, 0.75, fitted.adapter, fitted.patches)], weights)
    tensors = stock_tensors or comfy.utils.load_torch_file(str(path), safe_load=True)
    stock = comfy.sd.load_lora_for_models(model, clip, tensors, 0.75, 0.75)
    own, theirs = (patched_weights(m, *([c.patcher] if c else [])) for m, c, *_ in ((*ours,), (*stock, 0)))
    return {
        **difference(own, theirs, before.get), "plain": len(fitted.adapter.layers), "patches": len(fitted.patches),
        "patches_left": len(in_low_rank(fitted, weights).patches), "unknown": len(fitted.unknown),
        "read_again": again.adapter.layers.keys() == fitted.adapter.layers.keys()
        and all(torch.equal(d.dense(), fitted.adapter.layers[n].dense()) for n, d in again.adapter.layers.items())
        and again.patches.keys() == fitted.patches.keys(),
        "restored": all(torch.equal(v, before[k]) for s in states for k, v in s.items()),
    }  # fmt: skip


def compare_stack(model, names, strengths):
    """Several files at once against stock loaders one after another; patches a weight and largest difference"""
    weights, parts, stock = Weights(model, None), [], model
    for name, strength in zip(names, strengths):
        path = folder / "good" / f"{name}.safetensors"
        fitted, _ = read(path, model, None)
        parts.append(Part(name, strength, fitted.adapter, fitted.patches))
        tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
        stock = comfy.sd.load_lora_for_models(stock, None, tensors, strength, 0)[0]
    ours = patch_model(model, None, parts, weights)[0]
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    return {
        **difference(patched_weights(ours), patched_weights(stock), before.get),
        "per_weight": max(map(len, ours.patches.values())), "stock_per_weight": max(map(len, stock.patches.values())),
    }  # fmt: skip


def compare_factors(model, name, strength):
    """One file's changes as factors of full rank, as a saved stack has them, against the stock loader"""
    path = folder / "good" / f"{name}.safetensors"
    fitted, weights = read(path, model, None)
    fitted = in_low_rank(fitted, weights, True, strength)
    ours = patch_model(model, None, [Part(name, strength, fitted.adapter, fitted.patches)], weights)[0]
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    stock = comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    return difference(patched_weights(ours), patched_weights(stock), before.get)


found = {}
with torch.inference_mode():
    unet = small_unet()
    for path in sorted((folder / "good").glob("*.safetensors")):
        stock = None
        if path.stem == "diffusers" or path.stem.startswith("peft"):
            # the stock loader leaves these names of attention layers out: it is given them as it knows them
            prefix = "unet." if path.stem == "diffusers" else "base_model.model."
            stock = {f"unet.{k.removeprefix(prefix)}".replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out"): v
                     for k, v in comfy.utils.load_torch_file(str(path), safe_load=True).items()}  # fmt: skip
        found[path.stem] = compare(path, unet, None, stock)
    found["stack"] = compare_stack(unet, ["dora", "kohya", "loha", "locon"], [1.0, 0.5, -0.7, 1.3])
    found["stack_plain"] = compare_stack(unet, ["kohya", "locon", "locon_tucker", "kohya_float16"], [1.0, 0.5, -0.7, 0.1])
    found["factors"] = {
        f"{name} at {s}": compare_factors(unet, name, s) for name in ("oft", "boft", "loha") for s in (0.5, -1.0)
    }
    small = small_unet()
    for module in small.model.diffusion_model.modules():
        if type(module).__name__ == "Linear":
            module.weight = torch.nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
    found["stack_on_fp8"] = compare_stack(small, ["kohya", "locon"], [1.0, 0.5])
    model, clip, _ = load_demo_model(DEMO_MODEL)
    for path in sorted((folder / "sd3").glob("*.safetensors")):
        stock = None
        if path.stem == "text_peft":
            stock = {k.replace("base_model.model", "text_encoder"): v
                     for k, v in comfy.utils.load_torch_file(str(path), safe_load=True).items()}  # fmt: skip
        found[path.stem] = compare(path, model, clip, stock)
    errors, after_good = {}, {}
    warm = Weights(unet, None)
    fit(*read_safetensors(folder / "good" / "kohya.safetensors"), warm, "kohya")
    state = {k: v.clone() for k, v in unet.model.state_dict().items()}
    for path in sorted((folder / "broken").glob("*.safetensors")):
        try:
            fitted, weights = read(path, unet, None)
            patch_model(unet, None, [Part(path.name, 1.0, fitted.adapter, fitted.patches)], weights)
            errors[path.stem] = None
        except UserError as error:
            errors[path.stem] = str(error)
        try:
            fit(*read_safetensors(path), warm, path.name)
            after_good[path.stem] = None
        except UserError as error:
            after_good[path.stem] = str(error)
    found["errors"], found["errors_after_good"] = errors, after_good
    found["untouched"] = not unet.patches and all(torch.equal(v, state[k]) for k, v in unet.model.state_dict().items())
output.write_text(json.dumps(found))
