"""A look at model and data before the first step: do they mean the same classes?"""

from typing import Any

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mm_plugins.spatialflow.annotations import check_things_first


@HOOKS.register_module()
class PanopticClassesHook(Hook):
    """Refuse to start when the data's classes are not the model's: ``custom_hooks=[dict(type=...)]``.

    Works for every panoptic model of mmdet that has ``num_things_classes`` and ``num_stuff_classes``.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the training set."""
        self._check(runner, runner.train_dataloader, "train_dataloader")

    def before_val(self, runner: Runner) -> None:
        """Check the validation set."""
        self._check(runner, runner.val_dataloader, "val_dataloader")

    def before_test(self, runner: Runner) -> None:
        """Check the test set."""
        self._check(runner, runner.test_dataloader, "test_dataloader")

    @staticmethod
    def _check(runner: Runner, loader: Any, name: str) -> None:
        model = getattr(runner.model, "module", runner.model)
        meta = loader.dataset.metainfo
        classes = list(meta["classes"])
        counts = (model.num_things_classes, model.num_stuff_classes)
        if sum(counts) != len(classes):
            raise ValueError(
                f"the model has {counts[0]} thing and {counts[1]} stuff classes, {name} has {len(classes)} "
                "classes. Set num_things_classes and num_stuff_classes of all heads, and the box and mask "
                "heads' num_classes, to those of metainfo."
            )
        if "thing_classes" in meta:
            things = [cls in set(meta["thing_classes"]) for cls in classes]
            found = check_things_first(classes, things, f"{name}: metainfo['classes']")
            if found != counts[0]:
                raise ValueError(
                    f"{name} has {found} thing classes, the model {counts[0]}. Set "
                    f"num_things_classes={found} and num_stuff_classes={len(classes) - found}."
                )
