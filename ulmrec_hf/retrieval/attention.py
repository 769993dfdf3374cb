"""Multi-head self-attention, as SASRec and BERT4Rec use it."""

import torch
from torch import nn


class SelfAttention(nn.Module):
    """Scaled dot-product attention with several heads and dropout on its weights (Vaswani et al., 2017)."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads; got {hidden_size} and {num_heads}.")
        self.num_heads, self.dropout = num_heads, dropout
        self.input = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, readable: torch.Tensor | None = None) -> torch.Tensor:
        """float [batch, length, hidden_size] -> the same shape.

        Args:
            readable: bool [batch, length], the positions that all positions read, at least one in each row; None =
                each position reads itself and those before it.
        """
        query, key, value = self.input(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if readable is None else readable[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=readable is None,
        )
        return self.output(heads.transpose(1, 2).flatten(2))
