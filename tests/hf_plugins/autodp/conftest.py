from pathlib import Path

import datasets
import pytest

from tests.hf_plugins.autodp import tiny


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("model"))
