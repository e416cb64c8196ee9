"""`seqlora stack`, `report`, `sample` and `embedding`: what is done with LoRA files or a library."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from .errors import UserError
from .terminal import on_this_model, open_model, say


def _adapters(args):
    """(name, adapter, strength, moments or None) of files or of a whole library, and what the base model sees.

    What has strength 0 takes no part, as in the nodes: nothing gives way to it.
    """
    from .adapter import load_adapter
    from .library import Library
    from .lora_moments import kept_moments, shared_base
    from .same_layers import check_widths, moments_under, one_spelling, under_names
    from .statistics import read_statistics

    if bool(args.adapters) == bool(args.library):
        raise UserError("name LoRA files or give --library, one of the two")
    if args.library:
        opened = Library(args.library)
        _check_apart(args.output, [opened.paths(name)[0] for name in opened.names])
        calibration = opened.calibration()
        return [(c.name, c.adapter, 1.0, c.moments) for c in opened.concepts()], calibration and calibration.moments
    names, out, ask = [], [], "give their model with --model, or use the node Save Stack with it"
    if args.model is not None:
        names, ask = [s.name for s in open_model(args).sites()], "use the node Save Stack with their model"
    files = [_with_strength(item) for item in args.adapters]
    twice = next((p for p, _ in files if [q.resolve() for q, _ in files].count(p.resolve()) > 1), None)
    if twice:
        raise UserError(f"{twice} is named twice: name it once, with one strength")
    _check_apart(args.output, [path for path, _ in files])
    base = shared_base([path for path, _ in files])
    for path, strength in files:
        adapter, stats, moments = load_adapter(path), _statistics(path), None
        if stats.exists():
            moments, *_ = read_statistics(stats)
        elif kept := kept_moments(path, base):
            moments, _ = kept
        out.append((path.stem, under_names(adapter, [*names, *(moments.layers if moments else ())]), strength, moments))
    out = [part for part in out if part[2]] or out
    adapters, moments = one_spelling([a for _, a, *_ in out], [m for *_, m in out], ask)
    check_widths([name for name, *_ in out], adapters)
    general = _general([path for path, _ in files], base)
    general = general and moments_under(general, [n for a in adapters for n in a.layers])
    return [(name, a, strength, m) for (name, _, strength, _), a, m in zip(out, adapters, moments)], general


def _general(files: list[Path], base: str | None):
    """What the base model sees while it draws other things, from the first file by path that knows, whatever their order: of a
    library's concepts, which go before others, their calibration"""
    from .calibration import FILE, Calibration
    from .lora_moments import general_near

    concepts = [path for path in sorted(files) if _statistics(path).exists()]
    held = next((path for concept in concepts if (path := concept.with_name(FILE)).exists()), None)
    if held or not base:
        return held and Calibration.load(held).moments
    return next((found for path in sorted(files) if (found := general_near(path, base)) is not None), None)


def _statistics(path: Path) -> Path:
    """Where a library keeps what this concept of it sees"""
    return path.with_name(f"{path.stem}.stats.safetensors")


def _check_apart(output: Path | None, files: list[Path]) -> None:
    """UserError if what is written would take the place of what is read"""
    if output is not None and output.exists() and any(path.exists() and path.samefile(output) for path in files):
        raise UserError(f"{output} is one of the LoRAs themselves: name another file for the output, else it would be lost")


def _known(parts: list, mode: str):
    """The moments of all, or None where some are not known; UserError if `mode` cannot do without"""
    silent = [name for name, *_, moments in parts if moments is None]
    if silent and mode == "data":
        raise UserError(
            f"mode 'data' needs to know what {', '.join(silent)} sees: run 'python -m seqlora_core calibrate' on that file first, "
            "or use --mode weights"
        )
    return None if silent else [moments for *_, moments in parts]


def _with_strength(item: str) -> tuple[Path, float]:
    """FILE or FILE:0.8 (a Windows drive's colon is not a strength)"""
    from .composition import check_strength

    head, colon, tail = item.rpartition(":")
    path, strength = Path(item), 1.0
    if colon and not path.exists():
        with contextlib.suppress(ValueError):
            path, strength = Path(head), float(tail)
    check_strength(path.stem, strength)
    return path, strength


def stack(args):
    """`seqlora stack`; returns what --json prints"""
    from .adapter import check_useful, concatenate, save_adapter
    from .composition import Wishes, energy_kept, norm_shares, project, shared
    from .diffusers_names import as_diffusers
    from .low_rank import truncated
    from .same_layers import unseen
    from .selection import selected
    from .tensor_file import write_safetensors
    from .triggers import trigger_of

    parts, general = _adapters(args)
    names, adapters = [n for n, *_ in parts], [selected(a, args.layers) for _, a, *_ in parts]
    if not parts:
        raise UserError(f"the library {args.library} is empty: train a concept into it first")
    for name, adapter in zip(names, adapters):
        if not adapter.layers:
            raise UserError(f"the filter {args.layers!r} leaves no layer of {name}: use words that its layers' names hold")
    if args.rank is not None and args.rank < 1:
        raise UserError(f"rank is {args.rank}: give a number of at least 1")
    strangers = set(args.protect) - set(names)
    if strangers:
        raise UserError(f"no {sorted(strangers)[0]!r} in this stack to protect: its adapters are {', '.join(names)}")
    whole = frozenset(i for i, n in enumerate(names) if n in args.protect)
    wishes = Wishes(args.order, whole, args.restore, args.cap, args.norm_control)
    known = _known(parts, args.mode)
    left_out = unseen(adapters, known, names) if known and args.mode == "data" else ""
    projected = project(adapters, args.mode, args.amount, known, general, wishes=wishes)
    if args.norm_control:
        projected = [shared(p, share) for p, share in zip(projected, norm_shares(len(parts), whole))]
    kept = [energy_kept(a, p) for a, p in zip(adapters, projected)]
    together = concatenate([p.scaled(s) for p, (_, _, s, _) in zip(projected, parts)])
    called = (", ".join(a.triggers) or trigger_of(a.metadata) for a in adapters)
    together.metadata = {"seqlora.trigger": ", ".join(filter(None, dict.fromkeys(called)))}
    written, lost = truncated(together, args.rank)
    if args.diffusers:
        check_useful(args.output, written)
        write_safetensors(args.output, as_diffusers(written), written.metadata)
    else:
        save_adapter(args.output, written)
    tell = say(args)
    if left_out:
        tell(left_out)
    if args.mode != "sum":
        tell("energy kept of their weights: " + ", ".join(f"{n} {k:.0%}" for n, k in zip(names, kept)))
    tell(
        f"{len(parts)} adapters written to {args.output}"
        + (f", {lost:.2%} of their energy lost to rank {args.rank}" if args.rank else "")
    )
    return {"output": str(args.output), "adapters": names, "energy_kept": dict(zip(names, kept)), "energy_lost": lost}


def report(args):
    """`seqlora report`; returns what --json prints"""
    from dataclasses import asdict

    from .composition import project
    from .report import interference_report
    from .same_layers import unseen

    parts, general = _adapters(args)
    if not parts:
        raise UserError(f"the library {args.library} is empty: train a concept into it first")
    adapters, moments = {n: a for n, a, *_ in parts}, {n: m for n, *_, m in parts if m is not None}
    if len(adapters) < len(parts):
        raise UserError("two of the LoRA files have the same name: a report tells them apart by name, rename one")
    known = _known(parts, args.mode)
    left_out = unseen([adapters[n] for n in moments], list(moments.values()), list(moments))
    projected = project(list(adapters.values()), args.mode, args.amount, known, general)
    found = interference_report(adapters, moments, [s for _, _, s, _ in parts], projected, args.mode)
    found.advice += [left_out] if left_out else []
    say(args)(found.text())
    if args.output is not None and args.output.suffix.lower() == ".png":
        from .plots import save_picture, to_pil
        from .report_picture import report_picture

        save_picture(to_pil(report_picture(found)[0]), args.output)
    elif args.output is not None:
        args.output.write_text(json.dumps(asdict(found), indent=1, ensure_ascii=False), encoding="utf-8")
    return asdict(found)


def sample(args):
    """`seqlora sample`; returns what --json prints"""
    import torch

    from .adapter import concatenate, load_adapter
    from .denoiser import check_size
    from .library import Library
    from .plots import save_picture, to_pil
    from .preview import draw_with

    files = [_with_strength(item) for item in args.adapter]
    adapters, names = [load_adapter(path).scaled(strength) for path, strength in files], [path.name for path, _ in files]
    if args.library is not None:
        concepts = Library(args.library).concepts()
        adapters, names = adapters + [c.adapter for c in concepts], names + [c.name for c in concepts]
    model = open_model(args)
    check_size(model, (args.size or model.size,) * 2)
    placed = on_this_model(model, adapters, names, say(args))
    given = {"steps": args.steps, "guidance": args.guidance}
    drawn = draw_with(
        model, concatenate(placed) if placed else None, args.prompts, (args.size or model.size,) * 2, args.seed,
        **{k: v for k, v in given.items() if v is not None},
    )  # fmt: skip
    save_picture(to_pil(torch.cat(list(drawn), 1)), args.output)
    say(args)(f"written to {args.output}")
    return {"output": str(args.output)}


def embedding(args):
    """`seqlora embedding`; returns what --json prints"""
    from .adapter import load_adapter
    from .embedding import trigger_embedding
    from .tensor_file import write_safetensors

    adapter = load_adapter(args.adapter)
    if len(adapter.triggers) != 1:
        raise UserError(f"{args.adapter.name} names {len(adapter.triggers)} triggers: give the file of one concept")
    try:
        vectors = trigger_embedding(open_model(args), adapter, adapter.triggers[0])
    except UserError as error:
        raise UserError(f"{args.adapter.name}: {error}") from error
    write_safetensors(args.output, vectors, {"seqlora.trigger": adapter.triggers[0]})
    count = max(len(rows) for rows in vectors.values())
    say(args)(
        f"{count} vectors written to {args.output}; in ComfyUI's models/embeddings, embedding:{args.output.stem} calls it"
    )
    return {"output": str(args.output), "vectors": {name: len(rows) for name, rows in vectors.items()}}
