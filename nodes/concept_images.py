"""Reference pictures of one concept."""

from comfy_api.latest import io

from ..seqlora_core.errors import UserError
from ..seqlora_core.references import load_pictures
from ..seqlora_core.storage import stamp
from .folders import pictures_folder
from .types import CATEGORY, ConceptImages, ImagesType


class SeqLoRAConceptImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRAConceptImages",
            display_name="Concept Images (SeqLoRA)",
            category=CATEGORY,
            description="Reference pictures of one concept: from a folder, or from connected images.",
            inputs=[
                io.String.Input(
                    "folder", default="demo/octopus",
                    tooltip="Folder inside ComfyUI's input folder. Captions are read from .txt files beside the pictures. "
                    "demo/NAME takes one of the pack's samples. Ignored if images are connected.",
                ),
                io.Int.Input(
                    "resolution", default=512, min=32, max=2048, step=16,
                    tooltip="Size for training; pictures are scaled and cropped to a square. 64 for the demo model.",
                ),
                io.String.Input(
                    "captions", default="", multiline=True, placeholder="one caption a line, in the pictures' order (optional)",
                    tooltip="Replaces the captions of the files. One line serves all pictures. Each must hold the trigger.",
                ),
                io.Image.Input("images", optional=True, tooltip="Reference pictures, instead of a folder."),
            ],
            outputs=[ImagesType.Output(display_name="images")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder, resolution, captions, images=None):
        try:
            path = pictures_folder(folder)
            return [(p.name, stamp(p)) for p in sorted(path.iterdir())]
        except (UserError, OSError):
            return folder

    @classmethod
    def execute(cls, folder, resolution, captions, images=None) -> io.NodeOutput:
        if images is None:
            pictures, found = load_pictures(pictures_folder(folder), resolution)
        else:
            pictures, found = _square(images, resolution), [None] * len(images)
        lines = [line.strip() for line in captions.splitlines() if line.strip()]
        if lines:
            if len(lines) not in (1, len(pictures)):
                raise UserError(f"{len(lines)} captions for {len(pictures)} pictures: give one, or one for each")
            found = lines * (len(pictures) if len(lines) == 1 else 1)
        return io.NodeOutput(ConceptImages(pictures, found))


def _square(images, size):
    """Centre crop and resize an IMAGE batch"""
    import comfy.utils

    moved = images[..., :3].movedim(-1, 1)
    return comfy.utils.common_upscale(moved, size, size, "lanczos", "center").movedim(1, -1).clamp(0, 1)
