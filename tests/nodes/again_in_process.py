"""Run by ComfyUI's own python (not by pytest): what our nodes take over from an earlier run, and what they do anew.

argv: ComfyUI checkout, this pack, a folder for LoRAs, output file (JSON).
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

comfy_root, pack, folder, output = map(Path, sys.argv[1:5])
sys.path.insert(0, str(pack / "benchmarks"))

from comfy_process import start  # noqa: E402

start(comfy_root, pack)

import comfy.lora  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from seqlora_pack.nodes import comfy_lora_files, loading  # noqa: E402
from seqlora_pack.nodes.apply_stack import SeqLoRAApplyStack  # noqa: E402
from seqlora_pack.nodes.calibrate import SeqLoRACalibrate, _triggers  # noqa: E402
from seqlora_pack.nodes.comfy_demo import load_demo_model  # noqa: E402
from seqlora_pack.nodes.comfy_denoiser import ComfyDenoiser  # noqa: E402
from seqlora_pack.nodes.comfy_weights import Weights  # noqa: E402
from seqlora_pack.nodes.composing import compose_stack, general_moments  # noqa: E402
from seqlora_pack.nodes.concept import SeqLoRAConcept  # noqa: E402
from seqlora_pack.nodes.interference_report import SeqLoRAInterferenceReport  # noqa: E402
from seqlora_pack.nodes.save_stack import SeqLoRASaveStack  # noqa: E402
from seqlora_pack.nodes.types import Entry, Stack  # noqa: E402
from seqlora_pack.seqlora_core.adapter import Adapter, LayerDelta  # noqa: E402
from seqlora_pack.seqlora_core.calibration import Calibration  # noqa: E402
from seqlora_pack.seqlora_core.concept import Concept  # noqa: E402
from seqlora_pack.seqlora_core.demo_model import DEMO_MODEL  # noqa: E402
from seqlora_pack.seqlora_core.errors import UserError  # noqa: E402
from seqlora_pack.seqlora_core.library import Library  # noqa: E402
from seqlora_pack.seqlora_core.lora_moments import general_calibration, general_path, keep_moments  # noqa: E402
from seqlora_pack.seqlora_core.statistics import Moments  # noqa: E402
from seqlora_pack.seqlora_core.tensor_file import read_safetensors, write_safetensors  # noqa: E402

folder_paths.set_temp_directory(str(folder))
SeqLoRAInterferenceReport.hidden = SimpleNamespace(prompt=None, extra_pnginfo=None)  # what the executor tells a node
folder_paths.folder_names_and_paths["loras"] = ([str(folder)], {".safetensors"})
NAME = "joint_blocks.0.x_block.attn.proj"
UNET, TEXT = f"lora_unet_{NAME.replace('.', '_')}", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
generator = torch.Generator().manual_seed(0)


def lora(stem, rows, columns):
    down, up = torch.randn(4, columns, generator=generator), 0.1 * torch.randn(rows, 4, generator=generator)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}


def put(name, tensors):
    save_file(tensors, folder / f"{name}.safetensors")


def triggers(text, *names):
    """What `_triggers` finds for files that say nothing themselves, or its sentence"""
    try:
        return _triggers(text, [Entry("", n) for n in names], {n: Adapter({}) for n in names})
    except UserError as error:
        return str(error)


def records():
    """What Calibrate says, run after run, and whether both nodes' fingerprints are others after the records are gone"""
    put("plain", lora(UNET, 192, 192))
    with torch.inference_mode(False), torch.no_grad(), ComfyDenoiser(model, clip, vae, [weights.name_of[KEY]]) as denoiser:
        general_calibration(denoiser, folder / "seqlora", (32, 32), 2)  # the node's own draws many
    said = []

    def calibrate(size=32, pictures=1, seed=0):
        made = SeqLoRACalibrate.execute(model, clip, vae, "plain", "ohwx man", size, pictures, seed)
        said.append(made.args[1])

    def fingerprints():
        concept = SeqLoRAConcept.fingerprint_inputs("", "", 1.0, lora="plain.safetensors")
        return concept, SeqLoRACalibrate.fingerprint_inputs("plain")

    for change in ({}, {}, {"seed": 1}, {"seed": 1, "pictures": 2}, {"size": 64, "seed": 1, "pictures": 2}):
        calibrate(**change)
    path = next(folder.glob("plain.*.stats.safetensors"))
    tensors, metadata = read_safetensors(path)
    write_safetensors(path, tensors, {k: v for k, v in metadata.items() if k != "seqlora.drawn"})  # as older versions do
    calibrate()
    before = fingerprints()
    path.unlink()
    stack, states = Stack([Entry("", "plain")]), []
    for saved in (None, folder / "mine.safetensors"):
        states.append(SeqLoRASaveStack.fingerprint_inputs("mine", overwrite=False))
        SeqLoRASaveStack.execute(stack, "mine", "sum", 1.0, False) if saved is None else saved.unlink()
    states.append(SeqLoRASaveStack.fingerprint_inputs("mine", overwrite=False))
    return {"said": said, "fingerprints": [a != b for a, b in zip(before, fingerprints())], "saved": states}


def elsewhere():
    """Two LoRAs with moments of another model, then of this one too: what the report rests on and what the stack says"""
    names, said = ("one", "two"), {}
    stack = Stack([Entry("", name) for name in names])
    seen = Moments({weights.name_of[KEY]: torch.eye(192)})
    for when, base in (("elsewhere", "0123456789abcdef"), ("here", weights.fingerprint)):
        for name in names:
            if when == "elsewhere":
                put(name, lora(UNET, 192, 192))
            path = keep_moments(folder / f"{name}.safetensors", base, seen, f"{name}zu thing")
            if when == "here":
                os.utime(path, (0, 0))  # the others stay the newest
        data = json.loads(SeqLoRAInterferenceReport.execute(stack, model=model, clip=clip).args[2])
        _, _, triggers, report = SeqLoRAApplyStack.execute(model, clip, stack, "sum", 1.0).args
        said[when] = {"mode": data["mode"], "triggers": triggers, "report": report}
        if when == "elsewhere":
            try:
                SeqLoRAApplyStack.execute(model, clip, stack, "data", 1.0)
            except UserError as error:
                said["data"] = str(error)
    return said


def in_pieces():
    """The report on two LoRAs, and on the same with the first in pieces that make the whole, and with one beside that is off and
    was never calibrated: the mode, and what the projection leaves moved of each"""
    whole, other = Entry("", "one"), Entry("", "two")
    stacks = {
        "whole": [whole],
        "layers": [replace(whole, strength=0.4), replace(whole, strength=0.6, layers="*")],
        "steps": [replace(whole, strength=0.5), replace(whole, strength=0.5, end=0.7)],
        "off": [whole, Entry("", "dora", 0.0)],
    }
    said = {}
    for name, entries in stacks.items():
        data = json.loads(SeqLoRAInterferenceReport.execute(Stack([*entries, other]), model=model, clip=clip).args[2])
        said[name] = [data["mode"], sum(data["crosstalk_after"], data["disturbance_after"])]
    return said


def chosen():
    """A concept of a library that was calibrated nowhere else, by its name and among all files: what stack and report say of it"""
    name, said = weights.name_of[KEY], []
    library = Library(folder / "seqlora" / "taught", weights.fingerprint, create=True)
    layer = LayerDelta(torch.randn(4, 192, generator=generator), torch.randn(192, 4, generator=generator))
    moments = Moments({name: torch.eye(192)})
    library.add(Concept("octopus", "octzu", "animal", Adapter({name: layer}), moments, {}, torch.zeros(0), []))
    for entry in (Entry("taught", "octopus"), Entry("", str(Path("seqlora", "taught", "octopus.safetensors")))):
        stack = Stack([entry, Entry("", "one")])
        _, _, triggers, report = SeqLoRAApplyStack.execute(model, clip, stack, "data", 1.0).args
        said.append([triggers, report, SeqLoRAInterferenceReport.execute(stack, model=model, clip=clip).args[2]])
    return said


def general():
    """What is left of a LoRA by data, as a share: beside one that sees the same, and with what the base model sees of 5 and 50 times
    that kept where the command line keeps it, then where the nodes do"""
    stack, name, places = (
        Stack([Entry("", "one"), Entry("", "two")]),
        weights.name_of[KEY],
        {folder: 5.0, folder / "seqlora": 50.0},
    )
    left = []
    for place in (None, *places):
        if place is not None:
            seen = Calibration(Moments({name: places[place] * torch.eye(192)}), ["a house"], torch.zeros(1, 4))
            seen.save(general_path(place, weights.fingerprint), weights.fingerprint)
        lengths = [
            compose_stack(stack, mode, 1.0, None, weights).parts[0].adapter.layers[name].dense().norm()
            for mode in ("data", "sum")
        ]
        left.append(float(lengths[0] / lengths[1]))
    for place in places:
        general_path(place, weights.fingerprint).unlink()
    return left


def any_order():
    """Whether what two libraries know of the base model serves a stack of both alike, whichever comes first"""
    name, entries = weights.name_of[KEY], [Entry("second", "owl"), Entry("first", "fox")]
    for number, entry in enumerate(entries):
        library = Library(folder / "seqlora" / entry.library, weights.fingerprint, create=True)
        library.keep_calibration(Calibration(Moments({name: (1.0 + number) * torch.eye(192)}), ["a house"], torch.zeros(1, 4)))
    one, other = (general_moments(some).layers[name] for some in (entries, entries[::-1]))
    return torch.equal(one, other)


def projected():
    """Weights of ours from the truth after a change of checkpoint, and how many were decomposed in each run"""
    rows, columns = weights.shapes[weights.targets[TEXT]]
    dora = lora(TEXT, rows, columns) | lora(UNET, 192, 192)
    dora[f"{TEXT}.dora_scale"] = 1.1 * clip.cond_stage_model.state_dict()[weights.targets[TEXT]].norm(dim=1, keepdim=True)
    dora[f"{UNET}.dora_scale"] = 1.3 * model.model.state_dict()[KEY].norm(dim=1, keepdim=True)
    put("dora", dora)
    sides = (("a", (192, 2)), ("b", (2, 192)))
    put("loha", {f"{UNET}.hada_w{i}_{s}": torch.randn(*shape, generator=generator) for i in (1, 2) for s, shape in sides})
    other = load_demo_model(DEMO_MODEL)[0]
    other.model.state_dict()[KEY].mul_(1 + 0.3 * torch.randn(192, 192, generator=generator))
    # as ComfyUI leaves a model that has drawn, where there is a graphics card
    other.model.diffusion_model.to("cuda" if torch.cuda.is_available() else "cpu")
    made, counts, wrong, factors = comfy_lora_files.factorised, [], [], set()

    def counted(*arguments):
        counts[-1] += 1
        return made(*arguments)

    comfy_lora_files.factorised = counted
    runs = [("loha", model, 1.0), ("loha", model, 0.5), ("loha", other, 1.0)]
    runs += [("dora", model, 1.0), ("dora", model, 0.5), ("dora", other, 1.0), ("dora", other, 0.5), ("dora", model, 1.0)]
    for name, on, strength in runs:
        counts.append(0)
        now = Weights(on, clip)
        part = compose_stack(Stack([Entry("", name, strength)]), "sum", 1.0, None, now, exact=True).parts[0]
        fitted = loading._read_file(folder / f"{name}.safetensors", now)
        before = now.original(KEY)
        after = comfy.lora.calculate_weight([(1.0, fitted.patches[KEY], 1.0, None, None)], before.clone(), KEY)
        found = part.adapter.layers[now.name_of[KEY]]
        factors |= {f"{t.device.type} {t.dtype}" for t in (found.down, found.up)}
        wrong.append(float((found.dense() - (after - before)).norm() / (after - before).norm()))
    comfy_lora_files.factorised = made
    return {"decomposed": counts, "wrong": wrong, "factors": list(factors)}


def bent():
    """Factors of an OFT beside another, each over the square root of two: how far from what ComfyUI makes of it at the strength
    at which they act, and how far it would be at the strength that was asked for"""
    for name in ("oft", "oft_too"):
        put(name, {f"{UNET}.oft_blocks": 0.2 * torch.randn(8, 24, 24, generator=generator), f"{UNET}.alpha": torch.tensor(0.0)})
    stack = Stack([Entry("", "oft", 0.8), Entry("", "oft_too", 1.0)])
    part = compose_stack(stack, "sum", 1.0, None, weights, norm_control=True, exact=True).parts[0]
    patch = loading._read_file(folder / "oft.safetensors", weights).patches[KEY]
    ours = part.strength * part.adapter.layers[weights.name_of[KEY]].dense()
    before, wrong = weights.original(KEY), {}
    for key, strength in (("acting", part.patch_strength), ("asked", 0.8)):
        after = comfy.lora.calculate_weight([(strength, patch, 1.0, None, None)], before.clone(), KEY)
        theirs = (after - before) * (part.patch_strength / strength)
        wrong[key] = float((ours - theirs).norm() / theirs.norm())
    return wrong | {"strength": part.patch_strength}


with torch.inference_mode():
    model, clip, vae = load_demo_model(DEMO_MODEL)
    weights = Weights(model, clip)
    KEY = weights.targets[UNET]
    styles = ("A/style.safetensors", "B\\style.safetensors", "cat.v1")
    found = {
        "triggers": triggers("A/style: ohwx man\nB/style.safetensors: zwx dog\ncat.v1: kwx cat", *styles),
        "unclear": triggers("style: ohwx man\ncat.v1: kwx cat", *styles),
        "other_folder": triggers("C/cat.v1: kwx cat", "A/cat.v1"),
        "no_folder": triggers("cat.v1: kwx cat", "A/cat.v1"),
        "projected": projected(),
        "bent": bent(),
        "elsewhere": elsewhere(),
        "in pieces": in_pieces(),
        "chosen": chosen(),
        "general": general(),
        "any order": any_order(),
    }
found["records"] = records()
output.write_text(json.dumps(found))
