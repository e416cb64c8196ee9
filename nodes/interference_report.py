"""Who disturbs whom, before any picture is drawn."""

import json
from dataclasses import asdict

from comfy_api.latest import io, ui

from ..seqlora_core.composition import MODES
from ..seqlora_core.report import Report, interference_report
from ..seqlora_core.report_picture import report_picture
from .loading import load_concepts, names_of, project_stack
from .types import CATEGORY, Stack, StackType

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
            ],
            outputs=[
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="matrix"),
                io.String.Output(display_name="data"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, stack, mode=AUTO, amount=1.0) -> io.NodeOutput:
        report = report_of(stack, mode, amount)
        picture = report_picture(report)
        data = json.dumps(asdict(report), ensure_ascii=False)
        return io.NodeOutput(report.text(), picture, data, ui=ui.PreviewImage(picture, cls=cls))


def report_of(stack: Stack, mode: str, amount: float) -> Report:
    """The stack as a plain sum beside its projection"""
    if mode == AUTO:
        mode = "data" if all(c.moments is not None for c in load_concepts(stack)) else "weights"
    projected, concepts = project_stack(stack, mode, amount)
    names = names_of(concepts)
    moments = {n: c.moments for n, c in zip(names, concepts) if c.moments is not None}
    adapters = {n: c.adapter for n, c in zip(names, concepts)}
    return interference_report(adapters, moments, [e.strength for e in stack.entries], projected, mode)
