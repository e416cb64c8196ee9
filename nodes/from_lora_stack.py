"""LoRAs that other packs' nodes or ComfyUI's Train LoRA hand over, as a stack of ours."""

import math
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..seqlora_core.errors import UserError
from ..seqlora_core.metadata import file_hashes
from ..seqlora_core.names import safe_name
from ..seqlora_core.tensor_file import write_safetensors
from .concept import STRENGTH
from .folders import listed, lora_file
from .types import CATEGORY, MODEL, TEXT, Entry, LoraModelType, LoraStackType, Stack, StackType


class SeqLoRAFromLoraStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRAFromLoraStack",
            display_name="From LoRA Stack (SeqLoRA)",
            category=CATEGORY,
            description="Takes the LoRA stack of another pack's node, or what ComfyUI's Train LoRA has just trained.",
            inputs=[
                LoraStackType.Input("lora_stack", optional=True, tooltip="From a LoRA stacker of another pack."),
                LoraModelType.Input("lora_model", optional=True, tooltip="From ComfyUI's Train LoRA. It is kept as a file."),
                io.String.Input(
                    "name", default="trained", optional=True,
                    tooltip="The trained LoRA's file in models/loras begins with this; a new one each time that it is another LoRA.",
                ),
                io.Float.Input("strength", **STRENGTH, optional=True, tooltip="Of the trained LoRA."),
                StackType.Input("stack", optional=True, tooltip="More concepts to stand beside these."),
            ],
            outputs=[StackType.Output(display_name="stack")],
        )  # fmt: skip

    @classmethod
    def execute(cls, lora_stack=None, lora_model=None, name="trained", strength=1.0, stack=None) -> io.NodeOutput:
        if lora_stack is None and lora_model is None:
            raise UserError("nothing to take: connect lora_stack or lora_model")
        entries = _entries(lora_stack or ())
        if lora_model is not None:
            entries.append(Entry("", _kept(lora_model, name).name, strength))
        return io.NodeOutput((stack or Stack()).plus(*entries))


def _entries(items) -> list[Entry]:
    """(file, model strength, clip strength) each -> one entry a file, or one for the model and one for the text encoder where
    its strengths differ; those of a file that is there twice add up, as in chained loaders"""
    strengths: dict[str, tuple[float, float]] = {}
    for item in items:
        try:
            spelt, strength, text = str(item[0]), float(item[1]), float(item[2])
            if len(item) != 3 or not (math.isfinite(strength) and math.isfinite(text)):
                raise ValueError
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise UserError(
                f"the LoRA stack holds {item!r}: each of its items must be a file, a model strength and a clip strength"
            ) from error
        name = listed(lora_file(spelt))
        before = strengths.get(name, (0.0, 0.0))
        strengths[name] = before[0] + strength, before[1] + text
    out = []
    for name, (strength, text) in strengths.items():
        parts = {"": strength} if text == strength else {MODEL: strength, TEXT: text}
        out += [Entry("", name, value, part=part) for part, value in parts.items() if value]
    return out


def _kept(tensors: dict, name: str) -> Path:
    """The trained LoRA's file, written unless it is there"""
    hashes = file_hashes({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {})
    file = f"{safe_name(name, 'file name')}_{hashes['sshs_model_hash'][:8]}.safetensors"
    path = Path(folder_paths.get_folder_paths("loras")[0]) / file
    if not path.exists():
        write_safetensors(path, tensors, hashes)
    return path
