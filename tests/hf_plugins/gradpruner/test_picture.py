"""The picture of scores and plan."""

from xml.etree import ElementTree

from hf_plugins.gradpruner.picture import COLOURS, scores_svg
from hf_plugins.gradpruner.plan import PruningPlan, plan_pruning


def bars(plan: PruningPlan) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(scores_svg(plan))
    found = root.findall("{http://www.w3.org/2000/svg}rect")
    return [bar for bar in found if len(bar)]


def test_one_bar_a_layer_in_the_colour_of_its_fate() -> None:
    plan = plan_pruning([8.0, 1.0, 2.0, 4.0], n_prune=2, n_merge=1)
    fates = [bar.get("fill") for bar in bars(plan)]
    assert fates == [COLOURS[fate] for fate in ("kept", "dropped", "merged", "kept")]
    heights = [float(str(bar.get("height"))) for bar in bars(plan)]
    assert heights[0] > heights[3] > heights[2] > heights[1] > 0


def test_plans_without_scores_or_with_zeros_are_drawn() -> None:
    assert len(bars(PruningPlan(num_layers=3, dropped=(1,)))) == 3
    assert len(bars(PruningPlan(num_layers=2, dropped=(1,), scores=(0.0, 0.0)))) == 2
    assert len(bars(PruningPlan(num_layers=2, dropped=(1,), scores=(0.0, 2.0)))) == 2
