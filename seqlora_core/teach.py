"""Teach a library one more concept: the whole way from pictures to files."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import asdict, replace

from torch import Tensor

from .adapter import is_token_table, json_metadata
from .calibration import Calibration, calibrate, made_beside, picture_count, recipe
from .captions import unread
from .checkpoint import FOLDER, LIBRARY, Checkpoints, begun_with
from .concept import Concept, References
from .config import Checkpointing, TrainingConfig, settings
from .denoiser import Denoiser, check_size
from .errors import UserError
from .feasible import check_feasible
from .library import Library
from .live_prompts import is_text
from .metadata import curves, datasets, shortened, tag_frequency, training
from .names import concept_name, safe_text
from .parallel import Workers
from .pictures import Pictures
from .references import TEMPLATE, captions_of_class, complete_captions
from .storage import digest, digest_of
from .tensor_file import SMALL
from .trainer import Fit, Step, fit


def train_concept(
    denoiser: Denoiser, library: Library, images: Tensor | list[Pictures], name: str, trigger: str, class_noun: str = "",
    captions: list[str | None] | None = None, config: TrainingConfig | None = None,
    on_step: Callable[[Step], None] | None = None, replace_existing: bool = False,
    checkpointing: Checkpointing | None = None, template: str = TEMPLATE, regularisation: list[Pictures] = (),
    workers: Workers | None = None, tell: Callable[[str], None] | None = None,
) -> tuple[Concept, Fit]:  # fmt: skip
    """Train a concept on top of all that the library holds, and add it.

    images [n, height, width, 3] in 0..1, or `pictures.load`'s sets of several sizes.  captions: one for each image,
    None for the template.  An exception that `on_step` raises ends training: the concept is saved as it is then, unless
    the library holds one of this name that is whole, and `Fit.stopped` holds the exception.
    With `replace_existing` a concept of this name is trained anew beside all others, and replaced only then.
    A run that was stopped or killed goes on from its last checkpoint, to the same file as if it had not been, or without
    `checkpointing.resume` is begun anew; a concept that was saved as it was then is replaced by the whole one.
    regularisation: pictures of the class on which the model must stay as it is.  Of several `workers` the first writes.
    tell: is given the notes that are known before the first step, for who would rather stop then; `Fit.notes` has them too.
    Raises UserError before any work for a name that is taken, a missing trigger and the like.
    """
    name, trigger, class_noun = (
        concept_name(name),
        safe_text(trigger, "trigger"),
        safe_text(class_noun, "class noun"),
    )
    if not trigger:
        raise UserError("the trigger is empty: choose a rare word that calls the concept, such as 'ohwx'")
    checkpointing, workers = checkpointing or Checkpointing(), workers or Workers()
    checkpointing.validate()
    with library.training() if workers.first else contextlib.nullcontext():
        library.reload()
        unfinished = library.unfinished(name)
        library.check_free(name, replace_existing or unfinished)
        sets = images if isinstance(images, list) else [Pictures(images, captions or [None] * len(images))]
        if not sets or any(s.images.ndim != 4 or len(s.images) == 0 for s in sets):
            raise UserError("no reference images: give at least one, eight or more are better")
        for some in [*sets, *regularisation]:
            _check_pictures(some)
            check_size(denoiser, _size(some))
        texts = [complete_captions(s.captions, trigger, class_noun, template, s.names) for s in sets]
        config = replace(config or TrainingConfig(), planned=library.planned)
        of_class = class_captions(regularisation, trigger, class_noun, template, config)
        _check_kept(texts[0][: config.keep_latents])
        others = library.concepts(without=name, stored_moments=True)
        learnt = any(is_token_table(layer) for c in others for layer in c.adapter.layers)
        denoiser.adapt_text(config.text_encoder, tokens=config.learn_trigger or learnt)
        check_feasible(denoiser, config, workers)
        calibration = _calibration(denoiser, library, _size(sets[0]), config, workers)
        references = [_references(denoiser, s, t) for s, t in zip(sets, texts)]
        others_of_class = [_references(denoiser, s, t) for s, t in zip(regularisation, of_class)]
        for some, made in zip([*sets, *regularisation], [*references, *others_of_class]):
            _check_finite(some, made.latents)
        every = [t for some, s in zip(texts, sets) for t in some[:: 2 if s.mirrored else 1]]  # of each picture once
        early = cut_off(denoiser, sets, every, trigger)
        alike = next((c.name for c in others if c.trigger.lower() == trigger.lower()), None)
        if calibration.visited is None and config.drift_budget and config.replay_weight:
            early.append(
                f"the library {library.folder.name!r} was begun by an earlier version, whose statistics know the pictures that the "
                "budget looks at: unrelated prompts may move further than the budget says; a new library keeps to it"
            )
        if library.note:  # once, of a run of many concepts
            early.append(library.note)
            library.note = ""
        if alike is not None:
            early.append(f"the trigger {trigger!r} calls {alike!r} of this library too: use one of them at a time")
        for other in (n for n in stopped_runs(library) if n != name):
            early.append(f"the run of {other!r}, which was stopped, can go on no more once {name!r} is taught: finish it first")
        for note in early if tell else []:
            tell(note)
        run = _identity(library, name, [*references, *others_of_class], [*sets, *regularisation], trigger, config)
        checkpoints = Checkpoints(library.checkpoints(name), run, checkpointing.every, checkpointing.keep, checkpointing.resume)
        result = fit(denoiser, references, trigger, others, calibration, config, on_step, checkpoints, others_of_class, workers)
        kept = slice(0, config.keep_latents)
        result.notes += early
        result.adapter.metadata = _metadata(
            denoiser, name, f"{trigger} {class_noun}".strip(), every, references[0].size, others, result
        )  # fmt: skip
        concept = Concept(
            name, trigger, class_noun, result.adapter, result.moments, result.bases, references[0].latents[kept], texts[0][kept]
        )  # fmt: skip
        if workers.first:
            done = len(result.losses) == config.steps
            if done or not library.whole(name):
                again = name in library.names and library.cost(name)
                library.add(concept, replace_existing or unfinished)
                if again:
                    result.notes.append(f"{name} was trained anew, beside all others{again}")
        workers.wait()
        library.reload()
        return concept, result


def stopped_runs(library: Library) -> list[str]:
    """Whose runs were stopped before their concepts were whole, and can go on as long as the library stays as it is"""
    begun = {path.name: begun_with(path).get(LIBRARY) for path in sorted(library.folder.glob(f"{FOLDER}/*"))}
    return [name for name, state in begun.items() if state and state == library.state(name) and not library.whole(name)]


def class_captions(
    sets: list[Pictures], trigger: str, class_noun: str, template: str, config: TrainingConfig
) -> list[list[str]]:  # fmt: skip
    """Of pictures of the class, set by set; UserError if they would do nothing, or keep the concept from being learnt"""
    if sets and not config.replay_weight:
        raise UserError(
            "regularisation pictures are held by replay, which replay_weight 0 leaves out: give it a weight, such as "
            f"{TrainingConfig.replay_weight:g}, or leave the pictures out"
        )
    return [captions_of_class(s.captions, trigger, class_noun, template) for s in sets]


def _size(pictures: Pictures) -> tuple[int, int]:
    return tuple(pictures.images.shape[1:3])


def _check_pictures(pictures: Pictures) -> None:
    """UserError for what is no picture, and for captions that are not one for each"""
    images, captions = pictures.images, pictures.captions
    if images.shape[-1] != 3 or not images.is_floating_point():
        raise UserError(
            f"pictures are {list(images.shape)} of {str(images.dtype).removeprefix('torch.')}: give [n, height, width, 3], from 0 to 1"
        )
    if len(captions) != len(images):
        raise UserError(f"{len(captions)} captions for {len(images)} pictures: give one for each, None for the template")


def _check_kept(captions: list[str]) -> None:
    """UserError if they would fill the header of the file that they are kept in"""
    long = sum(len(caption.encode(errors="replace")) for caption in captions)
    if long > SMALL // 4:
        raise UserError(
            f"the captions of {len(captions)} pictures, which are kept for later concepts, are {long:,} bytes long, of {SMALL // 4:,} "
            "at most: shorten them, no text encoder reads so much, or keep fewer (keep_latents)"
        )


def cut_off(denoiser: Denoiser, sets: list[Pictures], captions: list[str], trigger: str) -> list[str]:
    """A note on captions that teach nothing of the trigger, none if there are none; UserError if no caption does.
    captions: of each picture once"""
    found = unread(denoiser, captions, trigger)
    if not found:
        return []
    if len(found) == len(captions):
        raise UserError(
            f"the text encoder gets as far as the trigger {trigger!r} in none of the {len(captions)} captions, so nothing would "
            "learn to answer to it: put it at their beginning"
        )
    names = [n for s in sets for n in (s.names or ["a picture"] * len(s.images))[:: 2 if s.mirrored else 1]]
    return [
        f"the text encoder does not get as far as the trigger {trigger!r} in {len(found)} of {len(captions)} captions, such as "
        f"that of {names[found[0]]}: put the trigger nearer to the beginning"
    ]


def _references(denoiser: Denoiser, pictures: Pictures, captions: list[str]) -> References:
    latents = denoiser.encode_images(pictures.images.float()).cpu()
    return References(latents, captions, _size(pictures), pictures.masks, pictures.repeats, pictures.mirrored)


def _check_finite(pictures: Pictures, latents: Tensor) -> None:
    """UserError if a picture is none, or the VAE makes none of it"""
    bad = next((i for i, one in enumerate(latents) if not one.isfinite().all()), None)
    if bad is None:
        return
    which = pictures.names[bad] if pictures.names else f"picture {bad + 1}"
    if not pictures.images[bad].isfinite().all():
        raise UserError(f"{which} holds values that are not finite: look at where it comes from, or leave it out")
    raise UserError(
        f"the VAE makes values of {which} that are not finite: load it in another precision, such as bfloat16 or float32"
    )


def _calibration(
    denoiser: Denoiser, library: Library, size: tuple[int, int], config: TrainingConfig, workers: Workers
) -> Calibration:
    """The library's.  If it has none, that of a library beside it on the same base model, else made; read back in any case,
    so that every run sees the same."""
    if library.calibration() is None and workers.first:
        count = picture_count(size)
        found = made_beside(library.folder, denoiser.fingerprint(), recipe(denoiser, size, count))
        library.keep_calibration(found or calibrate(denoiser, size, count))
    workers.wait()
    calibration = library.calibration()
    begun = any(is_text(name) for name in calibration.moments.layers)
    if begun != config.text_encoder:
        raise UserError(
            f"the library {library.folder.name!r} was begun {'with' if begun else 'without'} the text encoder: "
            f"train {'with' if begun else 'without'} text_encoder, or start a new library"
        )
    return calibration


def _identity(
    library: Library, name: str, references: list[References], sets: list[Pictures], trigger: str, config: TrainingConfig
) -> dict[str, str]:
    """What must be the same for a run to be gone on with"""
    tensors = (t for s in sets for t in (s.images, s.masks) if t is not None)
    contents = (t.float().contiguous().numpy().tobytes() for t in tensors)  # one at a time: they may fill the memory
    return {
        **{key: str(value) for key, value in asdict(config).items()},
        "trigger": trigger,
        "pictures": digest_of(itertools.chain([repr([s.repeats for s in sets]).encode()], contents)),
        "captions": digest(repr([r.captions for r in references]).encode()),
        LIBRARY: library.state(name),
    }


def _metadata(denoiser, name, phrase, texts, size, others, result: Fit) -> dict[str, str]:
    """What the file says of how it was trained; the library adds what it knows"""
    config = result.config
    orthogonal = config.orthogonal and bool(result.bases)  # of a trigger alone there are none
    metric = "in the metric of the base model's layer inputs" if config.whitened else "in the plain metric"
    said = {
        "ss_tag_frequency": shortened(tag_frequency(name, texts, phrase), phrase),
        "ss_datasets": datasets(name, phrase, len(texts)),
        "seqlora.steps_done": str(len(result.losses)),
        "seqlora.curves": curves(result.losses, result.energies),
        "seqlora.constraint": {
            "lora_down": f"orthogonal {metric}" if orthogonal else "free",
            "to": [c.name for c in others] if orthogonal else [],
        },
    }
    return (
        settings(config) | training(config, texts, size, len(result.losses)) | denoiser.about().metadata() | json_metadata(said)
    )
