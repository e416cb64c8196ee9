"""What the commands share: the model they work on, what they say, the bar of a run and its end."""

from __future__ import annotations

import contextlib
import signal
import sys

from .errors import UserError


def say(args):
    """Progress goes to stderr when stdout is for a machine; a process that only helps another says nothing"""
    if getattr(args, "quiet", False):
        return lambda text: None
    return lambda text: print(text, file=sys.stderr if args.json else sys.stdout, flush=True)


def open_model(args):
    """The base model that --model names, on --device in --dtype"""
    import torch

    from .demo_model import DEMO_MODEL, DemoModel
    from .diffusers_folder import open_folder

    path, dtype = args.model or DEMO_MODEL, getattr(torch, args.dtype)
    return (open_folder if path.is_dir() else DemoModel)(path, usable_device(args.device), dtype)


def usable_device(named: str | None) -> str:
    """The device of that name, or without one a GPU if there is one; UserError if it cannot be used"""
    import torch

    if named is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=named)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {named!r} cannot be used here: give cpu, or one that torch.cuda lists") from error
    return named


def on_this_model(model, adapters: list, names: list[str], tell) -> list:
    """The adapters under the names of the model's layers, those of its text encoders among them; what it has no place for is
    told.  names: the adapters', for messages"""
    from .preview import let_texts_act
    from .same_layers import on_model

    let_texts_act(model, adapters)
    sites = model.sites()
    placed = [on_model(a, sites, name) for a, name in zip(adapters, names)]
    for name, (_, missing) in zip(names, placed):
        if missing:
            tell(f"{name}: {len(missing)} layers have no place here, first {missing[0]}")
    return [a for a, _ in placed]


@contextlib.contextmanager
def bar(name: str, steps: int, quiet: bool = False):
    """Function to call after each step: a progress bar, and the place where Ctrl-C (or SIGTERM) ends a run.

    The bar appears with the first step, so that an error before it stands alone.  From then on a signal lets the step
    finish and ends the run with KeyboardInterrupt; a second one ends it where it is.  After the last step it leaves `asked`
    of the function not empty.
    """
    from tqdm import tqdm

    bars, asked, before = [], [], {}

    def ask(number, frame):
        asked.append(number)
        for which, handler in before.items():
            signal.signal(which, handler)

    def on_step(step) -> None:
        if not bars:
            bars.append(tqdm(total=steps, initial=step.number - 1, desc=name, unit="step", leave=False, disable=quiet))
            with contextlib.suppress(ValueError):  # signals belong to the main thread
                before.update({which: signal.signal(which, ask) for which in (signal.SIGINT, signal.SIGTERM)})
        bars[0].set_postfix(loss=f"{step.loss:.3f}", refresh=False)
        bars[0].update()
        if asked:
            raise KeyboardInterrupt

    on_step.asked = asked
    try:
        yield on_step
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
        for shown in bars:
            shown.close()
