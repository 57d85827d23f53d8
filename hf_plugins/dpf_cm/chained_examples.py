"""Prompts of examples chained from worst to best, so that the model continues the improvement."""

import bisect
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

Order = Literal["chain", "asc", "desc"]
_WORDS = {
    "zh": {
        "system": (
            "你是医学专家，为患者的问题编写指令，说明应当如何回答。下面的示例质量依次提高，"
            "请延续这种逐步改进的过程，为新问题写出更好的指令。只输出指令。"
        ),
        "plain": (
            "你是医学专家，为患者的问题编写指令，说明应当如何回答。参照示例，为新问题写出指令。只输出指令。"
        ),
        "first": "参考上面的示例，为下面的问题编写指令。",
        "next": "参考上面的生成过程，为下面的问题编写更好的指令。",
        "question": "问题：",
        "instruction": "指令：",
    },
    "en": {
        "system": (
            "You are a medical expert who writes instructions: how a patient's question should be "
            "answered. The examples below get better from one to the next. Continue this progression for the "
            "new question. Write the instruction only."
        ),
        "plain": (
            "You are a medical expert who writes instructions: how a patient's question should be "
            "answered. Follow the examples for the new question. Write the instruction only."
        ),
        "first": "Use the example above to write an instruction for the question below.",
        "next": "Use the previous generation process to write a better instruction for the question below.",
        "question": "Question: ",
        "instruction": "Instruction: ",
    },
}


class Example(NamedTuple):
    """A question with an instruction and the score that the instruction got."""

    id: str
    question: str
    instruction: str
    score: float


def ranked(examples: Sequence[Example], order: Order = "chain") -> list[Example]:
    """Examples from the lowest to the highest score (``desc`` turns them round).

    Equal scores are ordered by id, so that the order of the input does not matter.
    """
    found = sorted(examples, key=lambda example: (example.score, example.id))
    return found[::-1] if order == "desc" else found


def chained_prompt(
    examples: Sequence[Example], question: str, *, lang: str = "zh", order: Order = "chain"
) -> list[dict[str, str]]:
    """Chat messages that ask for an instruction to a new question.

    ``E_1 + instruct + E_2 + instruct* + ... + E_N + instruct* + question`` with ``E_1 < ... < E_N``: each
    later example is the answer to a request that points back at what stands before it. ``order="asc"`` is
    plain few-shot (examples, one request), the paper's baseline; ``desc`` reverses the chain, for ablation.

    Args:
        examples: At least one.
        question: The new question.
        lang: ``zh`` or ``en``.
        order: See above.

    Returns:
        A system and a user message.

    Raises:
        ValueError: If there is no example.

    Source: DPF-CM, arXiv 2509.01354, section on chained examples; wording ours.
    """
    if not examples:
        raise ValueError(
            "a chained prompt needs at least one example; give scored (question, instruction) pairs."
        )
    words = _WORDS[lang]
    parts = []
    for place, example in enumerate(ranked(examples, order)):
        if order != "asc" and place:
            parts.append(words["first"] if place == 1 else words["next"])
        parts.append(f"{words['question']}{example.question}\n{words['instruction']}{example.instruction}")
    # With one example nothing precedes it: a one-shot prompt, the same in every order.
    parts.append(words["first"] if len(examples) == 1 or order == "asc" else words["next"])
    parts.append(f"{words['question']}{question}\n{words['instruction']}")
    system = words["plain"] if order == "asc" or len(examples) == 1 else words["system"]
    return [{"role": "system", "content": system}, {"role": "user", "content": "\n\n".join(parts)}]


def draw_graded(pool: Sequence[Example], count: int, generator: random.Random) -> list[Example]:
    """Draw examples of strictly rising scores, one from each of ``count`` equal ranges of distinct scores.

    Args:
        pool: Scored examples in any order.
        count: How many.
        generator: Source of randomness; the same seed gives the same draw whatever the pool's order.

    Returns:
        ``count`` examples, scores strictly ascending.

    Raises:
        ValueError: If the pool has fewer distinct scores than ``count``.
    """
    ordered = ranked(pool)
    levels = sorted({example.score for example in ordered})
    if len(levels) < count:
        raise ValueError(
            f"{count} examples of different scores are needed and the pool has {len(levels)} "
            "distinct scores; lower num_examples or score more seeds."
        )
    scores = [example.score for example in ordered]
    drawn = []
    for part in range(count):
        low, high = levels[part * len(levels) // count], levels[(part + 1) * len(levels) // count - 1]
        start, stop = bisect.bisect_left(scores, low), bisect.bisect_right(scores, high)
        drawn.append(ordered[generator.randrange(start, stop)])
    return drawn
