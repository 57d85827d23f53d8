"""Distillation as a hook: the model's config stays as it is."""

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mm_plugins.pkd.detector import Distiller, PKDMixin, check_keys, distilled_class


@HOOKS.register_module()
class PKDHook(Hook):
    """Turns the Runner's detector into a distilled one when training starts.

    In a config: ``custom_hooks = [dict(type="PKDHook", distill=dict(teacher=..., teacher_ckpt=...))]``.
    No adapters and no inheriting: the optimizer, DDP and the weights exist before the hook runs.

    Args:
        distill: Options of `Distiller`, without ``adapt`` and ``inherit``.

    Raises:
        ValueError: If `distill` asks for ``adapt`` or ``inherit``; at the start of training, if the model
            distils already or the Runner has no config.
        TypeError: If it holds an unknown option.
    """

    def __init__(self, distill: Mapping[str, Any]) -> None:
        check_keys(distill, Distiller, "distill")
        for name in ("adapt", "inherit"):
            if distill.get(name):
                raise ValueError(
                    f"PKDHook: distill.{name}={distill[name]!r} needs the model before the optimizer is "
                    "built. Use model=dict(type='PKDDetector', ...) instead of the hook."
                )
        self.distill = dict(distill)

    def before_train(self, runner: Runner) -> None:
        """Attach the distiller and load the teacher."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if isinstance(model, PKDMixin):
            raise ValueError(
                f"PKDHook found a {type(model).__name__}, which distils already. Remove the hook, or set "
                "model.type to the student's own class."
            )
        student = runner.cfg.get("model")
        if student is None:
            raise ValueError(
                "PKDHook reads channels and input format from the config, and this Runner has none. "
                "Build it with Runner.from_cfg(config)."
            )
        distiller = Distiller(**self.distill, student=student)
        model.__class__ = distilled_class(type(model))
        model.pkd = distiller
        distiller.prepare(model)
