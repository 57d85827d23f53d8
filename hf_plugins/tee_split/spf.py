"""SPF: a linear layer of which only some rows learn, as a separate row-sparse difference.

The frozen weight stays untouched and has no optimizer state; a masked dense gradient would not do, since
AdamW's weight decay moves entries whose gradient is zero.
"""

# Shapes: S rows that learn, I inputs, O outputs, B any batch.
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpfLinear(nn.Module):
    """``y = base(x); y[..., rows] += x @ delta.T`` with a frozen ``base``.

    Args:
        base: Any module that maps (..., I) to (..., O): a linear layer, one under LoRA, or GPT-2's Conv1D.
        rows: Output rows that learn, sorted, without repetition.
        in_features: I.
        out_features: O.
        transposed: Whether ``base.weight`` is stored as (I, O), as Conv1D does.

    Raises:
        ValueError: If rows repeat, are unsorted, or lie outside of the layer.
    """

    def __init__(
        self, base: nn.Module, rows: Tensor, *, in_features: int, out_features: int, transposed: bool = False
    ) -> None:
        super().__init__()
        rows = rows.to(torch.int64).cpu()
        if rows.numel() and (rows[0] < 0 or rows[-1] >= out_features or bool((rows[1:] <= rows[:-1]).any())):
            raise ValueError(
                f"rows must be sorted, unique and in [0, {out_features}); got {rows[:8].tolist()}..."
            )
        self.base = base
        self.transposed = transposed
        self.in_features, self.out_features = in_features, out_features
        device = next(base.parameters()).device
        self.spf_rows: Tensor
        self.register_buffer("spf_rows", rows.to(device), persistent=False)
        # fp32 whatever the model's dtype: a difference of 1e-4 is lost in bfloat16.
        self.spf_delta = nn.Parameter(torch.zeros(rows.numel(), in_features, device=device))

    @property
    def weight(self) -> Tensor:
        """The frozen weight, as stored by the base."""
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return None if self.base.bias is None else self.base.get_parameter("bias")

    def forward(self, x_BI: Tensor) -> Tensor:
        """The layer's output, (..., O), in the dtype of the base's output.

        Gradients: ``g_x = g W + g[..., rows] delta`` and ``g_delta = g[..., rows].T x``, which are the chosen
        rows of the dense weight's gradient.
        """
        y_BO = self.base(x_BI)
        if self.spf_delta.shape[0] == 0:
            return y_BO
        step_BS = F.linear(x_BI, self.spf_delta.to(x_BI.dtype))
        return y_BO.index_add(-1, self.spf_rows, step_BS.to(y_BO.dtype))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the difference to the base's weight in place and return the base."""
        weight = self.weight
        delta_SI = self.spf_delta.to(weight.dtype)
        if self.transposed:
            weight.index_add_(1, self.spf_rows, delta_SI.T.contiguous())
        else:
            weight.index_add_(0, self.spf_rows, delta_SI)
        return self.base
