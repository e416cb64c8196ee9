"""Reference pictures from a folder: images, and a caption for each."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .prompts import calls

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
MASK = ".mask"  # ends the name of a picture's mask, before its suffix
CAPTION = ".txt"
TEMPLATE = "a {trigger} {class}"
LEAST_SIDE = 8  # pixels of a picture that shows anything


def caption_from(template: str, trigger: str, class_noun: str) -> str:
    """The template with the words in their places"""
    return template.replace("{trigger}", trigger).replace("{class}", class_noun).strip()


def load_pictures(folder: Path | str, size: int) -> tuple[Tensor, list[str | None]]:
    """Pictures of a folder, in the order of their names, and the captions in `.txt` files beside them.

    Returns [n, size, size, 3] in 0..1 (shorter side scaled to `size`, centre crop; transparency on white) and a
    caption or None for each.  Raises UserError for a missing or empty folder and for files that cannot be read.
    """
    files = picture_files(Path(folder))
    beside = Beside(Path(folder))
    return torch.stack([load_picture(p, size) for p in files]), [beside.caption(p) for p in files]


def picture_files(folder: Path, may_be_empty: bool = False) -> list[Path]:
    """Pictures in a folder by name, 2 before 10, masks left out; UserError if there is no folder or none in it."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: check the path of the reference images")
    files = sorted((p for p in folder.iterdir() if is_picture(p) and not is_mask(p)), key=_counted)
    if not files and not may_be_empty:
        raise UserError(f"no images in {folder}: put PNG, JPEG or WebP files there")
    return files


def _counted(path: Path) -> list:
    """A name in parts, of which the odd ones are numbers"""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", path.name, flags=re.ASCII))]


def is_picture(path: Path) -> bool:
    """By its name, if Pillow as installed opens such, and no folder; files that begin with a dot are a system's own"""
    from PIL import Image

    suffix = path.suffix.lower()
    opens = suffix in SUFFIXES and Image.registered_extensions().get(suffix) in Image.OPEN
    return opens and not path.name.startswith(".") and not path.is_dir()


def is_mask(path: Path) -> bool:
    """By its name"""
    return is_picture(path) and path.stem.lower().endswith(MASK)


class Beside:
    """What a folder holds beside its pictures, in whatever case it is spelt; the folder is looked through once"""

    def __init__(self, folder: Path):
        files = sorted(folder.iterdir(), reverse=True)  # of names alike the first counts
        self._masks = {p.stem.lower(): p for p in files if is_mask(p)}
        self._captions = {p.name.lower(): p for p in files if p.suffix.lower() == CAPTION}

    def mask(self, picture: Path) -> Path | None:
        """NAME.mask.png of a picture NAME.jpg, in whatever format; None if there is none"""
        return self._masks.get((picture.stem + MASK).lower())

    def caption(self, picture: Path) -> str | None:
        """Text of the `.txt` file of the same name, None if there is none; UserError if it is not UTF-8."""
        path = picture.with_suffix(CAPTION)
        if not path.exists():
            path = self._captions.get(path.name.lower())
        if path is None:
            return None
        try:
            text = path.read_text(encoding="utf-8-sig")
            if "\0" in text:  # UTF-16 without a mark
                raise UnicodeError
            return text.strip() or None
        except UnicodeError as error:
            raise UserError(f"the caption {path} is not UTF-8 text: save it again as UTF-8") from error
        except OSError as error:
            raise UserError(
                f"cannot read the caption {path}: {error.strerror}; make it a readable text file, or remove it"
            ) from error


def load_picture(path: Path, size: int) -> Tensor:
    """[size, size, 3] in 0..1"""
    return to_tensor(open_picture(path), (size, size))


def open_picture(path: Path):
    """As an RGBA image of Pillow, turned as its camera says; UserError if it cannot be read or is a dot."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            opened.load()
            turned = opened
            with contextlib.suppress(Exception):  # of what a camera or a program wrote wrongly beside a picture that is whole
                turned = ImageOps.exif_transpose(opened)
            if turned.mode.startswith("I") or turned.mode == "F":  # Pillow would cut 16 bits off at 255
                values = np.asarray(turned, dtype=np.float64)
                white = max(1.0, values.max()) if turned.mode == "F" else 65535
                turned = Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
            picture = turned.convert("RGBA")
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise UserError(f"the image {path} is too large, of more than {most} million pixels: make it smaller") from error
    except Exception as error:  # Pillow raises whatever its plug-ins raise
        if getattr(error, "errno", None):  # the system's
            raise UserError(f"cannot read the image {path}: {error.strerror}; check the file and its permissions") from error
        raise UserError(f"cannot read the image {path}: it is damaged or empty; replace or remove it") from error
    if min(picture.size) < LEAST_SIDE:
        raise UserError(f"the image {path} is {picture.size[0]} x {picture.size[1]} pixels: too small to learn from, remove it")
    return picture


def to_tensor(picture, size: tuple[int, int]) -> Tensor:
    """An RGBA image -> [height, width, 3] in 0..1: scaled, cropped about its centre, on white.  size: width, height"""
    from PIL import Image, ImageOps

    white = Image.new("RGBA", picture.size, "white")
    fitted = ImageOps.fit(Image.alpha_composite(white, picture).convert("RGB"), size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255)


def complete_captions(
    captions: list[str | None], trigger: str, class_noun: str, template: str = TEMPLATE, names: list[str] | None = None
) -> list[str]:
    """Captions with the template in place of missing ones, and {trigger} and {class} in any filled in; UserError if one lacks
    the trigger as a word of its own.  names: the pictures', for that."""
    done = [caption_from(c or template, trigger, class_noun) for c in captions]
    place = next((i for i, c in enumerate(done) if not calls(trigger, c)), None)
    if place is not None and not captions[place]:
        raise UserError(
            f"the caption {template!r}, which pictures without one get, lacks the trigger: write {{trigger}} into it"
        )
    if place is not None:
        whose = f" of {names[place]}" if names else ""
        raise UserError(
            f"the caption {done[place]!r}{whose} lacks the trigger {trigger!r}: add it, or leave the caption out to use the template"
        )
    return done


def captions_of_class(captions: list[str | None], trigger: str, class_noun: str, template: str = TEMPLATE) -> list[str]:
    """The same of pictures of the class, with nothing in place of {trigger}; UserError if one calls the concept, which replay
    would then hold as it was before it was taught, or lacks the class noun that it asks for"""
    wanting = next((c or template for c in captions if "{class}" in (c or template)), None)
    if wanting is not None and not class_noun.strip():
        raise UserError(
            f"the caption {wanting!r} of regularisation pictures says nothing without a class noun: give one, or write what each "
            "shows into a .txt file beside it"
        )
    done = [caption_from(c or template, "", class_noun).replace("  ", " ") for c in captions]
    called = next((c for c in done if calls(trigger, c)), None)
    if called is not None:
        raise UserError(
            f"the caption {called!r} of a regularisation picture has the trigger {trigger!r}, which would keep it from being learnt: "
            "take it out, or write {trigger} for it"
        )
    return done
