"""Texts, their split, and hidden states as training data."""

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

# Fields of a JSON row that hold text, in the order in which they are looked for.
_TEXT_FIELDS = ("text", "sentence", "full_text", "question", "instruction", "content")


def read_texts(path: str | Path, *, field: str | None = None) -> list[str]:
    """Texts of a file: one a line, or one a row of a ``.jsonl`` file; either may end in ``.gz``.

    Args:
        path: The file.
        field: Which field of a row holds the text; without it the usual names are tried.

    Returns:
        Texts without duplicates and blanks, in the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row has none of the fields, or the file holds no text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no text file {str(path)!r}; give a .txt or .jsonl file, plain or .gz.")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    if ".jsonl" in path.suffixes:
        lines = [_row_text(json.loads(line), field, path) for line in lines]
    texts = list(dict.fromkeys(line for line in lines if line.strip()))
    if not texts:
        raise ValueError(f"{path} holds no text.")
    return texts


def _row_text(row: dict[str, Any], field: str | None, path: Path) -> str:
    names = [field] if field else [name for name in _TEXT_FIELDS if name in row]
    if not names or names[0] not in row:
        raise ValueError(
            f"{path}: no text field {field or ' / '.join(_TEXT_FIELDS)} in a row with {', '.join(row)}; "
            "name it behind the path, as in data.jsonl:body."
        )
    return str(row[names[0]])


@dataclass(frozen=True, kw_only=True)
class Split:
    """Token ids of the texts that attacks learn from and of those that they are tried on; no text is in
    two.
    """

    fit: list[Tensor]
    calibrate: list[Tensor]
    test: dict[str, list[Tensor]]
    """By name of the data set."""

    @property
    def num_fit_tokens(self) -> int:
        """Tokens that attacks are fitted on."""
        return sum(map(len, self.fit))


def encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[Tensor]:
    """Token ids of each text, special tokens as the tokenizer puts them, cut to ``max_length``.

    Raises:
        ValueError: If nothing is left of any text.
    """
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] if texts else []
    kept = [torch.tensor(row, dtype=torch.int64) for row in rows if len(row)]
    if texts and not kept:
        raise ValueError("the tokenizer made no token of any text; check that it belongs to the model.")
    return kept


def split_texts(
    tokenizer: Any,
    data: dict[str, Sequence[str]],
    fit_texts: Sequence[str],
    *,
    num_test: int,
    num_calibrate: int,
    num_fit: int,
    max_length: int,
    seed: int = 0,
) -> Split:
    """Choose test texts from each data set and public text for fitting, with no text in both.

    Args:
        tokenizer: The model's.
        data: Texts to attack, by name of the data set.
        fit_texts: Public text; empty: what is left of the first data set after its test texts are taken.
        num_test: Texts of each set that are attacked, at most; at most half of the first set where the rest
            of it is needed for fitting.
        num_calibrate: Texts held back for choosing a penalty.
        num_fit: Texts to fit on, at most.
        max_length: Tokens of a text.
        seed: Of the choice.

    Returns:
        The split, as token ids.

    Raises:
        ValueError: If there is no data set, or no text is left to fit on.
    """
    if not data or any(len(texts) == 0 for texts in data.values()):
        raise ValueError("a scan needs at least one data set, each with at least one text.")
    test: dict[str, list[Tensor]] = {}
    taken: set[str] = set()
    for number, (name, texts) in enumerate(data.items()):
        order = list(dict.fromkeys(texts))
        random.Random(seed).shuffle(order)
        count = num_test if fit_texts or number else max(1, min(num_test, len(order) // 2))
        test[name] = encode(tokenizer, order[:count], max_length)
        taken |= set(order[:count])
    public = list(dict.fromkeys(fit_texts or next(iter(data.values()))))
    public = [text for text in public if text not in taken]
    random.Random(seed + 1).shuffle(public)
    if not public:
        raise ValueError(
            "no text is left to fit the attacks on; give more texts, or public text of its own (fit_texts, "
            "--fit)."
        )
    num_calibrate = min(num_calibrate, len(public) // 5)
    calibrate = encode(tokenizer, public[:num_calibrate], max_length)
    fit = encode(tokenizer, public[num_calibrate : num_calibrate + num_fit], max_length)
    return Split(fit=fit, calibrate=calibrate, test=test)


class StatesDataset(Dataset):
    """Hidden states of texts with their tokens, as a ``Trainer`` takes them.

    Args:
        states: States of each text (positions, width).
        ids: Tokens of each text (positions,).

    Raises:
        ValueError: If the two do not fit, or there is nothing.
    """

    def __init__(self, states: Sequence[Tensor], ids: Sequence[Tensor]) -> None:
        if not states or [len(x) for x in states] != [len(x) for x in ids]:
            raise ValueError(
                f"each text needs as many states as tokens; got {sum(map(len, states))} states of "
                f"{len(states)} texts and {sum(map(len, ids))} tokens of {len(ids)}."
            )
        self.states, self.ids = states, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"hidden_states": self.states[index], "labels": self.ids[index]}


@dataclass
class StatesCollator:
    """Pads texts on the right; looks up the embeddings that the parrot shall say.

    Args:
        codebook: Input embeddings of the attacked model (vocabulary, width).
    """

    codebook: Tensor

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One batch: ``hidden_states``, ``attention_mask``, ``labels`` and ``labels_embeds``."""
        pad = torch.nn.utils.rnn.pad_sequence
        labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)
        return {
            "hidden_states": pad([row["hidden_states"].float() for row in rows], batch_first=True),
            "attention_mask": (labels != -100).long(),
            "labels": labels,
            "labels_embeds": self.codebook[labels.clamp_min(0)],
        }
