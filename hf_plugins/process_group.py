"""The end of a command that `accelerate launch` or torchrun started in several processes."""

import sys
from collections.abc import Callable
from typing import NoReturn


def leave_process_group() -> None:
    """Leave the process group that the host began, if there is one.

    Left to the interpreter's end, threads of gloo are torn down in any order, and now and then that aborts a
    process whose work is done ("terminate called without an active exception").
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its code, out of its process group.

    Args:
        main: The command; its result is the exit code.

    Raises:
        SystemExit: Always.
    """
    code = main()
    leave_process_group()
    raise SystemExit(code)
