"""The search space: what may be tuned, on which values, and how a choice becomes a client's config."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Value = float | int | str | bool | None
Config = dict[str, Value]
GridKind = Literal["inclusive", "released"]


@dataclass(frozen=True, kw_only=True)
class When:
    """A hyper-parameter counts only while another one has one of these values."""

    name: str
    """The other hyper-parameter."""
    values: tuple[Value, ...]
    """Values of it that switch this one on."""


@dataclass(frozen=True, kw_only=True)
class Categorical:
    """One of a list of values."""

    choices: tuple[Value, ...]
    """At least one value, no two equal."""
    default: Value = None
    """Value of the anchor run; None: the first choice."""
    when: When | None = None
    """Condition; None: always on."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        if not self.choices:
            raise ValueError("choices is empty; a hyper-parameter needs at least one value to take.")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices must differ; got {list(self.choices)}.")
        if self.default is None:
            object.__setattr__(self, "default", self.choices[0])

    def grid(self, num: int, kind: GridKind) -> list[Value]:
        """All choices."""
        return list(self.choices)


@dataclass(frozen=True, kw_only=True)
class _Range:
    lower: float
    upper: float
    log: bool = False
    default: Value = None
    when: When | None = None

    def __post_init__(self) -> None:
        if not self.lower < self.upper:
            raise ValueError(f"lower must be below upper; got lower={self.lower}, upper={self.upper}.")
        if self.log and self.lower <= 0:
            raise ValueError(f"log=True needs lower > 0; got lower={self.lower}. Raise it, or use log=False.")

    def at(self, unit: float) -> float | int:
        """The value at a place in [0, 1]: linear, or linear in the logarithm."""
        if self.log:
            low, high = math.log10(self.lower), math.log10(self.upper)
            return float(min(self.upper, max(self.lower, 10 ** (low + unit * (high - low)))))
        return self.lower + unit * (self.upper - self.lower)

    def grid(self, num: int, kind: GridKind) -> list[Value]:
        """``num`` values: both ends included, or as released, where the upper end is never tried."""
        steps = num if kind == "released" else max(1, num - 1)
        return list(dict.fromkeys(self.at(i / steps) for i in range(num)))


@dataclass(frozen=True, kw_only=True)
class Float(_Range):
    """A number between two bounds, on a linear or logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class Int(_Range):
    """A whole number between two bounds, both included."""

    def at(self, unit: float) -> int:
        """The whole number at a place in [0, 1], rounded to the nearest."""
        return round(super().at(unit))


Dimension = Categorical | Float | Int


@dataclass(frozen=True)
class Space:
    """Named hyper-parameters in a fixed order.

    On a grid (``policy="categorical"``) each is a list of values and an action is an index; otherwise a
    range's action is a place in [0, 1].
    """

    dimensions: Mapping[str, Dimension]
    """Name to dimension; a condition names one that stands before it."""
    grid_size: int = 10
    """Values that a range is cut into on a grid."""
    grid_kind: GridKind = "inclusive"
    """``released`` cuts as the release did: the upper bound is never tried."""

    def __post_init__(self) -> None:
        if not self.dimensions:
            raise ValueError("the space has no hyper-parameter; name at least one to search.")
        if self.grid_size < 2:
            raise ValueError(f"grid_size must be >= 2; got {self.grid_size}.")
        seen: set[str] = set()
        for name, dimension in self.dimensions.items():
            if dimension.when is not None and dimension.when.name not in seen:
                raise ValueError(
                    f"{name} depends on {dimension.when.name!r}, which does not stand before it; known here: "
                    f"{', '.join(seen) or 'none'}."
                )
            self._check_default(name, dimension)
            seen.add(name)

    @staticmethod
    def _check_default(name: str, dimension: Dimension) -> None:
        default = dimension.default
        if isinstance(dimension, Categorical):
            if default not in dimension.choices:
                raise ValueError(
                    f"default of {name} must be one of {list(dimension.choices)}; got {default!r}."
                )
        elif default is not None and not dimension.lower <= float(default) <= dimension.upper:  # type: ignore[arg-type]
            raise ValueError(
                f"default of {name} must lie in {dimension.lower}..{dimension.upper}; got {default!r}."
            )

    @property
    def names(self) -> list[str]:
        """Names in order."""
        return list(self.dimensions)

    def grids(self) -> list[list[Value]]:
        """The values of each hyper-parameter on the grid."""
        return [d.grid(self.grid_size, self.grid_kind) for d in self.dimensions.values()]

    def default(self) -> Config:
        """The config of the anchor run; a range without a default takes its middle."""
        values = {
            name: d.default if d.default is not None or isinstance(d, Categorical) else d.at(0.5)
            for name, d in self.dimensions.items()
        }
        return self._active(values)

    def config(self, actions: Sequence[float], *, on_grid: bool) -> Config:
        """A client's config from one action per hyper-parameter.

        Args:
            actions: Index on the grid, or (a range off the grid) a place in [0, 1].
            on_grid: Whether ranges are cut into a grid.

        Returns:
            Name to value; hyper-parameters whose condition does not hold are left out.
        """
        values: Config = {}
        for action, (name, d), grid in zip(actions, self.dimensions.items(), self.grids(), strict=True):
            index = on_grid or isinstance(d, Categorical)
            values[name] = grid[int(action)] if index or isinstance(d, Categorical) else d.at(float(action))
        return self._active(values)

    def active(self, config: Mapping[str, Value]) -> list[bool]:
        """For each hyper-parameter in order, whether a config holds it."""
        return [name in config for name in self.dimensions]

    def _active(self, values: Config) -> Config:
        kept: Config = {}
        for name, dimension in self.dimensions.items():
            if dimension.when is None or kept.get(dimension.when.name, _MISSING) in dimension.when.values:
                kept[name] = values[name]
        return kept

    def suggest(self, trial: Any) -> Config:
        """A config drawn by Optuna: ``hp_space`` of transformers' ``hyperparameter_search`` takes this."""
        kept: Config = {}
        for name, d in self.dimensions.items():
            if d.when is not None and kept.get(d.when.name, _MISSING) not in d.when.values:
                continue
            if isinstance(d, Categorical):
                kept[name] = trial.suggest_categorical(name, list(d.choices))
            elif isinstance(d, Int):
                kept[name] = trial.suggest_int(name, int(d.lower), int(d.upper), log=d.log)
            else:
                kept[name] = trial.suggest_float(name, d.lower, d.upper, log=d.log)
        return kept

    def to_mapping(self) -> dict[str, dict[str, Any]]:
        """Plain values from which `space_from` builds the same space."""
        out: dict[str, dict[str, Any]] = {}
        for name, d in self.dimensions.items():
            if isinstance(d, Categorical):
                entry: dict[str, Any] = {"type": "categorical", "choices": list(d.choices)}
            else:
                kind = "int" if isinstance(d, Int) else "float"
                entry = {"type": kind, "lower": d.lower, "upper": d.upper, "log": d.log}
            if d.default is not None:
                entry["default"] = d.default
            if d.when is not None:
                entry["when"] = {"name": d.when.name, "values": list(d.when.values)}
            out[name] = entry
        return out


class _Missing:
    pass


_MISSING = _Missing()
_KINDS = {
    "cate": "categorical",
    "categorical": "categorical",
    "ordinal": "categorical",
    "float": "float",
    "uniform_float": "float",
    "int": "int",
    "uniform_int": "int",
}
_KEYS = {
    "categorical": {"choices", "default", "when"},
    "float": {"lower", "upper", "log", "default", "when"},
    "int": {"lower", "upper", "log", "default", "when"},
}


def space_from(data: Mapping[str, Any], *, grid_size: int = 10, grid_kind: GridKind = "inclusive") -> Space:
    """Read a space from plain values.

    Three forms are understood: ours (``lr: {type: float, lower: ..., upper: ..., log: true}``),
    FederatedScope's (``optimizer.lr: {type: cate, choices: [...]}``) and a ConfigSpace file (a mapping with
    the list ``hyperparameters``, and ``conditions`` of type EQ or IN).

    Args:
        data: The parsed YAML or JSON.
        grid_size: Values that a range is cut into on a grid.
        grid_kind: How it is cut.

    Returns:
        The space.

    Raises:
        ValueError: If an entry is not understood; the message names it.
    """
    if "hyperparameters" in data:
        data = _from_config_space(data)
    dimensions: dict[str, Dimension] = {}
    for name, entry in data.items():
        try:
            dimensions[name] = _dimension(entry)
        except (ValueError, TypeError) as error:
            raise ValueError(f"hyper-parameter {name}: {error}") from error
    return Space(dimensions, grid_size, grid_kind)


def _dimension(entry: Any) -> Dimension:
    if not isinstance(entry, Mapping) or entry.get("type") not in _KINDS:
        raise ValueError(f"it needs a mapping with a type out of {', '.join(_KINDS)}; got {entry!r}.")
    kind = _KINDS[entry["type"]]
    given = {key: value for key, value in entry.items() if key != "type"}
    if "default_value" in given:
        given["default"] = given.pop("default_value")
    unknown = set(given) - _KEYS[kind]
    if unknown:
        may = ", ".join(sorted(_KEYS[kind]))
        raise ValueError(f"an entry of type {kind} may hold {may}; got {', '.join(sorted(unknown))}.")
    if given.get("when") is not None:
        given["when"] = When(name=given["when"]["name"], values=tuple(given["when"]["values"]))
    if kind == "categorical":
        return Categorical(**{**given, "choices": tuple(given.get("choices", ()))})
    for bound in ("lower", "upper"):
        if not isinstance(given.get(bound), int | float):
            # YAML 1.1 reads 1e-3 as a word.
            raise ValueError(
                f"{bound} must be a number; got {given.get(bound)!r}. In YAML write 1.0e-3, not 1e-3."
            )
    return (Int if kind == "int" else Float)(**given)


def _from_config_space(data: Mapping[str, Any]) -> dict[str, Any]:
    if data.get("forbiddens"):
        raise ValueError("forbidden clauses of a ConfigSpace file are not supported; take them out.")
    out: dict[str, Any] = {}
    for entry in data["hyperparameters"]:
        kept = {
            key: entry[key]
            for key in ("type", "lower", "upper", "log", "choices", "default_value")
            if key in entry
        }
        if entry.get("type") == "constant":
            kept = {"type": "categorical", "choices": [entry["value"]]}
        if entry.get("type") == "ordinal":
            kept["choices"] = entry["sequence"]
        out[entry["name"]] = kept
    for condition in data.get("conditions", ()):
        if condition.get("type") not in ("EQ", "IN"):
            raise ValueError(
                f"conditions of type {condition.get('type')!r} are not supported; EQ and IN are. Rewrite it."
            )
        values = condition["values"] if condition["type"] == "IN" else [condition["value"]]
        out[condition["child"]]["when"] = {"name": condition["parent"], "values": values}
    return out
