"""Training that the client drives, batch by batch: the server's engine around a stock Trainer, and the
client's Trainer whose tail is far away."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_plugins.tee_split.batches import IGNORED, Sample, collate
from hf_plugins.tee_split.storage import SealedStore
from hf_plugins.tee_split.tensors import MessageError


class TailEngine:
    """Runs single micro-batches and optimizer steps of a stock Trainer on the server.

    One client at a time owns the accumulation window: from its first micro-batch to its STEP. A step that its
    client asks for twice is applied once; a half-accumulated one is dropped when its client goes.

    Args:
        model: The tail with its adapter.
        arguments: Of the Trainer; the learning rate comes with each STEP.
        store: Where the engine's state is sealed.
        seal_steps: Steps between two sealed states.
        return_gradient: Whether micro-batches return the gradient of the hidden states.
        label: What protects the run.
        bound_seconds: How long a client waits for another one's window.

    Attributes:
        lock: Held while the model changes; take it to read the model whole.
    """

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        *,
        store: SealedStore,
        seal_steps: int,
        return_gradient: bool,
        label: str,
        bound_seconds: float,
    ) -> None:
        self.model, self._store, self._seal_steps = model, store, seal_steps
        self._return_gradient, self._label, self._bound = return_gradient, label, bound_seconds
        self._trainer = Trainer(model=model, args=arguments, data_collator=collate)
        # Set by the Trainer's loop otherwise; the loss is scaled by num_items alone.
        self._trainer.current_gradient_accumulation_steps = 1
        self._optimizer = self._trainer.create_optimizer()
        self._applied: dict[str, int] = {}
        self._durable: dict[str, int] = {}
        self._owner: tuple[str, int] | None = None
        self._micros = 0
        self._free = threading.Condition()
        self.lock = self._free
        self._steps = 0
        if "engine" in store:
            self._restore()

    def standing(self, client: str) -> dict[str, int]:
        """Last applied and last sealed step of a client."""
        with self._free:
            return {"applied": self._applied.get(client, 0), "durable": self._durable.get(client, 0)}

    def micro(
        self,
        client: str,
        *,
        session: int = 0,
        step: int,
        micro: int,
        num_items: int,
        samples: Sequence[Sample],
    ) -> tuple[float, Tensor | None]:
        """Forward and backward of one micro-batch.

        Args:
            client: Whose it is.
            session: Of which connection; a new one of the same client takes its window over from the start.
            step: Number of the step it belongs to; must follow the last applied one.
            micro: Its number within the step.
            num_items: Predicted tokens of the whole step; the loss is divided by it.
            samples: The micro-batch.

        Returns:
            The loss, and the gradient of the joined hidden states if asked for.

        Raises:
            MessageError: If it is not the micro-batch that is due.
        """
        with self._free:
            if step != self._applied.get(client, 0) + 1 or num_items < 1:
                raise MessageError(f"step {step} came where {self._applied.get(client, 0) + 1} was due")
            owner = (client, session)
            if self._owner is not None and self._owner[0] == client and self._owner != owner:
                self._discard()
            if self._owner != owner and not self._free.wait_for(
                lambda: self._owner is None, timeout=self._bound
            ):
                raise MessageError("another client holds the step; try again")
            if micro != (self._micros if self._owner == owner else 0):
                raise MessageError(f"micro-batch {micro} of step {step} is not the one that is due")
            self._owner = owner
            loss, gradient = self._forward_backward(samples, num_items)
            self._micros += 1
        return loss, gradient

    def _forward_backward(self, samples: Sequence[Sample], num_items: int) -> tuple[float, Tensor | None]:
        inputs = collate(samples)
        if self._return_gradient:
            inputs["inputs_embeds"].requires_grad_(True)
        embeds = inputs["inputs_embeds"]
        loss = self._trainer.training_step(self.model, inputs, num_items_in_batch=torch.tensor(num_items))
        if not self._return_gradient:
            return float(loss), None
        assert embeds.grad is not None, "the tail's first layer depends on its input"
        rows = [embeds.grad[row, : sample.labels_T.shape[0]] for row, sample in enumerate(samples)]
        return float(loss), torch.cat(rows)

    def step(self, client: str, *, session: int = 0, step: int, learning_rate: float) -> dict[str, Any]:
        """Apply the accumulated gradient.

        Args:
            client: Who asks.
            session: Over which connection.
            step: Number of the step.
            learning_rate: Of this step.

        Returns:
            Last applied and last sealed step, and the gradient's norm (None for a step applied before).

        Raises:
            MessageError: If nothing was accumulated for this step.
        """
        with self._free:
            norm = None
            if step > self._applied.get(client, 0):
                if (
                    self._owner != (client, session)
                    or not self._micros
                    or step != self._applied.get(client, 0) + 1
                ):
                    raise MessageError(f"step {step} has no micro-batch to apply")
                norm = self._apply(learning_rate)
                self._applied[client] = step
                self._steps += 1
                self._release()
                if self._steps % self._seal_steps == 0:
                    self.seal()
        return {**self.standing(client), "grad_norm": norm}

    def _apply(self, learning_rate: float) -> float:
        bound = self._trainer.args.max_grad_norm
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if bound and bound > 0:
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), bound))
        else:
            norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.model.zero_grad()
        return norm

    def _release(self) -> None:
        self._owner, self._micros = None, 0
        self._free.notify_all()

    def drop(self, client: str, *, session: int = 0) -> None:
        """Forget what a client has accumulated over a connection that ended; it will send the step again."""
        with self._free:
            if self._owner == (client, session):
                self._discard()

    def _discard(self) -> None:
        self.model.zero_grad()
        self._release()

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def seal(self) -> None:
        """Write parameters, optimizer, random state and every client's last step to the store, sealed."""
        with self._free:
            tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
            for name, parameter in self._parameters().items():
                tensors[f"parameter/{name}"] = parameter.detach()
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer/{key}/{name}"] = value
            metadata = {"applied": self._applied, "steps": self._steps, "label": self._label}
            self._store.write("engine", metadata, tensors)
            self._durable = dict(self._applied)

    def _restore(self) -> None:
        metadata, tensors = self._store.read("engine")
        parameters = self._parameters()
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "parameter":
                with torch.no_grad():
                    parameters[rest].copy_(value)
            elif kind == "optimizer":
                name, _, parameter = rest.partition("/")
                self._optimizer.state[parameters[parameter]][name] = value.clone()
        torch.set_rng_state(tensors["rng"].clone())
        self._applied, self._steps = dict(metadata["applied"]), metadata["steps"]
        self._durable = dict(self._applied)


class _RemoteTail(nn.Module):
    """What the client's Trainer optimises in stream mode: nothing that is here."""

    def __init__(self) -> None:
        super().__init__()
        # The Trainer asks for a parameter to put an optimizer on; this one never gets a gradient.
        self.placeholder = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        """Never run: the tail is on the server."""
        raise RuntimeError(
            "the tail is on the server; train with SplitTrainer, evaluate on the server's adapter"
        )


class _SendStep(TrainerCallback):
    """Sends STEP where the local optimizer steps, with the learning rate of the local schedule."""

    def __init__(self, step: Callable[[float], None]) -> None:
        self.step = step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.step(kwargs["optimizer"].param_groups[0]["lr"])
        return control


def pad_token_batch(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Collate rows of ``input_ids`` and ``labels`` (lists of equal length), padded on the right.

    Labels default to the ids.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for number, row in enumerate(rows):
        size = len(row["input_ids"])
        ids[number, :size] = torch.as_tensor(row["input_ids"])
        labels[number, :size] = torch.as_tensor(row.get("labels", row["input_ids"]))
        mask[number, :size] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class SplitTrainer(Trainer):
    """A Trainer on the client whose batches go through a `SplitClient`; schedule, logs and callbacks are
    local.

    Args:
        client: Connected client in stream or bidirectional mode.
        args: Of the Trainer; ``max_grad_norm`` is the server's business and must be 0 here.
        front: Trainable client half, in bidirectional mode; None in stream mode.
        train_dataset: Rows of ``input_ids`` and ``labels``.
        callbacks: As for any Trainer.

    Raises:
        ValueError: If mode, front and options do not fit together.
    """

    def __init__(
        self,
        client: Any,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        front: nn.Module | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        mode = client.config.mode
        if mode == "cache":
            raise ValueError(
                "in cache mode the server trains by itself: call SplitClient.upload and SplitClient.train"
            )
        if (mode == "bidirectional") != (front is not None):
            raise ValueError(
                "a client half that learns (front) goes with mode='bidirectional', and only with it"
            )
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm}: the gradient lies on two machines. Set 0 here, and the "
                "bound on the server, which clips its own part."
            )
        args.remove_unused_columns = False
        self.client, self._front = client, front
        super().__init__(
            model=front if front is not None else _RemoteTail(),
            args=args,
            train_dataset=train_dataset,
            data_collator=pad_token_batch,
            callbacks=[_SendStep(client.step), *callbacks],
        )
        # Counts predicted tokens over the accumulation window, as for any causal language model.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Send one micro-batch; the window's losses come back with its last one.

        Raises:
            ValueError: If the batch has nothing to predict.
        """
        if not num_items_in_batch:
            raise ValueError(
                "the batch predicts no token: every label is -100. Check the labels of the dataset."
            )
        inputs = self._prepare_inputs(inputs)
        count = int(num_items_in_batch)
        if self._front is not None:
            return self._both_ways(inputs, count)
        self.client.micro(self.client.encode_batch(inputs), num_items=count)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        return torch.tensor(sum(self.client.losses()), device=self.args.device)

    def _both_ways(self, inputs: Mapping[str, Tensor], count: int) -> Tensor:
        assert self._front is not None, "called in bidirectional mode only"
        self._front.train()
        positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
        hidden = self._front.base_model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=positions.expand_as(inputs["input_ids"]),
            use_cache=False,
        ).last_hidden_state
        keep = inputs["attention_mask"].bool()
        joined = hidden[keep]
        sizes = inputs["attention_mask"].sum(1).tolist()
        rows = zip(joined.detach().split(sizes), inputs["labels"][keep].split(sizes), strict=True)
        loss, gradient = self.client.micro_both_ways([Sample(h, y) for h, y in rows], num_items=count)
        self.accelerator.backward(RemoteLoss.apply(joined, gradient.to(joined.device), loss))
        return torch.tensor(loss, device=self.args.device)


class RemoteLoss(torch.autograd.Function):
    """The server's loss as a function of what was sent, with the gradient the server returned."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor, loss: float) -> Tensor:
        """The loss, as a scalar of the hidden state's device."""
        ctx.save_for_backward(gradient)
        return hidden.new_tensor(loss)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        """The server's gradient, scaled."""
        return grad_output * ctx.saved_tensors[0], None, None
