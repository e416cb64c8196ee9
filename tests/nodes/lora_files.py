"""LoRA files of every kind, written by the libraries that people train with: peft, diffusers, lycoris."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RANK = 4
UNET = dict(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET)


def shaken(module: nn.Module, scale: float = 0.1) -> None:
    """Random values in place of a fresh adapter's zeros"""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * scale * (p.std() + 0.1 if p.numel() > 1 else 0.1))


def peft_state(module: nn.Module, targets: list[str], **options) -> dict[str, Tensor]:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(1)
    module.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, **options), module)
    shaken(module)
    return {k: v.detach().clone().contiguous() for k, v in get_peft_model_state_dict(module).items()}


def unet_files(folder: Path) -> None:
    """Every spelling and every algorithm, of one small U-Net"""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model

    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "conv1", "conv_shortcut"]
    state = peft_state(unet(), targets)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state, weight_name="diffusers.safetensors")
    kohya = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in state.items()})
    kohya = {k: torch.tensor(2.0) if k.endswith("alpha") else v for k, v in kohya.items()}
    save_file(kohya, folder / "kohya.safetensors")
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        save_file({k: v.to(dtype) for k, v in kohya.items()}, folder / f"kohya_{str(dtype).removeprefix('torch.')}.safetensors")
    # changes of biases, where a layer has none and where it has one
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
    biases = {f"{stem}{layer}.diff_b": torch.randn(32) for layer in ("q", "out_0")}
    save_file(kohya | biases, folder / "no_bias.safetensors")
    old = {}
    for key, value in state.items():
        if ".attn" in key:
            key = key.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
            key = key.replace(".lora_A.weight", "_lora.down.weight").replace(".lora_B.weight", "_lora.up.weight")
            old[f"unet.{key}"] = value
    save_file(old, folder / "diffusers_old.safetensors")
    torch.manual_seed(2)
    whole = get_peft_model(unet(), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    shaken(whole)
    whole.save_pretrained(folder / "peft")
    (folder / "peft" / "adapter_model.safetensors").rename(folder / "peft.safetensors")
    for name, options in lycoris_kinds():
        lycoris_file(folder / f"{name}.safetensors", **options)
    peft_kinds(folder)


def peft_kinds(folder: Path) -> None:
    """LoHa and LoKr as peft writes them"""
    from peft import LoHaConfig, LoKrConfig, get_peft_model

    for name, config in (("peft_loha", LoHaConfig), ("peft_lokr", LoKrConfig)):
        torch.manual_seed(5)
        model = get_peft_model(unet(), config(r=RANK, alpha=RANK, target_modules=["to_q", "net.2"]))
        shaken(model)
        model.save_pretrained(folder / name)
        (folder / name / "adapter_model.safetensors").rename(folder / f"{name}.safetensors")


def lycoris_kinds() -> Iterator[tuple[str, dict]]:
    yield "locon", dict(algo="lora")
    yield "locon_tucker", dict(algo="lora", use_tucker=True)
    yield "loha", dict(algo="loha")
    yield "loha_tucker", dict(algo="loha", use_tucker=True)
    yield "lokr", dict(algo="lokr", factor=4)
    yield "lokr_full", dict(algo="lokr", factor=4, full_matrix=True)
    yield "dora", dict(algo="lora", dora_wd=True)
    yield "dora_rows", dict(algo="lora", dora_wd=True, wd_on_output=True)
    yield "oft", dict(algo="diag-oft", constraint=1e-3)
    yield "boft", dict(algo="boft", constraint=1e-3)
    yield "full", dict(algo="full")
    yield "glora", dict(algo="glora")
    yield "loha_dora", dict(algo="loha", dora_wd=True)
    yield "lokr_dora", dict(algo="lokr", factor=4, dora_wd=True)
    yield "lokr_both", dict(algo="lokr", factor=4, decompose_both=True)


def lycoris_file(path: Path, algo: str, **options) -> None:
    from lycoris import LycorisNetwork, create_lycoris

    torch.manual_seed(3)
    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"], "use_fnmatch": False})
    dims = dict(linear_dim=RANK, linear_alpha=RANK / 2, conv_dim=RANK, conv_alpha=RANK / 2)
    net = create_lycoris(unet(), 1.0, algo=algo, **dims, **options)
    net.apply_to()
    shaken(net, 0.02)
    net.save_weights(str(path), torch.float32, {})


def sd3_files(folder: Path) -> None:
    """A fused q, k, v under many names, and a text encoder, of the demo model"""
    from diffusers import StableDiffusion3Pipeline

    from seqlora_core.demo_model import DemoModel

    demo = DemoModel()
    state = peft_state(demo.mmdit, ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"])
    StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=state, weight_name="sd3_diffusers.safetensors")
    ours = load_file(folder / "sd3_diffusers.safetensors")
    onetrainer = {}
    for key, value in ours.items():
        stem, half = key.replace("transformer.", "lora_transformer_", 1).split(".lora_")
        onetrainer[f"{stem.replace('.', '_')}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = value
    save_file(onetrainer, folder / "sd3_onetrainer.safetensors")
    torch.manual_seed(4)
    layer, width = "joint_blocks.0.x_block.attn.qkv", demo.sites()[0].in_features
    down, up = torch.randn(RANK, width), torch.randn(3 * width, RANK) * 0.1
    kohya = {f"lora_unet_{layer.replace('.', '_')}.lora_{k}.weight": v for k, v in (("down", down), ("up", up))}
    save_file(kohya | {f"lora_unet_{layer.replace('.', '_')}.alpha": torch.tensor(1.0)}, folder / "sd3_musubi.safetensors")
    toolkit = {f"diffusion_model.{layer}.lora_{k}.weight": v for k, v in (("A", down), ("B", up))}
    save_file(toolkit, folder / "sd3_ai_toolkit.safetensors")
    text_files(folder)


def text_files(folder: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from seqlora_core.demo_model import CLIP_SIZE

    text = peft_state(CLIPTextModel(CLIPTextConfig(**CLIP_SIZE)), ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])
    text = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in text.items()}
    StableDiffusionPipeline.save_lora_weights(folder, text_encoder_lora_layers=text, weight_name="text_diffusers.safetensors")
    kohya = {}
    for key, value in text.items():
        stem, half = key.split(".lora_")
        kohya[f"lora_te_{stem.replace('.', '_')}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = value
    save_file(kohya, folder / "text_kohya.safetensors")
    save_file({f"base_model.model.{k}": v for k, v in text.items()}, folder / "text_peft.safetensors")


def broken_files(folder: Path) -> None:
    good = load_file(folder.parent / "good" / "kohya.safetensors")
    first = next(k for k in good if k.endswith("attn1_to_q.lora_up.weight"))
    whole = (folder.parent / "good" / "kohya.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "header_cut.safetensors").write_bytes(whole[:100])
    (folder / "text.safetensors").write_bytes(b"<html>not found</html>")
    (folder / "empty.safetensors").write_bytes(b"")
    torch.save(good, folder / "torch_archive.safetensors")
    save_file({}, folder / "no_tensors.safetensors")
    save_file({k: v for k, v in good.items() if k != first}, folder / "no_up.safetensors")
    save_file({k: v for k, v in good.items() if k != first.replace("_up", "_down")}, folder / "no_down.safetensors")
    save_file(good | {first: torch.full_like(good[first], torch.nan)}, folder / "nan.safetensors")
    save_file(good | {first: torch.full_like(good[first], torch.inf).half()}, folder / "inf.safetensors")
    save_file(good | {first: torch.randn(48, RANK)}, folder / "other_size.safetensors")
    save_file(good | {first: torch.randn(32, RANK + 1)}, folder / "ranks_differ.safetensors")
    save_file({k.replace("lora_unet_", "lora_unet_another_"): v for k, v in good.items()}, folder / "another_model.safetensors")
    save_file({"model.layers.0.weight": torch.ones(3, 3)}, folder / "no_lora.safetensors")
    stem = first.removesuffix(".lora_up.weight")
    save_file(
        {f"{stem}.hada_w1_a": torch.ones(32, 4), f"{stem}.hada_w1_b": torch.ones(4, 32)}, folder / "half_loha.safetensors"
    )
    loha = {f"{stem}.hada_w{i}_{s}": torch.ones(*shape) for i in (1, 2) for s, shape in (("a", (48, 4)), ("b", (4, 48)))}
    save_file(loha, folder / "loha_other_size.safetensors")
    kron = {f"{stem}.lokr_w1": torch.ones(4, 4), f"{stem}.lokr_w2": torch.ones(10, 10)}
    save_file(kron, folder / "lokr_other_size.safetensors")
    save_file({f"{stem}.diff": torch.ones(48, 48)}, folder / "full_other_size.safetensors")
    sides = {f"{stem}.hada_w{i}_{s}": torch.ones(*shape) for i in (1, 2) for s, shape in (("a", (32, 3)), ("b", (5, 32)))}
    save_file(sides, folder / "loha_ranks.safetensors")
    loha = {f"{stem}.hada_w{i}_{s}": torch.ones(*shape) for i in (1, 2) for s, shape in (("a", (32, 4)), ("b", (4, 32)))}
    save_file(loha | {f"{stem}.alpha": torch.tensor(1e30)}, folder / "loha_alpha.safetensors")
    save_file({k: v.to(torch.int8) for k, v in loha.items()}, folder / "loha_int8.safetensors")
    save_file({f"{stem}.set_weight": torch.full((32, 32), torch.nan)}, folder / "set_nan.safetensors")
    save_file(good | {f"{stem}.dora_scale": torch.ones(5, 1)}, folder / "dora_short.safetensors")
    save_file(good | {first: torch.tensor(1.0)}, folder / "number.safetensors")
    save_file({f"{stem}.lokr_w1": torch.ones(4), f"{stem}.lokr_w2": torch.ones(8, 8)}, folder / "lokr_line.safetensors")
    parts = {f"{stem}.lokr_w1": torch.ones(4, 4), f"{stem}.lokr_w2_a": torch.ones(8, 3)}
    save_file(parts | {f"{stem}.lokr_w2_b": torch.ones(5, 8)}, folder / "lokr_ranks.safetensors")
    parts |= {f"{stem}.lokr_w2_b": torch.ones(3, 8), f"{stem}.alpha": torch.tensor(1e30)}
    save_file(parts, folder / "lokr_alpha.safetensors")
    glora = {f"{stem}.{n}.weight": torch.ones(*shape) for n, shape in zip(("a1", "a2", "b1", "b2"), ((4, 48), (48, 4)) * 2)}
    save_file(glora, folder / "glora_other_size.safetensors")
    glora = {f"{stem}.{n}.weight": torch.ones(*shape) for n, shape in zip(("a1", "a2", "b1", "b2"), ((4, 32), (32, 4)) * 2)}
    save_file(glora | {f"{stem}.alpha": torch.tensor(1e30)}, folder / "glora_alpha.safetensors")
    dora = {f"{stem}.dora_scale": torch.ones(1, 32), f"{stem}.alpha": torch.tensor(torch.nan)}
    save_file(good | dora, folder / "dora_alpha.safetensors")
    save_file({f"{stem}.oft_blocks": torch.ones(4, 6, 8)}, folder / "oft_oblong.safetensors")
    tucker = {f"{stem}.hada_w{i}_{s}": torch.ones(4, 32) for i in (1, 2) for s in "ab"}
    cores = {f"{stem}.hada_t1": torch.ones(4, 4, 1, 1), f"{stem}.hada_t2": torch.ones(4, 5, 1, 1)}
    save_file(tucker | cores, folder / "loha_core.safetensors")
    peft_rotations(folder)


def peft_rotations(folder: Path) -> None:
    """OFT and BOFT as peft writes them: other tensors, on the other side of the weight than ComfyUI's"""
    from peft import BOFTConfig, OFTConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    for name, config in (
        ("peft_oft", OFTConfig(r=0, oft_block_size=8, target_modules=["to_q"])),
        ("peft_boft", BOFTConfig(boft_block_size=8, target_modules=["to_q"])),
    ):
        model = inject_adapter_in_model(config, unet())
        state = get_peft_model_state_dict(model)
        save_file({f"base_model.model.{k}": v.contiguous() for k, v in state.items()}, folder / f"{name}.safetensors")
