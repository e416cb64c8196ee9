"""The one place where a name or a word from a user, a file or a workflow is checked before it is used."""

from __future__ import annotations

import re
import unicodedata

from .errors import UserError

_RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in "0123456789¹²³")}
_ALLOWED = re.compile(r"[\w][\w .+-]*", re.UNICODE)
_MARKS = ("Mn", "Mc")  # what Hindi, Thai and others write over and beside letters, which \w leaves out
LONGEST = 80
LONGEST_TEXT = 400
INVISIBLE = " \t\r\n\u00a0\u200b\u2060\ufeff"  # what copying brings along before and after a word, and nobody sees


def safe_name(name: str, what: str = "name") -> str:
    """The name, stripped and in Unicode's composed form, if it can be a file name on every system; else UserError.

    Letters and digits of any script, space, '_', '-', '+', '.'; no path separators, no leading or trailing dot,
    at most 80 characters (200 bytes), not a Windows device name.
    """
    if not isinstance(name, str):
        raise UserError(f"the {what} is not text but {type(name).__name__}: give it as text")
    stripped = unicodedata.normalize("NFC", name.strip())
    if not stripped:
        raise UserError(f"the {what} is empty: give it one, such as 'my_cat'")
    # surrogates have no bytes; they are refused below
    if len(stripped) > LONGEST or len(stripped.encode(errors="replace")) > 200:
        raise UserError(f"the {what} {stripped[:20]!r}... is too long: use at most {LONGEST} characters")
    letters = stripped[0] + "".join(c for c in stripped[1:] if unicodedata.category(c) not in _MARKS)
    bad = not _ALLOWED.fullmatch(letters) or stripped.endswith(".") or ".." in stripped
    if bad or stripped.split(".")[0].strip().lower() in _RESERVED or stripped.lower().endswith((".stats", ".safetensors")):
        raise UserError(
            f"the {what} {stripped!r} cannot be a file name everywhere: use letters, digits, spaces, '-', '_' and '+'"
        )
    return stripped


def concept_name(name: str) -> str:
    """`safe_name` for a concept, whose files must not take the place of the library's own"""
    name = safe_name(name, "concept name")
    if name.casefold() == "calibration":
        raise UserError(f"a concept cannot be called {name!r}, as the library's calibration is: use another name")
    return name


def safe_text(text: str, what: str) -> str:
    """Words that go into files and prompts, stripped: one line that can be written, else UserError."""
    stripped = text.strip().strip(INVISIBLE)
    if len(stripped) > LONGEST_TEXT:
        raise UserError(f"the {what} is {len(stripped)} characters long: use at most {LONGEST_TEXT}")
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in stripped):
        raise UserError(f"the {what} {stripped[:40]!r} holds a control character or a broken one: use plain text on one line")
    return stripped
