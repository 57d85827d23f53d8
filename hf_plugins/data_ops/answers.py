"""Answers of language models, checked against a schema: parsed strictly, repaired once, or unparsed."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_plugins.data_ops.chat import ChatClient, Messages, Progress, Sampling

Kind = Literal["integer", "number", "string", "boolean"]


class AnswerError(ValueError):
    """An answer does not fit its schema; the message tells the model (and the reader) what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of an answer."""

    kind: Kind
    about: str = ""
    """What stands there, told to the model."""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    nullable: bool = False

    def check(self, name: str, value: Any) -> Any:
        """The value, or an error that names what is wrong."""
        if value is None and self.nullable:
            return None
        kinds: dict[str, Any] = {"integer": int, "number": int | float, "string": str, "boolean": bool}
        if isinstance(value, float) and self.kind == "integer" and value.is_integer():
            value = int(value)
        if not isinstance(value, kinds[self.kind]) or (isinstance(value, bool) and self.kind != "boolean"):
            raise AnswerError(
                f"{name} must be of type {self.kind}; got {json.dumps(value, ensure_ascii=False)[:80]}"
            )
        if self.choices and value not in self.choices:
            raise AnswerError(f"{name} must be one of {', '.join(self.choices)}; got {str(value)[:80]!r}")
        if self.minimum is not None and value < self.minimum:
            raise AnswerError(f"{name} must be at least {self.minimum:g}; got {value}")
        if self.maximum is not None and value > self.maximum:
            raise AnswerError(f"{name} must be at most {self.maximum:g}; got {value}")
        return value


@dataclass(frozen=True, kw_only=True)
class AnswerSchema:
    """A JSON object of named fields; text around it is an error, a thinking part before it is not."""

    fields: Mapping[str, Field]

    def instruction(self, lang: str = "en") -> str:
        """The sentence that asks for this form, to stand at the end of a prompt."""
        lines = [
            f'  "{name}": {field.kind}{" or null" if field.nullable else ""}'
            + (f", one of {', '.join(field.choices)}" if field.choices else "")
            + (
                f", {field.minimum:g} to {field.maximum:g}"
                if None not in (field.minimum, field.maximum)
                else ""
            )
            + (f" ({field.about})" if field.about else "")
            for name, field in self.fields.items()
        ]
        head = (
            "只输出一个JSON对象，不要输出其他内容："
            if lang == "zh"
            else "Answer with one JSON object and nothing else:"
        )
        return head + "\n{\n" + ",\n".join(lines) + "\n}"

    def parse(self, text: str) -> dict[str, Any]:
        """Fields of an answer.

        Raises:
            AnswerError: If the answer is no such object.
        """
        # A reasoning model thinks aloud first; what counts stands behind the end of it.
        body = text.rpartition("</think>")[2].strip()
        fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", body, flags=re.S)
        try:
            value = json.loads(fenced[1] if fenced else body)
        except ValueError as error:
            raise AnswerError(
                f"the answer is no JSON object ({error}); write nothing but the object"
            ) from error
        if not isinstance(value, dict):
            raise AnswerError(f"the answer must be a JSON object; got {type(value).__name__}")
        missing = [name for name in self.fields if name not in value]
        if missing:
            raise AnswerError(f"the answer lacks {', '.join(missing)}")
        return {name: field.check(name, value[name]) for name, field in self.fields.items()}


@dataclass(frozen=True)
class Answer:
    """One checked answer."""

    value: dict[str, Any] | None
    """The fields; None if the answer stayed unusable after the repair."""
    raw: str
    """The last text that the model gave."""
    problem: str = ""
    """What was wrong with it, if anything is."""


def ask(
    client: ChatClient,
    conversations: Sequence[Messages],
    schema: AnswerSchema,
    *,
    sampling: Sampling | None = None,
    repairs: int = 1,
    progress: Progress | None = None,
) -> list[Answer]:
    """Ask for structured answers; one that does not fit is sent back once with what is wrong.

    Args:
        client: Who is asked.
        conversations: The questions.
        schema: What an answer holds.
        sampling: How it is drawn; ``n`` must be 1.
        repairs: Further turns for an answer that does not fit.
        progress: Told (done, total) of the first round.

    Returns:
        One answer a question, ``value`` None where none fitted.

    Raises:
        ChatError: If the model cannot be asked; finished answers are in the cache if there is one.
    """
    asked: list[Messages] = [list(messages) for messages in conversations]
    found: list[Answer] = [Answer(None, "")] * len(asked)
    todo = list(range(len(asked)))
    for turn in range(repairs + 1):
        if not todo:
            break
        texts = client.complete_many(
            [asked[i] for i in todo], sampling=sampling, progress=progress if turn == 0 else None
        )
        again = []
        for index, answers in zip(todo, texts, strict=True):
            try:
                found[index] = Answer(schema.parse(answers[0]), answers[0])
            except AnswerError as error:
                found[index] = Answer(None, answers[0], str(error))
                asked[index] = [
                    *asked[index],
                    {"role": "assistant", "content": answers[0]},
                    {"role": "user", "content": f"{error}. {schema.instruction()}"},
                ]
                again.append(index)
        todo = again
    return found
