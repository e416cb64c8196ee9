"""Fills the tables of README.md and docs/*.md in from docs/results/*.json.

    python docs/build.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from docs.tables import of_aims, of_method, of_pack  # noqa: E402

PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "RESULTS.md",
    ROOT / "docs" / "RELIABILITY.md",
    ROOT / "docs" / "MODELS.md",
    ROOT / "demo" / "model" / "MODEL_CARD.md",
]


TABLES = {
    "aims": of_aims.aims_table,
    "pixel_unet": of_method.pixel_unet_table,
    "study": of_method.study_table,
    "replay_pool": of_method.replay_table,
    "method": of_method.method_table,
    "strengths": of_method.strengths_table,
    "editing": of_method.editing_table,
    "late": of_method.late_table,
    "together": of_method.together_table,
    "orders": of_method.orders_table,
    "ablations": lambda: of_method.method_table("ablations"),
    "method_long_triggers": lambda: of_method.method_table("method_long_triggers"),
    "method_long_triggers_planned": lambda: of_method.method_table("method_long_triggers_planned"),
    "scale": of_method.scale_table,
    "method_long_triggers_32": lambda: of_method.method_table("method_long_triggers_32"),
    "method_long_triggers_101": lambda: of_method.method_table("method_long_triggers_101"),
    "fixed_weight": lambda: of_method.method_table("fixed_weight"),
    "method_unet": lambda: of_method.method_table("method_unet"),
    "demo": of_method.demo_table,
    "demo_other": lambda: of_method.demo_table("demo_other"),
    "base": of_method.base_table,
    "bound": of_method.bound_table,
    "prediction": of_method.prediction_table,
    "stacking": of_method.stacking_table,
    "without_data": of_method.without_data_table,
    "patching": of_pack.patching_table,
    "training": of_pack.training_table,
    "training_parts": of_pack.training_parts_table,
    "reliability": of_pack.reliability_table,
    "models": of_pack.models_table,
    "diffusers": of_pack.diffusers_table,
    "metric": of_pack.metric_table,
}


def filled(text: str) -> str:
    def table(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.S)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
