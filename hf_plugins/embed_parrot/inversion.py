"""The attacks without training by gradient: the model's own head, the hot map, and a linear map solved in
one pass."""

# Shapes: T tokens, D width, V vocabulary, K guesses per token.
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_plugins.embed_parrot.matching import Matches, best_rows, lowest_twins, unit_rows

Canonical = Callable[[Tensor], Tensor]
"""Maps vectors to what a defence cannot hide, (T, D) to (T, D); see `defences.AdaptiveView`."""


class BaseEmbedInversion:
    """BEI: read hidden states with the model's own output head, ``argmax_v (H W_head^T)[t, v]``.

    At depth it answers with the *next* token, because that is what the head was trained to say; score it
    against the text moved by one position as well. Softmax would not change the argmax and is left out.

    Args:
        head_VD: Output head (V, D).
        norm: Final normalisation of the model, applied first (the "logit lens"); None reads the states as
            they are, which is the formula to the letter.
        bias_V: Bias of the head, if it has one.

    Source: Embed Parrot, arXiv 2405.11916, BEI; the norm is our option, the paper's choice is not known.
    """

    def __init__(
        self, head_VD: Tensor, *, norm: Callable[[Tensor], Tensor] | None = None, bias_V: Tensor | None = None
    ) -> None:
        # The bias becomes one more column, so that one product gives the logits.
        head_VD = head_VD.detach().float()
        self.has_bias = bias_V is not None
        self.head_VD = (
            head_VD if bias_V is None else torch.cat([head_VD, bias_V.detach().float()[:, None]], 1)
        )
        self.norm = norm
        self.twins_V = lowest_twins(self.head_VD)

    @torch.no_grad()
    def top(self, hidden_TD: Tensor, top: int = 1) -> Matches:
        """The ``top`` best tokens of each state (T, D) with their logits."""
        x_TD = (hidden_TD if self.norm is None else self.norm(hidden_TD)).float()
        if self.has_bias:
            x_TD = torch.cat([x_TD, x_TD.new_ones(len(x_TD), 1)], 1)
        return best_rows(x_TD, self.head_VD, self.twins_V, top=top)

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        """Token ids (T,) of states (T, D)."""
        return self.top(hidden_TD).ids_TK[:, 0]


class HotmapEmbedInversion:
    """HEI: the token whose input embedding has the largest cosine with the hidden state.

    Args:
        codebook_VD: Input embeddings (V, D), or what a defence makes of them.
        canonical: Applied to states and codebook alike before they are compared.

    Source: Embed Parrot, arXiv 2405.11916, HEI.
    """

    def __init__(self, codebook_VD: Tensor, *, canonical: Canonical | None = None) -> None:
        self.canonical = canonical
        rows_VD = codebook_VD.detach() if canonical is None else canonical(codebook_VD.detach())
        self.unit_VD = unit_rows(rows_VD)
        self.twins_V = lowest_twins(self.unit_VD)

    @property
    def num_duplicates(self) -> int:
        """Tokens whose embedding points exactly as that of a lower id: nobody can tell the two apart."""
        return int((self.twins_V != torch.arange(len(self.twins_V))).sum())

    @torch.no_grad()
    def top(self, hidden_TD: Tensor, top: int = 1) -> Matches:
        """The ``top`` best tokens of each state (T, D) with their cosines."""
        x_TD = hidden_TD if self.canonical is None else self.canonical(hidden_TD)
        return best_rows(unit_rows(x_TD), self.unit_VD, self.twins_V, top=top)

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        """Token ids (T,) of states (T, D)."""
        return self.top(hidden_TD).ids_TK[:, 0]


class RidgeInversion:
    """A linear map from hidden states back to input embeddings, then HEI: the baseline a parrot must beat.

    Minimises ``||[H, 1] W - E[x]||^2 + lambda ||W||^2``. Only the normal equations are kept, so public text
    streams through in one pass: `update` as often as there is text, then `solve`, then call.

    Args:
        codebook_VD: Input embeddings (V, D).
        decode: HEI on the same table, if there is one already; its rows are costly to normalise.

    Source: closed-form counterpart of Embed Parrot (arXiv 2405.11916); not in the paper.
    """

    def __init__(self, codebook_VD: Tensor, *, decode: HotmapEmbedInversion | None = None) -> None:
        self.codebook_VD = codebook_VD.detach().float()
        self.decode = decode or HotmapEmbedInversion(codebook_VD)
        self.num_tokens = 0
        self.weight_DE: Tensor | None = None
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None

    def update(self, hidden_TD: Tensor, ids_T: Tensor) -> "RidgeInversion":
        """Add known text.

        Args:
            hidden_TD: Hidden states (T, D).
            ids_T: Their tokens (T,).

        Returns:
            Itself.

        Raises:
            ValueError: If the two differ in length, or there is nothing in them.
        """
        if len(hidden_TD) != len(ids_T) or len(ids_T) == 0:
            raise ValueError(
                f"a fit needs as many hidden states as tokens, at least one; got {len(hidden_TD)} and "
                f"{len(ids_T)}."
            )
        x_TD = hidden_TD.double()
        x_TD = torch.cat([x_TD, x_TD.new_ones(len(x_TD), 1)], 1)
        y_TE = self.codebook_VD[ids_T].double()
        gram, cross = x_TD.T @ x_TD, x_TD.T @ y_TE
        self._gram = gram if self._gram is None else self._gram + gram
        self._cross = cross if self._cross is None else self._cross + cross
        self.num_tokens += len(ids_T)
        return self

    def solve(
        self,
        *,
        penalties: Sequence[float] = (1e-8, 1e-6, 1e-4, 1e-2, 1.0),
        hidden_TD: Tensor | None = None,
        ids_T: Tensor | None = None,
    ) -> float:
        """Solve for the map; among several penalties take the one that recovers most of held-out text.

        Args:
            penalties: Values of ``lambda`` in units of the mean diagonal of ``X^T X``.
            hidden_TD: Held-out states (T, D); without them the first penalty is taken.
            ids_T: Their tokens (T,).

        Returns:
            The penalty taken.

        Raises:
            RuntimeError: If nothing was added by `update`.
        """
        if self._gram is None or self._cross is None:
            raise RuntimeError("the map has seen no text; call update(hidden, ids) before solve().")
        values, basis = torch.linalg.eigh(self._gram)
        rotated = basis.T @ self._cross
        scale = float(self._gram.diagonal().mean())
        best = (-1.0, 0.0, self._cross)
        for penalty in penalties:
            # Rounding leaves tiny negative eigenvalues where the Gram matrix is singular.
            weight = basis @ (rotated / (values.clamp_min(0) + penalty * scale)[:, None])
            self.weight_DE = weight.float()
            if hidden_TD is None or ids_T is None:
                return penalty
            share = float((self(hidden_TD) == ids_T).double().mean())
            if share > best[0]:
                best = (share, penalty, weight)
        self.weight_DE = best[2].float()
        return best[1]

    def to_embeddings(self, hidden_TD: Tensor) -> Tensor:
        """Estimated input embeddings (T, D), fp32, of states (T, D).

        Raises:
            RuntimeError: If `solve` was not called.
        """
        if self.weight_DE is None:
            raise RuntimeError("the map is not solved yet; call solve() after the last update().")
        weight_DE = self.weight_DE.to(hidden_TD.device)
        if hidden_TD.shape[1] != len(weight_DE) - 1:
            raise ValueError(
                f"hidden states have width {hidden_TD.shape[1]}, the map was fitted on "
                f"{len(weight_DE) - 1}; fit one map for each model and layer."
            )
        return hidden_TD.float() @ weight_DE[:-1] + weight_DE[-1]

    @torch.no_grad()
    def top(self, hidden_TD: Tensor, top: int = 1) -> Matches:
        """The ``top`` best tokens of each state (T, D) with their cosines."""
        return self.decode.top(self.to_embeddings(hidden_TD), top)

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        """Token ids (T,) of states (T, D)."""
        return self.top(hidden_TD).ids_TK[:, 0]
