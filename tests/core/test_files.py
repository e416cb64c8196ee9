"""Libraries and LoRA files: names, damage, repair; one sentence for each mistake."""

import gc
import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqlora_core.adapter import Adapter, LayerDelta, load_adapter, save_adapter, write_safetensors
from seqlora_core.editing import refit, rename
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.names import safe_name, safe_text
from seqlora_core.recipe import read_recipe
from seqlora_core.references import complete_captions, load_pictures
from seqlora_core.repair import repair
from seqlora_core.storage import Kept
from seqlora_core.teach import train_concept


def adapter(up=1.0):
    return Adapter({"diffusion_model.a": LayerDelta(torch.ones(2, 8), torch.full((6, 2), up))})


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "a\\b", "../a", "/etc", "C:", "c:\\x", "con", "NUL", "com1.x", "a\0b", "a\nb", "x" * 81, "a.", ".a", "a..b", "\u0301a", "\\\\host\\x", "x.stats", "x.safetensors", "-a"]
)  # fmt: skip
def test_names_that_could_leave_the_folder_are_refused(name):
    with pytest.raises(UserError):
        safe_name(name)


@pytest.mark.parametrize("name", ["cat", "my cat", "猫", "котик 2", "हिन्दी", "น้ำ", "a.b", "a-b_c+d", " padded "])
def test_usable_names_pass(name):
    assert safe_name(name) == name.strip()


@given(st.text(max_size=120))
def test_whatever_passes_is_one_plain_file_name(name):
    try:
        passed = safe_name(name)
    except UserError:
        return
    assert not set(passed) & set('/\\:*?"<>|\0\n') and passed not in (".", "..") and len(passed.encode()) <= 200


def test_a_trigger_has_no_edge_that_nobody_sees():
    assert safe_text("\u200bohwx \ufeff\n", "trigger") == "ohwx" and safe_text("👨\u200d👩", "trigger") == "👨\u200d👩"


@pytest.mark.parametrize("name", ["calibration", "Calibration", " CALIBRATION "])
def test_no_concept_takes_the_place_of_the_calibration(copy, name, tmp_path):
    """Neither trained nor renamed nor from a recipe, a manifest or a repair"""
    path, before = copy.folder / "calibration.safetensors", (copy.folder / "calibration.safetensors").read_bytes()
    told = pytest.raises(UserError, match="a concept cannot be called '(?i:calibration)'.*use another name")
    with told:
        rename(copy, "fox", name)
    with told:
        copy.add(replace(copy.load("fox"), name=name))
    with told:
        train_concept(None, copy, [], name, "octzu")
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[[concept]]\nimages = "x"\ntrigger = "y"\nname = "{name}"\n')
    with told:
        read_recipe(recipe)
    assert path.read_bytes() == before and copy.names == ["octopus", "penguin", "fox"] and copy.verify() == []
    stem = name.strip()
    for old, new in zip(copy.paths("fox"), (f"{stem}.safetensors", f"{stem}.stats.safetensors")):
        shutil.copy(old, copy.folder / new)
    assert repair(copy.folder).names == ["octopus", "penguin", "fox"]
    text = copy.manifest_path.read_text().replace('"fox"', f'"{stem}"')
    copy.manifest_path.write_text(text)
    with told:
        Library(copy.folder)


def test_round_trip_with_alpha(tmp_path):
    path = tmp_path / "x.safetensors"
    save_adapter(path, adapter())
    assert torch.equal(load_adapter(path).layers["diffusion_model.a"].dense(), adapter().layers["diffusion_model.a"].dense())
    write_safetensors(
        path, {"l.lora_down.weight": torch.ones(4, 8), "l.lora_up.weight": torch.ones(6, 4), "l.alpha": torch.tensor(2.0)}, {}
    )
    assert torch.equal(load_adapter(path).layers["l"].dense(), torch.full((6, 8), 2.0))


@pytest.mark.parametrize(
    "value, message", [(0.0, "every lora_up is zero"), (float("nan"), "not finite"), (float("inf"), "not finite")]
)
def test_useless_adapters_are_not_saved(tmp_path, value, message):
    with pytest.raises(UserError, match=message):
        save_adapter(tmp_path / "x.safetensors", adapter(value))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"a.lora_down.weight": torch.ones(2, 8)}, "no lora_up"),
        ({"a.lora_down.weight": torch.ones(8, 2), "a.lora_up.weight": torch.ones(2, 6)}, "do not multiply"),
        ({"a.lora_down.weight": torch.full((2, 8), torch.nan), "a.lora_up.weight": torch.ones(6, 2)}, "not finite"),
        ({"a.lora_down.weight": torch.ones(2, 8, 3, 3), "a.lora_up.weight": torch.ones(6, 2, 3, 3)}, "do not multiply"),
        ({"weight": torch.ones(2)}, "not a LoRA"),
    ],
)
def test_broken_adapters_get_one_sentence(tmp_path, tensors, message):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors, {})
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(path)
    assert "x.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, (10**9).to_bytes(8, "little") + b"{}"])
def test_files_that_are_no_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_adapter(path)
    with pytest.raises(UserError, match="no file"):
        load_adapter(tmp_path / "absent.safetensors")


def test_a_library_opens_again_as_it_was(library):
    again = Library(library.folder)
    assert again.names == ["octopus", "penguin", "fox"] and again.verify() == []
    for name in again.names:
        a, b = again.load(name), library.load(name)
        assert all(torch.equal(a.bases[k], b.bases[k]) for k in b.bases)
        assert a.captions and len(a.latents) == len(a.captions)


@pytest.fixture
def copy(library, tmp_path):
    shutil.copytree(library.folder, tmp_path / "copy")
    return Library(tmp_path / "copy")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99, "concepts": []}', '{"format": 1, "planned": 3, "base": "", "concepts": [{"name": "../x"}]}'])  # fmt: skip
def test_a_damaged_manifest_is_told_and_can_be_rebuilt(copy, text):
    copy.manifest_path.write_text(text)
    with pytest.raises(UserError):
        Library(copy.folder)
    rebuilt = repair(copy.folder)
    assert rebuilt.names == ["octopus", "penguin", "fox"]
    assert Library(copy.folder).verify() == []


def test_repair_leaves_out_what_is_not_whole(copy):
    lora, _ = copy.paths("penguin")
    lora.write_bytes(lora.read_bytes()[:1000])
    assert any(p.startswith("penguin:") for p in copy.verify())
    assert repair(copy.folder).names == ["octopus", "fox"]


def test_remove_keeps_the_others(copy):
    message = copy.remove("penguin")
    assert "fox" in message and Library(copy.folder).names == ["octopus", "fox"]
    assert copy.verify() == []
    with pytest.raises(UserError, match="no concept 'penguin'.*octopus, fox"):
        copy.remove("penguin")


def test_a_library_belongs_to_one_base_model(library):
    with pytest.raises(UserError, match="another base model"):
        Library(library.folder, "0123456789abcdef")


def test_no_library_is_told(tmp_path):
    with pytest.raises(UserError, match="no library"):
        Library(tmp_path / "nothing")


def test_a_name_that_is_another_one_in_capitals_is_taken(copy, tmp_path):
    """As file systems see it: of the German sharp s too.  A library that has both already is read again after a repair"""
    rename(copy, "fox", "straße")
    shutil.copytree(copy.folder, tmp_path / "other")
    other = Library(tmp_path / "other")
    other.remove("octopus")
    other.remove("penguin")
    with pytest.raises(UserError, match="has a concept 'straße' already"):
        rename(copy, "penguin", "STRASSE")
    for old, new in zip(copy.paths("penguin"), copy.paths("strasse")):
        shutil.copy(old, new)
    assert Library(copy.folder).names == ["octopus", "penguin", "straße"]
    text = copy.manifest_path.read_text(encoding="utf-8").replace('"penguin"', '"strasse"')
    copy.manifest_path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="names 'straße' twice"):
        Library(copy.folder)
    repair(copy.folder)
    opened = Library(copy.folder)
    assert opened.names == ["octopus", "penguin", "strasse"]
    with pytest.raises(UserError, match="two of the libraries hold a concept 'straße'"):
        refit([other, opened], tmp_path / "merged")


def test_two_writers_wait_or_are_told(copy, monkeypatch):
    import filelock

    monkeypatch.setattr("seqlora_core.library.LOCK_SECONDS", 0.2)
    with filelock.FileLock(str(copy.folder / ".lock")), pytest.raises(UserError, match="another process"):
        Library(copy.folder).remove("fox")
    assert Library(copy.folder).names == ["octopus", "penguin", "fox"]


def test_nothing_but_safetensors_and_the_manifest_is_written(library):
    assert {p.suffix for p in library.folder.iterdir() if not p.name.endswith(".lock")} == {".safetensors", ".json"}
    assert json.loads(library.manifest_path.read_text())["format"] == 2


def test_pictures(tmp_path):
    from PIL import Image

    with pytest.raises(UserError, match="no folder"):
        load_pictures(tmp_path / "absent", 64)
    with pytest.raises(UserError, match="no images"):
        load_pictures(tmp_path, 64)
    Image.new("RGBA", (100, 50), (255, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red zqx thing\n", encoding="utf-8")
    images, captions = load_pictures(tmp_path, 64)
    assert images.shape == (1, 64, 64, 3) and images.min() == 1 and captions == ["a red zqx thing"]
    for other in (b"\xff\xfe\xff", "a red zqx thing".encode("utf-16-le")):
        (tmp_path / "a.txt").write_bytes(other)
        with pytest.raises(UserError, match="a.txt is not UTF-8"):
            load_pictures(tmp_path, 64)
    (tmp_path / "a.txt").unlink()
    Image.new("RGB", (1, 1)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="too small"):
        load_pictures(tmp_path, 64)
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match="cannot read the image .*b.png"):
        load_pictures(tmp_path, 64)


def test_captions():
    assert complete_captions([None, "my zqx"], "zqx", "dog") == ["a zqx dog", "my zqx"]
    assert complete_captions(["my zqx\n  b\u00a0cat"], "zqx b", "cat") == ["my zqx\n  b\u00a0cat"]
    with pytest.raises(UserError, match="the caption 'a dog' of b.png lacks the trigger 'zqx': add it"):
        complete_captions(["a zqx", "a dog"], "zqx", "dog", names=["a.png", "b.png"])
    with pytest.raises(UserError, match="'a dog', which pictures without one get, lacks the trigger: write {trigger} into it"):
        complete_captions([None], "zqx", "dog", "a dog")


def test_what_is_kept_of_a_file_is_let_go_when_it_changes():
    kept, made = Kept(2), []

    def get(key, state):
        return kept.get(key, state, lambda: made.append((key, state)) or Thing())

    class Thing:
        pass

    first = weakref.ref(get("a", 1))
    assert get("a", 1) is first() and made == [("a", 1)]
    get("a", 2)
    gc.collect()
    assert first() is None and made == [("a", 1), ("a", 2)]
    get("b", 1)
    get("a", 2)
    get("c", 1)  # b was used before a
    assert len(made) == 4 and get("a", 2) and len(made) == 4
    get("b", 1)
    assert len(made) == 5


def test_what_is_kept_of_files_has_a_limit_in_bytes_and_ends_with_the_file(tmp_path):
    """A thousand bytes: the latest used stay, and the very last whatever its size; views of one tensor count once"""
    kept, made, files = Kept(9, most_bytes=1000), [], [tmp_path / n for n in "abcd"]

    def get(path, size):
        return kept.get((path, "kind"), None, lambda: made.append(path.name) or thing(size))

    def thing(size):
        whole = torch.zeros(size, dtype=torch.uint8)
        return Adapter({"l": LayerDelta(whole[: size // 2], whole[size // 2 :])}), [{"again": whole}]

    def again(path):
        """Whether it has to be made again"""
        made.clear()
        get(path, 400)
        return bool(made)

    for path in files:
        path.touch()
        get(path, 400)
    assert not again(files[3]) and not again(files[2]) and again(files[0])  # c was used after d
    assert not again(files[2]) and again(files[3])
    get(files[1], 5000)
    assert not again(files[1]) and again(files[2])
    first = weakref.ref(get(files[2], 400)[0])
    files[2].unlink()
    get(files[3], 400)
    gc.collect()
    assert first() is None
