"""Who disturbs whom, before any picture is drawn."""

from comfy_api.latest import io, ui

from ..seqlora_core.report import interference_report
from ..seqlora_core.report_picture import report_picture
from .loading import load_concepts
from .types import CATEGORY, StackType


class SeqLoRAInterferenceReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRAInterferenceReport",
            display_name="Interference Report (SeqLoRA)",
            category=CATEGORY,
            description="Shows how much each concept of a stack moves what the others see.",
            is_output_node=True,
            inputs=[StackType.Input("stack")],
            outputs=[io.String.Output(display_name="report"), io.Image.Output(display_name="matrix")],
        )

    @classmethod
    def execute(cls, stack) -> io.NodeOutput:
        concepts = load_concepts(stack)
        adapters = {c.name: c.adapter.scaled(e.strength) for c, e in zip(concepts, stack.entries)}
        report = interference_report(adapters, {c.name: c.moments for c in concepts})
        picture = report_picture(report)
        return io.NodeOutput(report.text(), picture, ui=ui.PreviewImage(picture, cls=cls))
