"""Node ids, input names and input order are a public format: shared workflows break when they change."""

import json
from pathlib import Path

from .snapshot import schemas

SNAPSHOT = Path(__file__).with_name("schema.json")


def test_the_public_format_is_unchanged(server):
    assert schemas(server.info) == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_contract_order():
    inputs = [i[0] for i in json.loads(SNAPSHOT.read_text(encoding="utf-8"))["SeqLoRATrainConcept"]["inputs"]]
    assert inputs[:13] == [
        "model", "clip", "vae", "images", "library", "name", "trigger", "class_noun", "rank", "steps", "learning_rate",
        "interference_weight", "seed",
    ]  # fmt: skip


def test_every_widget_has_a_tooltip_or_speaks_for_itself(server):
    silent = {"rank", "steps", "learning_rate", "seed", "batch_size", "mode"}
    for node, info in server.info.items():
        if node.startswith("SeqLoRA"):
            assert info["description"] and info["category"] == "SeqLoRA"
            for part in info["input"].values():
                for name, spec in part.items():
                    link = (
                        isinstance(spec[0], str) and spec[0].isupper() and spec[0] not in ("INT", "FLOAT", "STRING", "BOOLEAN")
                    )
                    assert link or name in silent or spec[1].get("tooltip"), f"{node}.{name}"
