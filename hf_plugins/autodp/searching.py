"""Searches over strategies behind one interface: ask for trials, tell their scores, until nothing is asked.

A search is deterministic given its seed, the scores it was told and, for an agent, the replies; so a run that
was cut off is resumed by playing it again with the stored scores and replies.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hf_plugins.autodp.protocol import (
    MAX_COMBINATIONS,
    REPAIR,
    Reply,
    echo,
    feedback,
    first_prompt,
    parse_reply,
)
from hf_plugins.autodp.strategies import IDENTITY, Space, Strategy, strategy_key

Chat = Callable[[list[dict[str, str]]], str]
MAX_ROUNDS = 6
ETA = 4
RUNGS = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Trial:
    """One evaluation that a search asks for."""

    strategy: Strategy
    budget: float = 1.0
    """Share of the full number of training steps."""
    keep: bool = False
    """Whether a longer trial of the same strategy may follow, which then goes on from this one's weights."""


@dataclass(frozen=True)
class Scored:
    """A trial and what came out of it."""

    trial: Trial
    score: float
    """Above 0: better than the unprocessed data."""
    low: float = -math.inf
    """Lower end of the score's confidence interval."""


class Search(Protocol):
    """What the driver of a run needs of a search."""

    def ask(self) -> list[Trial]:
        """Trials to run now; empty when the search is over."""

    def tell(self, results: Sequence[Scored]) -> None:
        """The scores of the trials just asked for, in their order."""

    def best(self) -> Strategy:
        """The strategy chosen, so far or for good; empty for unprocessed data."""


def best_of(results: Sequence[Scored]) -> Strategy:
    """The best score at the largest budget, or the empty strategy if no lower bound there is above 0.

    The bound decides between processing and none; ties go to the shorter, then to the earlier strategy.
    """
    if not results:
        return IDENTITY
    full = max(result.trial.budget for result in results)
    final = [result for result in results if result.trial.budget == full]
    if all(result.low <= 0 for result in final):
        return IDENTITY
    return max(final, key=lambda result: (result.score, -len(result.trial.strategy))).trial.strategy


@dataclass
class ListSearch:
    """Runs a fixed list of strategies in batches and takes the best."""

    strategies: Sequence[Strategy]
    batch: int = 8
    results: list[Scored] = field(default_factory=list)

    def ask(self) -> list[Trial]:
        """The next batch."""
        done = len(self.results)
        return [Trial(strategy) for strategy in self.strategies[done : done + self.batch]]

    def tell(self, results: Sequence[Scored]) -> None:
        """Take the scores."""
        self.results += results

    def best(self) -> Strategy:
        """Best so far, see `best_of`."""
        return best_of(self.results)


def exhaustive(space: Space) -> ListSearch:
    """Every strategy of the space with default parameters."""
    return ListSearch(space.all())


def random_search(space: Space, count: int, seed: int) -> ListSearch:
    """``count`` different strategies, uniform over the space, in drawn order.

    Raises:
        ValueError: If the space holds fewer strategies.
    """
    generator = random.Random(seed)
    if not any(spec.choices for spec in space.specs):
        every = space.all()
        if count > len(every):
            raise ValueError(
                f"num_strategies={count} but the space holds {len(every)}; use search='exhaustive' for all."
            )
        return ListSearch(generator.sample(every, count))
    found: dict[Strategy, None] = {}
    for _ in range(1000 * count):
        found.setdefault(space.draw(generator))
        if len(found) == count:
            return ListSearch(list(found))
    raise ValueError(
        f"num_strategies={count} but only {len(found)} different ones were drawn; ask for fewer."
    )


@dataclass
class HalvingSearch:
    """Successive halving: all at a quarter of the steps, the best quarter goes on to half, of these the best
    quarter to the end.

    Trials go on from their own weights, so 64 strategies cost 64/4 + 16/4 + 4/2 = 22 full trainings.
    """

    strategies: Sequence[Strategy]
    eta: int = ETA
    rungs: tuple[float, ...] = RUNGS
    results: list[Scored] = field(default_factory=list)
    _rung: int = 0
    _waiting: list[Strategy] | None = None

    def ask(self) -> list[Trial]:
        """All trials of the next rung."""
        if self._rung == len(self.rungs):
            return []
        waiting = list(self.strategies) if self._waiting is None else self._waiting
        last = self._rung == len(self.rungs) - 1
        return [Trial(strategy, self.rungs[self._rung], keep=not last) for strategy in waiting]

    def tell(self, results: Sequence[Scored]) -> None:
        """Take the scores and let the best ``1 / eta`` go on."""
        self.results += results
        self._rung += 1
        order = sorted(results, key=lambda result: -result.score)
        count = math.ceil(len(order) / self.eta)
        self._waiting = [result.trial.strategy for result in order[:count]]

    def best(self) -> Strategy:
        """Best of the last finished rung."""
        return best_of(self.results)


def halving_cost(count: int, *, eta: int = ETA, rungs: Sequence[float] = RUNGS) -> float:
    """Full trainings that successive halving costs, each trial going on from where it stood."""
    total, before = 0.0, 0.0
    for rung in rungs:
        total += count * (rung - before)
        before, count = rung, math.ceil(count / eta)
    return total


@dataclass
class MCTSSearch:
    """Tree search over prefixes: each node is a strategy, a simulation scores one new node (UCT).

    Every prefix is a strategy of its own, so no roll-out is needed: the value of a new node is its score.
    """

    space: Space
    num_simulations: int
    seed: int = 0
    exploration: float = 0.5
    """Weight of ``sqrt(ln N / n)``, in units of the spread of the scores seen so far."""
    results: list[Scored] = field(default_factory=list)
    _visits: dict[Strategy, int] = field(default_factory=dict)
    _sums: dict[Strategy, float] = field(default_factory=dict)
    _order: dict[Strategy, list[Strategy]] = field(default_factory=dict)

    def _children(self, node: Strategy) -> list[Strategy]:
        if node not in self._order:
            children = self.space.children(node)
            random.Random(f"{self.seed}/{strategy_key(node)}").shuffle(children)
            self._order[node] = children
        return self._order[node]

    def _full(self, node: Strategy) -> bool:
        return all(child in self._visits and self._full(child) for child in self._children(node))

    def ask(self) -> list[Trial]:
        """The next node to score."""
        if len(self.results) >= self.num_simulations or self._full(IDENTITY):
            return []
        scores = [result.score for result in self.results]
        spread = (max(scores) - min(scores)) if len(scores) > 1 else 1.0
        node = IDENTITY
        while True:
            children = self._children(node)
            fresh = [child for child in children if child not in self._visits]
            if fresh:
                return [Trial(fresh[0])]
            total = sum(self._visits[child] for child in children)

            def bound(child: Strategy, total: int = total) -> float:
                visits = self._visits[child]
                explore = self.exploration * spread * math.sqrt(math.log(total) / visits)
                return self._sums[child] / visits + explore

            node = max((child for child in children if not self._full(child)), key=bound)

    def tell(self, results: Sequence[Scored]) -> None:
        """Take the score and carry it up the tree."""
        self.results += results
        for result in results:
            strategy = result.trial.strategy
            for length in range(1, len(strategy) + 1):
                node = strategy[:length]
                self._visits[node] = self._visits.get(node, 0) + 1
                self._sums[node] = self._sums.get(node, 0.0) + result.score

    def best(self) -> Strategy:
        """Best so far, see `best_of`."""
        return best_of(self.results)


@dataclass
class AgentSearch:
    """The loop of the paper: a chat proposes, scores go back, until it decides or the rounds are used up.

    An unusable reply gets one repair turn; then it counts as a round without proposals. What scored before is
    not run again, its score is repeated to the agent.
    """

    space: Space
    chat: Chat
    max_rounds: int = MAX_ROUNDS
    limit: int = MAX_COMBINATIONS
    prompt: str = "json"
    budget: float = 1.0
    keep: bool = False
    results: list[Scored] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    """The conversation as it was sent."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """One entry a round: proposals, what was dropped, whether it decided."""
    stopped: str = ""
    """Why it ended: final, no_processing, max_rounds or unusable."""
    _scores: dict[Strategy, float] = field(default_factory=dict)
    _asked: Reply | None = None
    _final: Strategy | None = None

    def ask(self) -> list[Trial]:
        """Proposals of the next round that have no score yet; a decision without a score is scored last."""
        while not self.stopped:
            if len(self.log) == self.max_rounds:
                self.stopped = "max_rounds"
                break
            reply = self._round()
            if not reply.usable:
                # Nothing to run and nothing decided, also not after the repair turn.
                self.stopped = "unusable"
                break
            if reply.final is not None:
                self._final = reply.final
                self.stopped = "final" if reply.final else "no_processing"
            new = [strategy for strategy in reply.strategies if strategy not in self._scores]
            if self.stopped:
                unscored = reply.final and reply.final not in self._scores
                new = [reply.final] if unscored and reply.final is not None else []
            self._asked = reply
            if new:
                return [Trial(strategy, self.budget, self.keep) for strategy in new]
            if not self.stopped:
                self._answer(reply)
        return []

    def _round(self) -> Reply:
        if not self.messages:
            text = first_prompt(self.space, prompt=self.prompt, rounds=self.max_rounds, limit=self.limit)
            self.messages.append({"role": "user", "content": text})
        reply = self._parse(self.chat(list(self.messages)))
        repaired = False
        if not reply.usable or (reply.problems and not reply.strategies and reply.final is None):
            repaired = True
            problem = " ".join(reply.problems)
            turn = [
                {"role": "assistant", "content": echo(reply, self.space, self.prompt)},
                {"role": "user", "content": REPAIR[self.prompt].format(problem=problem)},
            ]
            reply = self._parse(self.chat([*self.messages, *turn]))
        self.messages.append({"role": "assistant", "content": echo(reply, self.space, self.prompt)})
        self.log.append(
            {
                "round": len(self.log) + 1,
                "strategies": [strategy_key(strategy) for strategy in reply.strategies],
                "final": None if reply.final is None else strategy_key(reply.final),
                "problems": list(reply.problems),
                "repaired": repaired,
            }
        )
        return reply

    def _parse(self, text: str) -> Reply:
        return parse_reply(text, self.space, prompt=self.prompt, limit=self.limit)

    def tell(self, results: Sequence[Scored]) -> None:
        """Take the scores and answer the agent."""
        self.results += results
        self._scores |= {result.trial.strategy: result.score for result in results}
        assert self._asked is not None, "tell follows ask"
        if not self.stopped:
            self._answer(self._asked)

    def _answer(self, reply: Reply) -> None:
        scores = [(strategy, self._scores[strategy]) for strategy in reply.strategies]
        text = feedback(
            scores,
            space=self.space,
            round_number=len(self.log),
            rounds=self.max_rounds,
            prompt=self.prompt,
            problems=reply.problems,
        )
        self.messages.append({"role": "user", "content": text})

    def best(self) -> Strategy:
        """The decision, else the best scored strategy, else unprocessed data."""
        return self._final if self._final is not None else best_of(self.results)


@dataclass
class HybridSearch:
    """An agent proposes at a quarter of the steps; the best quarter of what it proposed goes on as in
    halving.
    """

    agent: AgentSearch
    eta: int = ETA
    rungs: tuple[float, ...] = RUNGS
    _halving: HalvingSearch | None = None

    def __post_init__(self) -> None:
        self.agent.budget, self.agent.keep = self.rungs[0], True

    @property
    def results(self) -> list[Scored]:
        """All scores so far."""
        return self.agent.results + (self._halving.results if self._halving else [])

    def ask(self) -> list[Trial]:
        """The agent's trials first, then those of the longer rungs."""
        if self._halving is None:
            if trials := self.agent.ask():
                return trials
            if not self.agent.results:
                return []
            ranked = sorted(self.agent.results, key=lambda result: -result.score)
            count = max(math.ceil(len(ranked) / self.eta), min(2, len(ranked)))
            chosen = [result.trial.strategy for result in ranked[:count]]
            self._halving = HalvingSearch(chosen, self.eta, self.rungs[1:])
        return self._halving.ask()

    def tell(self, results: Sequence[Scored]) -> None:
        """Hand the scores to who asked."""
        (self.agent if self._halving is None else self._halving).tell(results)

    def best(self) -> Strategy:
        """Best of the longest rung."""
        return best_of(self.results)


def make_search(
    name: str, space: Space, *, count: int, seed: int, chat: Chat | None, max_rounds: int, prompt: str
) -> Search:
    """A search by its name: agent, exhaustive, random, halving, mcts or hybrid.

    Raises:
        ValueError: If the name is unknown, or an agent is asked for without a chat.
    """
    if name in ("agent", "hybrid"):
        if chat is None:
            raise ValueError(f"search={name!r} needs an agent; set agent= to a server, a model or a script.")
        agent = AgentSearch(space, chat, max_rounds=max_rounds, prompt=prompt)
        return agent if name == "agent" else HybridSearch(agent)
    if name == "exhaustive":
        return exhaustive(space)
    if name == "random":
        return random_search(space, count, seed)
    if name == "halving":
        return HalvingSearch(space.all())
    if name == "mcts":
        return MCTSSearch(space, count, seed)
    raise ValueError(f"search must be agent, exhaustive, random, halving, mcts or hybrid; got {name!r}.")
