"""Teach a library one more concept: the whole way from pictures to files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from torch import Tensor

from .adapter import json_metadata
from .calibration import calibrate
from .checkpoint import Checkpoints
from .concept import Concept, References
from .config import Checkpointing, TrainingConfig, settings
from .denoiser import Denoiser
from .errors import UserError
from .library import Library, digest
from .metadata import tag_frequency, training
from .names import safe_name, safe_text
from .references import complete_captions
from .trainer import Fit, Step, fit


def train_concept(
    denoiser: Denoiser, library: Library, images: Tensor, name: str, trigger: str, class_noun: str = "",
    captions: list[str | None] | None = None, config: TrainingConfig | None = None,
    on_step: Callable[[Step], None] | None = None, replace_existing: bool = False,
    checkpointing: Checkpointing | None = None,
) -> tuple[Concept, Fit]:  # fmt: skip
    """Train a concept on top of all that the library holds, and add it.

    images [n, height, width, 3] in 0..1.  captions: one for each image, None for the template.  An exception that
    `on_step` raises ends training: the concept is saved as it is then, and `Fit.stopped` holds the exception.
    With `replace_existing` a concept of this name is trained anew beside all others, and replaced only then.
    A run that was stopped or killed goes on from its last checkpoint, to the same file as if it had not been; a
    concept that was saved as it was then is replaced by the whole one.
    Raises UserError before any work for a name that is taken, a missing trigger and the like.
    """
    name, trigger, class_noun = (
        safe_name(name, "concept name"),
        safe_text(trigger, "trigger"),
        safe_text(class_noun, "class noun"),
    )
    if not trigger:
        raise UserError("the trigger is empty: choose a rare word that calls the concept, such as 'ohwx'")
    checkpointing = checkpointing or Checkpointing()
    checkpointing.validate()
    with library.training():
        library.reload()
        unfinished = checkpointing.resume and library.unfinished(name)
        library.check_free(name, replace_existing or unfinished)
        if images.ndim != 4 or len(images) == 0:
            raise UserError("no reference images: give at least one, eight or more are better")
        texts = complete_captions(captions or [None] * len(images), trigger, class_noun)
        config = replace(config or TrainingConfig(), planned=library.planned)
        config.validate()
        size = (images.shape[1], images.shape[2])
        calibration = library.calibration()
        if calibration is None:
            calibration = calibrate(denoiser, size)
            library.keep_calibration(calibration)
        latents = denoiser.encode_images(images).cpu()
        others = [c for c in library.concepts() if c.name != name]
        run = _identity(library, name, images, texts, trigger, config)
        checkpoints = Checkpoints(library.checkpoints(name), run, checkpointing.every, checkpointing.keep)
        if not checkpointing.resume:
            checkpoints.clear()
        result = fit(denoiser, References(latents, texts, size), trigger, others, calibration, config, on_step, checkpoints)
        kept = slice(0, config.keep_latents)
        result.adapter.metadata = _metadata(denoiser, name, texts, size, others, config, len(result.losses))
        concept = Concept(
            name, trigger, class_noun, result.adapter, result.moments, result.bases, latents[kept], texts[kept]
        )  # fmt: skip
        again = name in library.names and library.cost(name)
        library.add(concept, replace_existing or unfinished)
        if again:
            result.notes.append(f"{name} was trained anew, beside all others{again}")
        if result.stopped is None:
            checkpoints.clear()
        return concept, result


def _identity(
    library: Library, name: str, images: Tensor, texts: list[str], trigger: str, config: TrainingConfig
) -> dict[str, str]:
    """What must be the same for a run to be gone on with"""
    return {
        **{key: str(value) for key, value in asdict(config).items()},
        "trigger": trigger,
        "pictures": digest(images.float().contiguous().numpy().tobytes()),
        "captions": digest(repr(texts).encode()),
        "the state of the library": library.state(name),
    }


def _metadata(denoiser, name, texts, size, others, config: TrainingConfig, done: int) -> dict[str, str]:
    """What the file says of how it was trained; the library adds what it knows"""
    metric = "in the metric of the base model's layer inputs" if config.whitened else "in the plain metric"
    said = {
        "ss_tag_frequency": tag_frequency(name, texts),
        "seqlora.steps_done": str(done),
        "seqlora.constraint": {
            "lora_down": f"orthogonal {metric}" if config.orthogonal else "free",
            "to": [c.name for c in others] if config.orthogonal else [],
        },
    }
    return settings(config) | training(config, texts, size, done) | denoiser.about().metadata() | json_metadata(said)
