"""The embedded demo model: small enough to ship, so that every sample workflow runs as it is."""

import torch
from comfy_api.latest import io

from ..seqlora_core.demo_model import DEMO_MODEL
from ..seqlora_core.errors import UserError
from .comfy_demo import load_demo_model
from .types import CATEGORY


class SeqLoRADemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRADemoModel",
            display_name="Demo Model (SeqLoRA)",
            category=CATEGORY,
            description="A tiny SD3 that draws 64 px emoji. Swap it for Load Checkpoint to use your own model.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        if not DEMO_MODEL.exists():
            raise UserError("the demo model is missing from this installation: install the pack again, or use Load Checkpoint")
        # weights as ComfyUI's Train LoRA can use them: tensors of inference mode take part in no backward
        with torch.inference_mode(False), torch.no_grad():
            return io.NodeOutput(*load_demo_model(DEMO_MODEL))
