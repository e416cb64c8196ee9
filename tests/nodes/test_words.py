"""What nodes say: tooltips, help pages and translations, all of them there and none of them stale."""

import json

import pytest

from locales.build import HELP, LANGUAGES, definitions, files, inputs_of, load_words, missing, own


@pytest.fixture(scope="module")
def words():
    return load_words()


def test_every_text_has_its_translations(server, words):
    assert not missing(server.info, words), "translate these in locales/words.json, then run make words"


def test_committed_files_are_what_the_script_writes(server, words):
    for path, text in files(server.info, words).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} of {path.parent.name} is stale: run make words"


def test_the_server_hands_out_the_translations(server, words):
    served = server.get("/i18n")
    for language in LANGUAGES:
        for node, texts in definitions(server.info, language, words).items():
            assert served[language]["nodeDefs"][node] == texts


def test_every_widget_has_a_tooltip_that_reads_like_the_others(server):
    for node, info in own(server.info).items():
        assert info["description"].endswith(".") and info["category"] == "SeqLoRA", node
        for name, kind, options in inputs_of(info):
            widget = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
            tip = options.get("tooltip", "")
            if widget:
                assert tip, f"{node}.{name} has no tooltip"
            assert not tip or (tip[-1] in ".…" and len(tip) < 320 and "  " not in tip), f"{node}.{name}: {tip!r}"


def test_what_few_people_touch_is_folded_away(server):
    options = {name: o for name, _, o in inputs_of(server.info["SeqLoRATrainConcept"])}
    shown = [name for name, o in options.items() if "default" in o and not o.get("advanced")]
    assert shown == ["library", "name", "trigger", "class_noun", "rank", "steps", "if_trained"]


def test_every_node_has_a_page_with_a_picture(server):
    assert {p.stem for p in HELP.glob("*.md")} == set(own(server.info))
    for page in HELP.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert text.startswith("# ") and f"](images/{page.stem}.png)" in text and "<!-- table -->" in text
        assert (HELP / "images" / f"{page.stem}.png").stat().st_size < 150_000


def test_blueprints_are_offered_where_comfyui_knows_them(server):
    try:
        listed = server.get("/global_subgraphs")
    except Exception as error:
        pytest.skip(f"this ComfyUI has no blueprints of packs: {error}")
    assert {"SeqLoRA teach", "SeqLoRA stack"} <= {entry["name"] for entry in listed.values()}
    assert all(json.loads(server.get(f"/global_subgraphs/{key}")["data"])["definitions"] for key in listed)
