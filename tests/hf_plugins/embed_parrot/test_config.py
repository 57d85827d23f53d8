"""Options of the scan."""

import dataclasses

import pytest

from hf_plugins.embed_parrot.config import LeakScanConfig


def test_every_option_has_help() -> None:
    assert all(len(field.metadata["help"]) > 10 for field in dataclasses.fields(LeakScanConfig))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attacks": ("bei", "magic")},
            "attacks must be some of bei, bei_norm, hei, ridge, parrot, vocab; got bei, magic",
        ),
        ({"attacks": ()}, "got none"),
        ({"layers": (0, -1)}, "layers must be >= 0"),
        ({"defences": ()}, "defences must name at least one"),
        ({"seeds": ()}, "seeds must hold at least one number"),
        ({"num_test": 0}, "num_test must be >= 1; got 0"),
        ({"bootstrap": 0}, "bootstrap must be >= 1"),
        ({"shortlist": -1}, "shortlist must be >= 0; got -1"),
        ({"parrot_lr": 0.0}, "parrot_batch, parrot_layers and parrot_lr must be positive"),
        ({"parrot_width": 100}, "parrot_width must be a multiple of 64; got 100"),
        ({"parrot_loss": "mse"}, "parrot_loss must be 'cosine' or 'cosine_ce'; got 'mse'"),
        ({"fail_above": 10.0}, "It is a share: 0.1 is 10 %"),
    ],
)
def test_wrong_values(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeakScanConfig(**options)


def test_all_faults_at_once() -> None:
    with pytest.raises(ValueError, match=r"LeakScanConfig: .*num_fit.*fail_above"):
        LeakScanConfig(num_fit=0, fail_above=-1.0)
