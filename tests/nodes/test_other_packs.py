"""What LoRA Manager and rgthree's info dialog find in a file that our trainer wrote: their own code reads it.

Their checkouts are looked for in ~/comfy/interop, or where INTEROP_PACKS says:
git clone https://github.com/willmiao/ComfyUI-Lora-Manager, git clone https://github.com/rgthree/rgthree-comfy
"""

import asyncio
import hashlib
import importlib
import os
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from seqlora_core.config import TrainingConfig
from seqlora_core.demo import load_subject
from seqlora_core.library import Library
from seqlora_core.teach import train_concept

from .comfy_server import Server, find_comfyui

PACKS = Path(os.environ.get("INTEROP_PACKS", Path.home() / "comfy" / "interop"))
CAPTIONS = {
    "tags": "an octzu animal, {} background",
    "sentences": "a photo of an octzu animal that stands before a {} wall",
}


def pack(name: str) -> Path:
    if not (PACKS / name).is_dir():
        pytest.skip(f"no {name} in {PACKS}: clone it there, or set INTEROP_PACKS")
    return PACKS / name


@pytest.fixture(scope="module")
def folder(model, calibration, tmp_path_factory):
    """ComfyUI's base directory with a library of two concepts, captioned in tags and in sentences"""
    base = tmp_path_factory.mktemp("others")
    library = Library(base / "models" / "loras" / "seqlora" / "interop", model.fingerprint(), create=True)
    library.keep_calibration(calibration)
    subject, colours = load_subject(model, "octopus"), ("red", "blue", "green", "grey", "white")
    for name, text in CAPTIONS.items():
        captions = [text.format(colours[i % 5]) for i in range(len(subject.images))]
        train_concept(model, library, subject.images, name, "octzu", "animal", captions, TrainingConfig(steps=2))
    return base


def file(folder, name):
    return folder / "models" / "loras" / "seqlora" / "interop" / f"{name}.safetensors"


def tensors_hash(path):
    blob = path.read_bytes()
    return hashlib.sha256(blob[8 + int.from_bytes(blob[:8], "little") :]).hexdigest()


@pytest.fixture(scope="module")
def manager():
    """LoRA Manager's `py` folder as a package"""
    package = types.ModuleType("lora_manager")
    package.__path__ = [str(pack("ComfyUI-Lora-Manager") / "py")]
    sys.modules["lora_manager"] = package
    yield lambda name: importlib.import_module(f"lora_manager.{name}")
    for name in [n for n in sys.modules if n.startswith("lora_manager")]:
        del sys.modules[name]


def waited_for(coroutine):
    """Its result; in a thread of its own, because a browser that other tests opened keeps a loop running in this one"""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


@pytest.mark.parametrize("name", CAPTIONS)
def test_lora_manager_finds_words_and_base_model(manager, folder, name):
    metadata, path = manager("utils.lora_metadata"), file(folder, name)
    words, phrase = waited_for(metadata.extract_trained_words(str(path)))
    assert phrase == "octzu animal" and words[0][1] == 10 and "octzu animal" in words[0][0]
    assert dict(words)["octzu animal"] == 10
    assert waited_for(metadata.extract_lora_metadata(str(path))) == {"base_model": "sd3"}


@pytest.mark.parametrize("name", CAPTIONS)
def test_lora_manager_finds_the_hash(manager, folder, name):
    path = file(folder, name)
    try:
        files = manager("utils.file_utils")
    except ImportError as error:
        pytest.skip(f"LoRA Manager's hashes need {error.name}")
    assert files.calculate_autov3(str(path)) == tensors_hash(path)[:12]


def test_rgthrees_dialog_finds_words_base_model_and_hash(folder):
    """Its own route in a real server, which the dialog asks"""
    found = find_comfyui()
    if isinstance(found, str):
        pytest.skip(found)
    source = pack("rgthree-comfy")
    shutil.copytree(source, folder / "custom_nodes" / source.name, ignore=shutil.ignore_patterns(".git", "node_modules"))
    server = Server(*found, folder)
    try:
        for name in CAPTIONS:
            path = file(folder, name)
            said = server.get(f"/rgthree/api/loras/info?files=seqlora/interop/{path.name}&light=0")["data"][0]
            words = {w["word"]: w["count"] for w in said["trainedWords"]}
            assert words["octzu animal"] == max(words.values()) == 10, words
            assert said["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            assert said["raw"]["metadata"]["ss_base_model_version"] == "sd3"
            assert said["raw"]["metadata"]["sshs_model_hash"] == tensors_hash(path)
    finally:
        server.stop()
