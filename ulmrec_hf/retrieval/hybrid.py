"""The hybrid: a weighted sum of several retrievers' log-scores, the weights fitted on validation targets."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from scipy.optimize import minimize
from tqdm.auto import tqdm

from .base import Retriever, RetrieverConfig, Sequences, load_retriever
from .candidates import split_positions
from .ranking import hide, seen_places, top_items

_BATCH = 256
_POOL = 100  # the best items of each component that the weights are fitted on
_RIDGE = 1e-3  # keeps a weight that the targets say nothing of at 0


class HybridConfig(RetrieverConfig):
    """The config of `HybridRetriever`.

    Attributes:
        components: the retrievers that are combined; each is saved in a folder of that name.
        weights: how much the log-scores of each count.
    """

    model_type = "hybrid"

    components: list[str] | None = None
    weights: list[float] | None = None


class HybridRetriever(Retriever):
    """Scores an item by the weighted sum of the components' log-scores, a product of experts.

    The weights maximise the likelihood of the validation targets under the softmax of that sum (a conditional logit),
    a concave problem with one number for each component: there is one solution, and little to overfit.
    """

    config_class = HybridConfig

    def __init__(self, config: HybridConfig, components: Sequence[Retriever]):
        self.config, self.components = config, list(components)

    @classmethod
    def fit(cls, components: Sequence[Retriever], sequences: Sequences, *, max_users: int = 20_000) -> Self:
        """Fits the weights.

        Args:
            components: retrievers that were fitted on the train part alone, of different names.
            sequences: whole sequences; of each user the train part and the validation target are read.
            max_users: users, evenly spread, that the weights are fitted on.

        Raises:
            ValueError: two components of one name, one of another catalogue, or nobody has a validation target.
        """
        names = [component.name for component in components]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"a hybrid combines retrievers of different names; got {', '.join(names) or 'none'}.")
        for component in components:
            component.check_catalogue(sequences.catalogue)
        weights = fit_weights(*validation_pool(components, sequences, max_users))
        config = HybridConfig(
            num_items=sequences.num_items,
            catalogue=sequences.catalogue,
            max_history=max(component.config.max_history for component in components),
            components=names,
            weights=weights.tolist(),
        )
        return cls(config, components)

    @torch.inference_mode()
    def score(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """The weighted sum of log-scores, float32 [batch, num_items + 1]; see `Retriever.score`."""
        histories = self.newest_items(histories)
        parts = zip(self.config.weights, self.components, strict=True)
        # -inf at padding times a weight may be anything: it is set again
        return hide(sum(weight * component.log_scores(histories) for weight, component in parts))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes config.json, and each component into the folder of its name."""
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        for component in self.components:
            component.save_pretrained(Path(folder) / component.name)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> Self:
        """Reads what `save_pretrained` wrote."""
        config = HybridConfig.from_pretrained(folder)
        return cls(config, [load_retriever(Path(folder) / name) for name in config.components])


@torch.inference_mode()
def validation_pool(
    components: Sequence[Retriever], sequences: Sequences, max_users: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the weights are fitted on.

    Returns:
        Log-scores, float32 [users, 1 + pool, components], and whether a place holds an item, bool [users, 1 + pool].
        Place 0 is the user's validation target, the others the components' best items, each once; users whose target
        is not among the best items are left out.

    Raises:
        ValueError: nobody has a validation target after a non-empty train part, or no component finds one.
    """
    rows = split_positions(sequences, "validation")
    users = rows.users[rows.positions > 0]
    if not len(users):
        raise ValueError("no user has a validation target after a non-empty train part to fit a hybrid on.")
    users = users[np.unique(np.linspace(0, len(users) - 1, min(max_users, len(users))).astype(np.int64))]
    pools = []
    for start in tqdm(range(0, len(users), _BATCH), desc="hybrid: validation scores", unit="batch"):
        items = [sequences[user] for user in users[start : start + _BATCH]]
        histories = [row[:-2] for row in items]
        seen = seen_places(histories)
        scores = [hide(component.log_scores(histories).cpu(), seen) for component in components]
        best = torch.cat([top_items(part, _POOL)[0] for part in scores], 1).numpy()
        stacked = torch.stack(scores, 2).numpy()
        for row, target in enumerate(int(sequence[-2]) for sequence in items):
            values = stacked[row, [target, *np.setdiff1d(best[row], [target])]]
            # A target that no component finds says nothing of the order within the pool. Adding it would say that high
            # scores are a bad sign: it is there whatever its scores, all others for their high ones.
            if target in best[row] and np.isfinite(values[0]).all():
                pools.append(values[np.isfinite(values).all(1)])
    if not pools:
        raise ValueError(f"no validation target is among the {_POOL} best items of any of these retrievers.")
    features = np.zeros((len(pools), max(map(len, pools), default=0), len(components)), np.float32)
    real = np.zeros(features.shape[:2], bool)
    for row, values in enumerate(pools):
        features[row, : len(values)], real[row, : len(values)] = values, True
    return features, real


def fit_weights(features: np.ndarray, real: np.ndarray) -> np.ndarray:
    """float64 [components]: the weights under which the softmax over each user's places most expects place 0.

    Args:
        features: float [users, places, components].
        real: bool [users, places]; other places do not count. Place 0 always is.
    """
    mean = features[real].mean(0)
    features = torch.from_numpy((features - mean).astype(np.float64))
    hidden = torch.from_numpy(~real)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value = torch.from_numpy(weights).requires_grad_()
        logits = (features @ value).masked_fill(hidden, -torch.inf)
        total = (logits.logsumexp(1) - logits[:, 0]).mean() + _RIDGE * value.square().sum()
        total.backward()
        return total.item(), value.grad.numpy()

    return minimize(loss, np.full(features.shape[2], 0.5), jac=True, method="L-BFGS-B").x
