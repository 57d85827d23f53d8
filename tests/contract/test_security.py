"""What no file of the suite may do: unpickle, load YAML by its tags, run a shell, evaluate text."""

import ast
from pathlib import Path

import pytest

from tests.contract.rooms import ROOT

FILES = sorted(
    path for folder in ("hf_plugins", "mm_plugins", "tools") for path in (ROOT / folder).rglob("*.py")
)
FORBIDDEN = {
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "os.system", "os.popen", "eval", "exec", "joblib.load", "numpy.load", "np.load",
}  # fmt: skip


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_unsafe_call(path: Path) -> None:
    wrong = []
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        name = _name(call.func)
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        safe = {"np.load": "allow_pickle", "numpy.load": "allow_pickle"}.get(name)
        if name in FORBIDDEN and not (safe and ast.unparse(options.get(safe, ast.Constant(0))) == "False"):
            wrong.append(f"line {call.lineno}: {name}")
        if name == "torch.load" and ast.unparse(options.get("weights_only", ast.Constant(True))) != "True":
            wrong.append(f"line {call.lineno}: torch.load without weights_only")
        if "shell" in options and ast.unparse(options["shell"]) != "False":
            wrong.append(f"line {call.lineno}: {name} through a shell")
    assert not wrong, "; ".join(wrong)
