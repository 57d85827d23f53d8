"""The end of a command in several processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from hf_plugins.process_group import leave_process_group, run_command


@pytest.fixture
def group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)


@pytest.mark.usefixtures("group")
def test_a_group_is_left_and_the_code_is_handed_on() -> None:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: 3)
    assert end.value.code == 3
    assert not dist.is_initialized()


def test_without_a_group_nothing_happens() -> None:
    leave_process_group()
    with pytest.raises(SystemExit) as end:
        run_command(lambda: 0)
    assert end.value.code == 0


def test_torch_is_not_imported_for_it() -> None:
    code = (
        "import sys; from hf_plugins.process_group import leave_process_group as leave\n"
        "leave(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
