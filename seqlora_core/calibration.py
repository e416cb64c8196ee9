"""What a base model sees while it draws other things: moments for the metric, and pictures for replay.

Made once for a library; needs no images, the model draws its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .adapter import Adapter, is_token_table
from .attach import Attachment, attached
from .denoiser import Conditioning, Denoiser
from .drawing import STEPS, UNGUIDED, Visited, draw, latents_at_once
from .errors import UserError
from .prompts import generic_decoys, generic_prompts, is_decoy
from .statistics import Moments, Recorder, json_of, read_statistics
from .tensor_file import read_metadata, write_safetensors

FILE = "calibration.safetensors"
WATCHED = 6  # every so manieth picture is kept apart
PASSES = 4  # noise levels at which each of them is seen


@dataclass
class Calibration:
    """moments: G of each layer.  prompts, latents [n, ...]: pictures the base drew, kept for replay.

    made: how (`recipe`), "" if in a way of its own.  visited: on the way to them; None of what was recorded before that was kept.
    """

    moments: Moments
    prompts: list[str]
    latents: Tensor
    made: str = ""
    visited: Visited | None = None

    def save(self, path: Path, fingerprint: str) -> None:
        """Write it; fingerprint: of the base model it was made on"""
        metadata = {
            "seqlora.base": fingerprint,
            "seqlora.prompts": json.dumps(self.prompts),
            "seqlora.shared": json.dumps(self.moments.shared()),
            "seqlora.made": self.made,
        }
        visited = {f"visited.{name}": part for name, part in self.visited._asdict().items()} if self.visited else {}
        write_safetensors(path, {**self.moments.tensors(), "latents": self.latents.float(), **visited}, metadata)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read one that was saved; UserError if the file is missing, damaged or something else"""
        moments, tensors, metadata = read_statistics(path)
        prompts, latents = json_of(path, metadata, "seqlora.prompts", list), tensors.get("latents")
        visited = Visited(*(tensors.get(f"visited.{part}") for part in Visited._fields))
        visited = None if any(part is None for part in visited) else visited
        if (
            latents is None
            or len(prompts) != (len(latents) if latents.ndim else 0)
            or not all(isinstance(p, str) for p in prompts)
            or not (visited is None or visited.leads_to(latents))
        ):
            raise UserError(f"{path} is no calibration, or a damaged one: record it again with 'seqlora calibrate'")
        return cls(moments, prompts, latents, metadata.get("seqlora.made", ""), visited)


@torch.no_grad()
def record_moments(
    denoiser: Denoiser, latents: Tensor, conditioning: Conditioning, adapter: Adapter | None = None, seed: int = 0
) -> Moments:
    """Second moments of every site's inputs while these latents are seen at noise levels spread over the schedule.

    latents [n, ...]; conditioning of n prompts.  adapter: on meanwhile.
    """
    attachment = Attachment()
    attachment.set_frozen(adapter, denoiser.device)
    generator = torch.Generator().manual_seed(seed)
    count, batch = len(latents), latents_at_once(latents)
    sigmas = denoiser.even_sigmas(count * PASSES)[torch.randperm(count * PASSES, generator=generator)]
    with attached(denoiser.sites(), attachment), Recorder(attachment) as recorder:
        for repeat in range(PASSES):
            for index in torch.arange(count).split(batch):
                x = latents[index].to(denoiser.device)
                noise = torch.randn(x.shape, generator=generator).to(x)
                sigma = sigmas[repeat * count + index].to(x)
                recorder.next_pass()
                denoiser.predict(denoiser.noised(x, noise, sigma), sigma, conditioning[index])
    return recorder.moments()


def record_text(denoiser: Denoiser, prompts: list[str]) -> Moments:
    """The same of the text encoders' layers while these prompts are encoded, all tokens of each."""
    sites, attachment = denoiser.text_sites(), Attachment()
    with attached(sites, attachment), Recorder(attachment) as recorder:
        for prompt in prompts if sites else ():
            recorder.next_pass()
            denoiser.encode_prompts([prompt])
    return recorder.moments()


def picture_count(size: tuple[int, int]) -> int:
    """Pictures that a calibration draws: more cost a start-up and buy hardly a better trade (docs/RESULTS.md)"""
    return 288 if max(size) <= 128 else 32


def calibrate(
    denoiser: Denoiser, size: tuple[int, int], pictures: int | None = None, prompts: list[str] | None = None, seed: int = 0,
    guidance: float = UNGUIDED,
) -> Calibration:  # fmt: skip
    """Draw `pictures` prompts, a quarter of them decoys, with the bare model and record what its layers see meanwhile, but for
    those that are `watched`."""
    made = ""
    if prompts is None:
        pictures = pictures or picture_count(size)
        made = recipe(denoiser, size, pictures, seed, guidance)
        prompts = generic_prompts(pictures - pictures // 4, seed) + generic_decoys(pictures // 4, seed)
    apart = watched(prompts)
    others = [i for i in range(len(prompts)) if i not in apart] or apart
    parts = [others, apart] if others != apart else [others]
    drawn = [draw(denoiser, [prompts[i] for i in some], seed + n, size, guidance=guidance) for n, some in enumerate(parts)]
    order = torch.tensor(sum(parts, [])).argsort()
    latents, *visited = (torch.cat(same)[order] for same in zip(*((d.latents, *d.visited) for d in drawn)))
    return Calibration(drawn[0].moments, prompts, latents, made, Visited(*visited))


def watched(prompts: list[str]) -> list[int]:
    """Numbers of those whose pictures neither statistics nor replay see, so that what happens to them is what happens to others;
    no decoys among them"""
    return [i for i, text in enumerate(prompts) if i % WATCHED == 0 and not is_decoy(text)]


def recipe(denoiser: Denoiser, size: tuple[int, int], pictures: int, seed: int = 0, guidance: float = UNGUIDED) -> str:
    """Two calibrations of one base model that were made alike are the same"""
    layers = sum(not is_token_table(s.name) for s in denoiser.sites())
    return f"{pictures} pictures of {size[0]}x{size[1]}, {STEPS} levels, one in {WATCHED} apart, guidance {guidance:g}, seed {seed}, {layers} layers"


def made_beside(folder: Path, base: str, made: str) -> Calibration | None:
    """What a library beside this folder holds, if it is of the same base model and was made alike"""
    for path in sorted(folder.absolute().parent.glob(f"*/{FILE}")):
        try:
            held = read_metadata(path)
            if held.get("seqlora.base") == base and held.get("seqlora.made") == made:
                return Calibration.load(path)
        except UserError:  # a damaged one is its library's trouble
            continue
    return None
