import pytest

from .nodes.comfy_server import Server, find_comfyui


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One real ComfyUI server for all node and workflow tests; skipped with the reason if there is no ComfyUI."""
    found = find_comfyui()
    if isinstance(found, str):
        pytest.skip(found)
    server = Server(*found, tmp_path_factory.mktemp("comfy"))
    yield server
    server.stop()
