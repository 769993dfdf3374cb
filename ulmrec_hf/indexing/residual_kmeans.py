"""ResidualKMeans: codes of the users' mean vectors by k-means, level by level; what learning is compared with."""

from collections.abc import Iterable

import numpy as np
import torch

from .arguments import IndexArguments
from .base import KMEANS_USERS, Indexer, IndexerConfig
from .dataset import UserDataset


class ResidualKMeans(Indexer):
    """K-means of what the levels before leave of the users' mean vectors; nothing else is learned."""

    name = "residual_kmeans"

    def __init__(self, config: IndexerConfig):
        super().__init__(config)
        self.register_buffer("codebooks", torch.zeros(config.levels, config.codebook_size, config.code_dim))

    def train_on(self, dataset: UserDataset, args: IndexArguments) -> None:
        """See `Indexer`; of the settings, only the seed is read."""
        latents = self.latents(dataset, KMEANS_USERS).numpy()
        seeds = range(args.seed, args.seed + self.settings.levels)
        self.codebooks.copy_(torch.from_numpy(fit_codebooks(latents, self.settings.codebook_size, seeds, max_iter=20)))


def fit_codebooks(latents: np.ndarray, size: int, seeds: Iterable[int], *, max_iter: int) -> np.ndarray:
    """Codebooks by k-means, from a k-means++ start, of what the levels before leave of the latent vectors.

    Args:
        latents: float32 [users, code_dim]; of fewer users than codes, codes are repeated.
        size: codes per level.
        seeds: of each level's start, one a level.
        max_iter: of Lloyd's algorithm.

    Returns:
        float32 [levels, size, code_dim].
    """
    from sklearn.cluster import KMeans

    residuals, codebooks = latents.copy(), []
    for seed in seeds:
        kmeans = KMeans(min(size, len(residuals)), max_iter=max_iter, random_state=seed).fit(residuals)
        codebooks.append(np.resize(kmeans.cluster_centers_, (size, latents.shape[1])))
        residuals -= codebooks[-1][kmeans.labels_]
    return np.stack(codebooks)
