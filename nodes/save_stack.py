"""A stack as one ordinary LoRA file that any loader reads."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..seqlora_core.adapter import save_adapter
from ..seqlora_core.composition import MODES
from ..seqlora_core.errors import UserError
from ..seqlora_core.names import safe_name
from .loading import compose_stack
from .types import CATEGORY, StackType


class SeqLoRASaveStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRASaveStack",
            display_name="Save Stack (SeqLoRA)",
            category=CATEGORY,
            description="Writes the stack as one ordinary LoRA into models/loras.",
            is_output_node=True,
            inputs=[
                StackType.Input("stack"),
                io.String.Input("name", default="my_stack", tooltip="File name in models/loras, without .safetensors."),
                io.Combo.Input("mode", options=list(MODES), default="sum", tooltip="As in Apply Stack."),
                io.Float.Input("amount", default=1.0, min=0.0, max=1.0, step=0.05, tooltip="As in Apply Stack."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of this name."),
            ],
            outputs=[io.String.Output(display_name="path")],
        )

    @classmethod
    def execute(cls, stack, name, mode, amount, overwrite) -> io.NodeOutput:
        path = Path(folder_paths.get_folder_paths("loras")[0]) / f"{safe_name(name, 'file name')}.safetensors"
        if path.exists() and not overwrite:
            raise UserError(f"{path.name} exists in models/loras: choose another name, or switch overwrite on")
        composed, _ = compose_stack(stack, mode, amount)
        save_adapter(path, composed)
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"saved {path.name}"))
