"""The hybrid: the best items of several retrievers, ranked together by a model fitted on the validation targets."""

import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed

from ..protocol import HELD_OUT, target_positions
from ..tables import Sequences
from .arguments import RETRIEVERS, RetrieverArguments
from .base import Retriever, RetrieverConfig, load_retriever
from .topk import hide, seen_places, top_items

logger = logging.getLogger(__name__)

_BATCH = 256
_POOL = 100  # the best items of each component that are ranked together
_NETWORK = 32  # width of the combiner's network
_RIDGE = 1e-3  # keeps a weight that the targets do not determine at 0
_EVALUATE_EVERY = 5  # one in so many users evaluates the network instead of training it
_FEWEST = 500  # with fewer users whose target is in the pool, only the weights are fitted


class HybridConfig(RetrieverConfig):
    """The config of `Hybrid`.

    Attributes:
        components: the retrievers that are combined; each is saved in a folder of that name.
        network_size: width of the combiner's network; 0 = weights alone.
    """

    model_type = "hybrid"

    components: list[str] | None = None
    network_size: int = _NETWORK


class Combiner(nn.Module):
    """One score from each retriever's score of an item: a weighted sum of log-scores, plus a small network.

    The weighted sum is a product of experts. The network, whose output starts at zero, can express what no sum can,
    such as that an item ranked first by two retrievers is better than either score implies.

    Args:
        components: how many retrievers there are.
        network_size: width of the network; 0 = none.
    """

    def __init__(self, components: int, network_size: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(components))
        self.register_buffer("mean", torch.zeros(2 * components))
        self.register_buffer("scale", torch.ones(2 * components))
        self.network = None
        if network_size:
            self.network = nn.Sequential(
                nn.Linear(2 * components, network_size),
                nn.GELU(),
                nn.Dropout(0.2),
                nn.Linear(network_size, network_size),
                nn.GELU(),
                nn.Linear(network_size, 1, bias=False),
            )
            nn.init.zeros_(self.network[-1].weight)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """float [..., 2 * components], log-scores and then reciprocal ranks -> float [...]."""
        features = (features - self.mean) / self.scale
        scores = features[..., : len(self.weights)] @ self.weights
        return scores if self.network is None else scores + self.network(features).squeeze(-1)

    def forward(self, features: torch.Tensor, real: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean cross-entropy of the targets' places, int64 [rows], among the real ones, bool [rows, places]."""
        scores = self.score(features).masked_fill(~real, -torch.inf)
        return {"loss": nn.functional.cross_entropy(scores, target)}


class Hybrid(Retriever):
    """Ranks the best 100 items of each component together by a `Combiner`; all others follow by the weighted sum.

    The weights maximise the likelihood of the validation targets under the softmax of the sum (a conditional logit).
    The network is then trained on four fifths of the users, and kept only where it lowers the loss of the last fifth.
    """

    config_class = HybridConfig

    def __init__(self, config: HybridConfig, components: Sequence[Retriever], combiner: Combiner):
        self.config, self.components, self.combiner = config, list(components), combiner.eval()

    @classmethod
    def fit_sequences(cls, sequences: Sequences, titles: Sequence[str], args: RetrieverArguments) -> Self:
        """See `Retriever.fit_sequences`; fits the components in their order, then the combiner."""
        parts = [RETRIEVERS[name].fit_sequences(sequences, titles, args) for name in args.hybrid_components]
        return cls.combine(parts, sequences, seed=args.seed)

    @classmethod
    def combine(
        cls, components: Sequence[Retriever], sequences: Sequences, *, max_users: int = 20_000, seed: int = 42
    ) -> Self:
        """Fits the combiner of retrievers that are fitted already.

        With fewer than 500 users whose target a component finds, it is the weights alone.

        Args:
            components: retrievers of different names, fitted on the train part alone.
            sequences: whole sequences; of each user the train part and the validation target are read.
            max_users: how many users it is fitted on at most, evenly spread.
            seed: of the network.

        Raises:
            ValueError: two components of one name, one of another catalogue, or no user with a validation target.
        """
        names = [component.name for component in components]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"a hybrid combines retrievers of different names; got {', '.join(names) or 'none'}.")
        for component in components:
            component.check_catalogue(sequences.catalogue)
        pools = validation_pools(components, sequences, max_users)
        combiner = fit_combiner(pools, _NETWORK if len(pools["target"]) >= _FEWEST else 0, seed)
        config = HybridConfig(
            num_items=sequences.num_items,
            catalogue=sequences.catalogue,
            max_history=max(component.config.max_history for component in components),
            components=names,
            network_size=0 if combiner.network is None else _NETWORK,
        )
        return cls(config, components, combiner)

    @property
    def training_history(self) -> list[dict[str, float | str]]:
        """That of the components, one after the other."""
        return [epoch for part in self.components for epoch in part.training_history]

    def refit(self, sequences: Sequences) -> "Hybrid":
        """See `Retriever.refit`; the combiner stays."""
        return Hybrid(self.config, [part.refit(sequences) for part in self.components], self.combiner)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of one unit of each component's log-score in the weighted sum."""
        return dict(zip(self.config.components, _linear_weights(self.combiner).tolist(), strict=True))

    @torch.inference_mode()
    def score(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """float32 [batch, num_items + 1], see `Retriever.score`; items of the history follow the components' best."""
        histories = self.newest_items(histories)
        scores = [component.log_scores(histories).cpu() for component in self.components]
        total = torch.zeros_like(scores[0])
        for weight, part in zip(self.weights.values(), scores, strict=True):
            total.add_(part, alpha=weight)
        hide(total)  # -inf at padding times a weight of 0 or below is no longer -inf
        items, features, real = pool(scores, seen_places(histories))
        best = self.combiner.score(features)
        lowest = best.masked_fill(~real, torch.inf).amin(1, keepdim=True)
        total += torch.where(lowest.isfinite(), lowest, 0) - 1 - total.amax(1, keepdim=True)
        rows = real.nonzero()[:, 0]
        total[rows, items[real]] = best[real]
        return total

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes config.json, model.safetensors, and each component into the folder of its name."""
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        save_file(self.combiner.state_dict(), Path(folder) / "model.safetensors")
        for component in self.components:
            component.save_pretrained(Path(folder) / component.name)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> Self:
        """Reads what `save_pretrained` wrote."""
        config = HybridConfig.from_pretrained(folder)
        combiner = Combiner(len(config.components), config.network_size)
        combiner.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return cls(config, [load_retriever(Path(folder) / name) for name in config.components], combiner)


def pool(scores: list[torch.Tensor], seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best items of each component, each once, and all components' scores of them.

    Args:
        scores: the components' log-scores, float32 [batch, num_items + 1] each; set to -inf at the `seen_places`.

    Returns:
        Items, int64 [batch, places]; features, float32 [batch, places, 2 * components]: log-scores, then 1 / (1 + rank)
        by each component; and whether a place holds an item, bool [batch, places].
    """
    items = torch.cat([top_items(hide(part, seen), _POOL)[0] for part in scores], 1).sort(1).values
    values = torch.stack([part.gather(1, items) for part in scores], 2)
    real = values.isfinite().all(2)
    real[:, 1:] &= items[:, 1:] != items[:, :-1]
    values = values.masked_fill(~real[:, :, None], -torch.inf)
    order = values.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(2.0, 2.0 + items.shape[1])[None, :, None].expand_as(values)
    ranks = torch.empty_like(values).scatter_(1, order, places)
    return items, torch.cat([values, 1 / ranks], 2).masked_fill(~real[:, :, None], 0.0), real


@torch.inference_mode()
def validation_pools(components: Sequence[Retriever], sequences: Sequences, max_users: int) -> dict[str, torch.Tensor]:
    """What the combiner is fitted on: one row per user whose validation target is among the components' best items.

    Returns:
        `features` and `real`, see `pool`, and `target`, int64 [users], the place of the target.

    Raises:
        ValueError: no user has a validation target after a non-empty train part, or no component finds one.
    """
    users, positions = target_positions(sequences.lengths, "validation")
    users = users[positions > 0]
    if not len(users):
        raise ValueError("no user has a validation target after a non-empty train part to fit a hybrid on.")
    users = users[np.unique(np.linspace(0, len(users) - 1, min(max_users, len(users))).astype(np.int64))]
    found: dict[str, list[torch.Tensor]] = {"features": [], "real": [], "target": []}
    for start in tqdm(range(0, len(users), _BATCH), desc="hybrid: validation scores", unit="batch"):
        lists = [sequences[user] for user in users[start : start + _BATCH]]
        histories = [items[:-HELD_OUT] for items in lists]
        items, features, real = pool(
            [component.log_scores(histories).cpu() for component in components], seen_places(histories)
        )
        is_target = real & (items == torch.tensor([int(row[-HELD_OUT]) for row in lists])[:, None])
        # A target that no component finds carries no information on the order within the pool. Adding it would make
        # high scores a bad sign: it would be there despite its scores, all others because of theirs.
        kept = is_target.any(1)
        for name, values in (("features", features), ("real", real), ("target", is_target.int().argmax(1))):
            found[name].append(values[kept])
    pools = {name: torch.cat(values) for name, values in found.items()}
    if not len(pools["target"]):
        raise ValueError(f"no validation target is among the {_POOL} best items of any of these retrievers.")
    return pools


def fit_combiner(pools: dict[str, torch.Tensor], network_size: int, seed: int) -> Combiner:
    """Fits the weights, then the network if it helps, on what `validation_pools` returns."""
    features, real = pools["features"], pools["real"]
    set_seed(seed)
    combiner = Combiner(features.shape[2] // 2, network_size)
    combiner.mean.copy_(features[real].mean(0))
    combiner.scale.copy_(features[real].std(0).clamp(min=1e-6))
    train = (torch.arange(len(features)) % _EVALUATE_EVERY > 0) | (network_size == 0)
    _fit_weights(combiner, {name: values[train] for name, values in pools.items()})
    if not network_size:
        return combiner
    from transformers import Trainer  # takes long to import, and loading needs none

    from .trainer import training_arguments

    args = RetrieverArguments(
        seed=seed, epochs=10, batch_size=64, learning_rate=3e-3, weight_decay=0.01, lr_scheduler_type="cosine"
    )
    rows = [dict(zip(pools, values, strict=True)) for values in zip(*pools.values(), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            combiner,
            training_arguments(args, folder, label_names=["target"], prediction_loss_only=True, use_cpu=True),
            train_dataset=[row for row, kept in zip(rows, train.tolist(), strict=True) if kept],
            eval_dataset=[row for row, kept in zip(rows, train.tolist(), strict=True) if not kept],
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    logger.info("hybrid: held-out loss %.4f with weights alone, %.4f with the network", before, after)
    return combiner if after < before else fit_combiner(pools, 0, seed)


def _fit_weights(combiner: Combiner, pools: dict[str, torch.Tensor]) -> None:
    """Sets the weights that maximise the likelihood of the targets under the softmax over each user's places."""
    network, combiner.network = combiner.network, None

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        combiner.weights.data.copy_(torch.from_numpy(weights))
        combiner.weights.grad = None
        total = combiner(**pools)["loss"] + _RIDGE * _linear_weights(combiner).square().sum()
        total.backward()
        return total.item(), combiner.weights.grad.double().numpy()

    best = minimize(loss, np.full(len(combiner.weights), 0.5), jac=True, method="L-BFGS-B").x
    combiner.weights.data.copy_(torch.from_numpy(best))
    combiner.network = network


def _linear_weights(combiner: Combiner) -> torch.Tensor:
    return combiner.weights / combiner.scale[: len(combiner.weights)]
