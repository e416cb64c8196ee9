"""The command line: `python -m seqlora_core COMMAND`, or `seqlora COMMAND`.

Exit codes: 0, or 2 with one sentence for the user's mistake, 1 for ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import train_command
from .config import TrainingConfig
from .errors import UserError
from .options import GROUPS, add_options, build
from .terminal import bar, open_model, say


def _common(seed: int | str = 0) -> argparse.ArgumentParser:
    """Options of all commands"""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--model",
        type=Path,
        help="base model: a diffusers folder of SD1.5, SD2 or SDXL, or a file of the demo model's layout (default: the demo model)",
    )
    common.add_argument("--library", type=Path, help="folder of the library")
    common.add_argument("--seed", type=int, default=seed, help="of all that is random (default: 0)")
    common.add_argument("--device", default="cpu", help="cpu, cuda ...")
    common.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="of the base model")
    common.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    return common


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="seqlora", description="Concepts that stack: train them one after another, add them up."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[_common()])

    demo = command("demo", "teach sample concepts, stack them, compare")
    demo.add_argument("--output", type=Path, default=Path("demo_output"))
    demo.add_argument("--concepts", nargs="+", metavar="NAME", help="sample concepts (default: five)")
    add_options(demo, {"the method": GROUPS["the method"]})

    text = "teach a library one more concept, or all of a recipe"
    train = commands.add_parser("train", help=text, description=text, parents=[_common(argparse.SUPPRESS)])
    train_command.add_arguments(train)

    for name, text in (("stack", "write several concepts as one ordinary LoRA"), ("report", "who disturbs whom")):
        sub = command(name, text)
        sub.add_argument("adapters", nargs="*", metavar="ADAPTER[:STRENGTH]", help="LoRA files (or give --library)")
        sub.add_argument("--output", type=Path, required=name == "stack")
        sub.add_argument("--mode", default="sum", choices=["sum", "weights", "data"])
        sub.add_argument("--amount", type=float, default=1.0, help="of the projection, 0..1")
        if name == "stack":
            sub.add_argument("--order", default="symmetric", choices=["symmetric", "first", "strongest"],
                             help="of mode weights: all give way alike, or each to those before it or stronger")  # fmt: skip
            sub.add_argument("--protect", action="append", default=[], metavar="NAME", help="adapter left whole (repeatable)")
            sub.add_argument("--restore", action="store_true", help="scale each back to its energy before the projection")
            sub.add_argument("--norm-control", action="store_true", help="divide all by the square root of their number")
            sub.add_argument("--layers", default="", metavar="WORDS", help="only layers named so, as in 'up_blocks, -attn1'")
            sub.add_argument("--rank", type=int, help="at most so many directions a layer (default: exact)")
            sub.add_argument("--cap", type=float, metavar="F",
                             help="cut singular values above F times the median of an adapter's layers (10 is reported)")  # fmt: skip

    sample = command("sample", "draw prompts")
    sample.add_argument("prompts", nargs="+", metavar="PROMPT")
    sample.add_argument("--adapter", action="append", default=[], metavar="FILE[:STRENGTH]", help="LoRA to add (repeatable)")
    sample.add_argument("--output", type=Path, default=Path("sample.png"))

    calibrate = command("calibrate", "record what LoRAs see while they draw their triggers, or the base model for a library")
    calibrate.add_argument("loras", nargs="*", type=Path, metavar="LORA", help="LoRA files (or give --library)")
    calibrate.add_argument("--trigger", action="append", default=[], metavar="WORDS",
                           help="what calls a LoRA, one for each in their order (default: from its file)")  # fmt: skip
    calibrate.add_argument("--pictures", type=int, default=None, help="to draw, of each LoRA or of the library's base model")

    library = command("library", "look after a library: list, verify, repair, remove NAME, reorder NAME..., rebase, merge DIR")
    library.add_argument("action", choices=["list", "verify", "repair", "remove", "reorder", "rebase", "merge"])
    library.add_argument("folder", type=Path)
    library.add_argument("rest", nargs="*", help="concepts to remove or in their new order; folders to merge")
    library.add_argument("--output", type=Path, help="folder of the new library, for rebase and merge")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        result = COMMANDS[args.command](args)
    except UserError as error:
        print(f"seqlora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("seqlora: stopped", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    return 0


def _demo(args):
    from .demo import CONCEPTS, run_demo

    if args.model is not None and args.model.is_dir():
        raise UserError("the demo runs on the demo model: leave --model out")

    rows = run_demo(
        open_model(args), args.output, list(args.concepts or CONCEPTS), build(TrainingConfig, vars(args)), say(args), bar
    )
    return {"output": str(args.output), "rows": rows}


def _adapters(items: list[str], library: Path | None):
    """(name, adapter, strength, moments or None) of files or of a whole library, and what the base model sees"""
    from .adapter import load_adapter, renamed
    from .library import Library
    from .lora_moments import kept_general, kept_moments
    from .statistics import read_statistics

    if bool(items) == bool(library):
        raise UserError("name LoRA files or give --library, one of the two")
    if library:
        opened = Library(library)
        calibration = opened.calibration()
        return [(c.name, c.adapter, 1.0, c.moments) for c in opened.concepts()], calibration and calibration.moments
    out, general = [], None
    for item in items:
        path, strength = _with_strength(item)
        adapter, stats, moments = load_adapter(path), path.with_name(f"{path.stem}.stats.safetensors"), None
        if stats.exists():
            moments, *_ = read_statistics(stats)
        elif kept := kept_moments(path):
            moments, base = kept
            general = general or kept_general(path.parent, base)
        out.append((path.stem, adapter, strength, moments))
    # kohya's underscored names of a model's own modules and the dotted ones are the same layers
    dotted = [n for _, a, *_ in out for n in a.layers if n.startswith("diffusion_model.")]
    return [(name, renamed(adapter, dotted), *rest) for name, adapter, *rest in out], general


def _with_strength(item: str) -> tuple[Path, float]:
    """FILE or FILE:0.8 (a Windows drive's colon is not a strength)"""
    head, colon, tail = item.rpartition(":")
    if colon and not Path(item).exists():
        try:
            return Path(head), float(tail)
        except ValueError:
            pass
    return Path(item), 1.0


def _stack(args):
    from .adapter import concatenate, save_adapter
    from .composition import Wishes, energy_kept, norm_controlled, project
    from .low_rank import truncated
    from .selection import selected

    parts, general = _adapters(args.adapters, args.library)
    names, adapters, moments = [n for n, *_ in parts], [selected(a, args.layers) for _, a, *_ in parts], [m for *_, m in parts]
    if not parts:
        raise UserError(f"the library {args.library} is empty: train a concept into it first")
    for name, adapter in zip(names, adapters):
        if not adapter.layers:
            raise UserError(f"the filter {args.layers!r} leaves no layer of {name}: use words that its layers' names hold")
    if args.rank is not None and args.rank < 1:
        raise UserError(f"rank is {args.rank}: give a number of at least 1")
    unknown = set(args.protect) - set(names)
    if unknown:
        raise UserError(f"no {sorted(unknown)[0]!r} in this stack to protect: its adapters are {', '.join(names)}")
    wishes = Wishes(args.order, frozenset(i for i, n in enumerate(names) if n in args.protect), args.restore, args.cap)
    known = None if any(m is None for m in moments) else moments
    projected = project(adapters, args.mode, args.amount, known, general, wishes=wishes)
    kept = [energy_kept(a, p) for a, p in zip(adapters, projected)]
    together = concatenate(
        [p.scaled(s) for p, (_, _, s, _) in zip(norm_controlled(projected) if args.norm_control else projected, parts)]
    )
    together.metadata = {"seqlora.trigger": ", ".join(t for a in adapters for t in a.triggers)}
    written, lost = truncated(together, args.rank)
    save_adapter(args.output, written)
    tell = say(args)
    if args.mode != "sum":
        tell("energy kept: " + ", ".join(f"{n} {k:.0%}" for n, k in zip(names, kept)))
    tell(
        f"{len(parts)} adapters written to {args.output}"
        + (f", {lost:.2%} of their energy lost to rank {args.rank}" if args.rank else "")
    )
    return {"output": str(args.output), "adapters": names, "energy_kept": dict(zip(names, kept)), "energy_lost": lost}


def _report(args):
    from dataclasses import asdict

    from .composition import project
    from .report import interference_report

    parts, general = _adapters(args.adapters, args.library)
    if not parts:
        raise UserError(f"the library {args.library} is empty: train a concept into it first")
    adapters, moments = {n: a for n, a, *_ in parts}, {n: m for n, *_, m in parts if m is not None}
    if len(adapters) < len(parts):
        raise UserError("two of the LoRA files have the same name: a report tells them apart by name, rename one")
    known = list(moments.values()) if len(moments) == len(parts) else None
    projected = project(list(adapters.values()), args.mode, args.amount, known, general)
    report = interference_report(adapters, moments, [s for _, _, s, _ in parts], projected, args.mode)
    say(args)(report.text())
    if args.output is not None and args.output.suffix.lower() == ".png":
        from .plots import to_pil
        from .report_picture import report_picture

        to_pil(report_picture(report)[0]).save(args.output)
    elif args.output is not None:
        args.output.write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False), encoding="utf-8")
    return asdict(report)


def _sample(args):
    import torch

    from .adapter import concatenate, load_adapter, renamed
    from .library import Library
    from .plots import to_pil
    from .preview import draw_with

    adapters = [load_adapter(p).scaled(s) for p, s in map(_with_strength, args.adapter)]
    if args.library is not None:
        adapters += [c.adapter for c in Library(args.library).concepts()]
    model = open_model(args)
    adapters = [renamed(a, [s.name for s in model.sites()]) for a in adapters]
    drawn = draw_with(model, concatenate(adapters) if adapters else None, args.prompts, (model.size, model.size), args.seed)
    to_pil(torch.cat(list(drawn), 1)).save(args.output)
    say(args)(f"written to {args.output}")
    return {"output": str(args.output)}


def _calibrate(args):
    from .calibration import calibrate
    from .library import Library

    if bool(args.loras) == bool(args.library):
        raise UserError("name LoRA files or give --library, one of the two")
    if args.loras:
        return _calibrate_loras(args)
    model = open_model(args)
    library = Library(args.library, model.fingerprint(), create=True)
    if len(library):
        raise UserError(
            f"the library {library.folder.name!r} has concepts, whose bases rest on its calibration: start a new one"
        )
    calibration = calibrate(model, (model.size, model.size), args.pictures, seed=args.seed)
    library.keep_calibration(calibration)
    say(args)(f"{len(calibration.prompts)} pictures seen; written to {library.folder}")
    return {"pictures": len(calibration.prompts)}


def _calibrate_loras(args):
    from .adapter import load_adapter
    from .lora_moments import general_calibration, keep_moments, kept_moments, see_trigger
    from .triggers import trigger_of

    if args.trigger and len(args.trigger) != len(args.loras):
        raise UserError(f"{len(args.trigger)} triggers for {len(args.loras)} LoRAs: give one for each, in their order")
    adapters = [load_adapter(path) for path in args.loras]
    triggers = args.trigger or [trigger_of(a.metadata) for a in adapters]
    for path, trigger in zip(args.loras, triggers):
        if not trigger.strip():
            raise UserError(f"{path.name} does not say what calls it: give its trigger with --trigger")
    tell, model, done = say(args), open_model(args), []
    base, size = model.fingerprint(), (model.size, model.size)
    for path, adapter, trigger in zip(args.loras, adapters, triggers):
        new = kept_moments(path, base) is None
        if new:
            keep_moments(path, base, see_trigger(model, adapter, trigger, size, args.pictures or 0, args.seed), trigger)
        tell(f"{path.stem}: {f'drew {trigger!r}, moments kept beside it' if new else 'was recorded before'}")
        done.append({"lora": str(path), "trigger": trigger, "new": new})
    for folder in dict.fromkeys(path.parent for path in args.loras):
        general_calibration(model, folder, size, seed=args.seed)
    return {"base": base, "loras": done}


def _library(args):
    from .library import Library
    from .repair import repair

    tell = say(args)
    if args.action == "repair":
        library = repair(args.folder)
        tell(f"{len(library)} concepts: {', '.join(library.names)}")
        return {"names": library.names}
    library = Library(args.folder)
    if args.action == "list":
        for entry in library.manifest["concepts"]:
            tell(f"{entry['name']}\t{entry['trigger']} {entry['class_noun']}".rstrip())
        return library.manifest
    if args.action == "remove":
        if len(args.rest) != 1:
            raise UserError("which concept? give one name after the folder")
        message = library.remove(args.rest[0])
        tell(message)
        return {"removed": args.rest[0], "message": message}
    if args.action == "reorder":
        library.reorder(args.rest)
        tell(", ".join(library.names))
        return {"names": library.names}
    if args.action in ("rebase", "merge"):
        return _refit(args, library, tell)
    problems = library.verify()
    for problem in problems:
        tell(problem)
    if problems:
        raise UserError(
            f"{len(problems)} problems in {args.folder}: 'seqlora library repair' rebuilds the manifest from whole files"
        )
    tell(f"{len(library)} concepts, all well")
    return {"problems": problems}


def _refit(args, library, tell):
    from dataclasses import asdict

    from .editing import refit
    from .library import Library

    if bool(args.rest) != (args.action == "merge"):
        raise UserError("merge takes the other libraries' folders after the first; rebase takes one folder")
    if args.output is None:
        raise UserError("no folder for the new library: name it with --output; the old ones stay as they are")
    made, price = refit([library, *map(Library, args.rest)], args.output)
    tell(price.text())
    tell(f"written to {made.folder}")
    return {"output": str(made.folder), **asdict(price)}


COMMANDS = {
    "demo": _demo, "train": train_command.run, "stack": _stack, "report": _report, "sample": _sample, "calibrate": _calibrate,
    "library": _library,
}  # fmt: skip
