"""Broken files of every kind that a command line may be handed."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

Break = Callable[[Path], None]


def exit_code(module: str, words: list[str]) -> object:
    """What a room's command line ends with, whether it returns or leaves by argparse."""
    try:
        return importlib.import_module(f"{module}.__main__").main(words)
    except SystemExit as stop:
        return stop.code


def _write(data: bytes) -> Break:
    return lambda path: path.write_bytes(data) and None


YAML: dict[str, Break] = {
    "missing": lambda path: None,
    "empty": _write(b""),
    "a_list": _write(b"- 1\n- 2\n"),
    "a_number": _write(b"42\n"),
    "broken": _write(b"model: [1, 2\nkeep: }\n"),
    "tabs": _write(b"\tmodel: x\n"),
    "python_object": _write(b"model: !!python/object/apply:os.system ['touch pwned']\n"),
    "binary": _write(bytes(range(256))),
    "latin1": _write("model: \xe9\xff".encode("latin-1")),
    "unknown_key": _write(b"no_such_option: 1\n"),
    "folder": lambda path: path.mkdir(),
}
TEXT: dict[str, Break] = {
    "missing": lambda path: None,
    "empty": _write(b""),
    "binary": _write(bytes(range(256)) * 8),
    "cut_json": _write(b'{"text": "hello"}\n{"text": "wor'),
    "not_objects": _write(b"1\n2\n"),
    "folder": lambda path: path.mkdir(),
}
JSON: dict[str, Break] = {
    "missing": lambda path: None,
    "empty": _write(b""),
    "cut": _write(b'{"scores": [1, 2'),
    "a_list": _write(b"[]"),
    "other_keys": _write(b'{"a": 1}'),
    "binary": _write(bytes(range(256))),
    "folder": lambda path: path.mkdir(),
}
FILE: dict[str, Break] = {
    "missing": lambda path: None,
    "empty": _write(b""),
    "binary": _write(bytes(range(256))),
    "huge_header": _write((2**60).to_bytes(8, "little") + b"{}"),
    "folder": lambda path: path.mkdir(),
}


def _model(change: Callable[[Path], None]) -> Break:
    def build(path: Path) -> None:
        shutil.copytree(path.parent / "good_model", path)
        change(path)

    return build


def _cut_weights(path: Path) -> None:
    weights = path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])


def _pickle(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _config(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        config = path / "config.json"
        config.write_text(json.dumps(change(json.loads(config.read_text()))))

    return apply


MODEL: dict[str, Break] = {
    "missing": lambda path: None,
    "a_file": _write(b"not a folder"),
    "empty_folder": lambda path: path.mkdir(),
    "no_weights": _model(lambda path: (path / "model.safetensors").unlink()),
    "cut_weights": _model(_cut_weights),
    "empty_weights": _model(lambda path: (path / "model.safetensors").write_bytes(b"") and None),
    "no_config": _model(lambda path: (path / "config.json").unlink()),
    "cut_config": _model(lambda path: (path / "config.json").write_text('{"model_type": "lla') and None),
    "unknown_type": _model(_config(lambda config: config | {"model_type": "no_such_model"})),
    "a_pickle": _model(_pickle),
}
KINDS: dict[str, dict[str, Break]] = {
    "yaml": YAML, "text": TEXT, "json": JSON, "file": FILE, "model": MODEL,
}  # fmt: skip
