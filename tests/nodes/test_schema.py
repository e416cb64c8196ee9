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
