"""LRURec: linear recurrent units for sequential recommendation (Yue et al., WSDM 2024)."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .neural import NeuralRetriever, NeuralRetrieverConfig


class LRURecConfig(NeuralRetrieverConfig):
    """The config of `LRURec`.

    Attributes:
        min_radius, max_radius: the ring in the complex plane from which the initial eigenvalues are drawn, in (0, 1).
    """

    model_type = "lrurec"

    min_radius: float = 0.8
    max_radius: float = 0.99


class LinearRecurrentUnit(nn.Module):
    """h_t = lambda * h_{t-1} + gamma * (B x_t + b), y_t = Re(C h_t), with a complex diagonal lambda.

    The state has 2 * hidden_size complex numbers. Real and imaginary parts are kept apart: B acts on real inputs and C
    gives real outputs, so that both are real matrix products. lambda = exp(-exp(nu) + i exp(theta)) stays inside the
    unit circle whatever nu is.
    """

    def __init__(self, config: LRURecConfig):
        super().__init__()
        self.config = config
        size = 2 * config.hidden_size
        self.nu = nn.Parameter(torch.empty(size))
        self.theta = nn.Parameter(torch.empty(size))
        self.log_gamma = nn.Parameter(torch.empty(size))
        self.input = nn.Linear(config.hidden_size, 2 * size)
        self.output = nn.Linear(2 * size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float [batch, length, hidden_size] -> the same shape; position t reads positions up to t."""
        radius, angle = torch.exp(-torch.exp(self.nu)), torch.exp(self.theta)
        a, b = radius * torch.cos(angle), radius * torch.sin(angle)
        real, imag = (self.input(x) * torch.exp(self.log_gamma).repeat(2)).chunk(2, dim=-1)
        # Doubling: before each turn h_t sums the inputs of the last `step` positions, and lambda^step = a + ib.
        step, length = 1, x.shape[1]
        while step < length:
            before_real, before_imag = real[:, :-step], imag[:, :-step]
            shift = (0, 0, step, 0)
            real, imag = (
                real + nn.functional.pad(a * before_real - b * before_imag, shift),
                imag + nn.functional.pad(a * before_imag + b * before_real, shift),
            )
            a, b, step = a * a - b * b, 2 * a * b, 2 * step
        return self.output(torch.cat([real, imag], dim=-1))


class LRURecBlock(nn.Module):
    """A linear recurrent unit and a position-wise feed-forward layer, each with dropout, residual and layer norm."""

    def __init__(self, config: LRURecConfig):
        super().__init__()
        size = config.hidden_size
        self.recurrence = LinearRecurrentUnit(config)
        self.recurrence_norm = nn.LayerNorm(size)
        self.feed_forward = nn.Sequential(
            nn.Linear(size, 4 * size), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(4 * size, size)
        )
        self.feed_forward_norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.recurrence_norm(x + self.dropout(self.recurrence(x)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class LRURec(NeuralRetriever):
    """LRURec with tied item embeddings; right padding is never read, since the recurrence only looks back."""

    config_class = LRURecConfig

    def __init__(self, config: LRURecConfig):
        super().__init__(config)
        self.embedding_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(LRURecBlock(config) for _ in range(config.num_layers))
        self.post_init()

    def encode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `NeuralRetriever.encode`."""
        hidden = self.dropout(self.embedding_norm(self.item_embedding(input_ids)))
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, LinearRecurrentUnit):
            super()._init_weights(module)
            return
        # |lambda| uniform in area over the ring, its angle uniform; gamma keeps the state's size like the input's
        low, high = self.config.min_radius, self.config.max_radius
        square = torch.rand_like(module.nu) * (high**2 - low**2) + low**2
        init.copy_(module.nu, torch.log(-0.5 * torch.log(square)))
        init.copy_(module.theta, torch.log(2 * math.pi * (1 - torch.rand_like(module.theta))))  # (0, 2 pi]
        init.copy_(module.log_gamma, 0.5 * torch.log(1 - square))
