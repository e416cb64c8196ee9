import shutil
from pathlib import Path

import pytest

from seqlora_core.calibration import Calibration, calibrate
from seqlora_core.demo_model import DEMO_FOLDER, DemoModel
from seqlora_core.evaluation import HeldOut
from seqlora_core.lora_moments import general_path
from seqlora_core.references import load_pictures

from .nodes.comfy_server import Server, find_comfyui

# libraries that node and workflow tests train into
LIBRARIES = (
    "base", "unload", "held", "cancelled", "progress", "bad", "workflow_demo", "browser", "options", "levels", "called", "squares",
    "masked", "black", "checkpoints", "few", "connected", "templates", "triggers", "ranks", "never", "stopped", "hashed",
)  # fmt: skip


SLOW = {"nodes", "workflows", "benchmarks"}
TOGETHER = {"workflows"}  # folders whose files share what is taught and the open page


def pytest_collection_modifyitems(items):
    """What takes longest first, so that no worker is left with it while the others are done"""
    items.sort(key=lambda item: SLOW.isdisjoint(item.path.parts))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file, or a folder whose files share much, all on one worker.  (xdist's own groups need a `nodeid` that changes with
    `_nodeid`, which pytest 9.2 has no more.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.split("::")[0])
            return file.parent.name if file.parent.name in TOGETHER else str(file)

    return Scheduler(config, log)


def few_generic(model) -> HeldOut:
    """In place of `demo.load_generic`, where it is enough that unrelated pictures are measured: four of the 48"""
    images, captions = load_pictures(DEMO_FOLDER / "evaluation" / "generic", model.size)
    return HeldOut.of(model, model.encode_images(images[:4]), captions[:4], levels=4)


@pytest.fixture(scope="session")
def model():
    return DemoModel()


@pytest.fixture(scope="session")
def calibration(model) -> Calibration:
    """A small one: the full one draws 288 pictures."""
    return calibrate(model, (64, 64), 16)


@pytest.fixture(scope="session")
def server(model, calibration, tmp_path_factory):
    """One real ComfyUI server for all node and workflow tests; skipped with the reason if there is no ComfyUI."""
    found = find_comfyui()
    if isinstance(found, str):
        pytest.skip(found)
    base = tmp_path_factory.mktemp("comfy")
    for name in LIBRARIES:
        calibration.save(base / "models" / "loras" / "seqlora" / name / "calibration.safetensors", model.fingerprint())
    spoken = DemoModel()
    spoken.adapt_text(True)
    calibrate(spoken, (64, 64), 16).save(
        base / "models" / "loras" / "seqlora" / "spoken" / "calibration.safetensors", model.fingerprint()
    )
    calibration.save(general_path(base / "models" / "loras" / "seqlora", model.fingerprint()), model.fingerprint())
    (base / "custom_nodes").mkdir()
    for pack in ("their_stacker.py", "checks_in_every_layer.py"):
        shutil.copy(Path(__file__).parent / "nodes" / pack, base / "custom_nodes")
    server = Server(*found, base)
    yield server
    server.stop()
