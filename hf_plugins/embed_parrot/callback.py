"""Watch what the cut of a split model leaks while it is trained."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_plugins.embed_parrot.defences import Defence, NoDefence
from hf_plugins.embed_parrot.hook import collect_states, embedding_table
from hf_plugins.embed_parrot.inversion import HotmapEmbedInversion, RidgeInversion

logger = logging.getLogger(__name__)


class LeakageCallback(TrainerCallback):
    """Attacks the states at a cut at every n-th evaluation and logs the share of tokens read back.

    The figures are named ``embed_parrot/token_acc@LAYER/ATTACK``; they join the metrics of that evaluation
    and the log history. The model is left as it was.

    Args:
        layer: The cut: the states that layer ``layer`` hands on.
        fit_ids: Tokens of public texts, 1-D each, that ridge is fitted on.
        test_ids: Tokens of texts that are attacked.
        every: Attack at every n-th evaluation; the first counts.
        defence: What the client does to the states before it sends them; the attacker adapts to it.
        seed: Of the defence's randomness.

    Raises:
        ValueError: If there is nothing to fit or to attack, or ``every`` is below 1.
    """

    def __init__(
        self,
        layer: int,
        fit_ids: Sequence[Tensor],
        test_ids: Sequence[Tensor],
        *,
        every: int = 1,
        defence: Defence | None = None,
        seed: int = 0,
    ) -> None:
        if not fit_ids or not test_ids or every < 1:
            raise ValueError(
                f"the callback needs texts to fit and to attack and every >= 1; got {len(fit_ids)}, "
                f"{len(test_ids)}, {every}."
            )
        self.layer, self.fit_ids, self.test_ids = layer, fit_ids, test_ids
        self.every, self.defence, self.seed = every, defence or NoDefence(), seed
        self.num_evaluations = 0

    def attack(self, model: torch.nn.Module) -> dict[str, float]:
        """Share of tokens that HEI and ridge read back at the cut now."""
        states = collect_states(model, [*self.fit_ids, *self.test_ids], [self.layer])[self.layer]
        generator = torch.Generator().manual_seed(self.seed)
        defence = self.defence.at_scale(float(torch.cat(states).std()))
        states = [defence(x, generator) for x in states]
        view = defence.adaptive_view()
        table = embedding_table(model).cpu()
        fit = view.canonical(torch.cat(states[: len(self.fit_ids)]))
        test, truth = torch.cat(states[len(self.fit_ids) :]), torch.cat(list(self.test_ids))
        ridge = RidgeInversion(view.codebook(table)).update(fit, torch.cat(list(self.fit_ids)))
        ridge.solve(penalties=(1e-6,))
        guesses = {
            "hei": HotmapEmbedInversion(view.codebook(table), canonical=view.canonical)(test),
            "ridge": ridge(view.canonical(test)),
        }
        return {
            f"embed_parrot/token_acc@{self.layer}/{name}": float((ids == truth).double().mean())
            for name, ids in guesses.items()
        }

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Attack, and log on the main process."""
        self.num_evaluations += 1
        # Every process sees the same weights; one attack is enough.
        if (self.num_evaluations - 1) % self.every or not state.is_world_process_zero or model is None:
            return
        found = self.attack(model)
        if metrics is not None:
            metrics.update(found)
        state.log_history.append({**found, "step": state.global_step, "epoch": state.epoch})
        logger.info("step %d: %s", state.global_step, found)
