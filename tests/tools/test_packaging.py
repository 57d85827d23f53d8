"""The wheel: what is in it, what is not, and what its metadata promise."""

import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest

from tests.contract.rooms import ROOT, rooms


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, without isolation: the build's own requirements are installed here."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "source"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "mm_plugins", "hf_plugins"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy / name)], check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)],
        cwd=copy, check=True, capture_output=True,
    )  # fmt: skip
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.mark.host
def test_wheel_holds_both_sides_with_types_and_readmes(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {"mm_plugins/py.typed", "hf_plugins/py.typed"} <= names
    assert {f"{room.package}/{room.name}/README.md" for room in rooms()} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops - {name for name in tops if name.endswith(".dist-info")} == {"mm_plugins", "hf_plugins"}
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.host
def test_metadata_name_the_command_and_every_extra(wheel: zipfile.ZipFile) -> None:
    folder = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    extras = {"mm", "hf", "federated", "data", "pii", "tee", "report", "dev", "all"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    # Nothing but packaging comes without an extra, and no extra pulls in another's stack.
    needs = metadata.get_all("Requires-Dist")
    assert [need for need in needs if "extra ==" not in need] == ["packaging>=24"]
    mm = " ".join(need for need in needs if need.endswith('extra == "mm"'))
    assert "mmdet" in mm
    assert not any(alien in mm for alien in ("transformers", "trl", "flwr", "opacus"))
    assert "mmhf = hf_plugins.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
