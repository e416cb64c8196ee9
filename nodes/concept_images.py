"""Reference pictures of one concept."""

from pathlib import Path

from comfy_api.latest import io

from ..seqlora_core.config import PictureOptions
from ..seqlora_core.errors import UserError
from ..seqlora_core.pictures import Pictures, became, load, mirrored
from ..seqlora_core.storage import digest, stamp
from .folders import pictures_folder
from .types import CATEGORY, ConceptImages, ImagesType, advanced


class SeqLoRAConceptImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = PictureOptions()
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
                advanced(io.Boolean.Input(
                    "buckets", default=default.buckets, optional=True,
                    tooltip="Keeps the shape of each picture of the folder, at the area of resolution, instead of cropping squares.",
                )),
                advanced(io.Combo.Input(
                    "masks", options=["files", "alpha", "none"], default=default.masks, optional=True,
                    tooltip="What counts in a picture of the folder: what is white in a file NAME.mask.png beside it, what is not transparent, or all.",
                )),
                advanced(io.Boolean.Input(
                    "flip", default=default.flip, optional=True,
                    tooltip="Mirror images too. Not for faces with a parting, nor for writing.",
                )),
                io.Mask.Input("mask", optional=True, tooltip="What counts in the connected images: white. One for all, or one for each."),
            ],
            outputs=[ImagesType.Output(display_name="images")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        try:
            return [(p.name, stamp(p)) for p in sorted(pictures_folder(folder).rglob("*"))]
        except (UserError, OSError):
            return folder

    @classmethod
    def execute(
        cls, folder, resolution, captions, images=None, buckets=False, masks=PictureOptions.masks, flip=False, mask=None
    ) -> io.NodeOutput:
        notes: list[str] = []
        if images is None:
            options = PictureOptions(0, buckets, masks, flip)
            options.validate()
            sets, notes = load(Path(pictures_folder(folder)), resolution, options)
        else:
            pictures = _square(images, resolution)
            counted = None if mask is None else _masks(mask, images, resolution)
            sets = [Pictures(pictures, [None] * len(pictures), counted)]
            sets = [mirrored(s) for s in sets] if flip else sets
            notes = _notes(images, resolution)
        _name(sets, captions, 2 if flip else 1)
        return io.NodeOutput(ConceptImages(sets, notes))


def _notes(images, resolution: int) -> list[str]:
    """What became of connected pictures, all of one size; which are there twice"""
    (height, width), seen = images.shape[1:3], {}
    notes = [became(f"{len(images)} connected images", (width, height), (resolution, resolution), resolution)]
    for number, image in enumerate(images, 1):
        first = seen.setdefault(digest(image.contiguous().cpu().numpy().tobytes()), number)
        if first != number:
            notes.append(f"connected image {number} is the same picture as {first}: one of them would do")
    return notes


def _name(sets: list[Pictures], captions: str, times: int) -> None:
    """Puts the lines of `captions`, if there are any, in the place of the files' captions; times: pictures to a line"""
    lines = [line.strip() for line in captions.splitlines() if line.strip()]
    count = sum(len(s.captions) for s in sets) // times
    if len(lines) not in (0, 1, count):
        raise UserError(f"{len(lines)} captions for {count} pictures: give one, or one for each")
    if len(lines) > 1 and len(sets) > 1:
        raise UserError(
            "pictures of several shapes have no order: give one caption, or write each into a .txt file beside its picture"
        )
    for some in sets if lines else []:
        some.captions = lines * len(some.captions) if len(lines) == 1 else [line for line in lines for _ in range(times)]


def _masks(mask, images, size):
    """A MASK batch -> [n, size, size], cut as its pictures are; UserError for another number or size, and for one that lets
    nothing count of what is kept of its picture"""
    count, (height, width) = len(images), images.shape[1:3]
    if len(mask) not in (1, count):
        raise UserError(f"{len(mask)} masks for {count} pictures: connect one, or one for each")
    if mask.shape[1:] != (height, width):
        raise UserError(
            f"the mask is {mask.shape[2]} x {mask.shape[1]} pixels, its picture {width} x {height}: make them alike"
        )
    cut = _square(mask[..., None].expand(-1, -1, -1, 3), size)[..., 0]
    if not cut.flatten(1).any(1).all():
        raise UserError(
            "a mask is all black, or white only in what is cut off: nothing of its picture would count; paint white what does"
        )
    return cut.expand(count, -1, -1)


def _square(images, size):
    """Centre crop and resize an IMAGE batch"""
    import comfy.utils

    moved = images[..., :3].movedim(-1, 1)
    return comfy.utils.common_upscale(moved, size, size, "lanczos", "center").movedim(1, -1).clamp(0, 1)
