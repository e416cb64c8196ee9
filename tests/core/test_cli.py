"""The command line as a user runs it."""

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from seqlora_core.adapter import Adapter, load_adapter
from seqlora_core.cli import main
from seqlora_core.config import TrainingConfig
from seqlora_core.demo import train_series
from seqlora_core.demo_model import DEMO_FOLDER
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.plots import save_picture
from seqlora_core.preview import Preview
from seqlora_core.run_pictures import RunPictures
from seqlora_core.trainer import Step

from ..conftest import few_generic

OCTOPUS = str(DEMO_FOLDER / "concepts" / "octopus")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A library that the command line made: two concepts of three steps."""
    library = tmp_path_factory.mktemp("cli") / "library"
    assert main(["calibrate", "--library", str(library), "--pictures", "8"]) == 0
    for name, trigger in (("octopus", "octzu"), ("penguin", "pengvo")):
        images = str(DEMO_FOLDER / "concepts" / name)
        assert (
            main(
                [
                    "train",
                    "--library",
                    str(library),
                    "--images",
                    images,
                    "--trigger",
                    trigger,
                    "--class-noun",
                    "animal",
                    "--steps",
                    "3",
                ]
            )
            == 0
        )
    return library


@pytest.mark.parametrize("kind", ["demo", "sd15", "sd3"])
def test_half_precision_of_the_base_model_trains_and_draws(kind, tmp_path):
    """Adapters and latents stay in float32"""
    from benchmarks.tiny import make_pipeline
    from seqlora_core.adapter import load_adapter

    given = ["--library", str(tmp_path / "l"), "--dtype", "bfloat16"]
    if kind != "demo":
        make_pipeline(kind).save_pretrained(tmp_path / kind)
        given += ["--model", str(tmp_path / kind)]
    assert main(["calibrate", *given, "--pictures", "4"]) == 0
    given_too = ["--images", OCTOPUS, "--trigger", "octzu", "--name", "octopus", "--steps", "2", "--no-use-decoys"]
    assert main(["train", *given, *given_too]) == 0
    adapter = load_adapter(tmp_path / "l" / "octopus.safetensors")
    assert adapter.layers and all(d.up.dtype == torch.float32 and d.up.any() for d in adapter.layers.values())
    assert main(["sample", "an octzu", *given, "--steps", "2", "--output", str(tmp_path / "x.png")]) == 0


def test_a_run_is_shown_in_pictures(library, tmp_path, model):
    """Previews at the first step and every second, the curves and the sheet; the concept is the one of an unwatched run"""
    import shutil

    from PIL import Image

    files = []
    for name, more in (("watched", ["--pictures", str(tmp_path / "p"), "--preview-every", "2"]), ("alone", [])):
        shutil.copytree(library.folder, tmp_path / name)
        images = str(DEMO_FOLDER / "concepts" / "ghost")
        given = ["--library", str(tmp_path / name), "--images", images, "--trigger", "ghozt", "--steps", "4", "--batch", "2"]
        assert main(["train", *given, *more]) == 0
        files.append((tmp_path / name / "ghost.safetensors").read_bytes())
    assert files[0] == files[1]
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == [
        "ghost.curves.png", "ghost.sheet.png", "ghost.step-000001.png", "ghost.step-000002.png", "ghost.step-000004.png",
    ]  # fmt: skip
    assert Image.open(tmp_path / "p" / "ghost.sheet.png").width > 500


class Drawn:
    """In the place of previews, which take long"""

    failed = ""

    def draw(self, name, adapter):
        return Image.new("RGB", (8, 8))


def test_a_preview_that_cannot_be_written_ends_no_run(tmp_path):
    told, steps = [], []
    shown = RunPictures(tmp_path / "p", 2, told.append)
    (tmp_path / "p").rmdir()
    on_step = shown.watch("fox", Drawn(), steps.append)
    for number in (1, 2, 3):
        on_step(Step(number, 3, 0.0, 0.0, 0.0, lambda: None))
    assert len(steps) == 3 and len(told) == 2
    assert re.fullmatch("cannot write the picture .*fox.step-000001.png: No such file.*; training goes on", told[0])


def test_a_preview_that_finds_no_memory_ends_no_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "sample", lambda *_: torch.empty(1 << 60))
    preview, told, steps = Preview(model, "zqx", "cat", [], (64, 64)), [], []
    on_step = RunPictures(tmp_path, 2, told.append).watch("fox", preview, steps.append)
    for number in (1, 2, 3):
        on_step(Step(number, 3, 0.0, 0.0, 0.0, lambda: Adapter({})))
    assert len(steps) == 3 and not any(tmp_path.iterdir()) and len(told) == 2
    assert re.fullmatch("the preview of step 2 could not be drawn: .*memory.*; training goes on", told[1])
    assert preview.draw("step 3", Adapter({})).width > 400  # a host that shows it has a picture all the same


def test_pictures_that_cannot_be_written_are_told(library, model, tmp_path):
    shown = RunPictures(tmp_path / "p")
    (tmp_path / "p").rmdir()
    with pytest.raises(UserError, match="cannot write the picture .*octopus.curves.png: No such file.*; choose another place"):
        shown.after(model, library, "octopus", torch.rand(1, 64, 64, 3))
    for name in ("absent/x.png", "x.what"):
        with pytest.raises(UserError, match="cannot write the picture .*; choose another place"):
            save_picture(Drawn().draw("", None), tmp_path / name)


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_train_in_json(capsys, tmp_path):
    run(capsys, "calibrate", "--library", tmp_path / "l", "--pictures", 8)
    code, out, _ = run(
        capsys, "train", "--library", tmp_path / "l", "--images", OCTOPUS, "--trigger", "octzu", "--steps", 3, "--json"
    )
    result = json.loads(out)
    assert code == 0 and len(result["losses"]) == 3 and load_adapter(result["path"]).triggers == ["octzu"]


def test_library_commands(capsys, folder):
    code, out, _ = run(capsys, "library", "list", folder)
    assert code == 0 and out.split() == ["octopus", "octzu", "animal", "penguin", "pengvo", "animal"]
    assert run(capsys, "library", "verify", folder)[0] == 0
    assert run(capsys, "library", "repair", folder)[0] == 0
    code, _, err = run(capsys, "library", "remove", folder, "nobody")
    assert code == 2 and "no concept 'nobody'" in err


def test_a_name_that_the_terminal_cannot_show_ends_no_command(tmp_path, monkeypatch):
    name = "猫é\U00020000"
    library = Library(tmp_path / "l", "base", create=True)
    library.rewrite({**library.manifest, "concepts": [{"name": name, "trigger": "x", "class_noun": "", "order": 0}]})
    said = []
    for more in ([], ["--json"]):
        out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["library", "list", str(library.folder), *more]) == 0
        out.flush()
        said.append(out.buffer.getvalue().decode("cp1252"))
    assert said[0] == f"\\u732bé\\U00020000\tx{os.linesep}" and json.loads(said[1])["concepts"][0]["name"] == name


def test_a_library_is_reordered_rebased_and_merged(capsys, folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert run(capsys, "library", "reorder", copy, "penguin", "octopus")[0] == 0
    assert run(capsys, "library", "list", copy)[1].split()[0] == "penguin"
    code, out, _ = run(capsys, "library", "rebase", copy, "--output", tmp_path / "new", "--json")
    assert code == 0 and json.loads(out)["names"] == ["penguin", "octopus"]
    assert run(capsys, "library", "verify", tmp_path / "new")[0] == 0
    code, _, err = run(capsys, "library", "merge", copy, folder, "--output", tmp_path / "both")
    assert code == 2 and "two of the libraries hold a concept" in err
    code, _, err = run(capsys, "library", "merge", copy, "--output", tmp_path / "both")
    assert code == 2 and "merge takes" in err


def test_stack_and_report(capsys, folder, tmp_path):
    output = tmp_path / "stack.safetensors"
    code, *_ = run(capsys, "stack", "--library", folder, "--output", output)
    assert code == 0
    parts = [load_adapter(folder / f"{n}.safetensors") for n in ("octopus", "penguin")]
    total = load_adapter(output)
    assert total.triggers == ["octzu", "pengvo"]
    for name, delta in total.layers.items():
        assert (delta.dense() - sum(p.layers[name].dense() for p in parts)).abs().max() < 1e-6
    one = tmp_path / "half.safetensors"
    assert run(capsys, "stack", f"{folder / 'octopus.safetensors'}:0.5", "--output", one)[0] == 0
    name = next(iter(parts[0].layers))
    assert (load_adapter(one).layers[name].dense() - 0.5 * parts[0].layers[name].dense()).abs().max() < 1e-6
    assert run(capsys, "stack", "--library", folder, "--mode", "data", "--output", tmp_path / "data.safetensors")[0] == 0
    code, out, _ = run(capsys, "report", "--library", folder, "--output", tmp_path / "r.png", "--json")
    assert code == 0 and json.loads(out)["names"] == ["octopus", "penguin"]
    assert Image.open(tmp_path / "r.png").width > 300
    assert run(capsys, "report", folder / "octopus.safetensors", "--output", tmp_path / "r.json")[0] == 0
    assert json.loads((tmp_path / "r.json").read_text())["names"] == ["octopus"]


def test_sample_draws_what_the_adapter_does(capsys, folder, tmp_path):
    for name, extra in (("a", []), ("b", []), ("c", ["--library", folder])):
        assert (
            run(capsys, "sample", "an octzu animal", "a castle", *extra, "--seed", 3, "--output", tmp_path / f"{name}.png")[0]
            == 0
        )
    a, b, c = (Image.open(tmp_path / f"{n}.png").tobytes() for n in "abc")
    assert a == b != c


def test_sample_takes_steps_guidance_and_a_size(capsys, tmp_path):
    drawn = []
    for more in ([], ["--steps", 4], ["--guidance", 1], ["--size", 96]):
        assert run(capsys, "sample", "a castle", "--seed", 3, *more, "--output", tmp_path / "x.png")[0] == 0
        drawn.append(Image.open(tmp_path / "x.png").convert("RGB"))
    assert [d.size for d in drawn] == [(64, 64)] * 3 + [(96, 96)]
    assert len({d.tobytes() for d in drawn}) == 4
    for wrong, message in (
        (["--size", "100"], "give a multiple of 8 from 32 on"),
        (["--steps", "0"], "give a whole number from 1 on"),
    ):
        with pytest.raises(SystemExit):
            main(["sample", "a castle", *wrong])
        assert message in " ".join(capsys.readouterr().err.split())


def test_calibrate_starts_a_library_and_spares_a_full_one(capsys, folder, tmp_path):
    assert run(capsys, "calibrate", "--library", tmp_path / "new", "--pictures", 4)[0] == 0
    code, _, err = run(capsys, "calibrate", "--library", folder)
    assert code == 2 and "has concepts" in err


def test_demo_writes_everything(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("seqlora_core.demo.load_generic", few_generic)
    monkeypatch.setattr("seqlora_core.demo.DRAWN", 1)
    monkeypatch.setattr("seqlora_core.judge.INPUT", 64)
    monkeypatch.setattr("seqlora_core.teach.picture_count", lambda size: 16)
    monkeypatch.setattr("seqlora_core.evaluation.LEVELS", 2)
    output = tmp_path / "demo"
    code, *_ = run(capsys, "demo", "--output", output, "--concepts", "octopus", "penguin", "--steps", 3)
    assert code == 0
    data = json.loads((output / "table.json").read_text())
    assert [r["row"] for r in data["rows"]] == [
        "base", "ordinary_sum", "ordinary_norm", "ordinary_gram_schmidt", "closed_form", "seqlora",
    ]  # fmt: skip
    assert data["meta"]["seeds"] == [0] and data["meta"]["ordinary_rate"] in (3e-4, 1e-3, 3e-3)
    ours = data["rows"][-1]
    assert {"alone", "stack", "kept_mean", "kept_worst", "kept_subset", "generic_drift", "pairs", "seconds"} <= set(ours)
    assert len(list(csv.DictReader(open(output / "table.csv")))) == 6
    assert (output / "table.md").read_text().count("\n") == 8
    for name in ("contact_sheet", "pairs"):
        assert Image.open(output / f"{name}.png").width > 400
    for name in ("octopus", "penguin"):
        assert (output / "library" / f"{name}.safetensors").exists() and (output / "ordinary" / f"{name}.safetensors").exists()


@pytest.mark.parametrize("when", ["at a step", "after the last"])
def test_demo_ends_where_it_is_stopped(when, model, subjects, new_library, tmp_path):
    @contextlib.contextmanager
    def bar(name, steps):
        def on_step(step):
            if when == "at a step":
                raise KeyboardInterrupt

        on_step.asked = [2] if when == "after the last" else []
        yield on_step

    library, config = new_library(tmp_path / "l"), TrainingConfig(steps=2, batch=2, replay_batch=2, use_decoys=False)
    with pytest.raises(KeyboardInterrupt):
        train_series(model, list(subjects.values()), library, config, print, bar)
    assert library.names == ["octopus"]


def test_demo_leaves_a_library_that_is_not_its_own(capsys, folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "library")
    code, _, err = run(capsys, "demo", "--output", tmp_path, "--concepts", "octopus", "penguin", "--steps", 1)
    assert code == 2 and "not made by the demo" in err and (tmp_path / "library" / "octopus.safetensors").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--images", "/absent", "--trigger", "x", "--library", "l"], "no folder"),
        (["train", "--images", OCTOPUS, "--trigger", "octzu"], "no library"),
        (["train", "--images", OCTOPUS, "--trigger", "zzz", "--library", "{tmp}/l"], "lacks the trigger"),
        (["train", "--images", OCTOPUS, "--trigger", "octzu", "--library", "{tmp}/l", "--rank", "0"], "rank is 0"),
        (
            ["train", "--images", OCTOPUS, "--trigger", "octzu", "--library", "{tmp}/l", "--name", "../x"],
            "cannot be a file name",
        ),
        (
            ["train", "--images", OCTOPUS, "--trigger", "octzu", "--library", "{tmp}/l", "--retraction", "foo"],
            "retraction is 'foo'",
        ),
        (
            ["train", "--images", OCTOPUS, "--trigger", "octzu", "--library", "{tmp}/l", "--lambda", "nan"],
            "interference_weight is nan",
        ),
        (["train", "--images", OCTOPUS, "--trigger", "octzu", "--library", "{tmp}/l", "--resolution", "8"], "resolution is 8"),
        (
            ["train", "--images", OCTOPUS, "--trigger", "octzu", "--library", "{tmp}/l", "--replay-batch", "-3"],
            "replay_batch is -3",
        ),
        (
            ["train", "--images", OCTOPUS, "--trigger", "octzu", "--library", "{tmp}/l", "--keep-latents", "-1"],
            "keep_latents is -1",
        ),
        (
            ["train", "--images", OCTOPUS, "--trigger", "octzu", "--library", "{tmp}/l", "--device", "foo"],
            "device 'foo' cannot be used",
        ),
        (["train", "--images", OCTOPUS, "--trigger", "octopus", "--library", "{folder}"], "lacks the trigger"),
        (
            ["train", "--images", OCTOPUS, "--trigger", "octzu", "--library", "{tmp}/l", "--resolution", "72"],
            "pictures of 72 x 72 pixels do not fit this model: choose sides that are multiples of 16 and of at most 256",
        ),
        (["sample", "x", "--size", "264", "--output", "{tmp}/x.png"], "pictures of 264 x 264 pixels do not fit this model"),
        (
            ["train", "--images", OCTOPUS, "--trigger", "octzu", "--library", "{tmp}/l", "--preview-every", "5"],
            "no folder for previews",
        ),
        (["stack", "/absent.safetensors:nan", "--output", "x"], "the strength of absent is nan"),
        (["library", "rename", "{folder}", "octopus"], "give its name after the folder, and the new one"),
        (["stack", "--output", "x"], "one of the two"),
        (["stack", "/absent.safetensors", "--output", "x"], "no file"),
        (["stack", "--library", "{folder}", "--amount", "2", "--output", "x"], "amount is 2"),
        (["report", "--library", "/absent"], "no library"),
        (["sample", "x", "--adapter", "/absent.safetensors"], "no file"),
        (["sample", "x", "--model", "/absent.safetensors"], "no file"),
        (["demo", "--concepts", "octopus", "elephant"], "octopus.*choose from"),
        (["library", "verify", "/absent"], "no library"),
        (["library", "repair", "/absent"], "no folder"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(capsys, folder, tmp_path, arguments, message):
    filled = [a.replace("{tmp}", str(tmp_path)).replace("{folder}", str(folder)) for a in arguments]
    code, out, err = run(capsys, *filled)
    assert code == 2 and err.count("\n") == 1 and err.startswith("seqlora: ")
    assert re.search(message, err)


def test_unknown_options_exit_with_2_too():
    done = subprocess.run(
        [sys.executable, "-m", "seqlora_core", "train", "--nonsense"], capture_output=True, text=True, cwd=DEMO_FOLDER.parent
    )
    assert done.returncode == 2 and "usage" in done.stderr
