"""`seqlora train`: one concept, or all of a recipe."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from textwrap import indent

from .config import Checkpointing, PictureOptions, TrainingConfig
from .errors import UserError
from .options import DEFAULTS, add_options, build, flag
from .recipe import EXAMPLE, Job, read_recipe
from .terminal import bar, open_model, say, usable_device

EXAMPLES = f"""\
examples:
  seqlora train --library my_library --images photos/cat --trigger ohwx --class-noun cat
  seqlora train --recipe library.toml
  accelerate launch --multi_gpu -m seqlora_core train --recipe library.toml

a recipe (TOML; the same options, with '_' for '-'; concepts already trained are skipped, a run that was killed goes on):
{indent(EXAMPLE, "  ")}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to train; how comes from options.py"""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES
    parser.usage = "seqlora train --library DIR (--images DIR --trigger WORD | --recipe FILE) [options]"
    what = parser.add_argument_group("the concept")
    what.add_argument("--images", type=Path, metavar="DIR", help="reference pictures, captions in .txt files beside them")
    what.add_argument("--trigger", metavar="WORD", help="rare word that calls the concept")
    what.add_argument("--class-noun", metavar="NOUN", help="what it is: animal, person ...")
    what.add_argument("--regularisation", type=Path, metavar="DIR",
                      help="pictures of the class on which the model must stay as it is, beside those it draws itself")  # fmt: skip
    what.add_argument("--name", help="name in the library (default: the folder's)")
    what.add_argument("--recipe", type=Path, metavar="FILE", help="TOML file that names many concepts, instead of the above")
    what.add_argument("--again", action="store_true",
                      help="train a concept that the library has anew, beside all others; it is replaced only then")  # fmt: skip
    what.add_argument(
        "--pictures", type=Path, metavar="DIR", help="write the curves and the contact sheet of each concept there"
    )
    what.add_argument("--preview-every", type=int, default=0, metavar="N",
                      help="and every N steps a preview: the new concept, an earlier one, something unrelated (default: 0, none)")  # fmt: skip
    what.add_argument("--planned", type=int, metavar="N", help="concepts a new library is planned for (default: 32)")
    add_options(parser)


def run(args) -> dict:
    """`seqlora train`; returns what --json prints"""
    given = {name: value for name, value in vars(args).items() if name in DEFAULTS and name != "planned"}
    args.trigger, args.class_noun = (args.trigger or "").strip(), (args.class_noun or "").strip()
    if args.recipe is None:
        missing = next((word for word in ("images", "trigger") if not getattr(args, word)), None)
        if missing:
            raise UserError(f"no {missing} given: use --images DIR and --trigger WORD, or --recipe FILE")
        name = args.name or args.images.resolve().name
        return _train(args, [Job(args.images, name, args.trigger, args.class_noun, args.regularisation, given)])[0]
    for word in ("images", "trigger", "class_noun", "regularisation", "name"):
        if getattr(args, word):
            raise UserError(f"--{word.replace('_', '-')} and --recipe exclude one another: put it into the recipe")
    recipe = read_recipe(args.recipe)
    for word, value in recipe.settings.items():
        if getattr(args, word) is None:
            setattr(args, word, value)
    for job in recipe.jobs:
        job.options |= given  # what is said on the command line goes before what is written
    return {"library": str(args.library), "concepts": _train(args, recipe.jobs)}


def _train(args, jobs: list[Job]) -> list[dict]:
    from .library import Library
    from .manifest import FILE
    from .names import concept_name, safe_text
    from .parallel import launched
    from .preview import Preview
    from .run_pictures import RunPictures
    from .teach import train_concept

    if args.planned is not None:
        TrainingConfig(planned=args.planned).validate()
    configs = [[build(kind, job.options) for kind in (TrainingConfig, PictureOptions, Checkpointing)] for job in jobs]
    if args.library is None:
        raise UserError("no library: name its folder with --library")
    if args.preview_every and not args.pictures:
        raise UserError("no folder for previews: name it with --pictures")
    workers = launched(usable_device(args.device))
    args.device, args.quiet = workers.device or args.device, not workers.first
    if workers.count > 1:
        say(args)(f"{workers.count} processes share each batch")
    shown = RunPictures(args.pictures, args.preview_every, say(args)) if args.pictures and workers.first else None
    for job in jobs:
        concept_name(job.name)
        safe_text(job.trigger, "trigger")
        safe_text(job.class_noun, "class noun")
    if len({config.text_encoder for config, *_ in configs}) > 1:
        raise UserError("text_encoder is one choice for a whole library: give it once, above the first [[concept]]")
    model = open_model(args)
    done_before = _done_before(args, model.fingerprint(), jobs, configs) if args.recipe else set()
    # all, before any work: a mistake shows at once.  Of many concepts the first's pictures are kept, the others' read again
    # when it is their turn
    read: dict[str, tuple] = {}
    for job, (config, options, _) in zip(jobs, configs):
        if job.name not in done_before:
            found = _read(model, job, config, options, workers)
            read = read or {job.name: found}
    found = None
    planned = args.planned
    if planned is None and not (args.library / FILE).exists():
        planned = max(TrainingConfig.planned, len(jobs))
    library = Library(args.library, model.fingerprint(), planned, create=True)
    for name in (job.name for job in jobs if job.name not in done_before):
        library.check_free(name, args.again or library.unfinished(name))
    _check_order(library, jobs, configs, done_before)
    done = []
    for job, (config, options, checkpointing) in zip(jobs, configs):
        if job.name in done_before:
            left = ", and left as it is for a run that was stopped and goes on beside it"
            beside = left if args.again else _otherwise(library, job, config)
            say(args)(f"{job.name}: trained already{beside}")
            done.append({"name": job.name, "skipped": True})
        else:
            sets, notes, regularisation = read.pop(job.name, None) or _read(model, job, config, options, workers)
            for note in notes:
                say(args)(note)
            early: list[str] = []

            def tell(note: str, early=early) -> None:
                early.append(note)
                say(args)(note)

            with bar(job.name, config.steps, args.quiet) as reported:
                on_step = reported
                if shown:
                    earlier = library.concepts(without=job.name, stored_moments=True)
                    preview = Preview(model, job.trigger, job.class_noun, earlier, tuple(sets[0].images.shape[1:3]))
                    on_step = shown.watch(job.name, preview, on_step)
                concept, fit = train_concept(
                    model, library, sets, job.name, job.trigger, job.class_noun, None, config, on_step, args.again,
                    checkpointing=checkpointing, template=options.caption, regularisation=regularisation, workers=workers,
                    tell=tell,
                )  # fmt: skip
            again = "the same command goes on" if checkpointing.resume else "the same command goes on without --no-resume"
            done.append(_told(args, library, concept, fit, config.steps, early, again) | {"pictures": notes})
            if getattr(reported, "asked", None):  # after the last step
                raise KeyboardInterrupt
            if shown:
                try:
                    done[-1]["shown"] = shown.after(model, library, job.name, sets[0].images)
                    say(args)("drawn: " + ", ".join(done[-1]["shown"]))
                except UserError as error:
                    say(args)(f"{error}; {job.name} is in the library all the same")
    return done


def _done_before(args, base: str, jobs: list[Job], configs: list) -> set[str]:
    """Names of those that the library holds and that are left as they are: all that are whole, or with --again those before one
    whose stopped run goes on, which rests on them"""
    from .checkpoint import LIBRARY, begun_with
    from .library import Library
    from .manifest import FILE

    if not (args.library / FILE).exists():
        return set()
    library = Library(args.library, base)
    if args.again:
        begun = [c.resume and begun_with(library.checkpoints(job.name)).get(LIBRARY) for job, (*_, c) in zip(jobs, configs)]
        on = [bool(state) and state == library.state(job.name) for job, state in zip(jobs, begun)]
        jobs = jobs[: on.index(True) if True in on else 0]
    return {job.name for job in jobs if job.name in library.names and not library.unfinished(job.name)}


def _otherwise(library, job: Job, config: TrainingConfig) -> str:
    """What a concept that is there was trained with other than it is asked for now, as the end of a sentence"""
    from .tensor_file import read_metadata

    asked = {"trigger": job.trigger, "class_noun": job.class_noun}
    asked |= {name: getattr(config, name) for name in job.options if hasattr(config, name)}
    said: dict[str, str] = {}
    with contextlib.suppress(UserError):  # of a damaged file, which is told where it is needed
        said = read_metadata(library.paths(job.name)[0])
    pairs = {name: (said.get(f"seqlora.{name}", str(value)), str(value)) for name, value in asked.items()}
    other = [
        f"{flag(n).replace('-', '_')} {was or 'none'}, not {now or 'none'}" for n, (was, now) in pairs.items() if was != now
    ]
    return f", with {'; '.join(other)}: --again trains it anew" if other else ""


def _check_order(library, jobs: list[Job], configs: list, done_before: set[str]) -> None:
    """UserError if a run that was stopped would be gone on with only after others, with which it can go on no more"""
    from .teach import stopped_runs

    stopped, todo = stopped_runs(library), [job.name for job in jobs if job.name not in done_before]
    resumed = [job.name for job, (*_, c) in zip(jobs, configs) if c.resume and job.name in stopped]
    late = next((name for name in resumed if name in todo[1:]), None)
    if late is not None:
        raise UserError(
            f"the run of {late!r} was stopped, and can go on no more once {todo[0]!r} is taught: put it before that in the "
            "recipe, or begin it anew with --no-resume"
        )


def _read(model, job: Job, config: TrainingConfig, options: PictureOptions, workers) -> tuple[list, list[str], list]:
    """A concept's pictures, what there is to say of them, and pictures of its class; UserError for whatever would be told of
    them or of the options once it is trained"""
    from .feasible import check_feasible
    from .pictures import load
    from .references import complete_captions
    from .teach import class_captions, cut_off

    model.adapt_text(config.text_encoder, tokens=config.learn_trigger)
    check_feasible(model, config, workers)
    sets, notes = load(job.images, model.size, options, model)
    texts = [complete_captions(s.captions, job.trigger, job.class_noun, options.caption, s.names) for s in sets]
    cut_off(model, sets, [t for some, s in zip(texts, sets) for t in some[:: 2 if s.mirrored else 1]], job.trigger)
    regularisation, more = load(job.regularisation, model.size, options, model) if job.regularisation else ([], [])
    class_captions(regularisation, job.trigger, job.class_noun, options.caption, config)
    return sets, notes + [f"regularisation: {note}" for note in more], regularisation


def _told(args, library, concept, fit, steps: int, early: list[str], again: str) -> dict:
    """Says how a run ended; raises again what stopped it.  early: notes that were told before; again: how it goes on"""
    path, tell = library.paths(concept.name)[0], say(args)
    if len(fit.losses) < steps:
        kept = f"{concept.name} is kept as it was" if library.whole(concept.name) else f"what was trained is in {path}"
        tell(f"stopped after {len(fit.losses)} of {steps} steps; {kept}; {again}")
        raise fit.stopped
    for note in fit.notes:
        if note not in early:
            tell(note)
    tell(f"{concept.name}: {len(fit.losses)} steps, written to {path}")
    if fit.stopped is not None:
        raise fit.stopped
    return {"name": concept.name, "path": str(path), "losses": fit.losses, "energies": fit.energies, "notes": fit.notes}
