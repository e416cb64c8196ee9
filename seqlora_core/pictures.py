"""Reference pictures as training takes them: of one size or in sizes of their own, with masks, repeats and mirror images.

photos/cat/a.jpg  a.txt  a.mask.png      a picture, its caption, and what counts in it (white)
photos/cat/3_face/b.jpg                  taken three times as often as the others (kohya's folders)
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .config import PictureOptions
from .denoiser import Denoiser, check_size
from .errors import UserError
from .references import CAPTION, MASK, Beside, is_mask, is_picture, open_picture, picture_files, to_tensor

REPEATED = re.compile(r"(\d{1,3})_")  # begins the name of a subfolder that counts; 2024_ is a year
HELD_OUT = "held_out"  # a subfolder to measure on, of the demo's layout
# what trainers and systems keep beside pictures
SIDECARS = {".txt", ".caption", ".json", ".jsonl", ".npz", ".toml", ".yaml", ".csv", ".md", ".safetensors", ".db", ".ini"}
NAMED = 3  # of what was not read
LEAST_AREA = 0.5  # of what was asked for, below which a picture in its own shape is called small


@dataclass
class Pictures:
    """Pictures of one size.  images [n, height, width, 3] in 0..1; a caption or None for each; masks, repeats and mirrored
    as in concept.References; names of their files, None if they come from elsewhere."""

    images: Tensor
    captions: list[str | None]
    masks: Tensor | None = None
    repeats: list[int] | None = None
    mirrored: bool = False
    names: list[str] | None = None


@dataclass
class _One:
    image: Tensor
    mask: Tensor | None
    caption: str | None
    repeats: int
    name: str


def load(
    folder: Path | str, size: int, options: PictureOptions, model: Denoiser | None = None
) -> tuple[list[Pictures], list[str]]:
    """Pictures of a folder, the most numerous size first, and what there is to say of them, a sentence each.

    size: of the model's pictures, unless the options say another.  model: which must take them, if it is known.  Raises
    UserError for what cannot be read, and for a size that the model cannot take.
    """
    size, notes = options.resolution or size, []
    if model is not None:
        check_size(model, (size, size))
    longest = model.largest_side if model is not None else 0
    by_size: dict[tuple[int, int], list[_One]] = {}
    seen: dict[str, Path] = {}
    listed = _listed(Path(folder))
    beside = {parent: Beside(parent) for parent in {path.parent for path, _ in listed}}
    for path, repeats in listed:
        picture = open_picture(path)
        key = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
        if key in seen:
            notes.append(f"{path.name} is the same picture as {seen[key].name}: one of them would do")
        seen.setdefault(key, path)
        target = _bucket(picture.size, size, longest) if options.buckets else (size, size)
        notes.append(became(path.name, picture.size, target, size))
        mask = _mask(path, picture, target, options.masks, beside[path.parent])
        ones = by_size.setdefault(target, [])
        ones.append(_One(to_tensor(picture, target), mask, beside[path.parent].caption(path), repeats, path.name))
    for parent, times in dict.fromkeys((path.parent, repeats) for path, repeats in listed if repeats > 1):
        count = sum(path.parent == parent for path, _ in listed)
        notes.append(f"{parent.name}/: {count} picture{'s' * (count > 1)}, each taken {times} times as often")
    notes += _not_read(Path(folder), set(beside))
    sets = [_together(ones) for ones in sorted(by_size.values(), key=len, reverse=True)]
    return [mirrored(s) for s in sets] if options.flip else sets, notes


def mirrored(pictures: Pictures) -> Pictures:
    """Each picture followed by its mirror image"""

    def both(given: Tensor) -> Tensor:
        return torch.stack([given, given.flip(2)], 1).flatten(0, 1)

    def twice(given: list) -> list:
        return [one for one in given for _ in range(2)]

    masks, repeats = pictures.masks, pictures.repeats
    masks, repeats = None if masks is None else both(masks), repeats and twice(repeats)
    return Pictures(
        both(pictures.images), twice(pictures.captions), masks, repeats, True, pictures.names and twice(pictures.names)
    )


def _listed(folder: Path) -> list[tuple[Path, int]]:
    """Picture files with their repeats: those of the folder, and of subfolders called NUMBER_anything"""
    counted = []
    try:
        if folder.is_dir():
            for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
                number = REPEATED.match(sub.name)
                if number and int(number[1]) > 0:
                    counted += [(path, int(number[1])) for path in picture_files(sub)]
        return counted + [(path, 1) for path in picture_files(folder, may_be_empty=bool(counted))]
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"cannot read the folder {where}: {error.strerror}; check its permissions") from error


def _not_read(folder: Path, read: set[Path]) -> list[str]:
    """A note on files and subfolders that look as if they were meant and are not taken; none if there are none.

    read: the folders whose pictures were.
    """
    files, captions, masks, folders = [], [], [], []
    for within in sorted({folder, *read}):
        paths = sorted(p for p in within.iterdir() if not p.name.startswith("."))
        pictures = {p.stem.lower() for p in paths if p.suffix.lower() not in SIDECARS and not is_mask(p)}
        for path in paths:
            suffix, stem = path.suffix.lower(), path.stem.lower()  # of a.png.txt, a caption that is called wrongly, "a.png"
            counted = path in read or path.name == HELD_OUT or within == folder and REPEATED.match(path.name)
            if path.is_file() and not is_picture(path) and suffix not in SIDECARS:
                files.append(path.name)
            elif suffix == ".caption" or suffix == CAPTION and stem not in pictures and Path(stem).stem in pictures:
                captions.append(path.name)
            elif is_mask(path) and stem.removesuffix(MASK) not in pictures:
                masks.append(path.name)
            elif path.is_dir() and not counted and any(map(is_picture, path.rglob("*"))):
                folders.append(f"folder {path.relative_to(folder).as_posix()}/ (make it 1_{path.name}/ to read it)")
    kinds = (
        ("file", files, "save pictures as PNG or JPEG"),
        ("caption", captions, "name it NAME.txt beside its picture NAME.png"),
        ("mask", masks, "name it NAME.mask.png beside its picture NAME.png"),
    )
    parts = [f"{len(f)} {kind}{'s' * (len(f) > 1)} ({', '.join(_few(f))}; {advice})" for kind, f, advice in kinds if f]
    parts += _few(folders)
    return [f"not read: {', '.join(parts)}"] if parts else []


def _few(names: list[str]) -> list[str]:
    return names[:NAMED] + ["..."] * (len(names) > NAMED)


def _bucket(size: tuple[int, int], target: int, longest: int = 0) -> tuple[int, int]:
    """Width and height for a picture of this size: at most target squared in area, no side above `longest` (0: any), whole
    numbers of what networks take (64 pixels, 16 at small sizes), and larger than the picture only where that has fewer"""
    step = 64 if target >= 256 else 16
    scale = min(1.0, target / (size[0] * size[1]) ** 0.5)
    width, height = (max(step, min(int(n * scale), longest or n) // step * step) for n in size)
    most = target**2 // min(width, height) // step * step  # of a strip whose short side had to grow
    return min(width, most), min(height, most)


def became(name: str, size: tuple[int, int], target: tuple[int, int], wanted: int) -> str:
    """What a picture became, in a sentence.  size, target: width and height; wanted: side of a square of the area asked for"""
    scale = max(t / s for t, s in zip(target, size))
    lost = 1 - target[0] * target[1] / (size[0] * size[1] * scale**2)
    text = f"{name}: {size[0]} x {size[1]} became {target[0]} x {target[1]}"
    if lost > 0.005:
        text += f", {lost:.0%} of it cut off"
    if scale > 1:
        return f"{text}, enlarged {scale:.1f} times: a larger picture would be better"
    small = target[0] * target[1] < LEAST_AREA * wanted**2
    return text + (f", of {wanted} x {wanted} that were asked for: a larger picture would be better" if small else "")


def _mask(path: Path, picture, target: tuple[int, int], source: str, beside: Beside) -> Tensor | None:
    """[height, width] in 0..1; None if all counts"""
    from PIL import Image, ImageChops, ImageOps

    file = beside.mask(path)
    if source == "alpha":
        mask = picture.getchannel("A")
    elif source == "files" and file is not None:
        drawn = open_picture(file)  # what is transparent in a mask counts as little as what is black
        mask = ImageChops.multiply(drawn.convert("L"), drawn.getchannel("A"))
        if mask.size != picture.size:
            raise UserError(
                f"the mask {file} is {mask.size[0]} x {mask.size[1]} pixels, its picture {picture.size[0]} x {picture.size[1]}: make them alike"
            )
    else:
        return None
    fitted = ImageOps.fit(mask, target, Image.Resampling.BOX)
    values = torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255)
    if not values.any():
        raise UserError(f"the mask of {path} is all black: nothing of the picture would count; paint white what does")
    return values


def _together(ones: list[_One]) -> Pictures:
    masks = None
    if any(o.mask is not None for o in ones):
        masks = torch.stack([torch.ones(o.image.shape[:2]) if o.mask is None else o.mask for o in ones])
    repeats = [o.repeats for o in ones]
    return Pictures(
        torch.stack([o.image for o in ones]), [o.caption for o in ones], masks, repeats if set(repeats) != {1} else None,
        names=[o.name for o in ones],
    )  # fmt: skip
