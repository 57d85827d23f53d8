"""What is said between the search and an agent: prompts, the JSON reply, the published Chinese format.

Every text here is fixed before any data is seen; only names of steps, scores and counts are filled in.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_plugins.autodp.strategies import IDENTITY, Space, Strategy, strategy_json, strategy_key

MAX_COMBINATIONS = 4

PROMPT_JSON = """You tune the data processing of a fine-tuning set. You never see the data: you only see
scores.

Steps that exist:
{steps}

A strategy is an ordered list of 1 to {max_length} different steps. Each strategy is applied to a sample, a
model is fine-tuned on the result, and its score is reported. A score above 0 is better than the unprocessed
data, below 0 worse. Compare the strategies of a round with each other, not only their values. Do not repeat a
strategy: its score is final. Filling in what is missing and improving what exists are different steps. Start
with few steps to learn what each does alone.

Reply with one JSON object and nothing else:
{{"strategies": [["step", ...], ...], "final": null, "no_processing": false, "reason": "one line"}}
Propose at most {limit} strategies a round. When you are sure, set "final" to the best strategy; if no
strategy scores above 0, set "no_processing" to true. This is round 1 of at most {rounds}."""

PROMPT_ZH = """你是一名训练数据调优助手，以黑盒方式工作：数据内容对你不可见，你只能看到分数。

可用团队：
{steps}

任务：提出至多{limit}个不同的团队组合，每个组合给出明确的执行顺序，组合内团队不得重复，最多{max_length}个团队。\
先用少量团队了解单个团队的效果。分数大于0表示优于原始数据，小于0表示更差；请比较组合之间的相对变化。\
不要重复之前的组合，其分数是最终的。生成用于补全缺失内容，优化用于改进已有内容。最多进行{rounds}轮。

严格按照如下格式输出：
**###组合[1]###**
团队名称,团队名称
**###不同组合的理由###**
理由
确定最佳组合后，在理由之前输出【最佳团队】并给出该组合；若所有分数约为零，输出【原始数据无须任何处理】。"""

REPAIR = {
    "json": "Your reply could not be used: {problem} Reply again with only the JSON object described before.",
    "paper_zh": "你的回复无法使用：{problem} 请严格按照之前的格式重新输出。",
}
FEEDBACK = {
    "json": "Scores of round {round}:\n{scores}\nThis is round {next} of at most {rounds}. Assess the "
    "feedback and propose further strategies, or decide.",
    "paper_zh": "第{round}轮得分：\n{scores}\n请进行第{next}轮（最多{rounds}轮）：评估反馈，调整团队与顺序，"
    "组合数量可以变化，或给出最终决定。",
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["strategies", "final", "no_processing", "reason"],
    "additionalProperties": False,
    "properties": {
        "strategies": {"type": "array", "items": {"type": "array"}},
        "final": {"type": ["array", "null"]},
        "no_processing": {"type": "boolean"},
        "reason": {"type": "string"},
    },
}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an agent asked for, checked against the space."""

    strategies: tuple[Strategy, ...] = ()
    """Proposals, without repetitions inside the reply, at most `MAX_COMBINATIONS`."""
    final: Strategy | None = None
    """The decision; the empty strategy stands for unprocessed data."""
    problems: tuple[str, ...] = field(default=())
    """What was dropped and why; names of steps and counts only."""

    @property
    def usable(self) -> bool:
        """Whether there is anything to run or to decide."""
        return bool(self.strategies) or self.final is not None


def first_prompt(
    space: Space, *, prompt: str = "json", rounds: int = 6, limit: int = MAX_COMBINATIONS
) -> str:
    """The message that opens the conversation."""
    if prompt == "paper_zh":
        steps = "\n".join(
            f"- {spec.name_zh or spec.name}：{spec.ability_zh or spec.ability}" for spec in space.specs
        )
    else:
        steps = "\n".join(f"- {spec.name}: {spec.ability}{_parameters(spec.choices)}" for spec in space.specs)
    template = PROMPT_ZH if prompt == "paper_zh" else PROMPT_JSON
    return template.format(steps=steps, max_length=space.max_length, rounds=rounds, limit=limit)


def _parameters(choices: Any) -> str:
    if not choices:
        return ""
    listed = "; ".join(f"{key} in {json.dumps(list(values))}" for key, values in choices.items())
    return f' (write it as {{"name": ..., "params": {{...}}}} to set: {listed})'


def feedback(
    scores: Sequence[tuple[Strategy, float]],
    *,
    space: Space,
    round_number: int,
    rounds: int,
    prompt: str = "json",
    problems: Sequence[str] = (),
) -> str:
    """The scores of a round in the order of its combinations, rounded to four digits, and what was
    dropped.
    """
    lines = [f"{_shown(strategy, space, prompt)}: {score:.4f}" for strategy, score in scores]
    lines += [f"not run: {problem}" for problem in problems]
    return FEEDBACK[prompt].format(
        round=round_number, next=round_number + 1, rounds=rounds, scores="\n".join(lines)
    )


def echo(reply: Reply, space: Space, prompt: str = "json") -> str:
    """A reply as it stands in the history: the proposals alone, without the agent's free text."""
    if prompt == "paper_zh":
        blocks = [
            f"**###组合[{index}]###**\n{_shown(strategy, space, prompt)}"
            for index, strategy in enumerate(reply.strategies, start=1)
        ]
        return "\n".join(blocks) or "无"
    final = None if reply.final is None else strategy_json(reply.final)
    return json.dumps({"strategies": [strategy_json(s) for s in reply.strategies], "final": final})


def _shown(strategy: Strategy, space: Space, prompt: str) -> str:
    if prompt == "paper_zh":
        return ",".join(space.spec(step.name).name_zh or str(step) for step in strategy) or "原始数据"
    return json.dumps(strategy_json(strategy))


def parse_reply(text: str, space: Space, *, prompt: str = "json", limit: int = MAX_COMBINATIONS) -> Reply:
    """Read a reply; whatever cannot be used is dropped and named in ``problems``, nothing raises.

    Args:
        text: The agent's words; what stands before ``</think>`` is left out.
        space: What may be proposed.
        prompt: ``json`` or ``paper_zh``; the other form is tried when the asked one is not found.
        limit: Proposals that are kept.

    Returns:
        The checked reply.
    """
    text = text.rsplit("</think>", 1)[-1].strip()
    readers = [_read_json, _read_chinese] if prompt == "json" else [_read_chinese, _read_json]
    for reader in readers:
        found = reader(text)
        if found is not None:
            return _checked(*found, space=space, limit=limit)
    what = "an empty reply" if not text else "no JSON object and no combination block was found"
    return Reply(problems=(f"{what}.",))


def _read_json(text: str) -> tuple[list[Any], Any, bool] | None:
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and {"strategies", "final", "no_processing"} & set(found):
            strategies = found.get("strategies") or []
            if not isinstance(strategies, list):
                strategies = [strategies]
            return strategies, found.get("final"), found.get("no_processing") is True
    return None


def _read_chinese(text: str) -> tuple[list[Any], Any, bool] | None:
    body = re.split(r"\**#*\s*不同组合的理由", text, maxsplit=1)[0]
    blocks = re.findall(r"#*\s*组合\s*[\[【]?\s*\d+\s*[\]】]?\s*#*\**\s*[:：]?\s*\n+([^\n]+)", body)
    best = re.search(r"【最佳团队】[\s*:：]*([^\n]*(?:\n[^\n]+)?)", body)
    nothing = "【原始数据无须任何处理】" in body
    if not blocks and best is None and not nothing:
        return None
    final = None
    if best is not None:
        lines = [line for line in best.group(1).splitlines() if "团队" in line]
        final = _names(lines[0]) if lines else (_names(blocks[0]) if blocks else [])
    return [_names(block) for block in blocks], final, nothing


def _names(line: str) -> list[str]:
    parts = re.split(r"[,，、;；]|->|→|>", line)
    return [name for part in parts if (name := part.strip().lstrip("-*•·0123456789.、 ").strip("*[]【】 "))]


def _checked(entries: list[Any], final: Any, nothing: bool, *, space: Space, limit: int) -> Reply:
    problems: list[str] = []
    kept: list[Strategy] = []
    for index, entry in enumerate(entries, start=1):
        strategy = _strategy(entry, space, f"strategy {index}", problems)
        if strategy is not None and strategy not in kept:
            kept.append(strategy)
    if len(kept) > limit:
        problems.append(f"{len(kept)} strategies proposed, the first {limit} are run.")
        kept = kept[:limit]
    if nothing:
        return Reply(final=IDENTITY, problems=tuple(problems))
    decided = None
    if final is not None:
        decided = _strategy(final, space, "the final strategy", problems)
    return Reply(strategies=tuple(kept), final=decided, problems=tuple(problems))


def _strategy(entry: Any, space: Space, what: str, problems: list[str]) -> Strategy | None:
    """The checked strategy, or None and a problem that quotes none of the agent's own words."""
    if not isinstance(entry, list) or not all(isinstance(step, str | dict) for step in entry):
        problems.append(f"{what} is no list of steps.")
        return None
    unknown = 0
    for step in entry:
        try:
            space.spec(str(step.get("name", "")) if isinstance(step, dict) else step)
        except ValueError:
            unknown += 1
    if unknown:
        problems.append(f"{what}: {unknown} of its steps do not exist; there are {', '.join(space.names)}.")
        return None
    try:
        return space.strategy(entry)
    except ValueError:
        problems.append(
            f"{what}: it needs 1 to {space.max_length} steps, each once, with parameter values that are "
            f"listed."
        )
        return None


def describe(strategy: Strategy) -> str:
    """A strategy for people: ``clean, then select``."""
    return strategy_key(strategy).replace(">", ", then ")
