"""Reference pictures of one concept."""

from collections import Counter
from pathlib import Path

import torch
from comfy_api.latest import io

from ..seqlora_core.config import PictureOptions
from ..seqlora_core.errors import UserError
from ..seqlora_core.pictures import Pictures, became, load, mirrored
from ..seqlora_core.references import LEAST_SIDE
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
            is_input_list=True,  # a list of images, as folder loaders give out, is one concept: not one for each
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
            return [(p.name, stamp(p)) for p in sorted(pictures_folder(folder[0]).rglob("*"))]
        except (UserError, OSError):
            return folder

    @classmethod
    def execute(cls, images=None, mask=None, **widgets) -> io.NodeOutput:
        return io.NodeOutput(_concept(images, mask, **{name: values[0] for name, values in widgets.items()}))


def _concept(
    batches: list | None, masks_of: list | None, folder: str, resolution: int, captions: str, buckets: bool = False,
    masks: str = PictureOptions.masks, flip: bool = False,
) -> ConceptImages:  # fmt: skip
    """batches, masks_of: IMAGE and MASK batches of any sizes, instead of the folder; with --gpu-only they are on the GPU"""
    if batches is None:
        options = PictureOptions(0, buckets, masks, flip)
        options.validate()
        sets, notes = load(Path(pictures_folder(folder)), resolution, options)
    else:
        images = [image for batch in batches for image in batch.cpu().split(1) if len(image)]
        _check_images(images)
        counted = None if masks_of is None else _masks([m for b in masks_of for m in b.cpu().split(1)], images, resolution)
        sets = [Pictures(torch.cat([_square(image, resolution) for image in images]), [None] * len(images), counted)]
        sets = [mirrored(s) for s in sets] if flip else sets
        notes = _notes(images, resolution)
    return ConceptImages(sets, notes + _name(sets, captions, 2 if flip else 1))


def _check_images(images: list) -> None:
    if not images:
        raise UserError("the connected batch holds no images: connect another, or name a folder")
    for number, image in enumerate(images, 1):
        height, width = image.shape[1:3]
        if not image.isfinite().all():  # ComfyUI shows such as black
            raise UserError(
                f"connected image {number} holds values that are not finite: look at what makes it, or leave it out"
            )
        if min(height, width) < LEAST_SIDE:
            raise UserError(f"connected image {number} is {width} x {height} pixels: too small to learn from, leave it out")


def _notes(images: list, resolution: int) -> list[str]:
    """What became of connected pictures, size by size; which are there twice"""
    sizes, seen, notes = Counter((image.shape[2], image.shape[1]) for image in images), {}, []
    for size, count in sizes.items():
        many = f"{count} connected image{'s' * (count > 1)}"
        notes.append(became(many, size, (resolution, resolution), resolution))
    for number, image in enumerate(images, 1):
        first = seen.setdefault((image.shape, digest(image.contiguous().cpu().numpy().tobytes())), number)
        if first != number:
            notes.append(f"connected image {number} is the same picture as {first}: one of them would do")
    return notes


def _name(sets: list[Pictures], captions: str, times: int) -> list[str]:
    """Puts the lines of `captions`, if there are any, in the place of the files' captions, and tells whose each is where they are
    several; times: pictures to a line"""
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
    names = (sets[0].names or [f"connected image {n // times + 1}" for n in range(count * times)])[::times]
    return [f"{name} is captioned {line!r}" for name, line in zip(names, lines)] if len(lines) > 1 else []


def _masks(masks: list, images: list, size: int):
    """Masks [1, height, width] of pictures -> [n, size, size], cut as these are; UserError for another number or size, and for one
    that lets nothing count of what is kept of its picture"""
    if len(masks) not in (1, len(images)):
        raise UserError(f"{len(masks)} masks for {len(images)} pictures: connect one, or one for each")
    cut = []
    for mask, image in zip(masks * (len(images) // len(masks)), images):
        (height, width), found = image.shape[1:3], mask.shape[1:]
        if found != (height, width):
            raise UserError(f"the mask is {found[1]} x {found[0]} pixels, its picture {width} x {height}: make them alike")
        cut.append(_square(mask[..., None].expand(-1, -1, -1, 3), size)[..., 0])
        if not cut[-1].any():
            raise UserError(
                "a mask is all black, or white only in what is cut off: nothing of its picture would count; paint white what does"
            )
    return torch.cat(cut)


def _square(images, size: int):
    """Centre crop and resize an IMAGE batch"""
    import comfy.utils

    moved = images[..., :3].expand(-1, -1, -1, 3).movedim(-1, 1)  # grey ones may have one channel
    return comfy.utils.common_upscale(moved, size, size, "lanczos", "center").movedim(1, -1).clamp(0, 1)
