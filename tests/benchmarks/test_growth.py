"""What one more concept costs is measured on a library, and drawn."""

import json

from benchmarks import growth
from seqlora_core.config import TrainingConfig
from seqlora_core.demo import load_subject
from seqlora_core.library import Library
from seqlora_core.teach import train_concept


def test_the_whole_way(model, calibration, tmp_path):
    library = Library(tmp_path / "l", model.fingerprint(), create=True)
    library.keep_calibration(calibration)
    config = TrainingConfig(steps=1, batch=2, replay_batch=3, use_decoys=False)
    for name in ("octopus", "penguin"):
        s = load_subject(model, name)
        train_concept(model, library, s.images, name, s.trigger, s.class_noun, s.references.captions, config)
    growth.main(["--library", str(library.folder), "--every", "1", "--steps", "2", "--repeats", "1", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "results" / "growth.json").read_text(encoding="utf-8"))
    assert [r["concepts"] for r in found["rows"]] == [0, 1, 2] and all(r["step"] > 0 < r["start"] for r in found["rows"])
    assert found["bytes"] == [sum(p.stat().st_size for p in library.paths(n)) for n in library.names]
    assert (tmp_path / "images" / "growth.png").stat().st_size > 5000
