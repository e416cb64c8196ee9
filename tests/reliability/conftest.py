"""A toy denoiser and a library of one concept, which take no time"""

import pytest

from .toy import ToyDenoiser, start, teach


@pytest.fixture(scope="module")
def model():
    return ToyDenoiser()


@pytest.fixture
def library(model, tmp_path):
    library = start(tmp_path / "library", model)
    teach(model, library, "fox", steps=2)
    return library
