from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    import datasets

    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Not at the head: the cores' tests need no host.
    from tests.hf_plugins.autodp import tiny

    return tiny.model(tmp_path_factory.mktemp("model"))
