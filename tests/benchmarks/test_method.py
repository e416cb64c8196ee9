"""The benchmark of the method runs, resumes, and its rivals are what they are called."""

import functools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from benchmarks import by_concept, concepts, crowd, method, rivals
from seqlora_core import evaluation, identity
from seqlora_core.adapter import Adapter, LayerDelta, concatenate
from seqlora_core.demo import shared_words
from seqlora_core.demo_model import DEMO_FOLDER, TOKENIZER
from seqlora_core.identity import Identity
from seqlora_core.library import Library
from seqlora_core.preview import draw_with

from ..conftest import few_generic

ROWS = ["ordinary_sum", "closed_form", "orthogonal_adaptation", "seqlora"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, calibration, model):
    """The benchmark's command on two of the demo's concepts, two steps each; then one row of it again"""
    patch = pytest.MonkeyPatch()
    cache = tmp_path_factory.mktemp("bench")
    patch.setattr(concepts, "ensure", lambda _: DEMO_FOLDER / "concepts")
    patch.setattr(concepts, "names", lambda which="all": ["octopus", "penguin"])
    patch.setattr(method, "RATES", (1e-3,))
    patch.setattr(method, "load_generic", few_generic)
    patch.setattr(evaluation, "LEVELS", 2)
    patch.setattr(method, "Identity", lambda *given, drawn: Identity(*given, drawn=1))
    patch.setattr(identity, "draw_with", functools.partial(draw_with, steps=4))
    patch.setitem(method.MODELS, "demo", (lambda: model, "method.json"))
    (cache / "pairs").symlink_to(DEMO_FOLDER / "evaluation" / "pairs")
    calibration.save(cache / "runs-2" / "calibration.safetensors", model.fingerprint())
    arguments = ["--counts", "2", "--seeds", "0", "--steps", "2", "--cache", str(cache)]
    outputs = []
    for number, rows in enumerate((ROWS, ["seqlora", "seqlora_closed_form", by_concept.ROW])):
        outputs.append(cache / f"{number}.json")
        method.main([*arguments, "--output", str(outputs[-1]), "--rows", *rows])
    library = ["--count", "2", "--trigger-tokens", "0", *arguments[4:], "--rate", "1e-3"]
    by_concept.main([*library, "--output", str(cache / "by_concept.json")])
    crowd.main([*library, "--output", str(cache / "crowd.png")])
    patch.setattr(method.Bench, "chain", lambda *_: pytest.fail("what the results file holds was trained again"))
    method.main([*arguments, "--output", str(outputs[1]), "--rows", "seqlora"])
    with pytest.raises(SystemExit, match="another steps"):
        method.main([*arguments, "--steps", "3", "--output", str(outputs[1])])
    patch.undo()
    model.adapt_text(False)
    return cache, [json.loads(p.read_text()) for p in outputs]


def test_rows_are_those_of_the_contract_and_a_second_run_resumes(run):
    _, (first, second) = run
    assert [r["row"] for r in first["rows"]] == ROWS
    for row in first["rows"]:
        assert {
            "n", "alone", "stack", "alone_gain", "kept_mean", "kept_worst", "kept_subset", "generic_drift", "pairs",
            "identity_alone", "identity_stack", "pixel_control_stack", "seconds", "learning_rate", "spread",
        } <= set(row)  # fmt: skip
    assert first["runs"][-1] == second["runs"][0]
    plain, refitted, _ = second["runs"]
    assert refitted["row"] == "seqlora_closed_form" and refitted["alone"] == plain["alone"]
    assert refitted["stack"] != plain["stack"]
    assert {"command", "commit", "seeds", "device", "versions"} <= set(first["meta"])
    assert [c["name"] for c in first["costs"]["seqlora"]] == ["octopus", "penguin"]


def test_each_concept_of_a_library_has_its_own_line_and_its_own_picture(run):
    """What is kept, concept by concept, has the table's mean and worst"""
    cache, (_, table) = run
    found = json.loads((cache / "by_concept.json").read_text())
    assert list(found["kept"]) == ["octopus", "penguin"]
    expected = table["runs"][2]
    assert expected["row"] == by_concept.ROW
    assert found["without_styles"]["kept"] == pytest.approx(expected["kept_mean"], abs=1e-4)
    assert min(found["kept"].values()) == pytest.approx(expected["kept_worst"], abs=1e-4)
    picture = Image.open(cache / "crowd.png")
    assert picture.width > 4 * 2 * crowd.TILE and picture.height > crowd.TILE


def test_orthogonal_adaptation_has_frozen_bases_orthogonal_as_plain_vectors(run):
    cache, _ = run
    library = Library(next((cache / "runs-2" / "orthogonal_adaptation-0.001").iterdir()))
    first, second = library.concepts()
    for name, delta in first.adapter.layers.items():
        assert (delta.down @ second.adapter.layers[name].down.mT).abs().max() < 1e-5
        assert torch.allclose(delta.down @ delta.down.mT, torch.eye(delta.rank), atol=1e-5)


def test_a_merge_is_one_change_of_each_weight():
    generator = torch.Generator().manual_seed(0)
    make = lambda: Adapter({"l": LayerDelta(torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator))})  # noqa: E731
    a, b = make(), make()
    plain = rivals.merged([a, b], lambda parts: parts[0] + parts[1])
    assert torch.allclose(plain.layers["l"].dense(), concatenate([a, b]).layers["l"].dense(), atol=1e-6)
    # where both agree in sign and nothing is trimmed, TIES is the mean of the two
    merged = rivals.ties([a, a], density=1.0).layers["l"].dense()
    assert torch.allclose(merged, a.layers["l"].dense(), atol=1e-6)
    state = torch.random.get_rng_state()
    one, two = (rivals.dare_ties([a, b], seed=3).layers["l"].dense() for _ in range(2))
    assert torch.equal(one, two) and torch.equal(state, torch.random.get_rng_state())


def test_summary_is_mean_and_spread_over_seeds():
    runs = [{"row": "seqlora", "n": 2, "kept_mean": v, "seed": i, "planned": 10} for i, v in enumerate((0.8, 0.9, 1.0))]
    (row,) = method.summary(runs)
    assert row["kept_mean"] == pytest.approx(0.9) and row["spread"]["kept_mean"] == pytest.approx(0.1) and row["seeds"] == 3
    first, other = method.summary([*runs, {**runs[0], "planned": 101, "kept_mean": 0.5}])  # another library, no other seed
    assert first["seeds"] == 3 and other["kept_mean"] == 0.5 and other["row"] == "seqlora, planned for 101"


def test_concept_sets_are_apart_and_large_enough():
    tuning, final = concepts.names("tuning"), concepts.names("final")
    assert not set(tuning) & set(final)
    assert len(tuning) + len(final) >= 102 and len(final) >= 32
    triggers = [t for *_, t, _ in concepts.table().values()]
    triggers += [concepts.style_trigger(s, np.random.default_rng([concepts.SEED, i])) for i, s in enumerate(concepts.STYLES)]
    assert len(set(triggers)) == len(triggers)


@pytest.mark.parametrize("tokens", [4, 8])
def test_triggers_of_their_own_share_no_token_and_captions_are_otherwise_the_same(tmp_path, monkeypatch, tokens):
    home = tmp_path / "as they come"
    for name in ("octopus", "penguin"):
        shutil.copytree(DEMO_FOLDER / "concepts" / name, home / "concepts" / name)
    (home / "concepts" / "classic").mkdir()
    for number, thing in enumerate(("a cactus, black background", "a pig, pink background")):
        (home / "concepts" / "classic" / f"{number:02}.txt").write_text(f"{thing}, klasiko style")
    (home / "pairs").mkdir()
    shutil.copy(DEMO_FOLDER / "evaluation" / "pairs" / "octopus+penguin.txt", home / "pairs")
    monkeypatch.setattr(concepts, "ensure", lambda _: home / "concepts")
    folder = concepts.with_own_triggers(tmp_path, tokens)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    new = {}
    for name, old in (("octopus", "octzu"), ("penguin", "pengvo")):
        texts = [[p.read_text() for p in sorted((at / "concepts" / name).rglob("*.txt"))] for at in (home, folder)]
        new[old] = shared_words(texts[1])[0]
        same = [t.replace(f"an {old}", f"a {new[old]}").replace(old, new[old]) for t in texts[0]]
        assert texts[1] == same and old not in "".join(texts[1])
    ids = [set(tokenizer.encode(word).ids[1:-1]) for word in new.values()]
    assert [len(i) for i in ids] == [tokens, tokens] and not ids[0] & ids[1]
    style = (folder / "concepts" / "classic" / "00.txt").read_text()
    assert re.fullmatch(r"\w+ style, a cactus, black background", style) and "klasiko" not in style
    pair = (folder / "pairs" / "octopus+penguin.txt").read_text()
    assert all(word in pair for word in new.values()) and not any(word in pair for word in new)
