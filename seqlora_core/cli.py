"""The command line: `python -m seqlora_core COMMAND`, or `seqlora COMMAND`.

Exit codes: 0, or 2 with one sentence for the user's mistake, 1 for ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import calibrate_command, library_command, stack_command, train_command
from .config import LARGEST_SEED, TrainingConfig
from .errors import UserError
from .options import GROUPS, add_options, build
from .terminal import bar, open_model, say


def _common(seed: int | str = 0) -> argparse.ArgumentParser:
    """Options of all commands"""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--model",
        type=Path,
        help="base model: a diffusers folder of SD1.5, SD2, SDXL, SD3 or Flux.1, or a file of the demo model's layout (default: the demo model)",
    )
    common.add_argument("--library", type=Path, help="folder of the library")
    common.add_argument("--seed", type=_seed, default=seed, metavar="N", help="of all that is random (default: 0)")
    common.add_argument("--device", help="cpu, cuda ... (default: a GPU if there is one)")
    common.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="of the base model")
    common.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    return common


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"give a whole number from 0 to {LARGEST_SEED}")
    return number


def _whole(least: int, multiple: int = 1):
    """Reads whole numbers from `least` on, multiples of `multiple`"""

    def whole(text: str) -> int:
        number = int(text)
        if number < least or number % multiple:
            raise argparse.ArgumentTypeError(
                f"give a {f'multiple of {multiple}' if multiple > 1 else 'whole number'} from {least} on"
            )
        return number

    return whole


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
            sub.add_argument("--diffusers", action="store_true",
                             help="under diffusers' names, for its SD3 and Flux.1 pipelines (others read files as they are)")  # fmt: skip

    sample = command("sample", "draw prompts")
    sample.add_argument("prompts", nargs="+", metavar="PROMPT")
    sample.add_argument("--adapter", action="append", default=[], metavar="FILE[:STRENGTH]", help="LoRA to add (repeatable)")
    sample.add_argument("--steps", type=_whole(1), metavar="N", help="of sampling (default: 20)")
    sample.add_argument("--guidance", type=float, metavar="X", help="by the prompt (default: 4)")
    sample.add_argument(
        "--size", type=_whole(32, 8), metavar="N", help="side of the square in pixels (default: the model's own)"
    )
    sample.add_argument("--output", type=Path, default=Path("sample.png"))

    embedding = command(
        "embedding", "write a concept's learnt trigger as an embedding, for prompts that call it by its file's name"
    )
    embedding.add_argument("adapter", type=Path, metavar="FILE", help="the concept's LoRA, learnt with --learn-trigger")
    embedding.add_argument("--output", type=Path, required=True, help="such as models/embeddings/my_cat.safetensors of ComfyUI")

    calibrate = command("calibrate", "record what LoRAs see while they draw their triggers, or the base model for a library")
    calibrate.add_argument("loras", nargs="*", type=Path, metavar="LORA", help="LoRA files (or give --library)")
    calibrate.add_argument("--trigger", action="append", default=[], metavar="WORDS",
                           help="what calls a LoRA, one for each in their order (default: from its file)")  # fmt: skip
    calibrate.add_argument("--pictures", type=int, default=None, help="to draw, of each LoRA or of the library's base model")

    library = command(
        "library", "look after a library: list, verify, repair, remove NAME, rename OLD NEW, reorder NAME..., rebase, merge DIR"
    )  # fmt: skip
    library.add_argument("action", choices=["list", "verify", "repair", "remove", "rename", "reorder", "rebase", "merge"])
    library.add_argument("folder", type=Path)
    library.add_argument("rest", nargs="*", help="concepts to remove, to rename or in their new order; folders to merge")
    library.add_argument("--output", type=Path, help="folder of the new library, for rebase and merge")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0, or 2 after an error or a stop, which is told on stderr.  arguments: None for the process's own"""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show ends no run
            stream.reconfigure(errors="backslashreplace")
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
        unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        print(json.dumps(result, ensure_ascii=not unicode))
    return 0


def _demo(args):
    from .demo import CONCEPTS, run_demo

    if args.model is not None and args.model.is_dir():
        raise UserError("the demo runs on the demo model: leave --model out")

    rows = run_demo(
        open_model(args), args.output, list(args.concepts or CONCEPTS), build(TrainingConfig, vars(args)), say(args), bar
    )
    return {"output": str(args.output), "rows": rows}


COMMANDS = {
    "demo": _demo, "train": train_command.run, "stack": stack_command.stack, "report": stack_command.report,
    "sample": stack_command.sample, "embedding": stack_command.embedding, "calibrate": calibrate_command.run, "library": library_command.run,
}  # fmt: skip
