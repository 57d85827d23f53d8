"""The search space: ordered strategies of distinct teams, or of single operators with bounded parameters."""

import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

MAX_LENGTH = 4


@dataclass(frozen=True)
class Step:
    """One entry of a strategy: a team or an operator, with the parameters that were chosen for it."""

    name: str
    params: tuple[tuple[str, Any], ...] = ()

    def get(self, key: str) -> Any:
        """Value of a parameter."""
        return dict(self.params)[key]

    def __str__(self) -> str:
        if not self.params:
            return self.name
        return self.name + json.dumps(dict(self.params), sort_keys=True, separators=(",", ":"))


Strategy = tuple[Step, ...]
IDENTITY: Strategy = ()


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """What a search may choose: the step's name, what it can do, and the values of its parameters."""

    name: str
    ability: str
    """One line for the agent; fixed text that says nothing of the data."""
    name_zh: str = ""
    ability_zh: str = ""
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Parameter -> allowed values, the default first. Empty: the step has no choice."""


TEAMS = (
    StepSpec(
        name="clean",
        ability="removes duplicates, noise such as links and markup, and texts that are too short, too long "
        "or repetitive",
        name_zh="数据清洗团队",
        ability_zh="去重、去除噪声和特殊字符、按长度和重复率过滤",
    ),
    StepSpec(
        name="generate",
        ability="fills missing questions and answers and writes further question-answer pairs",
        name_zh="数据生成团队",
        ability_zh="补全缺失的问题或回答，合成新的问答对",
    ),
    StepSpec(
        name="optimize",
        ability="rewrites existing questions and answers of low quality",
        name_zh="数据优化团队",
        ability_zh="改写已有的低质量问题和回答",
    ),
    StepSpec(
        name="select",
        ability="keeps the half of the rows that should help training most",
        name_zh="数据挑选团队",
        ability_zh="挑选对训练最有价值的一半数据",
    ),
)


OPERATORS = (
    StepSpec(
        name="deduplicate",
        ability="drops near-duplicates above a similarity",
        choices={"threshold": (0.7, 0.8, 0.9)},
    ),
    StepSpec(name="strip_noise", ability="removes markup, links, addresses and superfluous blanks"),
    StepSpec(name="strip_symbols", ability="removes odd characters"),
    StepSpec(
        name="length", ability="drops pairs shorter than so many tokens", choices={"min_tokens": (20, 10, 40)}
    ),
    StepSpec(
        name="repetition",
        ability="drops texts that repeat themselves",
        choices={"max_ratio": (0.6, 0.3, 0.15)},
    ),
    StepSpec(
        name="perplexity",
        ability="drops the share of pairs that a language model finds strangest",
        choices={"max_ratio": (0.1, 0.2, 0.4)},
    ),
    StepSpec(name="fill_missing", ability="writes missing questions and answers"),
    StepSpec(name="synthesize", ability="adds new question-answer pairs", choices={"share": (0.5, 1.0, 2.0)}),
    StepSpec(name="optimize", ability="rewrites questions and answers of low quality"),
    StepSpec(
        name="select_less",
        ability="keeps the share of rows with the most influence on held-out pairs",
        choices={"ratio": (0.5, 0.25, 0.75)},
    ),
    StepSpec(
        name="select_deita",
        ability="keeps the share of rows that are complex, good and diverse",
        choices={"ratio": (0.5, 0.25, 0.75)},
    ),
)
# Steps that ask a language model, and in which role.
ASKS = {
    "generate": "writer",
    "optimize": "optimizer",
    "fill_missing": "writer",
    "synthesize": "writer",
    "select_deita": "scorer",
}


@dataclass(frozen=True)
class Space:
    """All steps a strategy may be made of, each at most once, ``max_length`` of them at most."""

    specs: tuple[StepSpec, ...] = TEAMS
    max_length: int = MAX_LENGTH

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the steps in their fixed order."""
        return tuple(spec.name for spec in self.specs)

    def spec(self, name: str) -> StepSpec:
        """The specification of a step, by its English or its Chinese name.

        Raises:
            ValueError: If there is no such step; the nearest names stand in the message.
        """
        wanted = name.strip().strip("[]【】*` ").lower()
        for spec in self.specs:
            if wanted in (spec.name.lower(), spec.name_zh):
                return spec
        near = get_close_matches(wanted, self.names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown step {name!r}; the space has {', '.join(self.names)}.{hint}")

    def step(self, entry: str | Mapping[str, Any]) -> Step:
        """A checked step from a name or from ``{"name": ..., "params": {...}}``; absent parameters take their
        default.

        Raises:
            ValueError: If the step, a parameter or a value is not in the space.
        """
        name, params = (
            (entry, {}) if isinstance(entry, str) else (entry.get("name", ""), entry.get("params") or {})
        )
        if not isinstance(name, str) or not isinstance(params, Mapping):
            raise ValueError(f'a step is a name or {{"name": ..., "params": {{...}}}}; got {entry!r}.')
        spec = self.spec(name)
        if unknown := sorted(set(params) - set(spec.choices)):
            raise ValueError(
                f"{spec.name} has no parameter {', '.join(unknown)}; it has "
                f"{', '.join(spec.choices) or 'none'}."
            )
        chosen = []
        for key, allowed in sorted(spec.choices.items()):
            value = params.get(key, allowed[0])
            if value not in allowed:
                raise ValueError(f"{spec.name}.{key} must be one of {list(allowed)}; got {value!r}.")
            chosen.append((key, value))
        return Step(spec.name, tuple(chosen))

    def strategy(self, entries: Iterable[str | Mapping[str, Any]]) -> Strategy:
        """A checked strategy, in the given order.

        Raises:
            ValueError: If it is empty or too long, names a step twice, or a step is not in the space.
        """
        steps = tuple(self.step(entry) for entry in entries)
        names = [step.name for step in steps]
        if not 1 <= len(steps) <= self.max_length:
            raise ValueError(f"a strategy has 1 to {self.max_length} steps; got {len(steps)}: {names}.")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"no step may stand twice in a strategy; {', '.join(twice)} does in {names}.")
        return steps

    def all(self) -> list[Strategy]:
        """Every strategy with default parameters, short ones first: 64 for four teams."""
        steps = [self.step(name) for name in self.names]
        lengths = range(1, min(self.max_length, len(steps)) + 1)
        return [found for length in lengths for found in itertools.permutations(steps, length)]

    def draw(self, generator: random.Random) -> Strategy:
        """One strategy, uniform over the ordered tuples of names, parameters uniform over their choices."""
        counts = [
            _falling(len(self.specs), length)
            for length in range(1, min(self.max_length, len(self.specs)) + 1)
        ]
        length = generator.choices(range(1, len(counts) + 1), counts)[0]
        specs = generator.sample(self.specs, length)
        return tuple(
            Step(spec.name, tuple((key, generator.choice(spec.choices[key])) for key in sorted(spec.choices)))
            for spec in specs
        )

    def children(self, strategy: Strategy) -> list[Strategy]:
        """All strategies that are one step longer, parameters at each of their choices."""
        if len(strategy) >= self.max_length:
            return []
        used = {step.name for step in strategy}
        found = []
        for spec in self.specs:
            if spec.name not in used:
                keys = sorted(spec.choices)
                for values in itertools.product(*(spec.choices[key] for key in keys)):
                    found.append((*strategy, Step(spec.name, tuple(zip(keys, values, strict=True)))))
        return found


def _falling(n: int, length: int) -> int:
    product = 1
    for index in range(length):
        product *= n - index
    return product


def strategy_key(strategy: Strategy) -> str:
    """The one spelling of a strategy, for scores, journals and reports: ``clean>select``, or ``identity``."""
    return ">".join(map(str, strategy)) or "identity"


def strategy_json(strategy: Strategy) -> list[Any]:
    """A strategy as JSON values: names, and objects where parameters were chosen."""
    return [
        {"name": step.name, "params": dict(step.params)} if step.params else step.name for step in strategy
    ]


def team_runs(strategies: Sequence[Strategy]) -> tuple[int, int]:
    """How many steps run for these strategies: each on its own, and with every shared prefix run once.

    All 64 strategies of four teams: 196 and 64.
    """
    prefixes = {strategy[:length] for strategy in strategies for length in range(1, len(strategy) + 1)}
    return sum(len(strategy) for strategy in strategies), len(prefixes)


def cost_model(
    times: Mapping[str, float], *, ratio: float, dirty_share: float, optimize_share: float, reuse: float
) -> dict[str, float]:
    """The least time a search can take with each saving, in the unit of ``times``.

    ``T = ops + train + gen + judge + agent``: sampling divides ops and train by at most ``1 / ratio``, target
    selection leaves ``dirty_share`` of the calls of OPTIMIZE, the cache divides ops by ``reuse``; generation
    and judging are untouched by all three.

    Args:
        times: Seconds of a search without any saving: ops, train, gen, judge, agent.
        ratio: Share of rows that are sampled.
        dirty_share: Share of rows that target selection leaves to OPTIMIZE.
        optimize_share: Share of the time of operators that OPTIMIZE takes.
        reuse: Steps without divided by steps with prefix reuse, see `team_runs`.

    Returns:
        Seconds under the names nothing, dps, pts, cache, all, and ``floor``: what no saving touches.
    """
    ops, train = times["ops"], times["train"]
    rest = times["gen"] + times["judge"] + times["agent"]
    kept = 1 - optimize_share * (1 - dirty_share)
    return {
        "nothing": ops + train + rest,
        "dps": ratio * (ops + train) + rest,
        "pts": kept * ops + train + rest,
        "cache": ops / reuse + train + rest,
        "all": ratio * (kept * ops / reuse + train) + rest,
        "floor": rest,
    }
