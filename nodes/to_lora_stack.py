"""A stack as other packs' nodes take it."""

from comfy_api.latest import io

from ..seqlora_core.errors import UserError
from .folders import listed
from .loading import entry_file
from .types import CATEGORY, MODEL, TEXT, Entry, LoraStackType, StackType


class SeqLoRAToLoraStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRAToLoraStack",
            display_name="To LoRA Stack (SeqLoRA)",
            category=CATEGORY,
            description="Hands a stack to another pack's nodes as its files with their strengths: a plain sum.",
            inputs=[
                StackType.Input("stack"),
                LoraStackType.Input("lora_stack", optional=True, tooltip="Another LoRA stack, whose LoRAs come first."),
            ],
            outputs=[LoraStackType.Output(display_name="lora_stack")],
        )

    @classmethod
    def execute(cls, stack, lora_stack=None) -> io.NodeOutput:
        strengths: dict[str, list[float]] = {}
        for entry in stack.entries:
            both = strengths.setdefault(_listed(entry), [0.0, 0.0])
            for i, part in enumerate((MODEL, TEXT)):
                if entry.part in ("", part):
                    both[i] += entry.strength
        return io.NodeOutput([*(lora_stack or ()), *((file, *both) for file, both in strengths.items())])


def _listed(entry: Entry) -> str:
    """Its file as ComfyUI lists it"""
    if entry.layers or not entry.always:
        raise UserError(
            f"{entry.name} acts on some layers or steps only, which a LoRA stack cannot say: take that off, or use Apply Stack"
        )
    return listed(entry_file(entry))
