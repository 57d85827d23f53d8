"""Which versions count as the oldest."""

from tools.oldest import lowest_pins, named_packages

SETUP = """
[options]
install_requires =
    packaging>=24
[options.extras_require]
a =
    Torch>=2.13,<2.14
    flwr[simulation]>=1.20,<2
b =
    # a comment
    dp_accounting>=0.4
c =
    other
"""


def test_packages_that_the_extras_name() -> None:
    assert named_packages(SETUP, ("a", "b")) == {"packaging", "torch", "flwr", "dp-accounting"}


def test_pins_of_what_is_named_alone() -> None:
    resolved = "# by uv\nabsl-py==1.4.0\n  # via x\ndp-accounting==0.5.0\nflwr[simulation]==1.40.0 ; x\n"
    assert lowest_pins(resolved, {"flwr", "dp-accounting"}) == ["dp-accounting==0.5.0", "flwr==1.40.0"]
