"""What the neural retrievers share: item embeddings tied to the output, the loss, and scoring at the last position."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, set_seed
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..tables import Sequences
from .arguments import RetrieverArguments
from .base import Retriever, RetrieverConfig
from .rows import pad_right
from .text import title_embeddings

_CELLS = 1 << 20  # logits that are held at once in training: 4 MB, which stay in a processor's cache


class NeuralRetrieverConfig(RetrieverConfig):
    """The config of every neural retriever; `initializer_range` is the standard deviation of the initial weights."""

    hidden_size: int = 64
    num_layers: int = 2
    dropout: float = 0.5
    initializer_range: float = 0.02


@dataclass
class RetrieverOutput(ModelOutput):
    """What a neural retriever returns.

    Attributes:
        loss: mean cross-entropy over the labelled positions, if labels were given.
        logits: float [batch, num_items + 1], of the item after the last one of each row, if no labels were given.
        last_hidden_state: float [batch, length, hidden_size].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None


class NeuralRetriever(Retriever, PreTrainedModel):
    """The base of neural retrievers; a subclass sets `config_class` and implements `encode`.

    Rows are padded on the right with item 0. The output is tied: the logit of item j is its embedding times the hidden
    state, plus a bias for each item.
    """

    config_class = NeuralRetrieverConfig
    base_model_prefix = "retriever"
    main_input_name = "input_ids"

    def __init_subclass__(cls, **kwargs: Any):
        """Makes a subclass with a config of its own known to transformers' Auto classes."""
        super().__init_subclass__(**kwargs)
        if "config_class" in vars(cls):
            AutoConfig.register(cls.config_class.model_type, cls.config_class, exist_ok=True)
            AutoModel.register(cls.config_class, cls, exist_ok=True)

    def __init__(self, config: NeuralRetrieverConfig):
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.item_bias = nn.Parameter(torch.zeros(config.num_items + 1))

    @classmethod
    def fit_sequences(cls, sequences: Sequences, titles: Sequence[str], args: RetrieverArguments) -> Self:
        """See `Retriever.fit_sequences`; seeds torch, numpy and random with `args.seed`.

        Raises:
            ValueError: nothing to train on, nothing to validate on, or a loss that is not finite.
        """
        from .trainer import train  # a Trainer takes long to import, and loading needs none

        set_seed(args.seed)
        model = cls(cls.make_config(sequences, args))
        if args.start_from_titles:
            model.start_from(title_embeddings(titles, args.text_encoder, args.hidden_size))
        model.training_history = [{"retriever": model.name} | epoch for epoch in train(model, sequences, args)]
        return model

    @abstractmethod
    def encode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states, float [batch, length, hidden_size], of right-padded items, int64 [batch, length].

        The state at a real position may depend on the real items up to it, and on nothing else.
        """

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> RetrieverOutput:
        """Loss or next-item logits.

        Args:
            input_ids: int64 [batch, length], padded on the right with 0.
            labels: int64 [batch, length], the item after each position, 0 where there is none.
        """
        hidden = self.encode(input_ids)
        if labels is None:
            last = (input_ids > 0).sum(1).sub(1).clamp(min=0)  # an empty row is read as padding alone
            rows = torch.arange(len(last), device=last.device)
            return RetrieverOutput(logits=self._logits(hidden[rows, last]), last_hidden_state=hidden)
        # logits over the catalogue are by far the most expensive part: only where there is something to predict
        labelled = labels > 0
        weight, bias = self._output()
        chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, _CELLS // len(weight)), acc_policy="compact")
        with torch.autocast(hidden.device.type, enabled=False):
            loss = nn.functional.linear_cross_entropy(
                hidden[labelled].float(), weight.float(), labels[labelled], linear_bias=bias.float(), options=chunks
            )
        return RetrieverOutput(loss=loss, last_hidden_state=hidden)

    def start_from(self, vectors: np.ndarray) -> None:
        """Sets the first dimensions of the item embeddings, scaled like initial weights.

        Args:
            vectors: float32 [num_items, at most hidden_size], of mean square 1.
        """
        with torch.no_grad():
            place = self.item_embedding.weight[1 : 1 + len(vectors), : vectors.shape[1]]
            place.copy_(torch.from_numpy(vectors) * self.config.initializer_range)

    def score(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """Next-item logits, float32 [batch, num_items + 1], without dropout; see `Retriever.score`."""
        training = self.training
        self.eval()
        with torch.inference_mode():
            input_ids = pad_right(self.newest_items(histories)).to(self.device)
            scores = self(input_ids).logits.float()
        self.train(training)
        return scores

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, *self._output())

    def _output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight, float [num_items + 1, hidden_size], and bias, float [num_items + 1], -inf for padding."""
        bias = nn.functional.pad(self.item_bias[1:], (1, 0), value=-torch.inf)
        return self.item_embedding.weight[: len(bias)], bias  # a model may embed more than the items

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
            if getattr(module, "padding_idx", None) is not None:
                init.zeros_(module.weight[0])  # stays 0: no position reads it, and it has no gradient
        elif isinstance(module, nn.GRU):
            for name, parameter in module.named_parameters():
                (init.zeros_ if name.startswith("bias") else init.xavier_uniform_)(parameter)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, NeuralRetriever):
            init.zeros_(module.item_bias)
