"""``mmhf leak-scan MODEL --data FILE``: what the hidden states of a model give away; exit code 1 above a
limit.

``mmhf leak-scan export MODEL ...`` writes hidden states for a scan elsewhere, ``mmhf leak-scan train STATES
...`` trains one parrot (also under ``accelerate launch -m hf_plugins.embed_parrot train ...``).
"""

import argparse
import dataclasses
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_plugins.embed_parrot.config import ATTACKS, LeakScanConfig
from hf_plugins.embed_parrot.dataset import encode, read_texts
from hf_plugins.embed_parrot.hook import collect_states, embedding_table, head_table, transformer_layers
from hf_plugins.embed_parrot.metric import scan
from hf_plugins.embed_parrot.model import EmbedParrotConfig, small_decoder
from hf_plugins.embed_parrot.page import render_page
from hf_plugins.embed_parrot.storage import export_states, load_states
from hf_plugins.embed_parrot.trainer import train_parrot
from hf_plugins.process_group import run_command
from hf_plugins.recipes import check_weights, read_recipe
from hf_plugins.whole_files import write_json, write_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after the program's name; those of the process by default.

    Returns:
        0 if all is well, 1 if more was recovered than ``--fail-above`` allows, 2 if the command could not
        run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = {"export": _export, "train": _train}.get(argv[0] if argv else "", _scan)
    try:
        return command(argv if command is _scan else argv[1:])
    except ModuleNotFoundError:
        raise  # `mmhf` names the extra that brings it.
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _scan(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mmhf leak-scan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", help="folder of a model or PEFT adapter, package:NAME/FOLDER, or .safetensors states"
    )
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="[NAME=]FILE[:FIELD]", help="texts to attack"
    )
    parser.add_argument("--fit", metavar="FILE[:FIELD]", help="public text that attacks are fitted on")
    parser.add_argument("--entities", metavar="FILE", help="names, numbers ... one a line, counted apart")
    parser.add_argument("--tokenizer", help="folder of the tokenizer, if not that of the model")
    parser.add_argument(
        "--out", type=Path, default=Path("leak_scan"), help="folder of report.json and report.html"
    )
    parser.add_argument("--config", type=Path, help="YAML file of the options below; the command line wins")
    _add_options(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_plugins.embed_parrot").setLevel(logging.INFO)
    config = _config(args)
    exported = args.model.endswith(".safetensors")
    model = load_states(args.model) if exported else load_model(args.model)
    place = args.tokenizer or (None if exported else _folder(args.model))
    report = scan(
        model,
        {name: read_texts(path, field=field) for name, path, field in map(_data, args.data)},
        tokenizer=None if place is None else AutoTokenizer.from_pretrained(place),
        fit_texts=read_texts(_data(args.fit)[1], field=_data(args.fit)[2]) if args.fit else (),
        config=config,
        work_dir=args.out / "parts",
        entities=read_texts(args.entities) if args.entities else (),
        name=Path(args.model).name if not args.model.startswith("package:") else args.model[8:],
    )
    write_json(args.out / "report.json", report)
    write_text(args.out / "report.html", render_page(report))
    found = report["verdict"]
    worst = ", ".join(f"{key} {value}" for key, value in found["worst"].items())
    print(
        f"{100 * found['leak']:.1f} % of tokens read back at worst ({worst}); see {args.out / 'report.html'}"
    )
    if found["failed"]:
        print(f"that is above --fail-above {found['fail_above']:g}", file=sys.stderr)
    return int(found["failed"])


def _add_options(parser: argparse.ArgumentParser) -> None:
    for option in dataclasses.fields(LeakScanConfig):
        flag = "--" + option.name.replace("_", "-")
        # None means "not given": the recipe's value holds then, or the default.
        text = f"{option.metadata['help']} Default: {option.default}.".replace("%", "%%")
        if isinstance(option.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif isinstance(option.default, tuple):
            parser.add_argument(flag, metavar="A,B,...", help=text)
        else:
            parser.add_argument(flag, type=type(option.default), help=text)


def _config(args: argparse.Namespace) -> LeakScanConfig:
    options = {option.name: option for option in dataclasses.fields(LeakScanConfig)}
    values = {} if args.config is None else read_recipe(args.config)
    unknown = sorted(set(values) - set(options))
    if unknown:
        raise ValueError(f"{args.config}: no option {', '.join(unknown)}; there are {', '.join(options)}.")
    for name, option in options.items():
        given = getattr(args, name)
        if given is not None:
            values[name] = _words(name, given) if isinstance(option.default, tuple) else given
    lists = {name for name, option in options.items() if isinstance(option.default, tuple)}
    return LeakScanConfig(**{name: tuple(v) if name in lists else v for name, v in values.items()})


def _words(name: str, given: str) -> list[Any]:
    words = split_list(given)
    if name == "attacks" and words == ["all"]:
        return list(ATTACKS)
    if name not in ("layers", "seeds"):
        return words
    if not all(word.lstrip("-").isdigit() for word in words):
        raise ValueError(f"--{name} takes whole numbers such as 0,3,6; got {given!r}.")
    return [int(word) for word in words]


def split_list(text: str) -> list[str]:
    """Words between commas; ``NAME=VALUE`` after a comma belongs to the word before it, as in
    ``none,dct:window=8,key=3,int8``.
    """
    words: list[str] = []
    for part in filter(None, text.split(",")):
        if words and "=" in part and ":" not in part:
            words[-1] += "," + part
        else:
            words.append(part)
    return words


def _data(text: str) -> tuple[str, str, str | None]:
    """``[NAME=]FILE[:FIELD]`` as name, file, field."""
    name, equals, rest = text.partition("=")
    path, colon, field = (rest if equals else text).rpartition(":")
    # A colon inside the path (a drive letter) is followed by a separator, a field is not.
    if not colon or "/" in field or "\\" in field:
        path, field = (rest if equals else text), ""
    return (name if equals else Path(path).name.split(".")[0]), path, field or None


def _folder(model: str) -> str:
    """Where a model lies; ``package:NAME/FOLDER`` looks inside an installed package without importing it."""
    if not model.startswith("package:"):
        if not Path(model).is_dir():
            raise FileNotFoundError(
                f"no model folder {model!r}; save the model there first, nothing is downloaded."
            )
        return model
    name, _, inside = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"no installed package {name!r} to take the model from; pip install it, or give a folder."
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / inside)


def load_model(model: str) -> Any:
    """A model for scanning: with its head if it is a causal LM, with its adapter if it is a PEFT folder."""
    folder = _folder(model)
    check_weights(folder)
    if (Path(folder) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(folder)
    names = AutoConfig.from_pretrained(folder).architectures or []
    causal = any("CausalLM" in name or "LMHead" in name for name in names)
    return (AutoModelForCausalLM if causal else AutoModel).from_pretrained(folder)


def _export(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mmhf leak-scan export", description="Write hidden states to a file."
    )
    parser.add_argument("model", help="folder of a model, or package:NAME/FOLDER")
    parser.add_argument(
        "--data", required=True, metavar="FILE[:FIELD]", help="texts to run through the model"
    )
    parser.add_argument("--layers", default="", metavar="A,B,...", help="which layers; all by default")
    parser.add_argument("--num-texts", type=int, default=2000, help="texts at most")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    args = parser.parse_args(argv)
    model = load_model(args.model)
    _, path, field = _data(args.data)
    texts = read_texts(path, field=field)[: args.num_texts]
    ids = encode(AutoTokenizer.from_pretrained(_folder(args.model)), texts, args.max_length)
    layers = [int(word) for word in split_list(args.layers)] or list(
        range(len(transformer_layers(model)[1]) + 1)
    )
    states = collect_states(model, ids, layers)
    head, _ = head_table(model)
    table = embedding_table(model)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    export_states(args.out, codebook=table, ids=ids, states=states, head=None if head is table else head)
    print(
        f"{args.out}: layers {', '.join(map(str, layers))}, {sum(map(len, ids))} tokens of {len(ids)} texts"
    )
    return 0


def _train(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mmhf leak-scan train", description="Train one parrot with the Trainer."
    )
    parser.add_argument("states", help="a file written by `mmhf leak-scan export`")
    parser.add_argument("--layer", type=int, required=True, help="whose states it inverts")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of checkpoints and of the parrot (final/)"
    )
    parser.add_argument("--loss", choices=("cosine", "cosine_ce"), default="cosine")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--num-layers", type=int, default=2, help="layers of the decode model")
    parser.add_argument("--width", type=int, default=128, help="its width, a multiple of 64")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="texts in a step, on each device")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    args = parser.parse_args(argv)
    exported = load_states(args.states)
    if args.layer not in exported.states:
        raise ValueError(
            f"{args.states} holds layers {', '.join(map(str, exported.states))}; got --layer {args.layer}."
        )
    config = EmbedParrotConfig(
        target_hidden_size=exported.codebook.shape[1],
        layer=args.layer,
        decoder=small_decoder(args.num_layers, args.width, num_positions=max(map(len, exported.ids))),
        causal=args.causal,
        loss=args.loss,
    )
    train_parrot(
        config,
        exported.states[args.layer],
        exported.ids,
        exported.codebook,
        folder=args.out,
        num_steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.lr,
        seed=args.seed,
        use_cpu=args.cpu,
    )
    print(f"{args.out / 'final'}: load it with EmbedParrot.from_pretrained")
    return 0


if __name__ == "__main__":
    run_command(main)
