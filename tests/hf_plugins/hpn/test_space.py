"""Search spaces: grids, places, conditions, imports, and what is refused."""

import pytest

from hf_plugins.hpn.space import Categorical, Float, Int, Space, When, space_from


def test_grids() -> None:
    """Log range 1e-4..1: inclusive thirds of the exponent; the release's ten points stop short of the end."""
    rate = Float(lower=1e-4, upper=1.0, log=True)
    assert rate.grid(5, "inclusive") == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    released = rate.grid(10, "released")
    assert len(released) == 10
    assert released[0] == pytest.approx(1e-4)
    assert released[-1] == pytest.approx(10**-0.4)  # -4 + 9 * 4 / 10
    assert Float(lower=0.0, upper=0.5).grid(10, "released")[-1] == pytest.approx(0.45)
    assert Int(lower=1, upper=4).grid(10, "inclusive") == [1, 2, 3, 4]


def test_places_in_a_range() -> None:
    assert Float(lower=1e-3, upper=1e-1, log=True).at(0.5) == pytest.approx(1e-2)
    assert Float(lower=1e-3, upper=1e-1, log=True).at(1.0) <= 1e-1
    assert Float(lower=2.0, upper=4.0).at(0.25) == pytest.approx(2.5)
    assert [Int(lower=1, upper=3).at(u) for u in (0.0, 0.24, 0.26, 1.0)] == [1, 1, 2, 3]


def _conditional() -> Space:
    return Space(
        {
            "optimizer": Categorical(choices=("sgd", "adamw")),
            "momentum": Float(lower=0.0, upper=0.9, when=When(name="optimizer", values=("sgd",))),
        }
    )


def test_condition_leaves_idle_parameters_out() -> None:
    space = _conditional()
    assert space.config([0, 1.0], on_grid=False) == {"optimizer": "sgd", "momentum": 0.9}
    assert space.config([1, 1.0], on_grid=False) == {"optimizer": "adamw"}
    assert space.active({"optimizer": "adamw"}) == [True, False]
    assert space.default() == {"optimizer": "sgd", "momentum": 0.45}


def test_defaults() -> None:
    space = Space(
        {"lr": Categorical(choices=(0.1, 0.2), default=0.2), "wd": Float(lower=0, upper=1, default=0)}
    )
    assert space.default() == {"lr": 0.2, "wd": 0}


def test_three_forms_give_one_space() -> None:
    ours = space_from(
        {
            "lr": {"type": "float", "lower": 0.001, "upper": 0.1, "log": True, "default": 0.01},
            "wd": {"type": "categorical", "choices": [0, 0.1]},
        }
    )
    released = space_from(
        {
            "lr": {"type": "float", "lower": 0.001, "upper": 0.1, "log": True, "default": 0.01},
            "wd": {"type": "cate", "choices": [0, 0.1]},
        }
    )
    config_space = space_from(
        {
            "name": "s",
            "hyperparameters": [
                {
                    "type": "uniform_float",
                    "name": "lr",
                    "lower": 0.001,
                    "upper": 0.1,
                    "log": True,
                    "default_value": 0.01,
                },
                {"type": "categorical", "name": "wd", "choices": [0, 0.1], "weights": None},
            ],
            "conditions": [],
        }
    )
    assert ours == released == config_space
    assert space_from(ours.to_mapping()) == ours


def test_config_space_conditions_and_constants() -> None:
    file = {
        "hyperparameters": [
            {"type": "constant", "name": "optimizer", "value": "sgd"},
            {"type": "ordinal", "name": "momentum", "sequence": [0.0, 0.9]},
        ],
        "conditions": [{"type": "EQ", "child": "momentum", "parent": "optimizer", "value": "sgd"}],
    }
    space = space_from(file)
    assert space.dimensions["momentum"].when == When(name="optimizer", values=("sgd",))
    assert space_from(space.to_mapping()) == space
    file["conditions"][0]["type"] = "GT"
    with pytest.raises(ValueError, match="conditions of type 'GT' are not supported; EQ and IN are"):
        space_from(file)
    with pytest.raises(ValueError, match="forbidden clauses of a ConfigSpace file are not supported"):
        space_from({**file, "forbiddens": [{}]})


class _Trial:
    def suggest_categorical(self, name: str, choices: list) -> object:
        return choices[-1]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        return high

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int:
        return high


def test_suggest_speaks_optuna() -> None:
    space = Space(
        {
            "a": Categorical(choices=(1, 2)),
            "b": Float(lower=0, upper=1, when=When(name="a", values=(1,))),
            "c": Int(lower=1, upper=5),
            "d": Float(lower=1, upper=2),
        }
    )
    assert space.suggest(_Trial()) == {"a": 2, "c": 5, "d": 2}


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="choices is empty; a hyper-parameter needs at least one value"):
        Categorical(choices=())
    with pytest.raises(ValueError, match=r"choices must differ; got .*\[1, 1\]"):
        Categorical(choices=(1, 1))
    with pytest.raises(ValueError, match="lower must be below upper; got .*lower=2, upper=2"):
        Float(lower=2, upper=2)
    with pytest.raises(ValueError, match="log=True needs lower > 0; got .*lower=0. Raise it"):
        Float(lower=0, upper=2, log=True)
    with pytest.raises(ValueError, match="the space has no hyper-parameter; name at least one"):
        Space({})
    with pytest.raises(ValueError, match="grid_size must be >= 2; got .*1"):
        Space({"a": Int(lower=0, upper=1)}, grid_size=1)
    with pytest.raises(
        ValueError, match="b depends on .*'a'.*, which does not stand before it; known here: .*none"
    ):
        Space({"b": Int(lower=0, upper=1, when=When(name="a", values=(1,)))})
    with pytest.raises(ValueError, match=r"default of a.* must be one of .*1, 2.*; got .*3"):
        Space({"a": Categorical(choices=(1, 2), default=3)})
    with pytest.raises(ValueError, match=r"default of a.* must lie in .*0\.\.1.*; got .*3"):
        Space({"a": Float(lower=0, upper=1, default=3)})
    with pytest.raises(
        ValueError, match="hyper-parameter .*lr: .*it needs a mapping with a type out of .*cate"
    ):
        space_from({"lr": [1, 2]})
    with pytest.raises(
        ValueError, match="an entry of type .*float.* may hold .*default, log, lower, upper, when; got .*step"
    ):
        space_from({"lr": {"type": "float", "lower": 0, "upper": 1, "step": 2}})
    with pytest.raises(
        ValueError, match=r"lower.* must be a number; got .*'1e-3'.*In YAML write 1.0e-3, not 1e-3"
    ):
        space_from({"lr": {"type": "float", "lower": "1e-3", "upper": 1}})
