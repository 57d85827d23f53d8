"""The user's side: order BLUR, LUS, clip, noise share; what leaves and what does not."""

import pytest
import torch
from torch import Tensor

from hf_plugins.dp_fedavg import FinishUpdate, gradient_term
from hf_plugins.dp_fedavg.hook import client_options, gradient_needed
from hf_plugins.rounds import ClientFailed, Job, Update
from tests.hf_plugins.dp_fedavg.tiny import config

DELTA = torch.tensor([1.680163, 2.240217, 0.280027, -0.140014])
GRADIENT = DELTA - torch.tensor([3.0, 4.0, 0.5, -0.25])


def job(multiplier: float = 0.0, **options: object) -> Job:
    given = client_options(
        config(**options),
        clipping_norm=options.get("clipping_norm", 1.0),
        noise_multiplier=multiplier,
        num_clients=100,
    )
    return Job(client_id=3, round_index=0, seed=1, config=given)


def update(vector: Tensor = DELTA, gradient: Tensor | None = GRADIENT) -> Update:
    return Update(
        client_id=3,
        round_index=0,
        vector_D=vector.clone(),
        gradient_D=gradient,
        num_examples=77,
        metrics={"loss": 2.0},
        base=5,
    )


def test_sparsified_then_clipped() -> None:
    """Keep 0.5 and S = 1 give [0.6, 0.8, 0, 0]; clipping first would leave a norm below 1."""
    done = FinishUpdate([4])(update(), job(keep_ratio=0.5, clipping_norm=1.0))
    torch.testing.assert_close(done.vector_D, torch.tensor([0.6, 0.8, 0.0, 0.0]), atol=1e-5, rtol=0)
    assert done.num_examples == 1, "how many records a user has is private"
    assert done.gradient_D is None
    assert done.base == 5
    assert done.metrics["clipped"] == 1.0
    assert done.metrics["norm"] == pytest.approx(float(DELTA[:2].norm()))
    assert done.metrics["norm_before_lus"] == pytest.approx(float(DELTA.norm()))


def test_what_lus_keeps_of_each_tensor_is_a_metric() -> None:
    """Of two halves, by magnitude over all: the first keeps all, the second nothing."""
    asked = job(keep_ratio=0.5, lus_scope="global", lus_score="magnitude")
    done = FinishUpdate([2, 2], ["a", "b.weight"])(update(), asked)
    assert {name: v for name, v in done.metrics.items() if "lus_kept" in name} == {
        "lus_kept/a": 1.0,
        "lus_kept/b.weight": 0.0,
    }
    shares = job(2.0, keep_ratio=0.5, noise_mode="shares")
    assert FinishUpdate([2, 2], ["a", "b.weight"])(update(), shares).metrics == {}


def test_small_update_passes_unchanged() -> None:
    done = FinishUpdate([4])(update(), job(clipping_norm=10.0))
    assert torch.equal(done.vector_D, DELTA)
    assert done.metrics["clipped"] == 0.0


def test_share_of_noise_covers_every_coordinate_and_metrics_stay() -> None:
    """m = 50 shares: each has standard deviation sigma S / sqrt(50); D = 20,000 gives it within 3 %."""
    big = torch.zeros(20000)
    big[0] = 3.0
    options = {"noise_mode": "shares", "keep_ratio": 0.5, "clipping_norm": 1.0, "lus_score": "magnitude"}
    done = FinishUpdate([20000])(update(big, None), job(2.0, **options))
    noise = done.vector_D.clone()
    noise[0] -= 1.0
    assert float(noise.std()) == pytest.approx(2.0 / 50**0.5, rel=0.03)
    assert int((noise == 0).sum()) == 0
    assert done.metrics == {}
    again = FinishUpdate([20000])(update(big, None), job(2.0, **options))
    assert torch.equal(again.vector_D, done.vector_D)
    secure = [FinishUpdate([20000])(update(big, None), job(2.0, secure=True, **options)) for _ in range(2)]
    assert not torch.equal(secure[0].vector_D, secure[1].vector_D)


def test_not_finite_stays_visible_and_zero_passes() -> None:
    bad = FinishUpdate([4])(update(DELTA * float("nan")), job(keep_ratio=0.5))
    assert bool(torch.isnan(bad.vector_D).all())
    zero = FinishUpdate([4])(update(torch.zeros(4), None), job(keep_ratio=0.5))
    assert not zero.vector_D.any()


def test_user_without_gradient_says_so() -> None:
    with pytest.raises(ClientFailed, match="Train with keep_gradient"):
        FinishUpdate([4])(update(gradient=None), job(keep_ratio=0.5))


def test_terms() -> None:
    """BLUR lambda 0.4 outside S = 1 and FedProx mu 0.1 everywhere: (0.4 + 0.1) delta and 0.1 delta."""
    options = job(blur=0.4, proximal=0.1, clipping_norm=1.0).config
    far, near = [torch.tensor([3.0, 4.0])], [torch.tensor([0.3, 0.4])]
    assert gradient_term(far, options, 0)[0].tolist() == pytest.approx([1.5, 2.0])
    assert gradient_term(near, options, 0)[0].tolist() == pytest.approx([0.03, 0.04])
    assert gradient_term(far, job(clipping_norm=1.0).config, 0) is None
    assert gradient_term(far, job(proximal=1.0).config, 0)[0].tolist() == [3.0, 4.0]
    hinge = job(blur=1.0, blur_hinge="norm", clipping_norm=1.0).config
    assert gradient_term(far, hinge, 0)[0].tolist() == pytest.approx([3 * 0.8, 4 * 0.8])


def test_gradient_is_asked_for_only_where_lus_ranks_by_it() -> None:
    assert gradient_needed(config(keep_ratio=0.5)) == "last"
    assert gradient_needed(config(keep_ratio=0.5, lus_gradient="full")) == "full"
    assert gradient_needed(config(keep_ratio=1.0)) == "none"
    assert gradient_needed(config(keep_ratio=0.5, lus_score="magnitude")) == "none"


def test_options_travel_as_plain_values() -> None:
    options = job(keep_ratio=0.5).config
    assert options["keep_gradient"] == "last"
    assert all(isinstance(v, bool | int | float | str) for v in options.values())
