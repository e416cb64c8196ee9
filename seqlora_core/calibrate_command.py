"""`seqlora calibrate`: what a base model sees, with LoRAs of others on, or for a new library."""

from __future__ import annotations

from .errors import UserError
from .terminal import on_this_model, open_model, say


def run(args):
    """`seqlora calibrate`; returns what --json prints"""
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
    from .adapter import is_token_table, load_adapter
    from .lora_moments import drawing, general_calibration, is_recorded, keep_moments, see_trigger
    from .triggers import trigger_of

    if args.trigger and len(args.trigger) != len(args.loras):
        raise UserError(f"{len(args.trigger)} triggers for {len(args.loras)} LoRAs: give one for each, in their order")
    adapters = [load_adapter(path) for path in args.loras]
    triggers = [t.strip() for t in args.trigger or [trigger_of(a.metadata) for a in adapters]]
    for path, trigger in zip(args.loras, triggers):
        if not trigger:
            raise UserError(f"{path.name} does not say what calls it: give its trigger with --trigger")
    tell, model, done = say(args), open_model(args), []
    base, size, pictures = model.fingerprint(), (model.size, model.size), args.pictures or 0
    adapters, drawn = on_this_model(model, adapters, [p.name for p in args.loras], tell), drawing(size, pictures, args.seed)
    layers = [s.name for s in model.sites() if not is_token_table(s.name)]  # whose inputs are no vectors
    for path, adapter, trigger in zip(args.loras, adapters, triggers):
        new = not is_recorded(path, base, trigger, drawn, layers)
        if new:
            keep_moments(path, base, see_trigger(model, adapter, trigger, size, pictures, args.seed), trigger, drawn)
        tell(f"{path.stem}: " + (f"drew {trigger!r}, moments kept beside it" if new else "was recorded before"))
        done.append({"lora": str(path), "trigger": trigger, "new": new})
    for folder in dict.fromkeys(path.parent for path in args.loras):
        general_calibration(model, folder, size, seed=args.seed)
    return {"base": base, "loras": done}
