"""A stack as one ordinary LoRA file that any loader reads."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..seqlora_core.adapter import concatenate, save_adapter
from ..seqlora_core.composition import MODES, Wishes
from ..seqlora_core.errors import UserError
from ..seqlora_core.low_rank import truncated
from ..seqlora_core.names import safe_name
from .apply_stack import cap_input, projection_inputs
from .comfy_patches import full_differences
from .comfy_weights import Weights
from .loading import compose_stack
from .types import CATEGORY, StackType, advanced


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
                io.Int.Input(
                    "rank", default=0, min=0, max=4096, optional=True, tooltip="At most so many directions a layer; 0 is exact."
                ),
                *projection_inputs(),
                io.Model.Input(
                    "model", optional=True, tooltip="To read LoRAs of other kinds than plain ones: LoHa, LoKr, DoRA ..."
                ),
                io.Clip.Input("clip", optional=True),
                advanced(cap_input()),
            ],
            outputs=[io.String.Output(display_name="path")],
        )

    @classmethod
    def execute(
        cls,
        stack,
        name,
        mode,
        amount,
        overwrite,
        rank=0,
        order="symmetric",
        restore=False,
        norm_control=False,
        model=None,
        clip=None,
        cap=0.0,
    ) -> io.NodeOutput:
        path = Path(folder_paths.get_folder_paths("loras")[0]) / f"{safe_name(name, 'file name')}.safetensors"
        if path.exists() and not overwrite:
            raise UserError(f"{path.name} exists in models/loras: choose another name, or switch overwrite on")
        weights = Weights(model, clip) if model is not None else None
        wishes = Wishes(order, restore=restore, cap=cap or None)
        composed = compose_stack(stack, mode, amount, wishes, weights, norm_control, exact=True)
        timed = next((p.source for p in composed.parts if (p.start, p.end) != (0.0, 1.0)), None)
        if timed:
            raise UserError(f"{timed} acts on some steps only, which a file cannot say: take that off, or use Apply Stack")
        adapters = [p.adapter.scaled(p.strength) for p in composed.parts]
        adapter, lost = truncated(concatenate(adapters), rank or None)
        adapter.metadata = {
            "seqlora.trigger": ", ".join(filter(None, (c.trigger for c in composed.concepts))),
            "modelspec.title": "SeqLoRA stack",
        }
        extra, left = full_differences(composed.parts, weights)
        save_adapter(path, adapter, extra=extra)
        said = f"saved {path.name}" + (f", {lost:.2%} of its energy lost to rank {rank}" if rank else "")
        if composed.unrecorded:
            said += f"; {composed.unrecorded}"
        if left:
            said += f"; {len(left)} changes that no file can hold are not in it, first {left[0]}"
        return io.NodeOutput(str(path), ui=ui.PreviewText(said))
