"""Find and run the ``tools/train.py`` and ``tools/test.py`` that ship inside the mmdet and mmseg wheels."""

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

HOSTS = ("mmdet", "mmseg")
TASKS = ("train", "test")
USAGE = "usage: python tools/mm.py {train,test} CONFIG [arguments of mmdet's or mmseg's own script]"


def host_script(scope: str, task: str) -> Path:
    """Path of the host's own script, for example ``.../mmdet/.mim/tools/train.py``.

    Raises:
        ValueError: If no host of this suite has that scope.
        ImportError: If the host is not installed, or its wheel lacks the tools (an editable clone keeps them
            in its own ``tools`` folder, which is tried too).
    """
    if scope not in HOSTS:
        raise ValueError(
            f"default_scope is {scope!r}; it must be one of {', '.join(HOSTS)}. Set default_scope in the "
            "config, or inherit one of mmdet's or mmseg's configs, which do."
        )
    spec = importlib.util.find_spec(scope)
    if spec is None or spec.origin is None:
        raise ImportError(f'{scope} is not installed; `pip install "mmhf-plugins[mm]"` brings it.')
    package = Path(spec.origin).parent
    candidates = [package / ".mim" / "tools" / f"{task}.py", package.parent / "tools" / f"{task}.py"]
    for script in candidates:
        if script.is_file():
            return script
    raise ImportError(
        f"{scope} is installed without its tools (looked for {', '.join(map(str, candidates))}). "
        f"Reinstall it from the package index: `pip install --force-reinstall --no-deps {scope}`."
    )


def config_scope(config: str) -> str:
    """The ``default_scope`` of a config file.

    Raises:
        FileNotFoundError: If the file does not exist; the nearest names in its folder are listed.
        ValueError: If the config sets no scope.
    """
    path = Path(config)
    if not path.is_file():
        names = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = get_close_matches(path.name, names, n=3, cutoff=0.4)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise FileNotFoundError(f"config {config!r} does not exist (working directory {Path.cwd()}).{hint}")
    from mmengine.config import Config

    scope = Config.fromfile(path).get("default_scope")
    if scope is None:
        raise ValueError(
            f"{config} sets no default_scope, so it cannot be told whose script should run it. "
            "Add default_scope = 'mmdet' (or 'mmseg')."
        )
    return scope


def main(argv: Sequence[str]) -> int:
    """Run the host's script on a config; returns 2 for wrong use, otherwise the script's own exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(USAGE + "\n")
        return 0 if argv else 2
    task, rest = argv[0], list(argv[1:])
    if task not in TASKS or not rest:
        sys.stderr.write(f"mm.py: got {' '.join(argv)!r}. {USAGE}\n")
        return 2
    config = next((arg for arg in rest if arg.endswith(".py") and not arg.startswith("-")), rest[0])
    try:
        script = host_script(config_scope(config), task)
    except (FileNotFoundError, ValueError, ImportError) as error:
        sys.stderr.write(f"mm.py: {error}\n")
        return 2
    sys.argv = [str(script), *rest]
    runpy.run_path(str(script), run_name="__main__")
    return 0
