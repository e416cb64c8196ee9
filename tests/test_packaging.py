"""The pack as it is handed out: metadata, the registry's zip, and what installing it changes."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from .nodes.comfy_server import PARTS, Server, find_comfyui

ROOT = Path(__file__).resolve().parents[1]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def comfy(*arguments, cwd, home) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("comfy")
    if not program.exists():
        pytest.skip("no comfy-cli: pip install comfy-cli")
    environment = {**os.environ, "HOME": str(home), "DO_NOT_TRACK": "1"}
    return subprocess.run(
        [program, "--skip-prompt", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the tracked files, in a repository of its own."""
    folder = tmp_path_factory.mktemp("checkout") / "seqlora"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout: what would be packed is unknown")
    for name in filter(None, names.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def packed(checkout, tmp_path_factory) -> Path:
    done = comfy("node", "pack", cwd=checkout, home=tmp_path_factory.mktemp("home"))
    assert done.returncode == 0 and (checkout / "node.zip").exists(), done.stdout + done.stderr
    return checkout / "node.zip"


def test_the_registry_accepts_the_project(checkout, tmp_path):
    done = comfy("node", "validate", cwd=checkout, home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr


def test_the_version_is_semantic_and_in_the_changelog():
    version = PROJECT["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_project_requires_what_the_requirements_say():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == PROJECT["project"]["dependencies"]


@pytest.mark.parametrize("key, size", [("Icon", (400, 400)), ("Banner", (1260, 540))])
def test_icon_and_banner_are_there(key, size):
    path = PROJECT["tool"]["comfy"][key].split("/main/")[1]
    assert Image.open(ROOT / path).size == size


def test_the_zip_holds_what_runs_and_no_more(packed):
    names = zipfile.ZipFile(packed).namelist()
    assert {name.split("/")[0] for name in names} >= set(PARTS) | {"requirements.txt", "LICENSE", "THIRD_PARTY_NOTICES.md"}
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "docs/", ".github/"))]
    assert packed.stat().st_size < 40e6


def test_the_zip_installs_into_an_empty_custom_nodes_and_runs(packed, tmp_path):
    found = find_comfyui()
    if isinstance(found, str):
        pytest.skip(found)
    pack = tmp_path / "unpacked"
    zipfile.ZipFile(packed).extractall(pack)
    server = Server(*found, tmp_path / "comfy", pack)
    try:
        model = {"1": {"class_type": "SeqLoRADemoModel", "inputs": {}}}
        images = {
            "2": {"class_type": "SeqLoRAConceptImages", "inputs": {"folder": "demo/fox", "resolution": 64, "captions": ""}}
        }
        encode = {"3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a fox"}}}
        latent = {"4": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}}
        sample = {"5": {"class_type": "KSampler", "inputs": {
            "model": ["1", 0], "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": 0, "steps": 2,
            "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}}}  # fmt: skip
        decode = {"6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}}}
        save = {"7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "zip"}}}
        assert server.run(model | images | encode | latent | sample | decode | save)["7"]["images"]
        assert "seqlora" in server.get("/workflow_templates")
        assert "IMPORT FAILED" not in server.log_path.read_text()
    finally:
        server.stop()


def test_installing_changes_no_package_that_comfyui_brings():
    """What pip would do in ComfyUI's own environment; tests/check_environment.sh does it for fresh ones."""
    found = find_comfyui()
    if isinstance(found, str):
        pytest.skip(found)
    pip = [found[1], "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        pytest.skip(f"no pip in {found[1]}")
    plan = subprocess.run(
        [*pip, "install", "--dry-run", "--quiet", "--report", "-", "-r", ROOT / "requirements.txt"],
        capture_output=True,
        text=True,
    )
    if plan.returncode:
        pytest.skip(f"pip finds no package index: {plan.stderr.strip().splitlines()[-1]}")
    listed = subprocess.run([*pip, "list", "--format", "json"], capture_output=True, text=True, check=True)
    there = {package["name"].lower().replace("_", "-"): package["version"] for package in json.loads(listed.stdout)}
    wanted = {
        i["metadata"]["name"].lower().replace("_", "-"): i["metadata"]["version"] for i in json.loads(plan.stdout)["install"]
    }
    assert there and not {name: (there[name], wanted[name]) for name in there.keys() & wanted.keys()}
