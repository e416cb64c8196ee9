"""What the tree promises: one-way imports, no host inside the core, nothing unsafe."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted((ROOT / "seqlora_core").glob("*.py"))
# a module may import modules of earlier lines only
LAYERS = [
    {"errors", "fonts", "linalg", "prompts", "tables", "triggers", "transformer_names"},
    {"metadata", "sketch", "spelling", "strict_json", "names", "references", "storage"},
    {"tensor_file", "manifest"},
    {"adapter", "optimisers"},
    {"attach", "diffusers_names", "low_rank", "selection", "spectrum"},
    {"denoiser", "statistics", "subspace", "recompute"},
    {"live_prompts", "drawing", "transformer_sites", "same_layers"},
    {"interference", "composition", "calibration", "demo_model", "unet_model", "transformer_model", "evaluation", "judge"},
    {"diffusers_folder", "bilevel", "hypergradient", "lora_moments", "report"},
    {"concept", "config", "plots"},
    {"captions", "learnt_trigger", "noise_levels", "parallel", "pictures", "pools"},
    {"replay", "budget", "report_picture", "labelled", "feasible"},
    {"start", "checkpoint", "objective", "embedding"},
    {"trainer"},
    {"concept_files"},
    {"library", "ordinary"},
    {"teach", "preview", "editing", "repair"},
    {"identity"},
    {"sheets", "run_pictures"},
    {"demo"},
    {"options", "terminal"},
    {"recipe"},
    {"calibrate_command", "library_command", "stack_command", "train_command"},
    {"cli"},
]


def own_imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [a.name for a in node.names]


def test_every_module_has_its_layer():
    assert {p.stem for p in CORE if not p.stem.startswith("__")} == set().union(*LAYERS)


@pytest.mark.parametrize("path", [p for p in CORE if not p.stem.startswith("__")], ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for imported in own_imports(path):
        assert level[imported] < level[path.stem], f"{path.stem} imports {imported}"


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.stem)
def test_the_core_knows_no_host_and_is_light_to_import(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    everywhere = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    everywhere |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
    assert not everywhere & {"comfy", "nodes", "folder_paths", "server", "comfy_api", "comfy_extras"}
    top = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    top |= {n.module.split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom) and n.level == 0}
    assert not top & {"diffusers", "transformers", "matplotlib", "PIL", "tokenizers"}


@pytest.mark.parametrize(
    "path", [*CORE, *sorted((ROOT / "nodes").glob("*.py")), ROOT / "__init__.py"], ids=lambda p: f"{p.parent.name}.{p.stem}"
)
def test_the_pack_runs_no_code_from_files_and_no_programs(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(p[i]ckle|eval\(|exec\(|torch\.load|urllib|requests|socket)\b", text.replace(".eval()", ""))
    if path.stem != "tables":  # asks git for the commit that a results file names
        assert "subprocess" not in text


def test_only_files_called_comfy_touch_comfyuis_internals():
    for path in (ROOT / "nodes").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.name.startswith("comfy.")}
        allowed = {"comfy.model_management", "comfy.utils"}
        internal = path.stem.startswith("comfy_")
        assert internal or used <= allowed, f"{path.name}: {used - allowed}"
