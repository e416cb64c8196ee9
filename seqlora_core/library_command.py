"""`seqlora library`: list, check, mend, shorten, rename, reorder and join libraries."""

from __future__ import annotations

from .errors import UserError
from .terminal import say


def run(args):
    """`seqlora library`; returns what --json prints"""
    from .editing import rename
    from .library import Library
    from .repair import repair

    tell = say(args)
    if args.action == "repair":
        library = repair(args.folder)
        tell(f"{len(library)} concepts: {', '.join(library.names)}")
        return {"names": library.names}
    library = Library(args.folder)
    if args.action == "list":
        for entry in library.manifest["concepts"]:
            tell(f"{entry['name']}\t{entry['trigger']} {entry['class_noun']}".rstrip())
        return library.manifest
    if args.action == "remove":
        if len(args.rest) != 1:
            raise UserError("which concept? give one name after the folder")
        message = library.remove(args.rest[0])
        tell(message)
        return {"removed": args.rest[0], "message": message}
    if args.action == "reorder":
        library.reorder(args.rest)
        tell(", ".join(library.names))
        return {"names": library.names}
    if args.action == "rename":
        if len(args.rest) != 2:
            raise UserError("which concept? give its name after the folder, and the new one")
        rename(library, *args.rest)
        tell(", ".join(library.names))
        return {"names": library.names}
    if args.action in ("rebase", "merge"):
        return _refit(args, library, tell)
    problems = library.verify()
    for problem in problems:
        tell(problem)
    if problems:
        raise UserError(
            f"{len(problems)} problems in {args.folder}: 'seqlora library repair' rebuilds the manifest from whole files"
        )
    tell(f"{len(library)} concepts, all well")
    return {"problems": problems}


def _refit(args, library, tell):
    from dataclasses import asdict

    from .editing import refit
    from .library import Library

    if bool(args.rest) != (args.action == "merge"):
        raise UserError("merge takes the other libraries' folders after the first; rebase takes one folder")
    if args.output is None:
        raise UserError("no folder for the new library: name it with --output; the old ones stay as they are")
    made, price = refit([library, *map(Library, args.rest)], args.output)
    tell(price.text())
    tell(f"written to {made.folder}")
    return {"output": str(made.folder), **asdict(price)}
