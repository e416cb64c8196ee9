"""A stack of concepts onto a model, as one patch."""

from comfy_api.latest import io

from ..seqlora_core.composition import MODES
from .comfy_denoiser import apply_adapter
from .interference_report import report_of
from .loading import compose_stack
from .types import CATEGORY, StackType


class SeqLoRAApplyStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRAApplyStack",
            display_name="Apply Stack (SeqLoRA)",
            category=CATEGORY,
            description="Adds all concepts of a stack to the model, as one patch a layer.",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                StackType.Input("stack"),
                io.Combo.Input(
                    "mode", options=list(MODES), default="sum",
                    tooltip="sum: as they are, what SeqLoRA's concepts are trained for. weights: Gram-Schmidt in the "
                    "stack's order. data: the closed form with what each concept sees, for LoRAs trained apart.",
                ),
                io.Float.Input("amount", default=1.0, min=0.0, max=1.0, step=0.05, tooltip="How much of the projection: 0 is the plain sum."),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.String.Output(display_name="triggers"),
                io.String.Output(display_name="report"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, clip, stack, mode, amount) -> io.NodeOutput:
        composed, concepts = compose_stack(stack, mode, amount)
        model, clip, missing = apply_adapter(model, clip, composed)
        report = report_of(stack, mode, amount).text()
        if missing:
            report += f"\n{len(missing)} layers of the stack have no place in this model, first {missing[0]}: it was trained on another kind."
        triggers = ", ".join(f"{c.trigger} {c.class_noun}".strip() for c in concepts)
        return io.NodeOutput(model, clip, triggers, report)
