import random

import pytest

from hf_plugins.dpf_cm.chained_examples import Example, chained_prompt, draw_graded, ranked

SEEDS = [
    Example("b", "问二", "指令二", 0.5),
    Example("a", "问一", "指令一", 0.3),
    Example("c", "问三", "指令三", 0.9),
]


def test_chain_rises_and_ends_with_the_best() -> None:
    scores = [example.score for example in ranked(SEEDS)]
    assert scores == sorted(scores)
    assert ranked(SEEDS)[-1].id == "c"
    system, user = chained_prompt(SEEDS, "新问题")
    text = user["content"]
    places = [
        text.index(part) for part in ("指令一", "参考上面的示例", "指令二", "参考上面的生成过程", "指令三")
    ]
    assert places == sorted(places)
    # E_1 + instruct + E_2 + instruct* + E_3 + instruct* + question.
    assert text.count("参考上面的示例") == 1
    assert text.count("参考上面的生成过程") == 2
    assert text.rstrip().endswith("问题：新问题\n指令：")
    assert "依次提高" in system["content"]


def test_order_of_the_input_does_not_matter() -> None:
    tied = [Example("z", "q", "i", 0.5), Example("y", "q", "i2", 0.5), *SEEDS]
    expected = chained_prompt(tied, "新")
    for seed in range(5):
        shuffled = random.Random(seed).sample(tied, len(tied))
        assert chained_prompt(shuffled, "新") == expected


def test_reversed_only_on_demand() -> None:
    text = chained_prompt(SEEDS, "新", order="desc")[1]["content"]
    assert text.index("指令三") < text.index("指令二") < text.index("指令一")


def test_plain_few_shot_has_one_request() -> None:
    system, user = chained_prompt(SEEDS, "新", order="asc")
    assert user["content"].count("参考上面的示例") == 1
    assert "生成过程" not in user["content"]
    assert "依次提高" not in system["content"]


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_one_example_is_one_shot_in_every_order(lang: str) -> None:
    prompts = [chained_prompt(SEEDS[:1], "q", lang=lang, order=order) for order in ("chain", "asc", "desc")]
    assert prompts[0] == prompts[1] == prompts[2]


def test_nothing_to_chain() -> None:
    with pytest.raises(ValueError, match="needs at least one example; give scored"):
        chained_prompt([], "q")


def test_graded_draw_is_strictly_rising_and_ignores_order() -> None:
    pool = [Example(f"{i:03}", f"q{i}", f"i{i}", (i % 10) / 10) for i in range(200)]
    draws = {tuple(e.id for e in draw_graded(pool, 3, random.Random(s))) for s in range(20)}
    assert len(draws) > 10
    for seed in range(20):
        drawn = draw_graded(pool, 3, random.Random(seed))
        assert [e.score for e in drawn] == sorted({e.score for e in drawn})
        assert drawn == draw_graded(pool[::-1], 3, random.Random(seed))
        # Ten levels in thirds: 0-.2, .3-.5, .6-.9.
        assert drawn[0].score <= 0.2
        assert 0.3 <= drawn[1].score <= 0.5
        assert drawn[2].score >= 0.6


def test_tied_seeds_cannot_be_graded() -> None:
    with pytest.raises(
        ValueError, match=r"pool has 1 distinct scores; lower num_examples or score more seeds"
    ):
        draw_graded([Example("a", "q", "i", 0.5)] * 3, 2, random.Random(0))
