"""Who disturbs whom, before any picture is drawn."""

import json
from dataclasses import asdict

from comfy_api.latest import io, ui

from ..seqlora_core.adapter import Adapter, is_token_table
from ..seqlora_core.composition import MODES
from ..seqlora_core.report import Report, interference_report
from ..seqlora_core.report_picture import report_picture
from .comfy_patches import Part
from .comfy_weights import Weights
from .composing import Composed, by_file, compose_stack, meeting, names_of, that_acts, unrecorded
from .loading import load_members
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
            known = all(m.concept.moments is not None for m in load_members(that_acts(stack), weights))
            mode = "data" if known else "weights"
        composed = compose_stack(stack, mode, amount, weights=weights, compared=True)
        report = report_of(composed, mode)
        report.advice += dict.fromkeys(filter(None, [unrecorded(composed.members), *composed.notes(mode)]))
        picture = report_picture(report)
        data = json.dumps(asdict(report), ensure_ascii=False)
        return io.NodeOutput(report.text(), picture, data, ui=ui.PreviewImage(picture, cls=cls))


def report_of(composed: Composed, mode: str, times: float = 1.0) -> Report:
    """The stack as a plain sum beside its projection, as far as it is low-rank; a LoRA that is there several times, for other
    layers, steps or parts of the model, stands in it once.  times: of the strengths that the entries had"""
    concepts, parts = composed.concepts, composed.parts
    groups = by_file(composed.members)
    firsts = [concepts[group[0]] for group in groups]
    names = names_of(firsts)
    moments = {n: c.moments for n, c in zip(names, firsts) if c.moments is not None}
    acting = [_at_most([parts[i] for i in group]) for group in groups]
    strengths = [max((v for n, v in most.items() if not is_token_table(n)), key=abs, default=1.0) for most in acting]
    plain, projected = (
        [_joined([a[i] for i in group], most, top or 1.0) for group, most, top in zip(groups, acting, strengths)]
        # of a plain sum what norm control and the cap leave of each is what acts
        for a in ([(c if mode != "sum" else p).adapter for c, p in zip(concepts, parts)], [p.adapter for p in parts])
    )
    asked = [s / (times or 1.0) for s in strengths]
    return interference_report(dict(zip(names, plain)), moments, strengths, projected, mode, asked, meeting(composed.members))


def _at_most(parts: list[Part]) -> dict[str, float]:
    """Layer -> the strength at which the entries of one LoRA together change it, in the steps in which that is most"""
    most: dict[str, float] = {}
    for step in sorted({part.start for part in parts}):
        now = [part for part in parts if part.start <= step < part.end]
        for name in {n for part in now for n in part.adapter.layers}:
            total = sum(part.strength for part in now if name in part.adapter.layers)
            most[name] = max(most.get(name, 0.0), total, key=abs)
    return most


def _joined(adapters: list[Adapter], acting: dict[str, float], strength: float) -> Adapter:
    """What several entries of one LoRA do together, over its strength"""
    layers = {n: d for adapter in adapters for n, d in adapter.layers.items()}
    made = {n: d if acting[n] == strength else d.scaled(acting[n] / strength) for n, d in layers.items()}
    return Adapter(made, adapters[0].metadata)
