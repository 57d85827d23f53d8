"""The engine behind a STEP: order, idempotence, windows of several clients, sealed state; and the client's
Trainer."""

import threading
from pathlib import Path

import pytest
import torch

from hf_plugins.tee_split.batches import Sample, collate
from hf_plugins.tee_split.model import split_model
from hf_plugins.tee_split.peft import attach_adapter
from hf_plugins.tee_split.storage import SealedStore
from hf_plugins.tee_split.tensors import MessageError
from hf_plugins.tee_split.trainer import RemoteLoss, SplitTrainer, TailEngine, _RemoteTail, pad_token_batch
from tests.hf_plugins.tee_split.tiny import arguments, client_config, rows, tail_config, tiny_model

SAMPLES = [
    Sample(
        torch.randn(n, 32, generator=torch.Generator().manual_seed(n)),
        torch.arange(3, 3 + n, dtype=torch.int32),
    )
    for n in (4, 6)
]


def engine(folder: Path, *, dropout: float = 0.0, **changes: object) -> TailEngine:
    config = tail_config(folder, folder, lora_dropout=dropout)
    model = attach_adapter(split_model(tiny_model(), 2, "server"), config)
    torch.manual_seed(0)
    given = {
        "store": SealedStore(folder / "store", bytes(32)),
        "seal_steps": 2,
        "return_gradient": False,
        "label": "x",
        "bound_seconds": 0.2,
        **changes,
    }
    return TailEngine(model, arguments(), **given)


def weights(made: TailEngine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made._parameters().items()}


def one_step(made: TailEngine, step: int, client: str = "alice") -> dict:
    for micro in range(2):
        made.micro(client, step=step, micro=micro, num_items=8, samples=SAMPLES[micro : micro + 1])
    return made.step(client, step=step, learning_rate=0.01)


def test_two_micro_batches_are_one_batch(tmp_path: Path) -> None:
    """The loss is divided by the predicted tokens of the whole step, so accumulation changes only
    rounding."""
    first, second = engine(tmp_path / "a"), engine(tmp_path / "b")
    losses = [first.micro("a", step=1, micro=m, num_items=8, samples=SAMPLES[m : m + 1])[0] for m in range(2)]
    whole = second.micro("a", step=1, micro=0, num_items=8, samples=SAMPLES)[0]
    assert sum(losses) == pytest.approx(whole, abs=1e-5)
    first.step("a", step=1, learning_rate=0.01)
    second.step("a", step=1, learning_rate=0.01)
    # AdamW's first step is lr * sign(g): equal signs move equally.
    for name, value in weights(first).items():
        torch.testing.assert_close(value, weights(second)[name], atol=1e-4, rtol=1e-3)


def test_gradient_of_the_hidden_state_is_that_of_autograd(tmp_path: Path) -> None:
    made = engine(tmp_path, return_gradient=True)
    _, gradient = made.micro("a", step=1, micro=0, num_items=8, samples=SAMPLES)
    inputs = collate(SAMPLES)
    embeds = inputs.pop("inputs_embeds").requires_grad_()
    logits = made.model(inputs_embeds=embeds, **{k: v for k, v in inputs.items() if k != "labels"}).logits[
        :, :-1
    ]
    labels = inputs["labels"][:, 1:]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").div(
        8
    ).backward()
    expected = embeds.grad[inputs["attention_mask"] == 1]
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_steps_are_applied_once_and_in_order(tmp_path: Path) -> None:
    made = engine(tmp_path)
    before = weights(made)
    for options in ({"step": 2, "micro": 0}, {"step": 0, "micro": 0}):
        with pytest.raises(MessageError, match="where 1 was due"):
            made.micro("alice", num_items=8, samples=SAMPLES, **options)
    with pytest.raises(MessageError, match="is not the one that is due"):
        made.micro("alice", step=1, micro=1, num_items=8, samples=SAMPLES)
    with pytest.raises(MessageError, match="has no micro-batch to apply"):
        made.step("alice", step=1, learning_rate=0.01)
    assert one_step(made, 1)["applied"] == 1
    after = weights(made)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    again = made.step("alice", step=1, learning_rate=0.01)
    assert (again["applied"], again["grad_norm"]) == (1, None)
    assert all(torch.equal(after[name], value) for name, value in weights(made).items())


def test_dropped_window_leaves_no_gradient(tmp_path: Path) -> None:
    straight, broken = engine(tmp_path / "a"), engine(tmp_path / "b")
    broken.micro("alice", step=1, micro=0, num_items=8, samples=SAMPLES)
    broken.drop("alice")
    broken.drop("nobody")
    broken.micro("alice", session=1, step=1, micro=0, num_items=8, samples=SAMPLES)
    # The connection before ends late and must not take the new one's window; a newer one starts from zero.
    broken.drop("alice", session=0)
    with pytest.raises(MessageError, match="is not the one that is due"):
        broken.micro("alice", session=2, step=1, micro=1, num_items=8, samples=SAMPLES)
    one_step(straight, 1)
    one_step(broken, 1)
    assert all(torch.equal(value, weights(broken)[name]) for name, value in weights(straight).items())


def test_a_second_client_waits_for_the_window(tmp_path: Path) -> None:
    made = engine(tmp_path)
    made.micro("alice", step=1, micro=0, num_items=8, samples=SAMPLES)
    with pytest.raises(MessageError, match="another client holds the step"):
        made.micro("bob", step=1, micro=0, num_items=8, samples=SAMPLES)
    release = threading.Timer(0.05, made.step, args=("alice",), kwargs={"step": 1, "learning_rate": 0.01})
    release.start()
    made.micro("bob", step=1, micro=0, num_items=8, samples=SAMPLES)
    release.join()
    assert made.step("bob", step=1, learning_rate=0.01)["applied"] == 1
    assert made.standing("alice") == {"applied": 1, "durable": 1}


def test_sealed_state_goes_on_bit_by_bit(tmp_path: Path) -> None:
    """With dropout, so that the random state must come back too."""
    straight = engine(tmp_path / "a", dropout=0.3)
    for step in (1, 2, 3, 4):
        one_step(straight, step)
    first = engine(tmp_path / "b", dropout=0.3)
    for step in (1, 2, 3):
        one_step(first, step)
    second = engine(tmp_path / "b", dropout=0.3)
    # Step 3 was not sealed: it is due again.
    assert second.standing("alice") == {"applied": 2, "durable": 2}
    for step in (3, 4):
        one_step(second, step)
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(straight).items())


def test_remote_loss_hands_the_scaled_gradient_back() -> None:
    hidden, gradient = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    loss = RemoteLoss.apply(hidden, gradient, 1.25)
    assert loss.item() == 1.25
    (2 * loss).backward()
    assert torch.equal(hidden.grad, 2 * gradient)


def test_token_batches_are_padded_on_the_right() -> None:
    batch = pad_token_batch([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


class FakeClient:
    """Only what SplitTrainer looks at before anything is sent."""

    def __init__(self, mode: str, folder: Path) -> None:
        self.config = client_config(folder, 1, mode=mode)

    def step(self, learning_rate: float) -> None:
        raise AssertionError


def test_wrong_combinations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="call SplitClient.upload and SplitClient.train"):
        SplitTrainer(FakeClient("cache", tmp_path), arguments(), train_dataset=rows())
    with pytest.raises(ValueError, match="goes with mode='bidirectional', and only with it"):
        SplitTrainer(FakeClient("bidirectional", tmp_path), arguments(), train_dataset=rows())
    with pytest.raises(ValueError, match="the gradient lies on two machines"):
        SplitTrainer(FakeClient("stream", tmp_path), arguments(), train_dataset=rows())
    made = SplitTrainer(FakeClient("stream", tmp_path), arguments(max_grad_norm=0.0), train_dataset=rows())
    with pytest.raises(ValueError, match="every label is -100"):
        made.training_step(made.model, {}, num_items_in_batch=torch.tensor(0))
    with pytest.raises(RuntimeError, match="the tail is on the server; train with SplitTrainer"):
        _RemoteTail()(torch.zeros(1), torch.zeros(1), torch.zeros(1))
