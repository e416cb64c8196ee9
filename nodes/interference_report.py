"""Who disturbs whom, before any picture is drawn."""

import json
from dataclasses import asdict

from comfy_api.latest import io, ui

from ..seqlora_core.composition import MODES
from ..seqlora_core.report import Report, interference_report
from ..seqlora_core.report_picture import report_picture
from .comfy_weights import Weights
from .loading import Composed, compose_stack, load_members, names_of
from .types import CATEGORY, StackType

AUTO = "auto"


class SeqLoRAInterferenceReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRAInterferenceReport",
            display_name="Interference Report (SeqLoRA)",
            category=CATEGORY,
            description="Shows how much each concept of a stack moves what the others see.",
            is_output_node=True,
            inputs=[
                StackType.Input("stack"),
                io.Combo.Input(
                    "mode", options=[AUTO, *MODES], default=AUTO, optional=True,
                    tooltip="The projection to compare with the plain sum. auto: 'data' where every LoRA has been calibrated, else 'weights'.",
                ),
                io.Float.Input("amount", default=1.0, min=0.0, max=1.0, step=0.05, optional=True, tooltip="As in Apply Stack."),
                io.Model.Input("model", optional=True, tooltip="To read LoRAs of other kinds than plain ones: LoHa, LoKr, DoRA ..."),
                io.Clip.Input("clip", optional=True),
            ],
            outputs=[
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="matrix"),
                io.String.Output(display_name="data"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, stack, mode=AUTO, amount=1.0, model=None, clip=None) -> io.NodeOutput:
        weights = Weights(model, clip) if model is not None else None
        if mode == AUTO:
            mode = "data" if all(m.concept.moments is not None for m in load_members(stack, weights)) else "weights"
        report = report_of(compose_stack(stack, mode, amount, weights=weights), mode)
        picture = report_picture(report)
        data = json.dumps(asdict(report), ensure_ascii=False)
        return io.NodeOutput(report.text(), picture, data, ui=ui.PreviewImage(picture, cls=cls))


def report_of(composed: Composed, mode: str) -> Report:
    """The stack as a plain sum beside its projection, as far as it is low-rank"""
    concepts = composed.concepts
    names = names_of(concepts)
    moments = {n: c.moments for n, c in zip(names, concepts) if c.moments is not None}
    adapters = {n: c.adapter for n, c in zip(names, concepts)}
    strengths = [p.strength for p in composed.parts]
    return interference_report(adapters, moments, strengths, [p.adapter for p in composed.parts], mode)
