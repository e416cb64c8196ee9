"""Run by ComfyUI's own python (not by pytest): what a saved stack does beside what Apply Stack does, for every kind of change.

argv: ComfyUI checkout, this pack, a folder for LoRAs, output file (JSON).
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

comfy_root, pack, folder, output = map(Path, sys.argv[1:5])
sys.path.insert(0, str(pack / "benchmarks"))

from comfy_process import start  # noqa: E402

start(comfy_root, pack)

import comfy.lora  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from seqlora_pack.nodes.apply_stack import SeqLoRAApplyStack  # noqa: E402
from seqlora_pack.nodes.comfy_demo import load_demo_model  # noqa: E402
from seqlora_pack.nodes.comfy_patches import StackPatch  # noqa: E402
from seqlora_pack.nodes.comfy_weights import Weights  # noqa: E402
from seqlora_pack.nodes.composing import compose_stack  # noqa: E402
from seqlora_pack.nodes.save_stack import SeqLoRASaveStack  # noqa: E402
from seqlora_pack.nodes.types import MODEL, Entry, Stack  # noqa: E402
from seqlora_pack.seqlora_core.adapter import LayerDelta  # noqa: E402
from seqlora_pack.seqlora_core.demo_model import DEMO_MODEL  # noqa: E402

folder_paths.folder_names_and_paths["loras"] = ([str(folder)], {".safetensors"})
STEM = "diffusion_model.joint_blocks.0.x_block.attn.proj"
WIDTH = 192
generator = torch.Generator().manual_seed(0)


def randn(*shape, size=0.05):
    return size * torch.randn(*shape, generator=generator)


def plain():
    return {f"{STEM}.lora_down.weight": randn(4, WIDTH), f"{STEM}.lora_up.weight": randn(WIDTH, 4)}


def kinds():
    halves = {f"{STEM}.lokr_w1": randn(4, 4, size=1), f"{STEM}.lokr_w2": randn(WIDTH // 4, WIDTH // 4)}
    return {
        "plain": plain(),
        "other": plain(),
        "full": {f"{STEM}.diff": randn(WIDTH, WIDTH, size=0.01)},
        "dora": plain() | {f"{STEM}.dora_scale": 1 + randn(WIDTH, 1), "text_model.embeddings.position_ids": torch.arange(77)},
        "oft": {f"{STEM}.oft_blocks": randn(8, 24, 24, size=0.1), f"{STEM}.alpha": torch.tensor(0.0)},
        "lokr": {k: v.half() for k, v in halves.items()} | {f"{STEM}.alpha": torch.tensor(1e5).half()},
        "bias": {f"{STEM}.diff_b": randn(WIDTH)},
    }


def changes(patched, clip):
    """Key -> what became of the weight, less what it was"""
    found = {}
    for patcher in (patched, clip.patcher):
        before = {k: comfy.utils.get_attr(patcher.model, k).detach().clone() for k in patcher.patches}
        patcher.patch_model()
        found |= {k: comfy.utils.get_attr(patcher.model, k).detach() - before[k] for k in patcher.patches}
        patcher.unpatch_model()
    return found


def away(found, wanted):
    """Of one set of changes from another, as a share of that"""
    keys = {*found, *wanted}
    zero = torch.zeros(())
    error = sum(float((found.get(k, zero) - wanted.get(k, zero)).double().square().sum()) for k in keys)
    return (error / sum(float(w.double().square().sum()) for w in wanted.values())) ** 0.5


def stack(*names):
    return Stack([Entry("", f"{name}.safetensors", 1.0 if i == 0 else 0.6) for i, name in enumerate(names)])


def applied(*names, mode="sum", amount=1.0, **options):
    return changes(*SeqLoRAApplyStack.execute(model, clip, stack(*names), mode, amount, **options).args[:2])


def in_turns(mode):
    """Two that share the sampling but no step of it, with norm control: how far each is from itself alone"""
    entries = [replace(e, start=i / 2, end=(i + 1) / 2) for i, e in enumerate(stack("plain", "other").entries)]
    parts = compose_stack(Stack(entries), mode, 1.0, None, Weights(model, clip), norm_control=True).parts
    own = [compose_stack(Stack([e]), "sum", 1.0, None, Weights(model, clip)).parts[0] for e in entries]
    pairs = [(p.adapter.layers[STEM], o.adapter.layers[STEM]) for p, o in zip(parts, own)]
    return max(float((p.dense() - o.dense()).norm() / o.dense().norm()) for p, o in pairs)


def in_own_steps():
    """A DoRA behind a plain LoRA, both in steps of their own: how far what their hooks do together is from what each does alone; and
    what is told of that and of the DoRA beside one that acts in all steps"""
    first, second, key = Entry("", "plain.safetensors"), Entry("", "dora.safetensors"), f"{STEM}.weight"
    timed = replace(second, end=0.5)
    _, hooked, _, told = SeqLoRAApplyStack.execute(model, clip, Stack([replace(first, end=0.8), timed]), "sum", 1.0).args
    before = comfy.utils.get_attr(model.model, key).detach()
    patches = [(1.0, hook.weights[key], 1.0, None, None) for hook in hooked.apply_hooks_to_conds.hooks]
    after = comfy.lora.calculate_weight(patches, before.clone(), key)
    alone = [changes(*SeqLoRAApplyStack.execute(model, clip, Stack([e]), "sum", 1.0).args[:2])[key] for e in (first, second)]
    beside = SeqLoRAApplyStack.execute(model, clip, Stack([first, timed]), "sum", 1.0).args[3]
    return away({key: after - before}, {key: sum(alone)}), told, beside


def saved(*names, mode="sum", **options):
    SeqLoRASaveStack.execute(stack(*names), "saved", mode, 1.0, True, model=model, clip=clip, **options)
    return by_stock("saved")


def by_stock(name):
    tensors = comfy.utils.load_torch_file(str(folder / f"{name}.safetensors"), safe_load=True)
    return changes(*comfy.sd.load_lora_for_models(model, clip, tensors, 1.0, 1.0))


def without_text():
    """A LoRA of both of which only the model's part is wanted, saved without a clip: how far from that part"""
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    both = {f"{text}.lora_down.weight": randn(4, 64), f"{text}.lora_up.weight": randn(64, 4)}
    save_file(plain() | both, folder / "both.safetensors")
    wanted = Stack([Entry("", "both.safetensors", part=MODEL)])
    SeqLoRASaveStack.execute(wanted, "saved", "sum", 1.0, True, model=model)
    return away(by_stock("saved"), changes(*SeqLoRAApplyStack.execute(model, clip, wanted, "sum", 1.0).args[:2]))


def in_a_padded_weight():
    """How far a change is from its own columns' in a weight that a patch before has made wider"""
    weight, layer = randn(6, 8), LayerDelta(randn(2, 5), randn(6, 2))
    wanted = weight.clone()
    wanted[:, :5] += 0.5 * layer.dense()
    return float((StackPatch([(0.5, layer)]).calculate_weight(weight, "", 1.0, 1.0, None, None) - wanted).abs().max())


with torch.inference_mode():
    model, clip, _ = load_demo_model(DEMO_MODEL)
    everything = kinds()
    for name, tensors in everything.items():
        save_file(tensors, folder / f"{name}.safetensors")
    others = [name for name in everything if name != "plain"]
    bias = f"{STEM}.bias"
    lengths = {
        mode: float(applied("bias", "plain", "other", "full", mode=mode, norm_control=True)[bias].norm())
        for mode in ("sum", "weights")
    }
    found = {
        "saved": {
            f"{mode} {name}": away(saved("plain", name, mode=mode), applied("plain", name, mode=mode))
            for mode in ("sum", "weights") for name in others
        } | {"sum full, dora": away(saved("full", "dora"), applied("full", "dora"))},
        "amount 0": {n: away(applied("plain", n, mode="weights", amount=0.0), applied("plain", n)) for n in others},
        "alone": {n: away(applied(n, mode="weights"), applied(n)) for n in others},
        "stock": {n: away(applied(n), by_stock(n)) for n in others},
        "in a padded weight": in_a_padded_weight(),
        "in turns": max(map(in_turns, ("sum", "weights"))),
        "in own steps": in_own_steps(),
        "without text": without_text(),
        "bias saved": away(saved("bias"), by_stock("bias")),
        "norm control": {m: v / float(by_stock("bias")[bias].norm()) for m, v in lengths.items()},
    }  # fmt: skip
output.write_text(json.dumps(found))
