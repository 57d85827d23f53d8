"""The check of classes before the first step."""

from types import SimpleNamespace
from typing import Any

import pytest

from mm_plugins.spatialflow.hook import PanopticClassesHook


def runner(**meta: Any) -> Any:
    loader = SimpleNamespace(dataset=SimpleNamespace(metainfo=meta))
    model = SimpleNamespace(num_things_classes=2, num_stuff_classes=1)
    return SimpleNamespace(
        model=model, train_dataloader=loader, val_dataloader=loader, test_dataloader=loader
    )


@pytest.mark.parametrize("moment", ["before_train", "before_val", "before_test"])
def test_classes_of_model_and_data(moment: str) -> None:
    hook = PanopticClassesHook()
    check = getattr(hook, moment)
    check(runner(classes=("a", "b", "c"), thing_classes=("a", "b")))
    check(runner(classes=("a", "b", "c")))
    with pytest.raises(
        ValueError, match="2 thing and 1 stuff classes.*has 4 classes. Set num_things_classes"
    ):
        check(runner(classes=("a", "b", "c", "d")))
    with pytest.raises(ValueError, match="things must come before stuff"):
        check(runner(classes=("a", "b", "c"), thing_classes=("a", "c")))
    with pytest.raises(ValueError, match="Set num_things_classes=1 and num_stuff_classes=2"):
        check(runner(classes=("a", "b", "c"), thing_classes=("a",)))


def test_a_wrapped_model_is_looked_into() -> None:
    given = runner(classes=("a", "b", "c"))
    given.model = SimpleNamespace(module=given.model)
    PanopticClassesHook().before_train(given)
