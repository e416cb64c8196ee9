"""A whole library, or a list of its concepts, as one stack."""

from comfy_api.latest import io

from ..seqlora_core.errors import UserError
from .concept import STRENGTH
from .folders import file_state, library_state, listed, lora_file, open_library
from .types import CATEGORY, Entry, Stack, StackType


class SeqLoRALibrary(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRALibrary",
            display_name="Library (SeqLoRA)",
            category=CATEGORY,
            description="Stacks all concepts of a library, or those that are listed.",
            inputs=[
                io.String.Input(
                    "library", default="my_library",
                    tooltip="Folder in models/loras/seqlora. Empty: the list below names files of models/loras.",
                ),
                io.String.Input(
                    "concepts", default="", multiline=True, placeholder="name: strength (one a line; empty for all)",
                    tooltip="Concepts to take, one a line, each with an optional strength. Empty takes the whole library.",
                ),
                io.Float.Input("strength", **STRENGTH, tooltip="For concepts without a strength of their own."),
                StackType.Input("stack", optional=True, tooltip="More concepts to stand beside these."),
            ],
            outputs=[StackType.Output(display_name="stack")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, library, concepts, strength, stack=None):
        if library.strip():
            return library_state(library)
        return [file_state(name) for name, _ in parse_list(concepts, strength)]

    @classmethod
    def execute(cls, library, concepts, strength, stack=None) -> io.NodeOutput:
        if not library.strip():
            files = [Entry("", listed(lora_file(name)), value) for name, value in parse_list(concepts, strength)]
            return io.NodeOutput((stack or Stack()).plus(*files))
        opened = open_library(library)
        wanted = parse_list(concepts, strength) or [(name, strength) for name in opened.names]
        if not wanted:
            raise UserError(f"the library {library!r} is empty: train a concept into it first")
        entries = [Entry(library.strip(), opened.require(name), value) for name, value in wanted]
        return io.NodeOutput((stack or Stack()).plus(*entries))


def parse_list(text: str, default: float) -> list[tuple[str, float]]:
    """ "octopus: 0.8" a line -> [("octopus", 0.8)]"""
    out = []
    for line in text.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name:
            try:
                out.append((name, float(value) if value else default))
            except ValueError as error:
                raise UserError(f"the line {line.strip()!r} has no number after the colon: write 'name: 0.8'") from error
    return out
