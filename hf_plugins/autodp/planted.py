"""Known defects planted into clean question-answer rows, to measure what a processing step finds and
mends.
"""

import random
from collections.abc import Mapping, Sequence

KINDS = ("markup", "boilerplate", "duplicate", "short", "missing", "garbled", "swapped", "degraded")
_BOILERPLATE = "Click here to subscribe to our newsletter and share this page with friends. "


def plant(
    rows: Sequence[tuple[str, str]], rates: Mapping[str, float], *, seed: int = 0
) -> list[tuple[str, str, str]]:
    """Rows with defects of known kinds.

    markup: tags, a link and an address inside the answer; boilerplate: one sentence instead of the answer,
    over and over; duplicate: another row once more with one character changed; short: the answer's first
    tenth; missing: an empty question or answer; garbled: the answer's words shuffled, letters inside them
    too; swapped: the answer of another row; degraded: slips of the keyboard, two
    neighbours of every four characters swapped.

    Args:
        rows: Clean pairs of question and answer.
        rates: Share of rows of each kind; the rest stays clean.
        seed: Of the choice and the defects.

    Returns:
        Triples question, answer, kind; the kind of a clean row is ``clean``. As many as there were rows.

    Raises:
        ValueError: If a kind is unknown or the shares exceed 1.
    """
    if unknown := sorted(set(rates) - set(KINDS)):
        raise ValueError(f"unknown kinds {', '.join(unknown)}; a defect is one of {', '.join(KINDS)}.")
    if not 0 <= sum(rates.values()) <= 1:
        raise ValueError(f"shares of defects must sum to at most 1; got {sum(rates.values()):g}.")
    generator = random.Random(seed)
    order = list(range(len(rows)))
    generator.shuffle(order)
    kinds = ["clean"] * len(rows)
    start = 0
    for kind, rate in rates.items():
        count = int(rate * len(rows) + 0.5)
        for index in order[start : start + count]:
            kinds[index] = kind
        start += count
    untouched = [index for index in order if kinds[index] == "clean"] or order
    return [(*_spoil(kind, rows, index, untouched, generator), kind) for index, kind in enumerate(kinds)]


def _spoil(
    kind: str,
    rows: Sequence[tuple[str, str]],
    index: int,
    untouched: Sequence[int],
    generator: random.Random,
) -> tuple[str, str]:
    question, answer = rows[index]
    other = rows[generator.choice(untouched)]
    if kind == "markup":
        middle = len(answer) // 2
        link = f'<a href="http://spam.example/{index}">more</a> mail{index}@spam.example'
        return question, f"<div><p>{answer[:middle]}</p> {link} <br/>{answer[middle:]}</div>"
    if kind == "boilerplate":
        return question, (_BOILERPLATE * (len(answer) // len(_BOILERPLATE) + 2)).strip()
    if kind == "duplicate":
        return other[0], other[1][:-1] + ("!" if other[1][-1:] != "!" else "?")
    if kind == "short":
        return question, answer[: max(2, len(answer) // 10)]
    if kind == "missing":
        return ("", answer) if generator.random() < 0.5 else (question, "")
    if kind == "garbled":
        words = ["".join(generator.sample(word, len(word))) for word in answer.split()]
        generator.shuffle(words)
        return question, " ".join(words)
    if kind == "swapped":
        return question, other[1]
    if kind == "degraded":
        swapped = list(answer)
        for place in range(0, len(answer) - 1, 4):
            swapped[place], swapped[place + 1] = answer[place + 1], answer[place]
        return question, "".join(swapped)
    return question, answer
