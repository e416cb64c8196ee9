"""What anyone's LoRA sees on one base model: it draws its own trigger, the inputs' moments are recorded once and kept.

    FOLDER/NAME.safetensors                the LoRA
    FOLDER/NAME.BASE.stats.safetensors     its moments on the base model whose fingerprint is BASE
    FOLDER/general.BASE.safetensors        what that model sees while it draws other things

A moments file names the hash of the LoRA it was recorded with: a LoRA that was replaced since has none.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from .adapter import Adapter, is_token_table
from .calibration import Calibration, calibrate, record_moments, record_text
from .denoiser import Denoiser
from .drawing import draw
from .errors import UserError
from .prompts import trigger_prompts
from .same_layers import moments_under
from .statistics import Moments, read_statistics
from .tensor_file import read_metadata, tensors_hash, write_safetensors

GUIDANCE = 2.5  # LoRAs of others are seen as people draw with them


def moments_path(lora: Path, base: str) -> Path:
    """Where a LoRA's moments on one base model are kept: beside it"""
    return lora.with_name(f"{lora.stem}.{base}.stats.safetensors")


def general_path(folder: Path, base: str) -> Path:
    """Where it is kept what the base model sees"""
    return folder / f"general.{base}.safetensors"


def kept_moments(lora: Path, base: str | None = None) -> tuple[Moments, str] | None:
    """Moments recorded with this very LoRA, and the base model they were recorded on; None if there are none.

    base: the one wanted; without it the newest file counts.  Damaged ones are as good as none: they are recorded anew.
    """
    for path, on in _recorded(lora):
        if base in (None, on):
            with contextlib.suppress(UserError):
                return read_statistics(path)[0], on
    return None


def shared_base(loras: list[Path]) -> str | None:
    """The base model on which most of these LoRAs have moments, of several the one that the first of them saw last: what one
    sees on another model is not what it sees beside the others.  None if none has any."""
    named = {lora: [on for _, on in _named(lora)] for lora in loras}
    if len({on for bases in named.values() for on in bases}) > 1:  # only then need the LoRAs themselves be read
        named = {lora: [on for _, on in _recorded(lora)] for lora in loras}
    bases = [on for bases in named.values() for on in bases]
    return max(bases, key=bases.count, default=None)  # the first of equals


def _recorded(lora: Path) -> Iterator[tuple[Path, str]]:
    """Its files of moments that can be read, the newest first, and the base model that each is of"""
    for path, on in _named(lora):
        with contextlib.suppress(UserError):
            if read_metadata(path).get("seqlora.lora") == tensors_hash(lora):
                yield path, on


def _named(lora: Path) -> list[tuple[Path, str]]:
    """The same by their names alone: the LoRA may be another one since"""
    pattern = re.compile(re.escape(lora.stem) + r"\.([0-9a-f]{16})\.stats\.safetensors")
    found = [(p, pattern.fullmatch(p.name)) for p in lora.parent.glob("*.stats.safetensors")]
    return sorted(((p, match[1]) for p, match in found if match), key=lambda f: _changed(f[0]), reverse=True)


def kept_trigger(lora: Path, base: str) -> str:
    """The words that this LoRA drew while the moments that `kept_moments` found on this base model were recorded"""
    return read_metadata(moments_path(lora, base)).get("seqlora.trigger", "")


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # gone since it was listed; reading it says so
        return 0


def kept_general(folder: Path, base: str) -> Moments | None:
    """What this base model sees while it draws other things, if `general_calibration` recorded it in this folder"""
    path = general_path(folder, base)
    return Calibration.load(path).moments if path.exists() else None


def general_folders(lora: Path) -> list[Path]:
    """Beside a LoRA, where the command line keeps it, and folders `seqlora` above, where the nodes do"""
    return [lora.parent, *(above / "seqlora" for above in lora.absolute().parents)]


def general_near(lora: Path, base: str) -> Moments | None:
    """The same in the first of its `general_folders` that has it"""
    return next(
        (found for found in (kept_general(folder, base) for folder in general_folders(lora)) if found is not None), None
    )


def drawing(size: tuple[int, int], pictures: int = 0, seed: int = 0) -> str:
    """How `see_trigger` draws with these, in a word for the moments' file"""
    return f"{size[0]}x{size[1]}, {pictures or trigger_count(size)} pictures, seed {seed}"


def is_recorded(lora: Path, base: str, trigger: str, drawn: str, layers: Collection[str]) -> bool:
    """Whether moments of all these layers are kept that were recorded with this very LoRA on this base model, with this trigger
    and drawn this way; those that do not say how they were drawn count as they are"""
    kept = kept_moments(lora, base)
    if kept is None or not set(layers) <= moments_under(kept[0], layers).layers.keys():
        return False
    found = read_metadata(moments_path(lora, base))
    return found.get("seqlora.trigger", "") == trigger and found.get("seqlora.drawn", drawn) == drawn


def keep_moments(lora: Path, base: str, moments: Moments, trigger: str, drawn: str = "") -> Path:
    """Write the moments beside the LoRA; returns where.  drawn: from `drawing`, if it shall be told"""
    path = moments_path(lora, base)
    metadata = {
        "seqlora.lora": tensors_hash(lora), "seqlora.base": base, "seqlora.trigger": trigger,
        "seqlora.shared": json.dumps(moments.shared()), **({"seqlora.drawn": drawn} if drawn else {}),
    }  # fmt: skip
    write_safetensors(path, moments.tensors(), metadata)
    return path


def trigger_count(size: tuple[int, int]) -> int:
    """Pictures that a LoRA draws of its trigger"""
    return 32 if max(size) <= 128 else 6


def see_trigger(
    denoiser: Denoiser, adapter: Adapter | None, trigger: str, size: tuple[int, int], pictures: int = 0, seed: int = 0
) -> Moments:
    """Moments of the layers' inputs while the LoRA's trigger is drawn with it on.

    adapter: None if the denoiser's weights hold it already.  pictures: 0 for `trigger_count`.
    """
    if not trigger.strip():
        raise UserError("no trigger: name the words that call the LoRA in a prompt; its file does not say")
    prompts = trigger_prompts(trigger.strip(), pictures or trigger_count(size), seed)
    moments = draw(denoiser, prompts, seed, size, adapter, GUIDANCE).moments
    return Moments(moments.layers | record_text(denoiser, prompts).layers)


def general_calibration(
    denoiser: Denoiser, folder: Path, size: tuple[int, int], pictures: int | None = None, seed: int = 0
) -> Calibration:
    """What the bare model sees while it draws other things; made once a base model and folder.

    Layers that were not recorded before are recorded on the pictures that are kept.
    """
    base = denoiser.fingerprint()
    path = general_path(folder, base)
    calibration = None
    if path.exists():
        with contextlib.suppress(UserError):  # a damaged one is made anew
            calibration = Calibration.load(path)
    if calibration is None:
        # nothing replays what was visited
        calibration = replace(calibrate(denoiser, size, pictures, seed=seed, guidance=GUIDANCE), visited=None)
        calibration.moments.layers |= record_text(denoiser, calibration.prompts).layers
    else:
        sites = [*denoiser.sites(), *denoiser.text_sites()]
        if all(s.name in calibration.moments.layers or is_token_table(s.name) for s in sites):
            return calibration
        prompts = denoiser.encode_prompts(calibration.prompts)
        calibration.moments.layers |= record_moments(denoiser, calibration.latents, prompts, seed=seed).layers
        calibration.moments.layers |= record_text(denoiser, calibration.prompts).layers
    calibration.save(path, base)
    return calibration
