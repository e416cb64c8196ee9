"""Which models train: every family that a host can build, at tiny width with random weights.  docs/results/models.json.

    python -m benchmarks.models ~/comfy/ComfyUI/.venv/bin/python ~/comfy/ComfyUI [PYTHON CHECKOUT ...]

ComfyUI's model classes run in ComfyUI's own python (comfy_models.py); diffusers' here (diffusers_models.py), always.  Without
arguments ComfyUI's rows stay as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from seqlora_core.sketch import MOST
from seqlora_core.statistics import SKETCH_FROM
from seqlora_core.tables import meta

ROOT = Path(__file__).resolve().parent.parent
# adapted layers of full-size models: (width of the input, layers, different inputs)
ADAPTED = {
    "SD1.5": [(320, 30, 20), (640, 30, 20), (1280, 36, 24), (768, 32, 1)],
    "SDXL": [(640, 60, 40), (1280, 360, 240), (2048, 140, 1)],
    "Flux.1": [(3072, 76, 76), (3072, 38, 38), (15360, 38, 38)],
}
RESULTS = ROOT / "docs" / "results" / "models.json"


def run(*command: str) -> tuple[str, list[dict]]:
    """(name and version of the host, its rows)"""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        subprocess.run([*command, str(output)], check=True, cwd=ROOT)
        found = json.loads(output.read_text(encoding="utf-8"))
    return found["meta"]["host"], found["rows"]


def metric_bytes(adapted: list[tuple[int, int, int]]) -> int:
    """Of a fit's metric and of what others see, in float32: two matrices a layer, of wide inputs two sketches an input"""
    return sum(
        2 * 4 * (layers * width**2 if width < SKETCH_FROM else inputs * MOST * width) for width, layers, inputs in adapted
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", nargs="*", help="pairs: a python that runs it, a checkout")
    args = parser.parse_args()
    rows = []
    for python, checkout in zip(args.comfyui[::2], args.comfyui[1::2]):
        host, found = run(python, str(ROOT / "benchmarks" / "comfy_models.py"), checkout)
        rows += [{"host": host, **row} for row in found]
    if not args.comfyui:
        rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    sizes = {name: metric_bytes(adapted) for name, adapted in ADAPTED.items()}
    host, found = run(sys.executable, "-m", "benchmarks.diffusers_models")
    result = {"meta": meta("python -m benchmarks.models", "cpu", [0]), "metric_bytes": sizes, "rows": rows}
    result["diffusers"] = {"host": host, "rows": found}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
