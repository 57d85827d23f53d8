"""``mmhf doctor``: what fits, what does not, and the line that mends it."""

import importlib.util
import json
from importlib import metadata

import pytest

from hf_plugins import doctor

needs_mm = pytest.mark.skipif(
    importlib.util.find_spec("mmdet") is None, reason="the extra mm is not installed"
)


def test_range_is_checked() -> None:
    state = doctor.PackageState(name="torch", needed="<2.14,>=2.13", found="2.13.0+cpu")
    assert state.fits
    assert not doctor.PackageState(name="torch", needed="<2.14,>=2.13", found="2.12.0").fits
    assert not doctor.PackageState(name="torch", needed="", found=None).fits


def test_every_extra_of_setup_cfg_is_examined() -> None:
    assert set(doctor.requirements_by_extra()) >= {"mm", "hf", "federated", "data", "tee", "report", "dev"}


def _without(monkeypatch: pytest.MonkeyPatch, *gone: str) -> None:
    def version(name: str) -> str:
        if name in gone:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    real = metadata.version
    monkeypatch.setattr(doctor.metadata, "version", version)


@needs_mm
def test_part_of_an_extra_missing_is_a_fault_with_its_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _without(monkeypatch, "mmdet")
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "FAULT: extra mm: mmdet==3.3.0 (found None). Mend: pip install" in printed
    assert "mmcv.ops served by: not checked" in printed


def test_no_host_at_all_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch, "mmdet", "mmengine", "transformers", "flwr", "lancedb")
    report = doctor.examine()
    assert report.in_use == []
    assert "no host is installed" in report.faults[0]


def test_asked_extra_is_held_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch, "cryptography")
    assert "extra tee: cryptography" in doctor.examine(["tee"]).faults[0]


def test_unknown_extra_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--extra", "vision"])
    assert "choose from" in capsys.readouterr().err


@needs_mm
@pytest.mark.host
def test_this_environment_is_complete(capsys: pytest.CaptureFixture) -> None:
    """The suite's own environment has the extra mm, so its hosts import and the ops are served."""
    assert doctor.main(["--json", "--extra", "mm"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ops"]["nms"] in ("portable", "torchvision", "compiled")
    assert report["op_backend"].startswith(("portable ops", "compiled"))


def test_library_that_does_not_load_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("operator torchvision::nms does not exist")

    report = doctor.Report(suite="0", python="3.11", devices=[], extras={}, in_use=["mm"])
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    doctor._probe_ops(report)
    assert report.faults == [
        "mm_plugins does not import: ImportError: operator torchvision::nms does not exist"
    ]
