"""What language models are asked, in Chinese and English: the paper's criteria in our words."""

from collections.abc import Sequence
from typing import Any

from hf_plugins.data_ops.answers import AnswerSchema, Field
from hf_plugins.data_ops.chat import Messages

LANGS = ("zh", "en")

SCORE = AnswerSchema(
    fields={
        "score": Field(kind="integer", minimum=1, maximum=10),
        "reason": Field(kind="string", about="one sentence"),
    }
)
OPTIMIZE = AnswerSchema(
    fields={
        "optimize": Field(kind="boolean", about="whether the pair has a defect"),
        "question": Field(kind="string", about="rewritten, or null", nullable=True),
        "answer": Field(kind="string", about="rewritten, or null", nullable=True),
        "reason": Field(kind="string", about="one sentence"),
    }
)
QA = AnswerSchema(fields={"question": Field(kind="string"), "answer": Field(kind="string")})
VOTE = AnswerSchema(
    fields={"best": Field(kind="integer", minimum=1), "worst": Field(kind="integer", minimum=1)}
)
HEADER = {"zh": "### 正文", "en": "### Text"}

CRITERIA = {
    "zh": (
        "按以下标准评判，前面的标准优先；发现缺陷要重扣，使分数拉开差距。\n"
        "1. 专业性：理解患者意图，切题，解释清楚；信息不足时主动追问。\n"
        "2. 安全性：医学上正确；不懂就承认；拒绝有害的建议；尊重伦理和患者的选择。\n"
        "3. 流畅性：连贯，无错误，不跑题，通俗友好。"
    ),
    "en": (
        "Judge by these criteria; an earlier one outweighs a later one. Punish defects hard, so that "
        "scores spread.\n"
        "1. Professionalism: understands the patient, stays relevant, explains clearly, asks back when "
        "information is missing.\n"
        "2. Safety: medically right, admits ignorance, refuses harmful advice, respects ethics and the "
        "patient's choice.\n"
        "3. Fluency: coherent, without errors and digressions, plain and friendly."
    ),
}
_SCORE = {
    "zh": "你是医学专家，负责审核训练数据的质量，给下面的内容打1到10分。",
    "en": "You are a medical expert who reviews training data. Give the text below a score from 1 to 10.",
}
_OPTIMIZE = {
    "zh": (
        "你是医学专家。先判断下面的问答是否有缺陷；没有缺陷则optimize为false，其余为null。"
        "有缺陷则改写，保持核心意图不变，长度变化不超过{percent}%。"
    ),
    "en": (
        "You are a medical expert. First decide whether this question and answer have a defect; if not, "
        "optimize is "
        "false and the texts are null. If so, rewrite them with the same core intent, the length changed "
        "by at most {percent} %."
    ),
}
_WRITE = {
    "zh": (
        "你是编写医学教材的专家。参照示例，写一段新的、专业、安全、流畅的医学科普文字。先单独输出一行"
        "“{header}”，随后是正文。"
    ),
    "en": (
        "You are a medical expert who compiles textbooks. In the manner of the examples write one new "
        "passage: "
        'professional, safe, fluent. First a line "{header}" by itself, then the passage.'
    ),
}
_QA = {
    "zh": "你是医学专家。参照示例，编写一个新的医患问答，不要重复示例的内容。",
    "en": (
        "You are a medical expert. In the manner of the examples write one new question and answer; do not "
        "repeat them."
    ),
}
_VOTE = {
    "zh": (
        "你是医学专家。下面是对同一问题的{count}个回答，选出最好和最差的编号。标准依次为：准确、安全、流畅"
        "、简洁。"
    ),
    "en": (
        "You are a medical expert. Below are {count} answers to one question; name the numbers of the best "
        "and the worst. Criteria in this order: accuracy, safety, fluency, conciseness."
    ),
}
_EXAMPLE = {"zh": "示例", "en": "Example"}
_QUESTION = {"zh": "问题", "en": "Question"}
_ANSWER = {"zh": "回答", "en": "Answer"}


def check_lang(name: str, lang: str) -> None:
    """Refuse a language that no prompt is written in.

    Raises:
        ValueError: If ``lang`` is not one of `LANGS`.
    """
    if lang not in LANGS:
        raise ValueError(
            f"{name}: lang must be one of {', '.join(LANGS)}, the language of the prompt; got {lang!r}."
        )


def _chat(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def score_messages(fields: Sequence[tuple[str, str]], lang: str) -> Messages:
    """Ask for a score of named texts."""
    body = "\n\n".join(f"## {name}\n{text}" for name, text in fields)
    return _chat(f"{_SCORE[lang]}\n{CRITERIA[lang]}", f"{body}\n\n{SCORE.instruction(lang)}")


def optimize_messages(question: str, answer: str, lang: str, tolerance: float) -> Messages:
    """Ask whether a pair has a defect, and for the better text if so."""
    system = f"{_OPTIMIZE[lang].format(percent=round(100 * tolerance))}\n{CRITERIA[lang]}"
    body = f"## {_QUESTION[lang]}\n{question}\n\n## {_ANSWER[lang]}\n{answer}"
    return _chat(system, f"{body}\n\n{OPTIMIZE.instruction(lang)}")


def write_messages(examples: Sequence[str], lang: str) -> Messages:
    """Ask for a new passage in the manner of the examples."""
    body = "\n\n".join(f"## {_EXAMPLE[lang]} {i}\n{text}" for i, text in enumerate(examples, 1))
    return _chat(_WRITE[lang].format(header=HEADER[lang]), body)


def qa_messages(examples: Sequence[tuple[str, str]], lang: str) -> Messages:
    """Ask for a new question and answer in the manner of the examples."""
    body = "\n\n".join(
        f"## {_EXAMPLE[lang]} {i}\n{_QUESTION[lang]}: {question}\n{_ANSWER[lang]}: {answer}"
        for i, (question, answer) in enumerate(examples, 1)
    )
    return _chat(_QA[lang], f"{body}\n\n{QA.instruction(lang)}")


def vote_messages(prompt: str, responses: Sequence[str], lang: str) -> Messages:
    """Ask for the best and the worst of numbered responses."""
    body = f"## {_QUESTION[lang]}\n{prompt}\n\n" + "\n\n".join(
        f"## {_ANSWER[lang]} {i}\n{text}" for i, text in enumerate(responses, 1)
    )
    return _chat(_VOTE[lang].format(count=len(responses)), f"{body}\n\n{VOTE.instruction(lang)}")


def templates(*names: str) -> tuple[str, ...]:
    """Fixed words of prompts (``score``, ``optimize``, ``write``, ``qa``, ``vote``), for fingerprints."""
    texts: dict[str, Any] = {
        "score": (_SCORE, CRITERIA, SCORE.instruction()),
        "optimize": (_OPTIMIZE, CRITERIA, OPTIMIZE.instruction()),
        "write": (_WRITE, HEADER),
        "qa": (_QA, QA.instruction()),
        "vote": (_VOTE, VOTE.instruction()),
    }
    return tuple(str(texts[name]) for name in names)
