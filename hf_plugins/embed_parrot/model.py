"""Embed Parrot as a transformers model: hidden states in, estimated input embeddings out."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import AutoConfig, AutoModel, GPT2Config, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_plugins.embed_parrot.cosine_loss import cosine_cross_entropy, cosine_loss
from hf_plugins.embed_parrot.inversion import HotmapEmbedInversion
from hf_plugins.embed_parrot.matching import Matches, unit_rows


class EmbedParrotConfig(PreTrainedConfig):
    """Config of `EmbedParrot`.

    Args:
        target_hidden_size: Width d of the attacked model.
        layer: Which layer's states it inverts, for the record.
        decoder: Config of the decode model as a dict with its ``model_type``; None is a small GPT-2 of fresh
            weights, 2 layers of width 128.
        causal: Whether a position sees only earlier states (the paper's GPT-2) or all of them.
        decoder_trainable: Whether the decode model learns, or only the two adapters do.
        loss: ``cosine`` (the paper) or ``cosine_ce``.
        tau: Inverse temperature of ``cosine_ce``.
        linear_skip: Add a fixed linear map from input to output beside the decode model, which learns what
            the map misses; see `EmbedParrot.start_from_ridge`.
        kwargs: Of `PreTrainedConfig`.

    Raises:
        ValueError: If ``loss`` is unknown or ``tau`` is not positive.
    """

    model_type = "embed_parrot"

    def __init__(
        self,
        target_hidden_size: int = 768,
        layer: int = 0,
        decoder: dict[str, Any] | None = None,
        causal: bool = True,
        decoder_trainable: bool = True,
        loss: str = "cosine",
        tau: float = 20.0,
        linear_skip: bool = False,
        **kwargs: Any,
    ) -> None:
        if loss not in ("cosine", "cosine_ce"):
            raise ValueError(f"loss must be 'cosine' (the paper) or 'cosine_ce'; got {loss!r}.")
        if not tau > 0:
            raise ValueError(
                f"tau must be > 0; got {tau}. 20 spreads cosines of 0.5 and 0.7 by a factor of 55."
            )
        self.target_hidden_size, self.layer = target_hidden_size, layer
        self.decoder = small_decoder() if decoder is None else decoder
        self.causal, self.decoder_trainable = causal, decoder_trainable
        self.loss, self.tau, self.linear_skip = loss, tau, linear_skip
        super().__init__(**kwargs)


def small_decoder(num_layers: int = 2, width: int = 128, *, num_positions: int = 1024) -> dict[str, Any]:
    """Config of a GPT-2 body with fresh weights and heads of width 64.

    Args:
        num_layers: Its layers.
        width: Its width, a multiple of 64.
        num_positions: Longest text.

    Returns:
        A dict for `EmbedParrotConfig.decoder`.
    """
    config = GPT2Config(
        n_layer=num_layers,
        n_embd=width,
        n_head=width // 64,
        n_positions=num_positions,
        vocab_size=1,
        bos_token_id=None,
        eos_token_id=None,
        # Public text is plentiful, so nothing is gained by dropping values.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return config.to_diff_dict() | {"model_type": "gpt2"}


class _NoTable(nn.Module):
    """Stands where the decode model's token table was; holds nothing."""


@dataclass
class EmbedParrotOutput(ModelOutput):
    """What a parrot answers."""

    loss: Tensor | None = None
    """Scalar fp32, if labels were given."""
    embeds: Tensor | None = None
    """Estimated input embeddings (batch, positions, target width)."""


class EmbedParrot(PreTrainedModel):
    """EP: a linear adapter, a decode model run on it, and a linear adapter back to the target's width.

    The attacked model is no part of it; hidden states come in as data, so a stock ``Trainer`` under
    ``accelerate launch`` trains it and checkpoints hold the parrot alone.

    Args:
        config: See `EmbedParrotConfig`.

    Source: Embed Parrot, arXiv 2405.11916. Linear adapters and a trained decode model are assumptions: the
        paper's details are not public. The bidirectional mask, ``cosine_ce`` and the skip are ours.
    """

    config_class = EmbedParrotConfig
    base_model_prefix = "parrot"
    main_input_name = "hidden_states"

    def __init__(self, config: EmbedParrotConfig) -> None:
        super().__init__(config)
        decoder_config = AutoConfig.for_model(**config.decoder)
        width = decoder_config.hidden_size
        self.num_positions = decoder_config.max_position_embeddings
        self.adapter_in = nn.Linear(config.target_hidden_size, width)
        self.decoder = AutoModel.from_config(decoder_config)
        self.adapter_out = nn.Linear(width, config.target_hidden_size)
        width = config.target_hidden_size
        self.skip = nn.Linear(width, width).requires_grad_(False) if config.linear_skip else None
        self._drop_token_table()
        # Held outside of the modules: no checkpoint carries it and DDP does not send it round.
        self._codebook: list[Tensor] = []
        self._hotmap: HotmapEmbedInversion | None = None
        self.post_init()

    def _drop_token_table(self) -> None:
        # Inputs come as vectors, so the table is dead weight, and DDP would wait for its gradient.
        self.decoder.set_input_embeddings(_NoTable())
        self.decoder.config.vocab_size = 1
        self.decoder.requires_grad_(self.config.decoder_trainable)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a decode model that was frozen stays frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        parrot = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading makes all parameters anew, each with a gradient.
        if parrot.skip is not None:
            parrot.skip.requires_grad_(False)
        parrot.decoder.requires_grad_(parrot.config.decoder_trainable)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        if module in (self.adapter_in, self.adapter_out):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif module is self.skip:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @classmethod
    def from_decoder(cls, name_or_path: str, *, target_hidden_size: int, **options: Any) -> "EmbedParrot":
        """A parrot whose decode model starts from published weights, such as ``gpt2`` or (the paper)
        ``gpt2-xl``.

        Args:
            name_or_path: What ``AutoModel.from_pretrained`` takes.
            target_hidden_size: Width of the attacked model.
            options: Further fields of `EmbedParrotConfig`.

        Returns:
            The parrot, its adapters fresh.
        """
        decoder = AutoModel.from_pretrained(name_or_path)
        description = decoder.config.to_diff_dict() | {
            "model_type": decoder.config.model_type,
            "vocab_size": 1,
        }
        parrot = cls(EmbedParrotConfig(target_hidden_size=target_hidden_size, decoder=description, **options))
        parrot.decoder = decoder
        parrot._drop_token_table()
        return parrot

    def set_codebook(self, codebook: Tensor) -> "EmbedParrot":
        """Give it the target's input embeddings (V, d): labels become embeddings, ``cosine_ce`` and decoding
        work.

        Args:
            codebook: Input embeddings of the attacked model, or what a defence makes of them.

        Returns:
            Itself.
        """
        if codebook.shape[1] != self.config.target_hidden_size:
            raise ValueError(
                f"the codebook is {codebook.shape[1]} wide, this parrot serves a model of width "
                f"{self.config.target_hidden_size}; take the input embeddings of the attacked model."
            )
        self._codebook = [codebook.detach().float(), unit_rows(codebook.detach())]
        self._hotmap = None
        return self

    def _table(self, unit: bool) -> Tensor:
        if not self._codebook:
            raise RuntimeError(
                "this parrot knows no codebook; call set_codebook(input embeddings of the target)."
            )
        if self._codebook[0].device != self.device:
            self._codebook = [table.to(self.device) for table in self._codebook]
        return self._codebook[int(unit)]

    def start_from_ridge(self, weight: Tensor) -> "EmbedParrot":
        """Begin where the linear map ends: the skip takes its weights and the output adapter starts at zero.

        The skip does not train: the map leans on directions of small variance, which Adam's equal steps
        wreck.

        Args:
            weight: ``RidgeInversion.weight_DE``, (d + 1, d), the bias in its last row.

        Returns:
            Itself.

        Raises:
            ValueError: If the parrot was made without ``linear_skip``.
        """
        if self.skip is None:
            raise ValueError("start_from_ridge needs a parrot made with linear_skip=True.")
        with torch.no_grad():
            self.skip.weight.copy_(weight[:-1].T)
            self.skip.bias.copy_(weight[-1])
            self.adapter_out.weight.zero_()
            self.adapter_out.bias.zero_()
        return self

    def _check(self, hidden: Tensor, mask: Tensor, position_ids: Tensor | None) -> None:
        if hidden.dim() != 3 or hidden.shape[-1] != self.config.target_hidden_size:
            raise ValueError(
                f"hidden_states must be (batch, positions, {self.config.target_hidden_size}); got "
                f"{tuple(hidden.shape)}. A parrot serves one model and one layer."
            )
        if hidden.numel() == 0 or not bool(mask.any()):
            raise ValueError(
                f"the batch holds no token (shape {tuple(hidden.shape)}); leave empty texts out."
            )
        if hidden.shape[1] > self.num_positions:
            raise ValueError(
                f"{hidden.shape[1]} positions, but the decode model has {self.num_positions}; cut the "
                "texts into windows or take a decode model with more."
            )
        if position_ids is None and bool((mask[:, 0] == 0).any()):
            raise ValueError("states are padded on the left; pad on the right or pass position_ids.")
        if not bool(torch.isfinite(hidden[mask.bool()]).all()):
            raise ValueError(
                "hidden_states hold NaN or infinity; look for overflow in the attacked model's dtype."
            )

    def _attention(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        count = mask.shape[1]
        seen = mask[:, None, None, :].bool().expand(-1, 1, count, -1)
        if self.config.causal:
            seen = seen & torch.ones(count, count, dtype=torch.bool, device=mask.device).tril()
        # An explicit 4D mask is taken as it is by every decode model, whatever its own habit.
        return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(
            ~seen, torch.finfo(dtype).min
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        labels_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> EmbedParrotOutput:
        """Estimate input embeddings.

        Args:
            hidden_states: States of the attacked model (batch, positions, target width).
            attention_mask: 1 for tokens, 0 for padding (batch, positions).
            labels_embeds: Right input embeddings, as ``hidden_states``; taken from the codebook where only
                ``labels`` are given.
            labels: Right tokens (batch, positions), -100 where they do not count.
            position_ids: Positions, needed only for padding on the left.

        Returns:
            The embeddings, and the loss if there was something to compare with.

        Raises:
            ValueError: If shapes, padding, length or values are not what it can work on.
        """
        mask = hidden_states.new_ones(hidden_states.shape[:2]) if attention_mask is None else attention_mask
        self._check(hidden_states, mask, position_ids)
        x = self.adapter_in(hidden_states.to(self.adapter_in.weight.dtype))
        # nan_to_num would hide faults; padding is zeroed because it may hold anything.
        x = x.masked_fill(~mask.bool()[..., None], 0)
        decoded = self.decoder(
            inputs_embeds=x, attention_mask=self._attention(mask, x.dtype), position_ids=position_ids
        ).last_hidden_state
        embeds = self.adapter_out(decoded)
        if self.skip is not None:
            embeds = embeds + self.skip(hidden_states.to(self.skip.weight.dtype))
        return EmbedParrotOutput(loss=self._loss(embeds, mask, labels_embeds, labels), embeds=embeds)

    def _loss(
        self, embeds: Tensor, mask: Tensor, labels_embeds: Tensor | None, labels: Tensor | None
    ) -> Tensor | None:
        if labels is None and labels_embeds is None:
            return None
        counted = mask.bool() if labels is None else mask.bool() & (labels != -100)
        if self.config.loss == "cosine_ce":
            if labels is None:
                raise ValueError(
                    "loss='cosine_ce' compares with tokens; pass labels, not labels_embeds alone."
                )
            return cosine_cross_entropy(
                embeds[counted], self._table(unit=True), labels[counted], tau=self.config.tau
            )
        target = self._table(unit=False)[labels[counted]] if labels_embeds is None else labels_embeds[counted]
        return cosine_loss(embeds[counted], target)

    @torch.no_grad()
    def top(self, hidden_states: Tensor, top: int = 1) -> Matches:
        """The ``top`` best tokens of one text's states (positions, target width), by HEI on the estimate."""
        embeds = self(hidden_states=hidden_states[None].to(self.device)).embeds[0]
        if self._hotmap is None:
            self._hotmap = HotmapEmbedInversion(self._table(unit=True))
        return self._hotmap.top(embeds.float(), top)


AutoConfig.register("embed_parrot", EmbedParrotConfig)
AutoModel.register(EmbedParrotConfig, EmbedParrot)
