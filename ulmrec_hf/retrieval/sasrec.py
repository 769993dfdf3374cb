"""SASRec: self-attentive sequential recommendation (Kang & McAuley, ICDM 2018)."""

import math

import torch
from torch import nn

from .attention import SelfAttention
from .neural import NeuralRetriever, NeuralRetrieverConfig


class SASRecConfig(NeuralRetrieverConfig):
    """The config of `SASRec`; `hidden_size` must be a multiple of `num_heads`."""

    model_type = "sasrec"

    num_heads: int = 2


class SASRecBlock(nn.Module):
    """Causal self-attention and a position-wise feed-forward layer: x + dropout(layer(norm(x))) for each."""

    def __init__(self, config: SASRecConfig):
        super().__init__()
        size = config.hidden_size
        self.attention_norm = nn.LayerNorm(size)
        self.attention = SelfAttention(size, config.num_heads, config.dropout)
        self.feed_forward_norm = nn.LayerNorm(size)
        self.feed_forward = nn.Sequential(
            nn.Linear(size, size), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(size, size)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class SASRec(NeuralRetriever):
    """SASRec with tied item embeddings, trained by cross-entropy over all items instead of one sampled negative.

    The paper pads on the left and so counts positions from the newest item; here the oldest item of a row has position
    0. Every position then learns to predict at the very place at which a history of that length is scored.
    """

    config_class = SASRecConfig

    def __init__(self, config: SASRecConfig):
        super().__init__(config)
        self.position_embedding = nn.Embedding(config.max_history, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(SASRecBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def encode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `NeuralRetriever.encode`; a row has at most `max_history` positions."""
        items = self.item_embedding(input_ids) * math.sqrt(self.config.hidden_size)
        hidden = self.dropout(items + self.position_embedding.weight[: input_ids.shape[1]])
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)
