"""`seqlora train`: a recipe for a whole library, killed and run again; what a recipe may get wrong."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from seqlora_core import run_pictures, train_command
from seqlora_core.checkpoint import FOLDER, SUFFIX
from seqlora_core.cli import main
from seqlora_core.demo_model import DEMO_FOLDER
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.recipe import read_recipe

from ..reliability.toy import SIZE, ToyDenoiser, start

ROOT = DEMO_FOLDER.parent
CONCEPTS = (DEMO_FOLDER / "concepts").as_posix()
QUICK = "use_decoys = false\nreplay_batch = 4\nbatch = 2\ncheckpoint_every = 1\n"
TWO = f"""
library = "{{library}}"
steps = 3
planned = 12
{QUICK}
[[concept]]
images = "{CONCEPTS}/octopus"
trigger = "octzu"
class_noun = "animal"

[[concept]]
images = "{CONCEPTS}/penguin"
name = "bird"
trigger = "pengvo"
class_noun = "animal"
steps = {{steps}}
"""


def write(folder, library, steps=4):
    path = folder / f"{library}.toml"
    path.write_text(TWO.format(library=library, steps=steps), encoding="utf-8")
    return path


@pytest.fixture
def calibrated(model, calibration, tmp_path):
    def make(name):
        library = Library(tmp_path / name, model.fingerprint(), create=True)
        library.keep_calibration(calibration)
        return library

    return make


def files(library):
    return {p.name: p.read_bytes() for p in library.folder.iterdir() if p.suffix in (".safetensors", ".json")}


def launch(path, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "seqlora_core", "train", "--recipe", str(path), *more], cwd=ROOT, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
        # which what runs in the background has ignored
        preexec_fn=None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for_checkpoint(library, name, process):
    for _ in range(1800):
        if any((library.folder / FOLDER / name).glob(f"*{SUFFIX}")):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("no checkpoint came")


def test_a_killed_recipe_goes_on_where_it_was(calibrated, tmp_path, capsys):
    """SIGKILL within the second concept; run again: the same files as from a run that nobody killed."""
    killed, whole = calibrated("killed"), calibrated("whole")
    path = write(tmp_path, "killed", steps=12)
    process = launch(path)
    wait_for_checkpoint(killed, "bird", process)
    process.kill()
    process.wait()
    assert Library(killed.folder).names == ["octopus"] and process.returncode == -signal.SIGKILL
    assert main(["train", "--recipe", str(path)]) == 0
    assert "octopus: trained already" in capsys.readouterr().out
    assert main(["train", "--recipe", str(write(tmp_path, "whole", steps=12))]) == 0
    assert files(killed) == files(whole)
    assert main(["train", "--recipe", str(path)]) == 0
    assert capsys.readouterr().out.count("trained already") == 2


def test_a_recipe_trained_again_goes_on_beside_what_it_trained_anew(calibrated, tmp_path, capsys, monkeypatch):
    library, path = calibrated("l"), write(tmp_path, "l")
    again = ["train", "--recipe", str(path), "--again", "--seed", "5"]
    assert main(again[:3]) == 0
    whole = files(library)

    @contextlib.contextmanager
    def stopping(name, steps, quiet):
        def on_step(step):
            if name == "bird" and step.number == 2:
                raise KeyboardInterrupt

        yield on_step

    with monkeypatch.context() as m:
        m.setattr(train_command, "bar", stopping)
        assert main(again) == 2
    assert "stopped after 2 of 4 steps; bird is kept as it was; the same command goes on" in capsys.readouterr().out
    first = files(library)
    assert {n for n in whole if whole[n] == first[n]} == {
        "bird.safetensors",
        "bird.stats.safetensors",
        "calibration.safetensors",
    }
    assert main(again) == 0
    assert "octopus: trained already, and left as it is for a run that was stopped" in capsys.readouterr().out
    after = files(library)
    assert after["octopus.safetensors"] == first["octopus.safetensors"]
    assert after["bird.safetensors"] != whole["bird.safetensors"] and not library.checkpoints("bird").exists()


def test_a_stopped_run_is_gone_on_with_before_what_it_could_not_go_on_after(tmp_path, capsys, monkeypatch):
    model, edited = ToyDenoiser(), tmp_path / "edited.toml"
    library, image = start(tmp_path / "l", model), Image.new("RGB", SIZE, "red")
    monkeypatch.setattr(train_command, "open_model", lambda args: model)
    monkeypatch.setattr(ToyDenoiser, "size", SIZE[0], raising=False)

    def concepts(*names):
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
            image.save(tmp_path / name / "a.png")
        text = "".join(f'[[concept]]\nimages = "{n}"\ntrigger = "{n}zx"\nclass_noun = "thing"\n' for n in names)
        edited.write_text(f'library = "l"\nsteps = 3\nrank = 2\n{QUICK}\n{text}', encoding="utf-8")
        return ["train", "--recipe", str(edited)]

    @contextlib.contextmanager
    def stopping(name, steps, quiet):
        def on_step(step):
            raise KeyboardInterrupt

        yield on_step

    with monkeypatch.context() as m:
        m.setattr(train_command, "bar", stopping)
        assert main([*concepts("owl", "yak"), "--no-resume"]) == 2
    assert "the same command goes on without --no-resume" in capsys.readouterr().out
    before = files(library)
    assert main(concepts("bee", "owl", "yak")) == 2
    error = capsys.readouterr().err
    assert error.startswith("seqlora: the run of 'owl' was stopped, and can go on no more once 'bee' is taught: put it before")
    assert files(library) == before and library.unfinished("owl")
    add = Library.add

    def interrupted(self, *given):
        signal.raise_signal(signal.SIGINT)
        add(self, *given)

    with monkeypatch.context() as m:  # Ctrl-C after the last step: what is under way is finished, and nothing more begun
        m.setattr(Library, "add", interrupted)
        assert main(concepts("owl", "bee", "yak")) == 2
    assert "owl: 3 steps, written to" in capsys.readouterr().out
    library.reload()
    assert library.names == ["owl"] and library.whole("owl") and not library.checkpoints("bee").exists()
    assert main(concepts("owl", "bee", "yak")) == 0
    assert Library(library.folder).names == ["owl", "bee", "yak"] and "yak: trained already" not in capsys.readouterr().out
    edited.write_text(
        edited.read_text(encoding="utf-8").replace('"owlzx"', '"owlvo"').replace("rank = 2", "rank = 2\nlambda = 1"),
        encoding="utf-8",
    )
    assert main(["train", "--recipe", str(edited), "--steps", "4"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [
        "owl: trained already, with trigger owlzx, not owlvo; steps 3, not 4: --again trains it anew",
        "bee: trained already, with steps 3, not 4: --again trains it anew",
    ]


@pytest.mark.skipif(os.name == "nt", reason="signals to another process are POSIX")
def test_ctrl_c_keeps_what_was_trained(calibrated, tmp_path):
    library = calibrated("l")
    process = launch(write(tmp_path, "l"), "--steps", "5000")
    wait_for_checkpoint(library, "octopus", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "stopped after" in out and "seqlora: stopped" in err and "Traceback" not in err
    assert Library(library.folder).load("octopus").adapter.layers and library.unfinished("octopus")


def test_what_a_recipe_says(tmp_path):
    recipe = read_recipe(write(tmp_path, "l"))
    assert recipe.settings == {"library": tmp_path / "l", "planned": 12}
    first, second = recipe.jobs
    assert (first.name, first.trigger, first.class_noun, first.options["steps"]) == ("octopus", "octzu", "animal", 3)
    assert (second.name, second.options["steps"], second.options["every"]) == ("bird", 4, 1)
    path = tmp_path / "home.toml"
    path.write_text('library = "~/l"\n[[concept]]\nimages = "~/cat"\ntrigger = " zwx "\nclass_noun = "cat "', encoding="utf-8")
    recipe = read_recipe(path)
    (job,) = recipe.jobs
    assert recipe.settings["library"] == Path.home() / "l" and job.images == Path.home() / "cat"
    assert (job.trigger, job.class_noun) == ("zwx", "cat")


def test_pictures_of_the_class_are_told_of_and_must_not_call_the_trigger(calibrated, tmp_path, capsys):
    calibrated("l")
    (tmp_path / "class").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "class" / "a.png")
    given = ["--library", str(tmp_path / "l"), "--images", f"{CONCEPTS}/octopus", "--trigger", "octzu", "--steps", "1"]
    given += ["--class-noun", "animal", "--no-use-decoys", "--batch", "2", "--regularisation", str(tmp_path / "class")]
    (tmp_path / "class" / "a.txt").write_text("an octzu animal", encoding="utf-8")
    assert main(["train", *given]) == 2
    assert "the caption 'an octzu animal' of a regularisation picture has the trigger 'octzu'" in capsys.readouterr().err
    (tmp_path / "class" / "a.txt").write_text("an {class}", encoding="utf-8")
    assert main(["train", *given, "--replay-weight", "0"]) == 2
    assert "regularisation pictures are held by replay, which replay_weight 0 leaves out" in capsys.readouterr().err
    assert main(["train", *given]) == 0
    assert "regularisation: a.png: 32 x 32 became 64 x 64, enlarged 2.0 times" in capsys.readouterr().out


ONE = '[[concept]]\nimages = "x"\ntrigger = "y"\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps = ", "is not TOML"),
        ("steps = 3", "names no concepts"),
        ("concept = 3", "names no concepts"),
        ("step = 3\n" + ONE, "unknown option 'step'; did you mean 'steps'"),
        ('steps = "many"\n' + ONE, "steps is 'many': give a whole number"),
        ("use_decoys = 1\n" + ONE, "use_decoys is 1: give true or false"),
        ("library = 3\n" + ONE, "library is 3: give a text"),
        (ONE + "rnak = 3", "concept 1: unknown option 'rnak'; did you mean 'rank'"),
        ('[[concept]]\nimages = "x"\n', "concept 1: trigger is missing"),
        ('[[concept]]\ntrigger = "x"\n', "concept 1: images is missing"),
        (ONE + ONE, "two concepts are called 'x'"),
        (ONE + 'name = "../x"', "cannot be a file name"),
        (ONE + "steps = 0", "steps is 0"),
        (ONE + f"seed = {2**64}", "seed is 18446744073709551616: give at most"),
        (ONE, "no library"),
        ('library = "l"\n' + ONE, "no folder"),
        (b"\xff\xfe", "not UTF-8"),
        ('library = ""\n' + ONE, "library is '': give a path"),
        ('library = "a\\u0000b"\n' + ONE, r"library is 'a\\x00b': give a path"),
        ('library = "~nobody at all/l"\n' + ONE, "library is '~nobody at all/l': give a path"),
        ('[[concept]]\nimages = " "\ntrigger = "x"\n', "concept 1: images is ' ': give a path"),
        ('[[concept]]\nimages = "x"\ntrigger = " "\n', "concept 1: trigger is missing"),
        (f"shift = 1{'0' * 400}\n" + ONE, "shift is 10{60,80}: give a number"),
        (f"shift = 1{'0' * 5000}\n" + ONE, "is not TOML|give a number"),
        (None, "cannot read the recipe"),
    ],
)
def test_a_wrong_recipe_gets_one_sentence(tmp_path, capsys, text, message):
    import re

    path = tmp_path / "r.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["train", "--recipe", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err), err


def test_help_is_a_page_in_groups(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    page = capsys.readouterr().out
    for title in ("the concept:", "the method:", "prior preservation:", "stopping:", "examples:"):
        assert title in page
    assert "--recipe FILE" in page and "(default: 320)" in page


@pytest.mark.parametrize(
    "options, message",
    [
        ('optimiser = "prodigy"\nlearning_rate = 1.0', "needs the package prodigyopt"),
        ("min_snr = 5.0", "min_snr is for models that predict noise"),
        ('layers = "cross"', "no layer of this model is named by layers 'cross'"),
        ('trigger = "nowhere"', "lacks the trigger 'nowhere'"),
        ('trigger = "peng\\tvo"', "the trigger 'peng\\tvo' holds a control character"),
        ("text_encoder = true", "text_encoder is one choice for a whole library"),
    ],
)
def test_what_is_wrong_with_a_later_concept_is_told_before_the_first_is_trained(
    tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    path = write(tmp_path, "late")
    text = path.read_text(encoding="utf-8")
    if "trigger" in options:
        text = text.replace('trigger = "pengvo"', options)
    path.write_text(text + options * ("trigger" not in options), encoding="utf-8")
    assert main(["train", "--recipe", str(path)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "late").exists()


@pytest.mark.parametrize("kind", ["name", "file"])
def test_what_stands_in_the_way_of_a_later_concept_is_told_before_the_first_is_trained(calibrated, tmp_path, capsys, kind):
    library = calibrated("taken")
    if kind == "name":
        other = {"name": "Bird", "trigger": "x", "class_noun": "", "order": 0}
        library.rewrite({**library.manifest, "concepts": [other]})
    else:
        (library.folder / "bird.safetensors").write_bytes(b"of someone else")
    assert main(["train", "--recipe", str(write(tmp_path, "taken"))]) == 2
    told = {"name": "has a concept 'Bird' already", "file": "bird.safetensors is not of this library"}[kind]
    assert told in capsys.readouterr().err and "octopus" not in Library(library.folder).names


def test_pictures_that_cannot_be_written_end_no_recipe(calibrated, tmp_path, capsys, monkeypatch):
    def full(picture, path):
        raise UserError(f"cannot write the picture {path}: the disk is full")

    monkeypatch.setattr(run_pictures, "sample_sheet", lambda *_: torch.ones(1, 8, 8, 3))
    monkeypatch.setattr(run_pictures, "save_picture", full)
    library, path = calibrated("sheets"), write(tmp_path, "sheets", steps=1)
    assert main(["train", "--recipe", str(path), "--steps", "1", "--pictures", str(tmp_path / "p")]) == 0
    assert "octopus.curves.png: the disk is full; octopus is in the library all the same" in capsys.readouterr().out
    assert Library(library.folder).names == ["octopus", "bird"]


def test_pictures_of_a_concept_that_is_trained_are_not_missed(calibrated, tmp_path, capsys):
    calibrated("known")
    path = write(tmp_path, "known", steps=2)
    assert main(["train", "--recipe", str(path)]) == 0
    text = (
        path.read_text(encoding="utf-8").replace(f"{CONCEPTS}/octopus", "moved").replace('"moved"', '"moved"\nname = "octopus"')
    )
    path.write_text(text, encoding="utf-8")
    assert main(["train", "--recipe", str(path), "--json"]) == 0
    assert '"skipped": true' in capsys.readouterr().out


def test_what_belongs_on_the_command_line_is_told(tmp_path, capsys):
    path = write(tmp_path, "odd")
    path.write_text("preview_every = 10\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["train", "--recipe", str(path)]) == 2
    assert "preview_every is no option of a recipe: say --preview-every on the command line" in capsys.readouterr().err
