"""How many concepts a library is planned for: said once, and told when it is said otherwise later."""

import pytest

from seqlora_core.cli import main
from seqlora_core.demo_model import DEMO_FOLDER
from seqlora_core.errors import UserError
from seqlora_core.library import Library

from ..reliability.toy import ToyDenoiser, start, teach

OCTOPUS = str(DEMO_FOLDER / "concepts" / "octopus")


def test_a_library_without_concepts_takes_another_number_and_one_with_concepts_tells(tmp_path):
    model = ToyDenoiser()
    start(tmp_path / "l", model, planned=32)
    assert Library(tmp_path / "l", model.fingerprint(), 5, create=True).planned == 5
    library = Library(tmp_path / "l", model.fingerprint(), create=True)
    assert library.planned == 5 and not library.note
    _, fit = teach(model, library, "fox", steps=1)
    assert not any("planned" in note for note in fit.notes)
    library = Library(tmp_path / "l", model.fingerprint(), 7, create=True)
    notes = [teach(model, library, name, steps=1)[1].notes for name in ("owl", "bee")]
    said = "the library 'l' was planned for 5 when it was begun; 7 is ignored"
    assert [said in some for some in notes] == [True, False] and Library(tmp_path / "l").planned == 5


def test_the_number_stays_while_the_first_concept_is_trained(tmp_path, monkeypatch):
    library = start(tmp_path / "l", ToyDenoiser(), planned=32)
    monkeypatch.setattr("seqlora_core.library.LOCK_SECONDS", 0.01)
    with library.training(), pytest.raises(UserError, match="another process is training into the library 'l'"):
        Library(tmp_path / "l", planned=5)
    assert Library(tmp_path / "l").planned == 32


@pytest.mark.parametrize("planned", [0, -3])
def test_no_library_is_planned_for_none(planned, tmp_path, capsys):
    with pytest.raises(UserError, match=f"planned is {planned}: give at least 1"):
        Library(tmp_path / "l", "base", planned, create=True)
    given = ["train", "--library", str(tmp_path / "l"), "--images", OCTOPUS, "--trigger", "octzu", "--planned", str(planned)]
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'library = "l"\nplanned = {planned}\n[[concept]]\nimages = "{OCTOPUS}"\ntrigger = "octzu"\n')
    for arguments in (given, ["train", "--recipe", str(recipe)]):
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"seqlora: planned is {planned}: give at least 1\n"
    assert not (tmp_path / "l").exists()
