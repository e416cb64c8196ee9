"""Record what anyone's LoRAs see on this model, so that mode 'data' and the report work on them."""

from dataclasses import replace

import comfy.model_management as management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..seqlora_core.errors import UserError
from ..seqlora_core.lora_moments import drawing, general_calibration, is_recorded, keep_moments, see_trigger
from ..seqlora_core.triggers import trigger_of
from .comfy_denoiser import ComfyDenoiser
from .comfy_patches import Part, patch_model
from .comfy_weights import Weights
from .concept import STRENGTH
from .folders import file_state, libraries_folder, listed, lora_file
from .library import parse_list
from .loading import load_members
from .types import CATEGORY, Entry, Stack, StackType


class SeqLoRACalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRACalibrate",
            display_name="Calibrate LoRAs (SeqLoRA)",
            category=CATEGORY,
            description="Lets each LoRA draw its trigger on this model and records what its layers see. Done once: it is kept "
            "beside the LoRA's file. Apply Stack's mode 'data' and the report rest on it.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model, without LoRAs."),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                io.String.Input(
                    "loras", default="", multiline=True, placeholder="file: strength (one a line)",
                    tooltip="Files in models/loras, one a line, each with an optional strength.",
                ),
                io.String.Input(
                    "triggers", default="", multiline=True, placeholder="file: words that call it (only where its file does not say)",
                    tooltip="What calls a LoRA in a prompt, such as 'ohwx man'. Read from the file's metadata where it is there.",
                ),
                io.Int.Input("resolution", default=512, min=32, max=2048, step=16, tooltip="Of the pictures drawn; 64 for the demo model."),
                io.Int.Input("pictures", default=0, min=0, max=1000, tooltip="For each LoRA; 0: 6 of them, 32 of small ones."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**32 - 1, control_after_generate=False,
                    tooltip="The same seed draws the same pictures.",
                ),
                StackType.Input("stack", optional=True, tooltip="LoRAs to calibrate too, and concepts to stand beside them."),
            ],
            outputs=[StackType.Output(display_name="stack"), io.String.Output(display_name="report")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, loras, stack=None, **_):
        """Runs again when a file is another one, or its record"""
        try:
            return [file_state(name) for name, _ in parse_list(loras, STRENGTH["default"])]
        except UserError:
            return loras

    @classmethod
    def execute(cls, model, clip, vae, loras, triggers, resolution, pictures, seed, stack=None) -> io.NodeOutput:
        given = [Entry("", listed(lora_file(name)), strength) for name, strength in parse_list(loras, STRENGTH["default"])]
        whole = (stack or Stack()).plus(*given)
        # a LoRA that stands there several times, for parts of the model or of the sampling, is seen once, whole
        once = Stack().plus(*(replace(e, part="", layers="", start=0.0, end=1.0) for e in whole.entries))
        files = [e for e in once.entries if not e.library]
        if not files:
            raise UserError("no LoRA to calibrate: name files of models/loras, one a line; concepts of a library need none")
        weights = Weights(model, clip)
        members = load_members(once, weights)
        loras = {m.entry.name: m.fitted for m in members if not m.entry.library}
        adapters = {name: fitted.adapter for name, fitted in loras.items()}
        calls, drawn = _triggers(triggers, files, adapters), drawing((resolution, resolution), pictures, seed)
        layers, size, lines = {n for m in members for n in m.fitted.names(weights)}, (resolution, resolution), []
        bar = comfy.utils.ProgressBar(len(files) + 1)
        with torch.inference_mode(False), torch.no_grad():
            with ComfyDenoiser(model, clip, vae, layers) as denoiser:
                base, seen = denoiser.fingerprint(), {s.name for s in [*denoiser.sites(), *denoiser.text_sites()]}
                general_calibration(denoiser, libraries_folder(), size, seed=seed)
            bar.update(1)
            for entry in files:
                management.throw_exception_if_processing_interrupted()
                path = lora_file(entry.name)
                # what it sees in the other LoRAs' layers counts too
                if not is_recorded(path, base, calls[entry.name], drawn, seen):
                    fitted = loras[entry.name]
                    part = Part(entry.name, 1.0, fitted.adapter, fitted.patches)
                    patched, text, missing = patch_model(model, clip, [part], weights)
                    with ComfyDenoiser(patched, text, vae, layers) as denoiser:
                        moments = see_trigger(denoiser, None, calls[entry.name], size, pictures, seed)
                    keep_moments(path, base, moments, calls[entry.name], drawn)
                    lines.append(
                        f"{_plain(entry.name)}: drew {calls[entry.name]!r}"
                        + (f", {len(missing)} layers have no place here" if missing else "")
                    )
                else:
                    lines.append(f"{_plain(entry.name)}: was recorded before")
                bar.update(1)
        named = [e if e.library else replace(e, base=base) for e in whole.entries]
        report = "\n".join(lines)
        return io.NodeOutput(Stack(named), report, ui=ui.PreviewText(report))


def _triggers(text: str, files: list[Entry], adapters: dict) -> dict[str, str]:
    """What calls each file's LoRA: as it is written in the node, else as its metadata says"""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(files) == len(lines) == 1 and ":" not in lines[0]:
        lines = [f"{files[0].name}: {lines[0]}"]
    there = dict.fromkeys(_plain(e.name) for e in files)
    written = {}
    for name, _, words in (line.partition(":") for line in lines):
        # with its folder, or without where that is clear
        meant = [f for f in there if f == _plain(name)] or [f for f in there if f.rpartition("/")[2] == _plain(name)]
        if not meant:
            raise UserError(f"a trigger is given for {name.strip()!r}, which is not among the LoRAs: write 'file: words'")
        if len(meant) > 1:
            raise UserError(
                f"a trigger is given for {name.strip()!r}, which is {' and '.join(meant)}: write each with its folder"
            )
        written[meant[0]] = words.strip()
    found = {e.name: written.get(_plain(e.name)) or trigger_of(adapters[e.name].metadata) for e in files}
    silent = [_plain(name) for name, words in found.items() if not words]
    if silent:
        raise UserError(f"{silent[0]} does not say what calls it: write '{silent[0]}: its trigger' into triggers")
    return found


def _plain(name: str) -> str:
    """A file's name in models/loras, as one writes it on any system"""
    return name.strip().replace("\\", "/").removesuffix(".safetensors")
