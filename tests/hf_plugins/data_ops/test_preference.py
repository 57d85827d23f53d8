import json
import re
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hf_plugins.data_ops.chat import ScriptedChat
from hf_plugins.data_ops.op import OpContext
from hf_plugins.data_ops.preference import (
    PreferenceDenoiseFilter,
    PreferenceVoteMapper,
    ResponseSamplingMapper,
    Verdict,
    ensemble_distance,
    tally,
    trim_ranks,
)


def test_votes_by_hand() -> None:
    assert tally([(0, 4), (0, 3), (1, 4)], 5) == Verdict(0, 4, "majority")
    # Best 0, 1, 2, no majority: points 0: 2+1+1=4, 1: 4, 2: 4, 3: 0+0+1, 4: 1+1+0=2 -> first of the tied.
    assert tally([(0, 3), (1, 3), (2, 4)], 5) == Verdict(0, 3, "borda")
    # Points: 0: 2+0=2, 1: 1+1=2, 2: 0+2=2: best and worst fall together on the first.
    assert tally([(0, 2), (2, 0)], 3) is None
    assert tally([], 3) is None
    # A voter whose best is its worst says nothing.
    assert tally([(1, 1)], 3) is None
    assert tally([(1, 1), (2, 0)], 3) == Verdict(2, 0, "majority")


def test_distance_facts() -> None:
    """Swapping chosen and rejected negates d; equal responses give 0 exactly; N = 1 is the single gap."""
    gaps = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [-1.0, np.nan, 0.5]])
    d = ensemble_distance(gaps)
    assert d.tolist() == [2.0, 0.0, -0.25]
    assert (ensemble_distance(-gaps) == -d).all()
    assert ensemble_distance(gaps[:, :1]).tolist() == gaps[:, 0].tolist()


def test_trimming_6000_leaves_4800() -> None:
    """The paper's figures: 10 % from either end of 6,000 pairs."""
    d = np.random.default_rng(0).normal(size=6000)
    low, high = trim_ranks(d, 0.1, 0.1)
    assert (len(low), len(high)) == (600, 600)
    assert d[low].max() <= np.delete(d, low).min()
    assert d[high].min() >= np.delete(d, high).max()
    assert [len(part) for part in trim_ranks(np.zeros(30), 0.1, 0.1)] == [3, 3]
    assert [len(part) for part in trim_ranks(np.zeros(5), 0.0, 0.0)] == [0, 0]
    low, high = trim_ranks(np.zeros(10), 0.5, 0.5)
    assert sorted([*low, *high]) == list(range(10))


def _pairs(distances: list[float]) -> Dataset:
    n = len(distances)
    return Dataset.from_dict(
        {
            "prompt": [f"p{i}" for i in range(n)],
            "chosen": [f"c{i}" for i in range(n)],
            "rejected": [f"r{i}" for i in range(n)],
            "rm_margins": [[d - 0.5, d + 0.5] for d in distances],
        }
    )


def test_planted_flips_are_in_the_bottom_decile() -> None:
    """540 clean pairs with d in 1..2, 60 flipped with d in -2..-1: the lowest tenth is exactly the flips."""
    rng = np.random.default_rng(1)
    d = rng.uniform(1, 2, 600)
    flipped = rng.permutation(600)[:60]
    d[flipped] *= -1
    context = OpContext()
    out = PreferenceDenoiseFilter(trim_high=0.1).run(_pairs(d.tolist()), context)
    assert len(out) == 480
    dropped = context.ledger.rows(action="dropped")
    assert len(dropped) == 120
    assert len(out) + len(dropped) == 600
    low = [row["value"] for row in dropped if "smallest" in row["reason"]]
    assert sorted(low) == pytest.approx(sorted(d[flipped].tolist()))


def test_actions_on_the_low_tail() -> None:
    data = _pairs([-2.0, -1.0, 0.5, 1.0, 5.0])
    flip = PreferenceDenoiseFilter(trim_low=0.4, trim_high=0.2, action="flip").run(data)
    assert list(flip["chosen"]) == ["r0", "r1", "c2", "c3"]
    assert list(flip["rejected"]) == ["c0", "c1", "r2", "r3"]
    # A low but positive distance is weak, not flipped: nothing speaks for swapping it.
    weak = PreferenceDenoiseFilter(trim_low=0.2, trim_high=0.0, action="flip").run(
        _pairs([0.1, 1.0, 2.0, 3.0, 4.0])
    )
    assert len(weak) == 4
    smooth = PreferenceDenoiseFilter(trim_low=0.2, trim_high=0.2, action="label_smooth", smoothing=0.3).run(
        data
    )
    assert list(smooth["label_smoothing"]) == [0.3, 0.0, 0.0, 0.0]
    assert list(smooth["rm_distance"]) == [-2.0, -1.0, 0.5, 1.0]
    assert len(PreferenceDenoiseFilter().run(_pairs([]).cast(data.features))) == 0


def test_sampling_asks_the_policy() -> None:
    policy = ScriptedChat(lambda m: [f"{m[-1]['content']}{i}" for i in range(5)])
    told: list[tuple[str, int, int]] = []
    context = OpContext(clients={"policy": policy}, progress=lambda *what: told.append(what))
    out = ResponseSamplingMapper().run(Dataset.from_dict({"prompt": ["a", "b"]}), context)
    assert out[1]["responses"] == ["b0", "b1", "b2", "b3", "b4"]
    chat = Dataset.from_dict({"prompt": [[{"role": "user", "content": "q"}]]})
    assert ResponseSamplingMapper().run(chat, context)[0]["responses"][0] == "q0"
    assert told == [("response_sampling_mapper", 2, 2), ("response_sampling_mapper", 1, 1)]


def judge(messages: list[dict[str, str]]) -> str:
    """Prefers the longest answer and dislikes the shortest, wherever they stand."""
    texts = re.findall(r"## 回答 \d+\n(\S*)", messages[1]["content"])
    sizes = [len(text) for text in texts]
    return json.dumps({"best": sizes.index(max(sizes)) + 1, "worst": sizes.index(min(sizes)) + 1})


def test_votes_become_pairs_whatever_the_order() -> None:
    client = ScriptedChat(judge)
    data = Dataset.from_dict({"prompt": ["q", "r"], "responses": [["aa", "a", "aaaa", "aaa", "aaaaa"]] * 2})
    context = OpContext(clients={"default": client})
    out = PreferenceVoteMapper().run(data, context)
    assert list(out["chosen"]) == ["aaaaa"] * 2
    assert list(out["rejected"]) == ["a"] * 2
    # Each voter sees an order of its own.
    assert len({request[1]["content"] for request in client.requests}) > 2
    assert PreferenceVoteMapper().roles == ("voter_1", "voter_2", "voter_3")


def test_a_voter_that_loves_the_first_place_says_nothing_together() -> None:
    first = ScriptedChat(lambda _: '{"best": 1, "worst": 2}')
    data = Dataset.from_dict(
        {"prompt": [f"q{i}" for i in range(200)], "responses": [["a", "b", "c", "d", "e"]] * 200}
    )
    out = PreferenceVoteMapper().run(data, OpContext(clients={"default": first}))
    counts = [list(out["chosen"]).count(letter) for letter in "abcde"]
    # Shuffled orders spread the first place; 200 draws of 1/5 stay below 90 but for odds under 1e-6.
    assert max(counts) < 90


def test_useless_votes_drop_the_row() -> None:
    silent = ScriptedChat(lambda _: '{"best": 9, "worst": 1}')
    context = OpContext(clients={"default": silent})
    out = PreferenceVoteMapper().run(Dataset.from_dict({"prompt": ["q"], "responses": [["a", "b"]]}), context)
    assert len(out) == 0
    assert {row["action"] for row in context.ledger.rows()} == {"flagged", "dropped"}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ensemble_distance(np.zeros(3)), r"margins must be rows x models; got shape \(3,\)"),
        (lambda: ensemble_distance(np.full((2, 2), np.nan)), "2 pairs have no margin.*score every pair"),
        (lambda: trim_ranks(np.zeros(3), 0.6, 0.6), "sum to at most 1; got 0.6 and 0.6. Write 0.1 for 10 %"),
        (lambda: PreferenceDenoiseFilter(action="fix"), "action must be drop, flip or label_smooth"),
        (lambda: PreferenceDenoiseFilter(smoothing=0.7), r"smoothing must lie in \(0, 0.5\]"),
        (lambda: ResponseSamplingMapper(num_responses=1), "num_responses must be >= 2"),
        (lambda: PreferenceVoteMapper(voters=()), "voters is empty; name at least one role"),
    ],
)
def test_wrong_use(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
