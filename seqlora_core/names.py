"""The one place where a name from a user, a file or a workflow becomes part of a path."""

from __future__ import annotations

import re

from .errors import UserError

_RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))}
_ALLOWED = re.compile(r"[\w][\w .+-]*", re.UNICODE)
LONGEST = 80


def safe_name(name: str, what: str = "name") -> str:
    """The name, stripped, if it can be a file name on every system; else UserError.

    Letters and digits of any script, space, '_', '-', '+', '.'; no path separators, no leading or trailing dot,
    at most 80 characters (200 bytes), not a Windows device name.
    """
    stripped = name.strip()
    if not stripped:
        raise UserError(f"the {what} is empty: give it one, such as 'my_cat'")
    if len(stripped) > LONGEST or len(stripped.encode()) > 200:
        raise UserError(f"the {what} {stripped[:20]!r}... is too long: use at most {LONGEST} characters")
    bad = not _ALLOWED.fullmatch(stripped) or stripped.endswith(".") or ".." in stripped
    if bad or stripped.split(".")[0].strip().lower() in _RESERVED or stripped.lower().endswith((".stats", ".safetensors")):
        raise UserError(
            f"the {what} {stripped!r} cannot be a file name everywhere: use letters, digits, spaces, '-', '_' and '+'"
        )
    return stripped
