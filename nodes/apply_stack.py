"""A stack of concepts onto a model, as one patch."""

from comfy_api.latest import io

from ..seqlora_core.composition import MODES, ORDERS, Wishes
from .comfy_patches import patch_model
from .comfy_weights import Weights
from .composing import compose_stack
from .concept import LAYERS
from .interference_report import report_of
from .types import CATEGORY, Stack, StackType, advanced


def projection_inputs() -> list:
    """How LoRAs are kept apart, beyond mode and amount"""
    return [
        io.Combo.Input(
            "order", options=list(ORDERS), default="symmetric", optional=True,
            tooltip="Of mode weights. symmetric: all give way alike. first: each gives way to those before it in the stack. "
            "strongest: each gives way to the stronger ones.",
        ),
        io.Boolean.Input(
            "restore", default=False, optional=True,
            tooltip="Scale each LoRA back to the strength it had before the projection.",
        ),
        io.Boolean.Input(
            "norm_control", default=False, optional=True,
            tooltip="Divide all by the square root of how many act at the same time, so that together they are about as strong as one.",
        ),
    ]  # fmt: skip


def cap_input() -> io.Float.Input:
    return io.Float.Input(
        "cap", default=0.0, min=0.0, max=1000.0, step=0.5, optional=True,
        tooltip="Cuts what a LoRA pushes harder than this many times its middle layer; 10 is what the report warns of. 0 cuts nothing.",
    )  # fmt: skip


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
                    tooltip="sum: as they are, what SeqLoRA's concepts are trained for. weights: made orthogonal, no data "
                    "needed. data: the closed form with what each concept sees, for LoRAs trained apart.",
                ),
                io.Float.Input("amount", default=1.0, min=0.0, max=1.0, step=0.05, tooltip="How much of the projection: 0 is the plain sum."),
                *projection_inputs(),
                io.Float.Input(
                    "strength", default=1.0, min=-4.0, max=4.0, step=0.05, optional=True,
                    tooltip="Of the whole stack, times each concept's own.",
                ),
                io.String.Input("layers", default="", optional=True, tooltip=LAYERS),
                advanced(cap_input()),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.String.Output(display_name="triggers"),
                io.String.Output(display_name="report"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, clip, stack, mode, amount, order="symmetric", restore=False, norm_control=False, strength=1.0, layers="",
        cap=0.0,
    ) -> io.NodeOutput:  # fmt: skip
        if not stack.entries:  # of a LoRA stack whose rows are all off
            return io.NodeOutput(model, clip, "", "the stack is empty: model and clip are as they came")
        weights, wishes = Weights(model, clip), Wishes(order, restore=restore, cap=cap or None)
        stack = Stack([e.times(strength, layers) for e in stack.entries])
        composed = compose_stack(stack, mode, amount, wishes, weights, norm_control)
        model, clip, missing = patch_model(model, clip, composed.parts, weights)
        lines = [report_of(composed, mode, strength).text(), *composed.notes(mode, wishes.cap)]
        if missing:
            lines.append(
                f"{len(missing)} layers of the stack have no place in this model, first {missing[0]}: it was trained on another kind."
            )
        return io.NodeOutput(model, clip, composed.triggers, "\n".join(lines))
