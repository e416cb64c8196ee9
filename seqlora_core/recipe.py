"""A recipe: which concepts a library is to hold, in which order, with which options (EXAMPLE)."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .names import concept_name
from .options import from_recipe

EXAMPLE = """\
library = "my_library"          # folders are looked for beside the recipe
steps = 400                     # options for all concepts, as on the command line, with '_' for '-'

[[concept]]
images = "photos/cat"
trigger = "ohwx"
class_noun = "cat"

[[concept]]
images = "photos/mug"
name = "blue_mug"               # default: the folder's name
trigger = "zwx"
class_noun = "mug"
steps = 250                     # for this one only
"""
TOP = {"library": str, "model": str, "planned": int}
OF_CONCEPT = {"images": str, "name": str, "trigger": str, "class_noun": str, "regularisation": str}
FOLDERS = ("library", "model", "images", "regularisation")


@dataclass
class Job:
    """One concept to train; options: those that the recipe gives for it or for all."""

    images: Path
    name: str
    trigger: str
    class_noun: str
    regularisation: Path | None
    options: dict[str, Any]


@dataclass
class Recipe:
    """settings: library, model, planned ..., as far as given."""

    settings: dict[str, Any]
    jobs: list[Job]


def read_recipe(path: Path | str) -> Recipe:
    """Raises UserError, naming the place, for anything that is not as it should be."""
    path = Path(path)
    table = _parsed(path)
    concepts = table.pop("concept", [])
    if not isinstance(concepts, list) or not all(isinstance(c, dict) for c in concepts) or not concepts:
        raise UserError(f"{path} names no concepts: begin each with a line [[concept]]")
    top = _with_folders(from_recipe(table, TOP, str(path)), path.parent, str(path))
    settings = {k: top.pop(k) for k in TOP if k in top}
    jobs = [_job(entry, f"{path}, concept {number}", path.parent, top) for number, entry in enumerate(concepts, 1)]
    names = [job.name.casefold() for job in jobs]
    double = next((job.name for i, job in enumerate(jobs) if job.name.casefold() in names[:i]), None)
    if double:
        raise UserError(f"{path}: two concepts are called {double!r}: give one of them another name")
    return Recipe(settings, jobs)


def _parsed(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise UserError("recipes need the package tomli on Python 3.10: install it with 'pip install tomli'") from error
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the recipe {path} is not UTF-8 text: save it again as UTF-8") from error
    except (ValueError, RecursionError) as error:  # tomllib's own, and Python's on numbers of thousands of digits
        raise UserError(f"the recipe {path} is not TOML: {error}") from error


def _job(entry: dict[str, Any], where: str, folder: Path, for_all: dict[str, Any]) -> Job:
    options = {**for_all, **_with_folders(from_recipe(entry, OF_CONCEPT, where), folder, where)}
    options |= {word: options[word].strip() for word in ("trigger", "class_noun") if word in options}
    missing = next((word for word in ("images", "trigger") if not options.get(word)), None)
    if missing:
        raise UserError(f'{where}: {missing} is missing: add a line {missing} = "..."')
    images = options.pop("images")
    name = concept_name(options.pop("name", images.resolve().name))
    return Job(
        images, name, options.pop("trigger"), options.pop("class_noun", ""), options.pop("regularisation", None), options
    )


def _with_folders(table: dict[str, Any], beside: Path, where: str) -> dict[str, Any]:
    return {k: beside / _path(v, f"{where}: {k}") if k in FOLDERS else v for k, v in table.items()}


def _path(text: str, what: str) -> Path:
    with contextlib.suppress(RuntimeError):  # of a ~ whose home is unknown
        if text.strip() and "\0" not in text:
            return Path(text).expanduser()
    raise UserError(f'{what} is {text!r}: give a path, such as "photos/cat"')
