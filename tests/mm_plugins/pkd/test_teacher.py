"""A frozen teacher, and what is said of weights that do not fit it."""

from collections import OrderedDict

import torch
import torch.nn as nn
from torch import Tensor

from mm_plugins.pkd.teacher import FrozenTeacher, fingerprint, key_problems, part_of


class Stages(nn.Module):
    """Two maps, with a norm and a dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.drop(self.norm(self.conv(x)))
        return [x, x[:, :, ::2, ::2]]


def test_eval_mode_is_whole_and_official_mode_keeps_dropout() -> None:
    """Fact 9: with ``eval`` two passes are bit-equal; ``official`` freezes the norms only."""
    x = torch.rand(2, 3, 8, 8)
    teacher = FrozenTeacher(Stages(), None)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(teacher(x), teacher(x), strict=True))
    official = FrozenTeacher(Stages(), None, mode="official")
    assert official.backbone.drop.training
    assert not official.backbone.norm.training
    assert not torch.equal(official(x)[0], official(x)[0])


def test_neck_sees_the_maps_of_the_backbone() -> None:
    class Double(nn.Module):
        def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
            return tuple(2 * x for x in maps)

    x, stages = torch.rand(1, 3, 4, 4), Stages()
    plain, doubled = FrozenTeacher(stages, None)(x), FrozenTeacher(stages, Double())(x)
    assert all(torch.equal(2 * a, b) for a, b in zip(plain, doubled, strict=True))


def test_key_problems_names_kind_number_and_examples() -> None:
    """Missing, mis-shaped and surplus keys each make a teacher another network; none passes silently."""
    teacher = FrozenTeacher(Stages(), None)
    fits = {name: value + 1 for name, value in teacher.state_dict().items()}
    assert key_problems(teacher, fits) == []
    assert torch.equal(teacher.backbone.conv.weight, fits["backbone.conv.weight"])
    lacks = {name: value for name, value in fits.items() if "conv" not in name}
    assert key_problems(teacher, lacks) == ["2 missing (backbone.conv.weight; backbone.conv.bias)"]
    surplus = fits | {f"backbone.layer4.{i}.weight": torch.zeros(1) for i in range(5)}
    (line,) = key_problems(teacher, surplus)
    assert line.startswith("5 not in the model (backbone.layer4.0.weight; ")
    assert line.endswith("...)")
    wrong = fits | {"backbone.conv.weight": torch.zeros(8, 3, 1, 1), "backbone.other": torch.zeros(1)}
    assert key_problems(teacher, wrong) == [
        "1 of another shape (backbone.conv.weight is (8, 3, 1, 1), needs (4, 3, 1, 1))",
        "1 not in the model (backbone.other)",
    ]


def test_batch_counters_may_be_missing() -> None:
    """Checkpoints older than PyTorch 0.4.1 have none, and they do not matter in eval mode."""
    teacher = FrozenTeacher(Stages(), None)
    old = {name: value for name, value in teacher.state_dict().items() if "num_batches" not in name}
    assert key_problems(teacher, old) == []


def test_part_of_keeps_the_versions_of_modules() -> None:
    state = OrderedDict(
        {"backbone.a": torch.zeros(1), "bbox_head.b": torch.zeros(1), "neck.c": torch.zeros(1)}
    )
    state._metadata = {"backbone": {"version": 2}}  # type: ignore[attr-defined]
    part = part_of(state, ("backbone.", "neck."))
    assert list(part) == ["backbone.a", "neck.c"]
    assert part._metadata == {"backbone": {"version": 2}}  # type: ignore[attr-defined]
    assert list(part_of({"neck.c": torch.zeros(1)}, ("neck.",))) == ["neck.c"]


def test_fingerprint_follows_the_weights_only() -> None:
    torch.manual_seed(0)
    one, other = FrozenTeacher(Stages(), None), FrozenTeacher(Stages(), None)
    assert fingerprint(one) != fingerprint(other)
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(other)
    other.backbone.norm.running_mean[0] += 1e-6
    assert fingerprint(one) != fingerprint(other)
