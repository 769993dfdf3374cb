"""BERT4Rec: sequential recommendation with bidirectional encoders (Sun et al., CIKM 2019)."""

import torch
from torch import nn

from .attention import SelfAttention
from .neural import NeuralRetriever, NeuralRetrieverConfig, RetrieverOutput


class BERT4RecConfig(NeuralRetrieverConfig):
    """The config of `BERT4Rec`; `hidden_size` must be a multiple of `num_heads`, `mask_probability` is in [0, 1)."""

    model_type = "bert4rec"

    num_heads: int = 2
    mask_probability: float = 0.6


class BERT4RecBlock(nn.Module):
    """Self-attention and a position-wise feed-forward layer: norm(x + dropout(layer(x))) for each."""

    def __init__(self, config: BERT4RecConfig):
        super().__init__()
        size = config.hidden_size
        self.attention = SelfAttention(size, config.num_heads, config.dropout)
        self.attention_norm = nn.LayerNorm(size)
        self.feed_forward = nn.Sequential(
            nn.Linear(size, 4 * size), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(4 * size, size)
        )
        self.feed_forward_norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, readable: torch.Tensor) -> torch.Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, readable)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class BERT4Rec(NeuralRetriever):
    """BERT4Rec with tied item embeddings; the mask is item num_items + 1, which is never scored.

    Positions count from the end of the row, as they do in the paper, which pads on the left: a history is scored at a
    mask after it, which has position 0 whatever the history's length.
    """

    config_class = BERT4RecConfig

    def __init__(self, config: BERT4RecConfig):
        super().__init__(config)
        size = config.hidden_size
        self.item_embedding = nn.Embedding(config.num_items + 2, size, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_history + 1, size)
        self.embedding_norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BERT4RecBlock(config) for _ in range(config.num_layers))
        self.head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size))
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> RetrieverOutput:
        """See `NeuralRetriever.forward`; a row has at most `max_history` items.

        With labels, each row is read with its last item masked and, in training mode, also with random items masked:
        `last_hidden_state` is that of the masked rows, float [rows, length + 1, hidden_size].
        """
        if labels is None:
            end = (input_ids > 0).sum(1, keepdim=True)
            rows = nn.functional.pad(input_ids, (0, 1)).scatter(1, end, self.config.num_items + 1)
            return super().forward(rows)
        rows = torch.cat([input_ids[:, :1], labels], dim=1)
        masked = _places_from_end(rows) == 0
        if self.training:
            rows, masked = rows.repeat(2, 1), torch.cat([self._random_places(rows), masked])
        return super().forward(rows.masked_fill(masked, self.config.num_items + 1), labels=rows.masked_fill(~masked, 0))

    def _random_places(self, rows: torch.Tensor) -> torch.Tensor:
        """bool [batch, length]: each item with `mask_probability`, and at least one of each row."""
        draws = torch.rand(rows.shape, device=rows.device).masked_fill(rows == 0, 1.0)
        return (draws < self.config.mask_probability) | (draws == draws.amin(1, keepdim=True))

    def encode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states, float [batch, length, hidden_size], of right-padded items and masks, int64 [batch, length].

        Unlike other retrievers' states, each of them depends on all items of its row.
        """
        places = _places_from_end(input_ids)
        hidden = self.item_embedding(input_ids) + self.position_embedding(places.clamp(min=0))
        hidden = self.dropout(self.embedding_norm(hidden))
        for block in self.blocks:
            hidden = block(hidden, places >= 0)
        return self.head(hidden)


def _places_from_end(input_ids: torch.Tensor) -> torch.Tensor:
    """int64 [batch, length]: 0 at the last item of each row, 1 at the one before, below 0 at padding."""
    real = input_ids > 0
    return real.sum(1, keepdim=True) - 1 - torch.arange(real.shape[1], device=real.device)
