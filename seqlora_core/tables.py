"""Results as files: rows of the protocol in JSON, CSV and Markdown, with how they were made."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
from pathlib import Path

import torch

# key of a row -> (head, format)
COLUMNS = {
    "row": ("row", "{}"), "alone": ("alone", "{:.4f}"), "stack": ("stack", "{:.4f}"), "alone_gain": ("gain alone", "{:.2f}"),
    "stack_gain": ("gain of the stack", "{:.2f}"), "kept_mean": ("kept", "{:.2f}"), "kept_worst": ("worst", "{:.2f}"),
    "kept_subset": ("subsets", "{:.2f}"),
    "generic_drift": ("generic drift", "{:+.1%}"), "pairs": ("pairs", "{:.4f}"),
    "identity_alone": ("identity alone", "{:.2f}"), "identity_stack": ("identity stack", "{:.2f}"),
    "pixel_control_stack": ("pixel control", "{:.2f}"), "one_nn_stack": ("1-NN", "{:.0%}"),
}  # fmt: skip


def markdown(rows: list[dict]) -> str:
    """The rows as a table; missing cells are '-'"""
    lines = ["| " + " | ".join(head for head, _ in COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = ["-" if row.get(key) is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save_table(folder: Path, about: dict, rows: list[dict]) -> None:
    """table.json, table.md and table.csv in the folder"""
    text = json.dumps({"meta": about, "rows": rows}, indent=1) + "\n"
    (folder / "table.json").write_text(text, encoding="utf-8")
    (folder / "table.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r)))
        writer.writeheader()
        writer.writerows(rows)


def meta(command: str, device, seeds: list[int]) -> dict:
    """How a results file was made"""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"command": command, "commit": commit, "seeds": seeds, "device": str(device), "versions": versions}
