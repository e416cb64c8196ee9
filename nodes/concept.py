"""One concept of a library or one LoRA file, chainable."""

from comfy_api.latest import io

from ..seqlora_core.errors import UserError
from .folders import file_state, library_state, listed, lora_file, lora_files, open_library
from .types import CATEGORY, Entry, Stack, StackType

STRENGTH = dict(default=1.0, min=-4.0, max=4.0, step=0.05)
PERCENT = dict(min=0.0, max=1.0, step=0.01)
FROM_LIBRARY = "(from the library)"
LAYERS = (
    "Only layers whose name holds one of these words, such as: up_blocks, attn2. A minus leaves out: -mid_block. @text: those that "
    "read the prompt. @trigger: learnt triggers alone."
)


class SeqLoRAConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRAConcept",
            display_name="Concept (SeqLoRA)",
            category=CATEGORY,
            description="Takes one trained concept, or anyone's LoRA file; chain several of these to stack them.",
            inputs=[
                io.String.Input("library", default="my_library", tooltip="Folder in models/loras/seqlora."),
                io.String.Input("name", default="", placeholder="concept", tooltip="The concept's name in the library."),
                io.Float.Input("strength", **STRENGTH, tooltip="1 is as trained, 0 is off."),
                StackType.Input("stack", optional=True, tooltip="More concepts to stand beside this one."),
                io.Combo.Input(
                    "lora", options=[FROM_LIBRARY, *lora_files()], default=FROM_LIBRARY, optional=True,
                    tooltip="A LoRA file of any kind instead of a library's concept; library and name are then not used.",
                ),
                io.Boolean.Input(
                    "protected", default=False, optional=True,
                    tooltip="No projection touches it: the others give way to it.",
                ),
                io.String.Input("layers", default="", optional=True, tooltip=LAYERS),
                io.Float.Input(
                    "start_percent", default=0.0, **PERCENT, optional=True,
                    tooltip="Share of the sampling after which it acts. Prompts must be encoded with Apply Stack's clip.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, **PERCENT, optional=True,
                    tooltip="Share of the sampling until which it acts.",
                ),
            ],
            outputs=[StackType.Output(display_name="stack")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, library, name, strength, stack=None, lora=FROM_LIBRARY, **_):
        return library_state(library) if lora == FROM_LIBRARY else file_state(lora)

    @classmethod
    def execute(
        cls,
        library,
        name,
        strength,
        stack=None,
        lora=FROM_LIBRARY,
        protected=False,
        layers="",
        start_percent=0.0,
        end_percent=1.0,
    ) -> io.NodeOutput:
        if start_percent >= end_percent:
            raise UserError(
                f"start_percent is {start_percent} and end_percent {end_percent}: it would never act, start earlier"
            )
        if lora == FROM_LIBRARY:
            library, name = library.strip(), open_library(library).require(name.strip())
        else:
            library, name = "", listed(lora_file(lora))
        entry = Entry(library, name, strength, start=start_percent, end=end_percent, protected=protected, layers=layers)
        return io.NodeOutput((stack or Stack()).plus(entry))
