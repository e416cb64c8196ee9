"""One concept of a library, chainable."""

from comfy_api.latest import io

from .folders import library_state, open_library
from .types import CATEGORY, Entry, Stack, StackType

STRENGTH = dict(default=1.0, min=-4.0, max=4.0, step=0.05)


class SeqLoRAConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRAConcept",
            display_name="Concept (SeqLoRA)",
            category=CATEGORY,
            description="Takes one trained concept; chain several of these to stack them.",
            inputs=[
                io.String.Input("library", default="my_library", tooltip="Folder in models/loras/seqlora."),
                io.String.Input("name", default="", placeholder="concept", tooltip="The concept's name in the library."),
                io.Float.Input("strength", **STRENGTH, tooltip="1 is as trained, 0 is off."),
                StackType.Input("stack", optional=True, tooltip="More concepts to stand beside this one."),
            ],
            outputs=[StackType.Output(display_name="stack")],
        )

    @classmethod
    def fingerprint_inputs(cls, library, name, strength, stack=None):
        return library_state(library)

    @classmethod
    def execute(cls, library, name, strength, stack=None) -> io.NodeOutput:
        entry = Entry(library.strip(), open_library(library).require(name.strip()), strength)
        return io.NodeOutput((stack or Stack()).plus(entry))
