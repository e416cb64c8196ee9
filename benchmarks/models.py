"""Which models train: every family that a host can build, at tiny width with random weights.  docs/results/models.json.

    python -m benchmarks.models ~/comfy/ComfyUI/.venv/bin/python ~/comfy/ComfyUI [PYTHON CHECKOUT ...]

ComfyUI's model classes run in ComfyUI's own python (comfy_models.py), diffusers' in this one (diffusers_models.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from seqlora_core.tables import meta

ROOT = Path(__file__).resolve().parent.parent
# transformer blocks of the UNets: (width, how many), and the width of their text
UNETS = {"SD1.5": ([(320, 5), (640, 5), (1280, 6)], 768), "SDXL": ([(640, 10), (1280, 60)], 2048)}
RESULTS = ROOT / "docs" / "results" / "models.json"


def run(python: str, script: str, *arguments: str) -> tuple[str, list[dict]]:
    """(name and version of the host, its rows)"""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        subprocess.run([python, str(ROOT / "benchmarks" / script), *arguments, str(output)], check=True, cwd=ROOT)
        found = json.loads(output.read_text(encoding="utf-8"))
    return found["meta"]["host"], found["rows"]


def metric_bytes(blocks: list[tuple[int, int]], text: int) -> int:
    """Of a fit's two dense float32 matrices a layer; six attention projections a block read its width, two the text"""
    return sum(2 * 4 * count * (6 * width**2 + 2 * text**2) for width, count in blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", nargs="*", help="pairs: a python that runs it, a checkout")
    args = parser.parse_args()
    rows = []
    for python, checkout in zip(args.comfyui[::2], args.comfyui[1::2]):
        host, found = run(python, "comfy_models.py", checkout)
        rows += [{"host": host, **row} for row in found]
    sizes = {name: metric_bytes(*unet) for name, unet in UNETS.items()}
    about = meta("python -m benchmarks.models", "cpu", [0])
    RESULTS.write_text(json.dumps({"meta": about, "metric_bytes": sizes, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
