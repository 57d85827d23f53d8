"""Any mmdet detector as the student of a frozen teacher: same config, same checkpoint, one more `distill`
block."""

import difflib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn as nn
from mmdet.models.detectors import BaseDetector, SemiBaseDetector
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.logging import MessageHub, print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from mm_plugins.pkd.loss import ImitationLoss, PKDLoss
from mm_plugins.pkd.model_config import input_format, is_two_stage, level_channels, num_levels
from mm_plugins.pkd.pairing import Size, check_levels, pair_by_index, pair_by_stride
from mm_plugins.pkd.preprocess import remap_images, valid_positions
from mm_plugins.pkd.report import InspectReport, LevelPlan
from mm_plugins.pkd.teacher import PARTS, FrozenTeacher, TeacherMode, fingerprint, key_problems, part_of

Pairing = Literal["index", "stride"]
AMP_DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
DIGEST_KEY = "pkd/teacher_sha256"
ADAPTERS = "pkd_adapters"

WEIGHT_TWO_STAGE: float = 6.0
"""Loss weight per level that the authors' configs use with a two-stage teacher."""

WEIGHT_ONE_STAGE: float = 10.0
"""The same with a one-stage teacher."""


def teacher_model_config(teacher: str | Path | Mapping[str, Any]) -> ConfigDict:
    """The ``model`` part of a teacher's config.

    Args:
        teacher: ``mmdet::folder/name.py`` from the installed wheel, the path of a config file, a whole config
            as a dict, or its ``model`` dict.

    Returns:
        Model config with ``backbone``, and ``data_preprocessor`` if the config has one.

    Raises:
        FileNotFoundError: If the config does not exist.
        ValueError: If it holds no detector with a backbone.
        TypeError: If it is something else.
    """
    if isinstance(teacher, (str, Path)):
        config = _read_config(str(teacher))
    elif isinstance(teacher, Mapping):
        config = Config(dict(teacher))
    else:
        raise TypeError(
            f"distill.teacher must be a config name, a path or a dict; got {type(teacher).__name__}. "
            "Example: distill.teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'."
        )
    model = config.get("model", config)
    if "backbone" not in model:
        raise ValueError(
            f"distill.teacher has no model.backbone; its keys are {sorted(model)}. Give the config of a "
            "plain detector; of a wrapper such as SoftTeacher, the part under `detector`."
        )
    model = ConfigDict({key: value for key, value in model.items()})
    if config.get("data_preprocessor") is not None:
        model.setdefault("data_preprocessor", config.data_preprocessor)
    return model


def _read_config(name: str) -> Config:
    if "::" in name:
        try:
            return get_config(name)
        except (FileNotFoundError, OSError, ValueError) as error:
            raise FileNotFoundError(
                f"distill.teacher={name!r} is not among the configs of the installed package. List them: "
                "`ls $(python -c 'import mmdet; print(mmdet.__path__[0])')/.mim/configs`."
            ) from error
    if not Path(name).is_file():
        raise FileNotFoundError(
            f"distill.teacher={name!r} is no file in {Path.cwd()}. Give an absolute path, or "
            "'mmdet::folder/name.py' for a config of the installed mmdet."
        )
    return Config.fromfile(name)


def read_weights(path: str) -> dict[str, Tensor]:
    """The state dict of a detector's checkpoint, on the CPU.

    Args:
        path: File or address that mmengine can load.

    Returns:
        Parameters and buffers by name, with torch's version metadata if it was saved.

    Raises:
        FileNotFoundError: If a local file does not exist.
    """
    if "://" not in path and not Path(path).is_file():
        raise FileNotFoundError(
            f"distill.teacher_ckpt={path!r} does not exist. Training needs it (testing does not): give the "
            "path with --cfg-options model.distill.teacher_ckpt=PATH."
        )
    checkpoint = CheckpointLoader.load_checkpoint(path, map_location="cpu", logger="current")
    return checkpoint.get("state_dict", checkpoint)


def build_teacher(model: Mapping[str, Any], *, mode: TeacherMode = "eval") -> FrozenTeacher:
    """Backbone and neck of a detector's config, with random weights, on the CPU.

    Args:
        model: Model config of the teacher.
        mode: See `TeacherMode`.

    Returns:
        The frozen teacher; torch's random numbers are left as they were.
    """
    # The teacher's random initial values must not move the student's random numbers.
    with torch.random.fork_rng(devices=[]):
        neck = MODELS.build(model["neck"]) if model.get("neck") is not None else None
        return FrozenTeacher(MODELS.build(model["backbone"]), neck, mode=mode)


def load_teacher(
    model: Mapping[str, Any], path: str | None, *, mode: TeacherMode = "eval"
) -> tuple[FrozenTeacher, str]:
    """Build and load a teacher.

    Args:
        model: Model config of the teacher.
        path: Its checkpoint.
        mode: See `TeacherMode`.

    Returns:
        The frozen teacher on the CPU and the SHA-256 of its weights.

    Raises:
        ValueError: If no checkpoint is named, or it does not fit the config in every backbone and neck key.
        FileNotFoundError: If the checkpoint does not exist.
    """
    if not path:
        raise ValueError(
            "distill.teacher_ckpt is not set; an untrained teacher teaches noise. "
            "Give it with --cfg-options model.distill.teacher_ckpt=PATH."
        )
    weights = part_of(read_weights(path), PARTS)
    teacher = build_teacher(model, mode=mode)
    problems = key_problems(teacher, weights)
    if problems:
        raise ValueError(
            f"distill.teacher_ckpt={path!r} does not fit distill.teacher: of {len(teacher.state_dict())} "
            f"backbone and neck keys: {', '.join(problems)}. Use the checkpoint that was trained with this "
            "config, or the config stored in the checkpoint (its meta.cfg)."
        )
    digest = fingerprint(teacher)
    print_log(
        f"PKD teacher: {path}, sha256 of its weights {digest[:16]}", logger="current", level=logging.INFO
    )
    return teacher, digest


class Distiller:
    """All that a student needs to learn from a teacher; the content of ``model.distill`` in a config.

    It is no module and copies as itself: the teacher is in no state dict, optimizer, DDP bucket or EMA copy.

    Args:
        teacher: Config of the teacher: ``mmdet::folder/name.py``, a path, or a dict.
        teacher_ckpt: Its checkpoint; needed for training only.
        levels: Which outputs of the student's neck distil.
        pairing: ``index``: level i learns from level i (the authors' choice; sizes that differ are resized).
            ``stride``: levels of equal stride are paired.
        loss: Config of the loss; ``dict(type="PKDLoss")`` by default. Without ``loss_weight``, PKDLoss gets 6
            for a two-stage and 10 for a one-stage teacher, per level.
        adapt: ``conv1x1``: a bias-free 1x1 convolution on student levels whose channels differ from the
            teacher's.
        teacher_mode: ``eval``, or ``official``: dropout and drop path stay active, as in the authors'
            release.
        teacher_amp: ``fp16`` or ``bf16`` runs the teacher in that precision, None in fp32.
        valid_mask: Leave positions on padding out of the statistics.
        inherit: Parts of the student that start from the teacher's weights, such as ``("neck",
            "bbox_head")``.
        stop_epoch: Distil in epochs ``0 .. stop_epoch - 1`` only, then free the teacher.
        stop_iter: Distil in iterations ``0 .. stop_iter - 1`` only.
        student: Filled in by PKDDetector and PKDHook: the model config of the student.

    Raises:
        ValueError: If a value or a pair of models does not fit; all checks that need no checkpoint happen
            here.
        TypeError: If the type of a value does not fit.
        FileNotFoundError: If the teacher's config does not exist.
    """

    def __init__(
        self,
        teacher: str | Path | Mapping[str, Any],
        teacher_ckpt: str | None = None,
        *,
        levels: Sequence[int] = (0, 1, 2, 3),
        pairing: Pairing = "index",
        loss: Mapping[str, Any] | None = None,
        adapt: Literal["conv1x1"] | None = None,
        teacher_mode: TeacherMode = "eval",
        teacher_amp: Literal["fp16", "bf16"] | None = None,
        valid_mask: bool = False,
        inherit: Sequence[str] = (),
        stop_epoch: int | None = None,
        stop_iter: int | None = None,
        student: Mapping[str, Any],
    ) -> None:
        _check_choice("pairing", pairing, get_args(Pairing))
        _check_choice("adapt", adapt, (None, "conv1x1"))
        _check_choice("teacher_mode", teacher_mode, get_args(TeacherMode))
        _check_choice("teacher_amp", teacher_amp, (None, *AMP_DTYPES))
        for name, value in (("stop_epoch", stop_epoch), ("stop_iter", stop_iter)):
            if value is not None and value < 1:
                raise ValueError(
                    f"distill.{name} must be at least 1; got {value}. It counts distilled "
                    f"{name.removeprefix('stop_')}s from the start; leave it out to distil to the end."
                )
        self.levels = tuple(levels)
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise ValueError(
                f"distill.levels must name at least one level and none twice; got {self.levels}. "
                "The authors use (0, 1, 2, 3)."
            )
        self.teacher_model = teacher_model_config(teacher)
        self.teacher_ckpt, self.pairing, self.valid_mask = teacher_ckpt, pairing, valid_mask
        self.teacher_mode: TeacherMode = teacher_mode
        self.teacher_amp, self.inherit = teacher_amp, tuple(inherit)
        self.stop_epoch, self.stop_iter = stop_epoch, stop_iter
        self.source, self.target = input_format(student), input_format(self.teacher_model)
        for whose, model in (("student", student), ("teacher", self.teacher_model)):
            known = num_levels(model)
            if known is not None and (pairing == "index" or whose == "student"):
                check_levels(self.levels, known, whose)
        self.adapted = self._plan_adapters(student, adapt)
        self.loss = self._build_loss(dict(loss or {}))
        self.teacher: FrozenTeacher | None = None
        self._digest: str | None = None

    def __deepcopy__(self, memo: dict) -> "Distiller":
        return self

    def _plan_adapters(self, student: Mapping[str, Any], adapt: str | None) -> dict[int, tuple[int, int]]:
        """Student level -> (student channels, teacher channels), where the two differ."""
        ours, theirs = level_channels(student), level_channels(self.teacher_model)
        if ours is None or theirs is None:
            if adapt is not None:
                whose = "student" if ours is None else "teacher"
                raise ValueError(
                    f"distill.adapt={adapt!r} needs the channels of both necks, but the {whose}'s config "
                    "has no neck.out_channels. Give it a neck that states them, such as ChannelMapper."
                )
            return {}
        if self.pairing == "stride" and not (isinstance(ours, int) and isinstance(theirs, int)):
            raise ValueError(
                f"distill.pairing='stride' needs one channel count for all levels; got {ours} (student) and "
                f"{theirs} (teacher). Use pairing='index'."
            )
        differ = {}
        for level in self.levels:
            pair = (_at(ours, level, "student"), _at(theirs, level, "teacher"))
            if pair[0] != pair[1]:
                differ[level] = pair
        if differ and adapt is None:
            level, (num_student, num_teacher) = next(iter(differ.items()))
            raise ValueError(
                f"level {level}: the student's neck gives {num_student} channels, the teacher's "
                f"{num_teacher}; PKD compares equal channels. Set distill.adapt='conv1x1', or "
                f"neck.out_channels={num_teacher} in the student's config."
            )
        if adapt is not None and not differ:
            print_log(
                f"distill.adapt={adapt!r} adds nothing: student and teacher have equal channels. Leave it "
                "out.",
                logger="current",
                level=logging.WARNING,
            )
        return differ

    def _build_loss(self, cfg: dict[str, Any]) -> ImitationLoss:
        cfg.setdefault("type", "PKDLoss")
        kind = MODELS.get(cfg["type"]) if isinstance(cfg["type"], str) else cfg["type"]
        if not (isinstance(kind, type) and issubclass(kind, ImitationLoss)):
            raise ValueError(
                f"distill.loss.type={cfg['type']!r} is no loss between feature pyramids. "
                "Use 'PKDLoss', or 'PlainMSELoss' for a control run."
            )
        check_keys({key: value for key, value in cfg.items() if key != "type"}, kind, "distill.loss")
        if "loss_weight" not in cfg:
            if not issubclass(kind, PKDLoss):
                raise ValueError(
                    f"distill.loss.loss_weight is not set; {kind.__name__} has no rule for it, as it depends "
                    "on the scale of the features. Set it so that the loss starts near the detection loss."
                )
            two_stage = is_two_stage(self.teacher_model)
            cfg["loss_weight"] = WEIGHT_TWO_STAGE if two_stage else WEIGHT_ONE_STAGE
            print_log(
                f"PKD: loss_weight={cfg['loss_weight']} per level, the authors' value for a "
                f"{'two' if two_stage else 'one'}-stage teacher; set distill.loss.loss_weight to change it",
                logger="current",
                level=logging.INFO,
            )
        return MODELS.build(cfg)

    def build_adapters(self) -> nn.ModuleDict:
        """Bias-free 1x1 convolutions for the levels whose channels differ, by the student's level.

        A bias would be removed by the standardisation, and a zero start would be a dead channel: torch's
        default initialisation (Kaiming, uniform) stays.
        """
        return nn.ModuleDict(
            {
                str(level): nn.Conv2d(num_student, num_teacher, kernel_size=1, bias=False)
                for level, (num_student, num_teacher) in self.adapted.items()
            }
        )

    def prepare(self, student: BaseDetector) -> None:
        """Load what training needs, so that a wrong path fails before the first iteration."""
        if self.inherit:
            self._inherit(student)
        self._ready_teacher(torch.device("cpu"))

    def _inherit(self, student: BaseDetector) -> None:
        weights = read_weights(self.teacher_ckpt or "")
        for name in self.inherit:
            part = getattr(student, name, None)
            if not isinstance(part, nn.Module):
                have = [child for child, _ in student.named_children()]
                raise ValueError(
                    f"distill.inherit names {name!r}, which the student does not have; it has "
                    f"{', '.join(have)}.{did_you_mean(name, have)}"
                )
            # The part under its own name, so that the checkpoint's names fit.
            problems = key_problems(nn.ModuleDict({name: part}), part_of(weights, [f"{name}."]))
            if problems:
                raise ValueError(
                    f"distill.inherit: the teacher's {name} does not fit the student's: "
                    f"{', '.join(problems)}. Leave {name!r} out of distill.inherit, or use the teacher's "
                    "configuration of it."
                )

    def _ready_teacher(self, device: torch.device) -> FrozenTeacher:
        if self.teacher is None:
            self.teacher, self._digest = load_teacher(
                self.teacher_model, self.teacher_ckpt, mode=self.teacher_mode
            )
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        return self.teacher

    def _record_digest(self) -> None:
        """Note which weights taught, in the checkpoint's message hub; warn if a resumed run had others."""
        if self._digest is None:
            return
        hub = MessageHub.get_current_instance()
        before = hub.get_info(DIGEST_KEY)
        if before is not None and before != self._digest:
            print_log(
                f"the teacher's weights are not those this run began with (sha256 {before[:16]}, now "
                f"{self._digest[:16]}). Resume with the same distill.teacher_ckpt, or start a new run.",
                logger="current",
                level=logging.WARNING,
            )
        hub.update_info(DIGEST_KEY, self._digest)
        self._digest = None

    @staticmethod
    def _adapters_of(student: nn.Module) -> nn.ModuleDict:
        adapters = dict(student.named_children()).get(ADAPTERS)
        return adapters if isinstance(adapters, nn.ModuleDict) else nn.ModuleDict()

    def stopped(self) -> bool:
        """Whether ``stop_epoch`` or ``stop_iter`` has been reached by the Runner that is running."""
        if self.stop_epoch is None and self.stop_iter is None:
            return False
        hub = MessageHub.get_current_instance()
        return any(
            limit is not None and (hub.get_info(name) or 0) >= limit
            for name, limit in (("epoch", self.stop_epoch), ("iter", self.stop_iter))
        )

    @torch.no_grad()
    def teacher_maps(self, images: Tensor, image_sizes: Sequence[Size]) -> tuple[Tensor, ...]:
        """The teacher's maps of a batch that the student's preprocessor made.

        Args:
            images: Batch (N, C, H, W).
            image_sizes: (H, W) of each image without padding.

        Returns:
            Maps of all levels of the teacher's neck.
        """
        teacher = self._ready_teacher(images.device)
        with torch.autocast(images.device.type, enabled=False):
            images = remap_images(images.float(), self.source, self.target, image_sizes)
        with torch.autocast(
            images.device.type,
            dtype=AMP_DTYPES.get(self.teacher_amp or ""),
            enabled=self.teacher_amp is not None,
        ):
            return teacher(images)

    def losses(
        self,
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
        adapters: nn.ModuleDict,
        input_size: Size,
        image_sizes: Sequence[Size],
    ) -> dict[str, Tensor]:
        """Loss and signals of health of each level.

        Args:
            student_maps: All maps of the student's neck.
            teacher_maps: All maps of the teacher's neck.
            adapters: From `build_adapters`, by student level.
            input_size: Padded (H, W) of the batch.
            image_sizes: (H, W) of each image without padding.

        Returns:
            ``loss_pkd_<level>``, which the host sums, and ``pkd/r_<level>`` and ``pkd/dead_channels``, which
            it logs.
        """
        pairs = self.pairs(student_maps, teacher_maps)
        ours = [
            adapters[str(i)](student_maps[i]) if str(i) in adapters else student_maps[i] for i, _ in pairs
        ]
        theirs = [teacher_maps[j] for _, j in pairs]
        valid = None
        if self.valid_mask:
            sizes = theirs if self.loss.resize_stu else ours
            valid = [
                valid_positions(image_sizes, input_size, (x.shape[2], x.shape[3]), device=x.device)
                for x in sizes
            ]
        names = [f"student level {i} / teacher level {j}" for i, j in pairs]
        results = self.loss.levels(ours, theirs, names=names, valid=valid)
        losses = {f"loss_pkd_{i}": result.loss for (i, _), result in zip(pairs, results, strict=True)}
        losses |= {f"pkd/r_{i}": result.correlation for (i, _), result in zip(pairs, results, strict=True)}
        return losses | {"pkd/dead_channels": torch.stack([result.num_dead for result in results]).sum()}

    def pairs(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Which student level learns from which teacher level, given the maps of all levels."""
        if self.pairing == "index":
            return pair_by_index(self.levels, len(student_maps), len(teacher_maps))
        return pair_by_stride(
            self.levels,
            [(x.shape[2], x.shape[3]) for x in student_maps],
            [(x.shape[2], x.shape[3]) for x in teacher_maps],
        )

    def step(
        self, student: BaseDetector, images: Tensor, data_samples: Sequence[Any], detect: Callable[..., dict]
    ) -> dict[str, Any]:
        """One training forward: the student's own losses and those of distillation.

        Args:
            student: The detector that learns.
            images: Preprocessed batch (N, C, H, W).
            data_samples: Its mmdet data samples; ``img_shape`` is read.
            detect: The student's own ``loss``.

        Returns:
            The dict for the host's ``parse_losses``.
        """
        adapters = self._adapters_of(student)
        if self.stopped():
            if self.teacher is not None:
                print_log("PKD: distillation ends here, the teacher is freed", logger="current")
            self.teacher = None
            losses = detect(images, data_samples)
            # DDP waits for a gradient of every parameter.
            idle = {f"loss_pkd_{i}": 0 * sum(p.sum() for p in a.parameters()) for i, a in adapters.items()}
            return losses | idle
        image_sizes = [tuple(sample.metainfo["img_shape"][:2]) for sample in data_samples]
        teacher_maps = self.teacher_maps(images, image_sizes)
        self._record_digest()
        with recorded_maps(student) as calls:
            losses = detect(images, data_samples)
        if len(calls) != 1:
            raise RuntimeError(
                f"{type(student).__name__} ran its neck {len(calls)} times in one loss(); PKD needs exactly "
                "one pass over the batch. Distil a detector whose loss() calls extract_feat once."
            )
        return losses | self.losses(
            calls[0], teacher_maps, adapters, (images.shape[2], images.shape[3]), image_sizes
        )


def _at(channels: int | tuple[int, ...], level: int, whose: str) -> int:
    if isinstance(channels, int):
        return channels
    check_levels([level], len(channels), whose)
    return channels[level]


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(
            f"distill.{name} must be one of {', '.join(map(repr, choices))}; got {value!r}."
            f"{did_you_mean(str(value), [choice for choice in choices if isinstance(choice, str)])}"
        )


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """`` Did you mean 'x'?`` if a known word is near, else an empty string."""
    near = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_keys(options: Mapping[str, Any], target: Callable, where: str) -> None:
    """Refuse keys that a callable does not take.

    Args:
        options: Keys and values from a config.
        target: What they will be passed to.
        where: Name of the config block, for the message.

    Raises:
        TypeError: If a key is unknown; names the nearest one.
    """
    known = [name for name in inspect.signature(target).parameters if name != "student"]
    for key in options:
        if key not in known:
            raise TypeError(
                f"{where} has no option {key!r}; it has {', '.join(known)}.{did_you_mean(key, known)}"
            )


@contextmanager
def recorded_maps(student: BaseDetector) -> Iterator[list[tuple[Tensor, ...]]]:
    """Collects what the neck (the backbone where there is no neck) gives while the block runs."""
    calls: list[tuple[Tensor, ...]] = []
    tap: nn.Module = student.neck if student.with_neck else student.backbone
    handle = tap.register_forward_hook(lambda _module, _args, maps: calls.append(tuple(maps)))
    try:
        yield calls
    finally:
        handle.remove()


class PKDMixin:
    """Puts distillation into a detector's ``init_weights`` and ``loss``; nothing else of it changes."""

    pkd: Distiller

    def init_weights(self) -> None:
        """Initialise the student, then load the teacher. The Runner calls this for training only."""
        super().init_weights()  # type: ignore[misc]
        self.pkd.prepare(self)  # type: ignore[arg-type]

    def loss(self, batch_inputs: Tensor, batch_data_samples: Sequence[Any]) -> dict[str, Any]:
        """The detector's losses plus ``loss_pkd_<level>``."""
        return self.pkd.step(self, batch_inputs, batch_data_samples, super().loss)  # type: ignore


_CLASSES: dict[type, type] = {}


def distilled_class(base: type) -> type:
    """The class ``PKD<Base>``: a detector class with `PKDMixin` in front.

    Args:
        base: An mmdet detector class.

    Returns:
        The same class object at each call.

    Raises:
        ValueError: If the base is semi-supervised: it has no single forward over one labelled batch.
    """
    if issubclass(base, SemiBaseDetector):
        raise ValueError(
            f"PKDDetector cannot wrap {base.__name__}: semi-supervised detectors hold a student and a "
            "teacher of their own. Distil the detector under its `detector` key."
        )
    if base not in _CLASSES:
        _CLASSES[base] = type(f"PKD{base.__name__}", (PKDMixin, base), {"__module__": __name__})
    return _CLASSES[base]


@MODELS.register_module()
def PKDDetector(student_type: str | type, distill: Mapping[str, Any], **student: Any) -> BaseDetector:
    """Build a detector that is distilled while it trains.

    In a config that inherits from a plain one:
    ``model = dict(type="PKDDetector", student_type=_base_.model.type, distill=dict(teacher=...,
    teacher_ckpt=...))``. The result is an instance of the student's own class with the state dict of the
    plain student (plus ``pkd_adapters.*`` if channels differ), so mmdet's tools and hooks see the detector
    they know.

    Args:
        student_type: Registered name (or class) of the student.
        distill: Options of `Distiller`.
        **student: The student's own options, passed on to its class.

    Returns:
        The student.

    Raises:
        ValueError: If the student or an option does not fit.
        TypeError: If `distill` holds an unknown option.
    """
    base = MODELS.get(student_type) if isinstance(student_type, str) else student_type
    if not (isinstance(base, type) and issubclass(base, BaseDetector)):
        raise ValueError(
            f"student_type={student_type!r} is no registered detector of mmdet. Write "
            f"student_type=_base_.model.type.{did_you_mean(str(student_type), list(MODELS.module_dict))}"
        )
    check_keys(distill, Distiller, "distill")
    distilled = distilled_class(base)
    distiller = Distiller(**distill, student=student)
    detector = distilled(**student)
    detector.pkd = distiller
    adapters = distiller.build_adapters()
    if len(adapters):
        detector.add_module(ADAPTERS, adapters)
    return detector


def distill_options(config: Config) -> Mapping[str, Any]:
    """The `distill` block of a config, whether it stands in the model or in a hook.

    Args:
        config: A training config.

    Returns:
        Options of `Distiller`.

    Raises:
        ValueError: If the config distils nothing.
    """
    if config.model.type == "PKDDetector":
        return config.model.distill
    for hook in config.get("custom_hooks", []):
        if hook["type"] == "PKDHook":
            return hook["distill"]
    raise ValueError(
        f"the config distils nothing: its model.type is {config.model.type!r} and no custom hook is a "
        "PKDHook. Set model=dict(type='PKDDetector', student_type=_base_.model.type, "
        "distill=dict(teacher=...))."
    )


def inspect_config(config: str | Path | Config, *, input_size: int = 256) -> InspectReport:
    """Dry run: build both pyramids with random weights, send one empty image through, and report the pairs.

    Nothing is downloaded and nothing is written; a local teacher checkpoint is compared key by key.

    Args:
        config: Training config or its path.
        input_size: Side of the image in pixels; a multiple of the coarsest stride.

    Returns:
        The plan, with notes and problems in words.

    Raises:
        ValueError: If the config is wrong in itself, as at the start of training.
    """
    config = config if isinstance(config, Config) else Config.fromfile(config)
    options = distill_options(config)
    check_keys(options, Distiller, "distill")
    distiller = Distiller(**options, student=config.model)
    student, teacher = build_teacher(config.model), build_teacher(distiller.teacher_model)
    image = torch.zeros(1, 3, input_size, input_size)
    with torch.no_grad():
        student_maps, teacher_maps = student.eval()(image), teacher.eval()(image)
    plans, notes, problems = [], [], []
    for i, j in distiller.pairs(student_maps, teacher_maps):
        ours, theirs = student_maps[i].shape, teacher_maps[j].shape
        resized = "" if ours[2:] == theirs[2:] else "student" if distiller.loss.resize_stu else "teacher"
        if ours[1] != theirs[1] and i not in distiller.adapted:
            problems.append(f"level {i}: {ours[1]} and {theirs[1]} channels; set distill.adapt='conv1x1'")
        plans.append(
            LevelPlan(
                student_level=i,
                teacher_level=j,
                student_stride=round(input_size / ours[2]),
                teacher_stride=round(input_size / theirs[2]),
                student_channels=ours[1],
                teacher_channels=theirs[1],
                resized=resized,
                adapted=i in distiller.adapted,
            )
        )
    if not distiller.source.same_pixels(distiller.target):
        notes.append("images are mapped from the student's normalisation to the teacher's")
    if distiller.source.pad_size_divisor % distiller.target.pad_size_divisor:
        notes.append(
            f"the teacher needs sides that are multiples of {distiller.target.pad_size_divisor}; the "
            f"student pads to {distiller.source.pad_size_divisor}"
        )
    coverage, broken = _key_coverage(teacher, distiller.teacher_ckpt)
    (problems if broken else notes).append(coverage)
    kind = config.model.get("student_type", config.model.type)
    return InspectReport(
        student=str(kind),
        teacher=str(distiller.teacher_model.get("type")),
        teacher_millions=sum(parameter.numel() for parameter in teacher.parameters()) / 1e6,
        loss=type(distiller.loss).__name__,
        loss_weight=distiller.loss.loss_weight,
        levels=tuple(plans),
        notes=tuple(notes),
        problems=tuple(problems),
    )


def _key_coverage(teacher: FrozenTeacher, path: str | None) -> tuple[str, bool]:
    """One sentence on how a checkpoint fits, and whether that is a problem."""
    if not path:
        return "teacher_ckpt is not set; give --cfg-options model.distill.teacher_ckpt=PATH", True
    if "://" in path:
        return f"teacher keys are checked when training starts; nothing is downloaded here ({path})", False
    if not Path(path).is_file():
        return f"teacher_ckpt={path!r} does not exist", True
    found = key_problems(teacher, part_of(read_weights(path), PARTS))
    count = len(teacher.state_dict())
    return f"teacher keys: {', '.join(found) if found else f'all {count} fit'} ({path})", bool(found)


def export_student(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The plain student in a checkpoint of a distilled run.

    Args:
        checkpoint: As a Runner writes it.

    Returns:
        ``state_dict`` without adapters, and ``meta``; no optimizer, schedule or log.

    Raises:
        ValueError: If there is no ``state_dict``.
    """
    if "state_dict" not in checkpoint:
        raise ValueError(
            f"the file holds no state_dict but {sorted(checkpoint)[:5]}. Give a checkpoint that the Runner "
            "wrote, such as work_dirs/NAME/epoch_12.pth."
        )
    weights = part_of(checkpoint["state_dict"], [""])
    for name in [name for name in weights if name.startswith(f"{ADAPTERS}.")]:
        del weights[name]
    return {"state_dict": weights, "meta": dict(checkpoint.get("meta", {}))}
