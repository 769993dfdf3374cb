"""NARM: a neural attentive recommendation machine (Li et al., CIKM 2017)."""

import math

import torch
from torch import nn

from .neural import NeuralRetriever, NeuralRetrieverConfig


class NARMConfig(NeuralRetrieverConfig):
    """The config of `NARM`; the layers are those of its GRU.

    Initial weights are larger than in the other models, since no layer norm brings small states back to size.
    """

    model_type = "narm"

    num_layers: int = 1
    initializer_range: float = 0.1


class NARM(NeuralRetriever):
    """A GRU whose last state is joined with a sum of all its states, weighed by how they fit the last one.

    The paper predicts the end of a session alone; here each position is the end of the items up to it, so that all
    train at once. That takes batch x length^2 x hidden_size numbers.
    """

    config_class = NARMConfig

    def __init__(self, config: NARMConfig):
        super().__init__(config)
        size = config.hidden_size
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.GRU(
            size, size, config.num_layers, batch_first=True, dropout=config.dropout if config.num_layers > 1 else 0.0
        )
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, size, bias=False)
        self.energy = nn.Linear(size, 1, bias=False)
        self.bilinear = nn.Linear(2 * size, size, bias=False)
        self.post_init()

    def encode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `NeuralRetriever.encode`: B [h_t; sum over j <= t of a_tj h_j], a_tj = v sigmoid(A1 h_t + A2 h_j)."""
        items = self.item_embedding(input_ids) * math.sqrt(self.config.hidden_size)
        states, _ = self.encoder(self.dropout(items))
        pairs = torch.sigmoid(self.query(states)[:, :, None] + self.key(states)[:, None])
        alpha = self.energy(pairs).squeeze(-1).tril()  # no softmax: the weights may sum to anything
        return self.bilinear(self.dropout(torch.cat([states, alpha @ states], dim=-1)))
