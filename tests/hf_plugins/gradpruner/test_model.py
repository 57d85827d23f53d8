"""Pruning in memory and the baselines' measurements."""

import pytest
import torch
from torch import nn

from hf_plugins.decoder_layers import bypass_layers, find_decoder_layers
from hf_plugins.gradpruner import GradPrunerConfig, PruningPlan, baseline_plan, plan_pruning, prune_model
from hf_plugins.gradpruner.merging import importance_rows
from hf_plugins.gradpruner.model import mean_cosines
from tests.hf_plugins import tiny_models
from tests.hf_plugins.gradpruner import reference
from tests.hf_plugins.gradpruner.collected import with_lora
from tests.hf_plugins.gradpruner.test_storage import PLAN, random_history


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
def test_merge_changes_what_it_should(family: str) -> None:
    """Receivers follow the literal formula; norms, biases and all other layers are bit-identical."""
    model, old = tiny_models.build(family), tiny_models.build(family)
    history = random_history(model)
    prune_model(model, PLAN, history=history)
    new_layers, old_layers = find_decoder_layers(model).modules, find_decoder_layers(old).modules
    for place, number in enumerate(PLAN.kept):
        for name, parameter in new_layers[place].named_parameters():
            before = dict(old_layers[number].named_parameters())[name]
            if number != 0 or parameter.ndim != 2:
                assert torch.equal(parameter, before), (number, name)
                continue
            module = name.removesuffix(".weight")
            donors, masks = [], []
            for donor in PLAN.receivers[0]:
                donors.append(dict(old_layers[donor].named_parameters())[name].detach())
                left, right = history.factors(donor, module)
                masks.append(reference.donor_mask(importance_rows(left, right, 0, len(before)), 0.2))
            torch.testing.assert_close(
                parameter.double(), reference.merge(before.detach(), donors, masks), rtol=1e-6, atol=1e-7
            )
            assert not torch.equal(parameter, before)


def test_without_merging_kept_tensors_are_bit_identical() -> None:
    """Acceptance fact 4, last part, and fact 7 through prune_model."""
    model = tiny_models.build("llama", attn_implementation="eager")
    plan = plan_pruning([9.0, 3.0, 1.0, 2.0, 8.0, 7.0], n_prune=3, n_merge=0)
    with bypass_layers(model, plan.dropped), torch.no_grad():
        want = model(tiny_models.token_ids()).logits
    prune_model(model, plan)
    assert torch.equal(model(tiny_models.token_ids()).logits, want)


def test_adapters_must_be_unloaded_first() -> None:
    with pytest.raises(TypeError, match=r"call model.unload\(\) first"):
        prune_model(with_lora(tiny_models.build("llama")), PLAN)  # type: ignore[arg-type]


def test_plan_and_history_must_fit() -> None:
    with pytest.raises(ValueError, match="needs their gradient factors"):
        prune_model(tiny_models.build("llama"), PLAN)
    with pytest.raises(ValueError, match="score this very model first"):
        prune_model(tiny_models.build("llama", 4), PLAN)


def test_quantised_weights_are_refused() -> None:
    model = tiny_models.build("llama")
    history = random_history(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="Load the model unquantised"):
        prune_model(model, PLAN, history=history)


def test_orphans_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_plugins.gradpruner.model.logger.warning", told.append)
    model = tiny_models.build("llama")
    plan = PruningPlan(num_layers=6, dropped=(0, 2), merged=((2, 1),))
    prune_model(model, plan, history=random_history(model, plan))
    assert told == ["layers [0] have no kept layer before them and are dropped without merging."]


# ------------------------------------------------------------------ baselines


def batches() -> list[dict[str, torch.Tensor]]:
    ids = tiny_models.token_ids(4)
    mask = torch.ones_like(ids)
    mask[2:, 7:] = 0
    return [
        {"input_ids": ids[:2], "attention_mask": mask[:2]},
        {"input_ids": ids[2:], "attention_mask": mask[2:]},
    ]


@torch.no_grad()
def test_mean_cosines_against_hidden_states() -> None:
    """Over real tokens only: 2 x 12 and 2 x 7 of them."""
    model = tiny_models.build("bert")
    total, count = torch.zeros(6, dtype=torch.float64), 0
    for batch in batches():
        states = model(**batch, output_hidden_states=True).hidden_states
        for i in range(6):
            cosine = torch.nn.functional.cosine_similarity(states[i], states[i + 1], dim=-1)
            total[i] += cosine[batch["attention_mask"].bool()].sum()
        count += int(batch["attention_mask"].sum())
    assert count == 38
    assert mean_cosines(model, batches()) == pytest.approx((total / count).tolist(), rel=1e-5)


def test_a_layer_that_does_nothing_goes_first() -> None:
    """Block influence 0: output projections of layer 2 are zero, so it hands on what it gets."""
    model = tiny_models.build("llama")
    model.model.layers[2].self_attn.o_proj.weight.data.zero_()
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    plan = baseline_plan(model, GradPrunerConfig(method="block_influence", n_prune=1), batches())
    assert plan.dropped == (2,)
    assert plan.method == "block_influence"
    assert plan.scores[2] == pytest.approx(0, abs=1e-6)


def test_light_layers_go_by_magnitude() -> None:
    model = tiny_models.build("llama")
    for parameter in model.model.layers[3].parameters():
        parameter.data.mul_(0.5)
    assert baseline_plan(model, GradPrunerConfig(method="magnitude", n_prune=1)).dropped == (3,)


def test_order_baselines() -> None:
    model = tiny_models.build("llama")
    assert baseline_plan(model, GradPrunerConfig(method="reverse", n_prune=2)).dropped == (3, 4)
    plans = {
        baseline_plan(model, GradPrunerConfig(method="random", n_prune=2, plan_seed=s)).dropped
        for s in range(20)
    }
    assert len(plans) > 3
    again = [
        baseline_plan(model, GradPrunerConfig(method="random", n_prune=2, plan_seed=5)) for _ in range(2)
    ]
    assert again[0] == again[1]


def test_laco_collapses_what_changes_least_and_leaves_the_model_as_it_was() -> None:
    """With one donor R + (D - R) is D, so collapsing 3 into 2 loses layer 2 alone, which does nothing
    here."""
    model = tiny_models.build("llama")
    model.model.layers[2].self_attn.o_proj.weight.data.zero_()
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = baseline_plan(model, GradPrunerConfig(method="laco", n_prune=1), batches())
    assert plan.merged == ((3, 2),)
    assert plan.rule == "difference"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prune_model(model, plan)
    assert model.config.num_hidden_layers == 5


def test_baselines_say_what_they_need() -> None:
    model = tiny_models.build("llama")
    with pytest.raises(ValueError, match="give calibration batches"):
        baseline_plan(model, GradPrunerConfig(method="laco", n_prune=1))
    with pytest.raises(ValueError, match="plans from gradients: use GradPrunerCallback"):
        baseline_plan(model, GradPrunerConfig(n_prune=1))
