"""Results of the reliability scripts: docs/results/reliability.json, one entry a script."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from seqlora_core.tables import meta

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "reliability.json"


def main(name: str, count: int, what: str, run: Callable[[int, int, Path, float], dict[str, Any]]) -> None:
    """A script: `run(count, seed, an empty folder, minutes)` as the command line asks, its totals printed and recorded."""
    args, started = arguments(count, what), time.time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        result = run(args.count, args.seed, folder, args.minutes)
    finish(name, args, result, started)


def arguments(count: int, what: str) -> argparse.Namespace:
    """What every script can be told"""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=count, help=what)
    parser.add_argument("--seed", type=int, default=None, help="printed, to repeat a run (default: a new one)")
    parser.add_argument("--record", action="store_true", help=f"write the result into docs/results/{RESULTS.name}")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop then, with the count that was reached")
    args = parser.parse_args()
    args.seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    print(f"{Path(sys.argv[0]).stem}: seed {args.seed}, count {args.count}", flush=True)
    return args


def finish(name: str, args: argparse.Namespace, result: dict[str, Any], started: float) -> None:
    """Print, record if asked to, and exit with 1 if there were failures."""
    result = {**result, "seconds": round(time.time() - started)}
    print(json.dumps(result, indent=1), flush=True)
    if args.record and "skipped" not in result:
        command = f"python -m tests.reliability.{name} --count {args.count} --seed {args.seed}"
        found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        entry = {"meta": meta(command, torch.device("cpu"), [args.seed]), "wanted": args.count, **result}
        RESULTS.write_text(json.dumps({**found, name: entry}, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if result["failures"] else 0)
