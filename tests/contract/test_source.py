"""Style guide (b), (c), (d): docstrings, annotations, options that act, errors that are tested."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.rooms import ROOT, SHARED, Room, label, rooms, source_files, tree

Function = ast.FunctionDef | ast.AsyncFunctionDef
each_file = pytest.mark.parametrize("path", source_files(), ids=label)


def _public_functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Public functions, and public methods of public classes."""
    for node in tree(path).body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, Function) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method


@each_file
def test_public_names_have_docstrings(path: Path) -> None:
    classes = [node for node in tree(path).body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
    bare = [node.name for node in classes if not ast.get_docstring(node)]
    bare += [name for name, node in _public_functions(path) if not ast.get_docstring(node)]
    assert ast.get_docstring(tree(path)), f"{path} has no docstring"
    assert not bare, f"{path}: no docstring on {bare}"


@each_file
def test_public_functions_are_annotated(path: Path) -> None:
    loose = []
    for name, node in _public_functions(path):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls", "ctx")]
        if untyped or node.returns is None:
            loose.append((name, untyped or "return"))
    assert not loose, f"{path}: not annotated: {loose}"


@each_file
def test_no_bare_or_silent_except(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            names = (
                {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)}
                if node.type
                else set()
            )
            assert node.type is not None, f"{path}:{node.lineno}: bare except"
            assert not names & {"Exception", "BaseException"}, (
                f"{path}:{node.lineno}: except names no exception"
            )


@each_file
def test_no_assert_stands_for_a_check_of_input(path: Path) -> None:
    """An assert is gone under ``python -O``; it may only state, with a message, what a bug would break."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"{path}:{node.lineno}: assert without a message"


def _config_fields(room: Room) -> list[str]:
    config = room.folder / "config.py"
    if not config.is_file():
        return []
    return [
        item.target.id
        for node in tree(config).body
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]


@pytest.mark.parametrize("room", rooms(), ids=label)
def test_every_option_is_read(room: Room) -> None:
    """A field of config.py is read by another file of the room (its own check does not count as acting)."""
    others = [path for path in room.files() if path.name != "config.py"]
    read = {node.attr for path in others for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    dead = [name for name in _config_fields(room) if name not in read]
    assert not dead, f"{room}: options that nobody reads: {dead}"


def _constructors(room: Room) -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in room.adapters():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                        yield f"{path.name}:{node.name}", item


@pytest.mark.parametrize("room", rooms(), ids=label)
def test_every_constructor_argument_is_used(room: Room) -> None:
    for name, init in _constructors(room):
        used = {node.id for node in ast.walk(init) if isinstance(node, ast.Name)}
        arguments = [a.arg for a in (*init.args.args, *init.args.kwonlyargs) if a.arg != "self"]
        dead = [argument for argument in arguments if argument not in used]
        assert not dead, f"{name}: arguments that nobody reads: {dead}"


def _literal(node: ast.AST) -> str:
    """The fixed text of a message; what an f-string fills in becomes one placeholder character."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_literal(part) if isinstance(part, ast.Constant) else "\x00" for part in node.values)
    if isinstance(node, ast.BinOp):
        return _literal(node.left) + _literal(node.right)
    return "\x00"


def _raised_messages(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = _literal(node.exc.args[0])
            if len(text.replace("\x00", "")) >= 12:
                yield node.lineno, text


def _match_texts(folder: Path) -> list[str]:
    """Every string constant of the tests below a folder, regular expressions made plain."""
    constants = [
        node.value
        for path in folder.rglob("test_*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return [re.sub(r"\\(.)", r"\1", text) for text in constants]


def _shares_words(message: str, expected: str, length: int = 10) -> bool:
    """Whether some fragment of an expected text, ``length`` characters or more, stands in the message."""
    fragments = [part.strip() for part in re.split(r"\.\*|\.\+|\||\x00", expected)]
    return any(len(part) >= length and part in message for part in fragments)


SHARED_FOLDERS = [
    (ROOT / package / name, ROOT / "tests" / package / name)
    for package in ("mm_plugins", "hf_plugins")
    for name in sorted(SHARED)
    if (ROOT / package / name).is_dir()
]
FOLDERS = [(room.folder, room.tests) for room in rooms()] + SHARED_FOLDERS


@pytest.mark.parametrize(("folder", "tests"), FOLDERS, ids=label)
def test_every_error_message_is_tested(folder: Path, tests: Path) -> None:
    """Each ``raise`` with a message has a test that expects part of that message."""
    expected = _match_texts(tests)
    untested = [
        f"{path.name}:{line}: {message[:70]!r}"
        for path in sorted(folder.rglob("*.py"))
        for line, message in _raised_messages(path)
        if not any(_shares_words(message, text) for text in expected)
    ]
    assert not untested, "no test expects these messages:\n" + "\n".join(untested)
