"""What nodes say, in every language: locales/LANG/*.json and the tables of the help pages, from the nodes' own words.

    python -m locales.build      starts ComfyUI, reads /object_info, writes them anew

words.json holds the translations, by the English text: a changed tooltip has none until somebody writes it, and says so.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELP = HERE.parent / "web" / "docs"
LANGUAGES = ("en", "ja", "zh")
TYPES = {"SEQLORA_IMAGES": "concept images", "SEQLORA_OPTIONS": "training options", "SEQLORA_STACK": "concept stack"}


def load_words() -> dict[str, dict[str, str]]:
    return json.loads((HERE / "words.json").read_text(encoding="utf-8"))


def own(object_info: dict) -> dict:
    return {name: info for name, info in sorted(object_info.items()) if name.startswith("SeqLoRA")}


def inputs_of(info: dict):
    """(name, what /object_info says of it), in the order of the node."""
    for part in ("required", "optional"):
        for name in info["input_order"].get(part, []):
            kind, *options = info["input"][part][name]
            yield name, kind, (options[0] if options else {})


def label(name: str) -> str:
    return name.replace("_", " ")


def definitions(object_info: dict, language: str, words: dict) -> dict:
    """The content of LANGUAGE/nodeDefs.json; KeyError with the English text that has no translation."""

    def say(text: str) -> str:
        return text if language == "en" or not text else words[text][language]

    out = {}
    for node, info in own(object_info).items():
        inputs = {}
        for name, _, options in inputs_of(info):
            inputs[name] = {"name": say(label(name))}
            if options.get("tooltip"):
                inputs[name]["tooltip"] = say(options["tooltip"])
        out[node] = {
            "display_name": say(info["display_name"]),
            "description": say(info["description"]),
            "inputs": inputs,
            "outputs": {str(i): {"name": say(label(name))} for i, name in enumerate(info["output_name"])},
        }
    return out


def main_words(language: str, words: dict) -> dict:
    """The content of LANGUAGE/main.json."""
    types = {kind: text if language == "en" else words[text][language] for kind, text in TYPES.items()}
    return {"nodeCategories": {"SeqLoRA": "SeqLoRA"}, "dataTypes": types}


def missing(object_info: dict, words: dict) -> set[str]:
    """English texts that lack a translation into some language."""
    found: set[str] = set()

    class Any(dict):
        def __missing__(self, text):
            found.add(text)
            return dict.fromkeys(LANGUAGES, text)

    complete = {text: value for text, value in words.items() if set(LANGUAGES) - {"en"} <= set(value)}
    definitions(object_info, "zh", Any(complete))
    return found


def table(info: dict) -> str:
    """Inputs and outputs of a node, as Markdown."""
    rows = ["| input | type | default | |", "|---|---|---|---|"]
    for name, kind, options in inputs_of(info):
        kind = "COMBO" if isinstance(kind, list) else kind
        default = json.dumps(options["default"], ensure_ascii=False) if "default" in options else ""
        rows.append(f"| {label(name)} | {kind} | {default} | {options.get('tooltip', '')} |")
    rows += ["", "| output | type |", "|---|---|"]
    rows += [f"| {label(n)} | {t if isinstance(t, str) else 'COMBO'} |" for n, t in zip(info["output_name"], info["output"])]
    return "\n".join(rows)


def filled(page: str, info: dict) -> str:
    return re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table(info)}\n{m[2]}", page, flags=re.S)


def files(object_info: dict, words: dict) -> dict[Path, str]:
    """Every generated file -> its text."""
    out = {}
    for language in LANGUAGES:
        for name, data in (("nodeDefs", definitions(object_info, language, words)), ("main", main_words(language, words))):
            out[HERE / language / f"{name}.json"] = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    for node, info in own(object_info).items():
        page = HELP / f"{node}.md"
        out[page] = filled(page.read_text(encoding="utf-8"), info)
    return out


def main() -> None:
    import tempfile

    from tests.nodes.comfy_server import Server, find_comfyui

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = Server(*find_comfyui(), Path(folder))
        server.stop()
    words = load_words()
    for text in sorted(missing(server.info, words)):
        print(f"no translation: {text!r}")
    for path, text in files(server.info, words).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
