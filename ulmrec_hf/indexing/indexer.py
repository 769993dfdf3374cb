"""UserIndexer: attention over a user's texts (eq. 1) and the residual-quantised autoencoder (eqs. 2-6)."""

import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import nn
from torch.utils.data import Dataset
from vector_quantize_pytorch import ResidualVQ

from ..user_index import UserIndex
from .arguments import PRESETS
from .assignment import assign_new
from .inputs import Input, InputEncoder, Table, unit

_ENCODE_BATCH = 1024
_KMEANS_USERS = 65_536
logger = logging.getLogger(__name__)


class UserIndexer(nn.Module, PyTorchModelHubMixin):
    """Turns a user's text embeddings into a latent vector and its codes.

    The preset "paper" learns its codebooks by the loss of eqs. (4)-(6). In "default" a user's vector has length 1, and
    codebooks, where it is trained with any, are running means of what falls to them, with dead codes revived; it has
    the other terms of the loss in common. Both start them by k-means.

    A plain module with `PyTorchModelHubMixin`: `PreTrainedModel` would not restore the quantiser's buffers.

    Args:
        embedding_dim: length of a text embedding.
        codebook_size: codes per level (K).
        levels: codes per user (p).
        code_dim: length of a latent vector.
        hidden_sizes: widths of the encoder's hidden layers; the decoder has them mirrored.
        preset: "default" or "paper".
        attention: eq. (1); off, a user is the mean of the texts.
        beta: weight of the commitment term.
        encoder_name: which text encoder the embeddings come from.
        user_dim: length of an embedded id string; None = embedding_dim.

    Attributes:
        inputs: what turns interactions into vectors; None until it is set. Saved and loaded with the rest.
    """

    def __init__(
        self,
        embedding_dim: int = 384,
        codebook_size: int = 256,
        levels: int = 4,
        code_dim: int = 32,
        hidden_sizes: tuple = (512, 256, 128),
        preset: str = "default",
        attention: bool = True,
        beta: float = 0.25,
        encoder_name: str = "tfidf",
        user_dim: int | None = None,
    ):
        super().__init__()
        self.inputs: InputEncoder | None = None
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}.")
        self.embedding_dim, self.codebook_size, self.levels, self.code_dim = (
            embedding_dim,
            codebook_size,
            levels,
            code_dim,
        )
        self.preset, self.beta, self.encoder_name = preset, beta, encoder_name
        # Zeros are uniform attention, and no saddle: the gradient of A there is that of any other start.
        self.attention = nn.Parameter(torch.zeros(embedding_dim, user_dim or embedding_dim)) if attention else None
        sizes = [embedding_dim, *hidden_sizes, code_dim]
        self.encoder = _mlp(sizes)
        self.decoder = _mlp(sizes[::-1])
        self.quantizer = ResidualVQ(
            dim=code_dim,
            num_quantizers=levels,
            codebook_size=codebook_size,
            learnable_codebook=preset == "paper",
            ema_update=preset == "default",
            threshold_ema_dead_code=2 if preset == "default" else 0,
            kmeans_init=True,
            kmeans_iters=20,
            rotation_trick=False,
            commitment_weight=0.0,  # the loss is `quantization_loss`: the library's own has no stop-gradients
        )
        self.quantize = True  # off: a plain autoencoder, for the first epochs of training

    @property
    def codebooks(self) -> torch.Tensor:
        """float [levels, codebook_size, code_dim]."""
        return self.quantizer.codebooks.detach()

    def pool(self, texts: torch.Tensor, mask: torch.Tensor, user_ids: torch.Tensor) -> torch.Tensor:
        """`x_u` of eq. (1): `alpha_i = softmax_i(e_wi^T A e_ou)`, `x_u = sum_i alpha_i e_wi`.

        Args:
            texts: float [users, texts, embedding_dim].
            mask: bool [users, texts], true where there is a text; a user without any gets zeros.
            user_ids: float [users, user_dim], the embedded id strings; not read without attention.

        Returns:
            float [users, embedding_dim].
        """
        scores = torch.zeros(mask.shape, device=texts.device, dtype=texts.dtype)
        if self.attention is not None:
            scores = torch.einsum("und,ud->un", texts, user_ids @ self.attention.T)
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1) * mask
        vectors = torch.einsum("un,und->ud", weights, texts)
        # Of equal length, users are told apart by what they like, not by how much it varies.
        return F.normalize(vectors, dim=-1) if self.preset == "default" else vectors

    def forward(self, texts: torch.Tensor, mask: torch.Tensor, user_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns `loss`, `vectors` [users, embedding_dim] and `latents` [users, code_dim] of a batch (see `pool`)."""
        vectors = self.pool(texts, mask, user_ids)
        latents = self.encoder(vectors)
        quantized, loss = latents, 0.0
        if self.quantize:
            quantized, codes, _ = self.quantizer(latents.detach())
            quantized = latents + (quantized - latents).detach()  # straight through, once and not at every level
            loss = self.quantization_loss(latents, codes)
        loss = loss + (vectors - self.decoder(quantized)).square().sum(dim=-1).mean()
        return {"loss": loss, "vectors": vectors, "latents": latents}

    def quantization_loss(self, latents: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Eq. (5): `sum_i ||sg[r_i] - v||^2 + beta ||r_i - sg[v]||^2`, the mean over users."""
        residuals, loss = latents, 0.0
        for level, codebook in enumerate(self.quantizer.codebooks):
            nearest = F.embedding(codes[:, level], codebook)
            commitment = (residuals - nearest.detach()).square().sum(dim=-1).mean()
            loss = loss + self.beta * commitment
            if self.preset == "paper":
                loss = loss + (residuals.detach() - nearest).square().sum(dim=-1).mean()
            residuals = residuals - nearest.detach()
        return loss

    @torch.no_grad()
    def index(
        self, reviews: Iterable[str] = (), *, used: UserIndex, user_id: str = "", **others: Sequence
    ) -> UserIndex:
        """A free index near those of similar users, from the frozen codebooks; nothing else changes.

        Args:
            reviews: what the user wrote, oldest first; where the index was not made from reviews, leave it out.
            used: the indices in use; `used.merge` of the result gives the extended map.
            user_id: the user's id.
            others: other inputs that the index was made from, see `InputEncoder.encode`: `titles`, `cooccurrence` (item
                ids), `ratings`, `times`, one value for each interaction.

        Returns:
            A `UserIndex` of this one user, of the same kind; a number is the user's own only after the merge.

        Raises:
            ValueError: the user has an index already, all indices are in use, the indexer was loaded without its
                inputs, or an input does not fit. A user without anything is warned of.
        """
        if self.inputs is None:
            raise ValueError(
                "this UserIndexer has no inputs to read texts with: load it from the folder index/indexer."
            )
        if not isinstance(user_id, str):
            raise ValueError(f"user_id must be a string, {str(user_id)!r} say; got {user_id!r}.")
        if user_id in used:
            raise ValueError(f"User {user_id!r} has an index already: {used.spell(user_id)}.")
        if used.codebook_size != self.codebook_size or used.levels != self.levels:
            raise ValueError(
                f"the map has {used.levels} levels of {used.codebook_size} codes, this indexer {self.levels} of "
                f"{self.codebook_size}: they do not belong together."
            )
        reviews = reviews if isinstance(reviews, str) else list(() if reviews is None else reviews)
        vectors = torch.from_numpy(self.inputs.encode(**({"reviews": reviews} if reviews else {}) | others))[None]
        told = vectors.any(-1)
        if not told.any():
            logger.warning("User %r has nothing to be indexed by, and gets an index that means nothing.", user_id)
        ids = torch.zeros(1, 0)
        if self.attention is not None:
            ids = torch.from_numpy(self.inputs.encode_user_ids([user_id]))
        latents = self.encoder(self.pool(vectors[:, told[0]], told[:, told[0]], ids))
        codes = assign_new(latents.numpy(), self.codebooks.numpy(), used.keys)
        return UserIndex([user_id], codes, self.codebook_size, used.kind)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        if self.inputs is not None:
            self.inputs.save(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **settings: Any) -> "UserIndexer":
        folder = model_id
        if not os.path.isdir(folder):
            hub = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            folder = snapshot_download(model_id, **{name: settings.get(name) for name in hub})
        indexer = super()._from_pretrained(model_id=str(folder), **settings).eval()
        if (Path(folder) / "inputs.json").is_file():
            indexer.inputs = InputEncoder.load(folder)
            found = indexer.inputs.encoder.name if indexer.inputs.encoder else ""
            if (indexer.encoder_name, indexer.embedding_dim) != (found, indexer.inputs.dim):
                raise ValueError(
                    f"{folder}: the indexer was made for the encoder {indexer.encoder_name!r} and vectors of length "
                    f"{indexer.embedding_dim}; its inputs ({', '.join(indexer.inputs.weights)}) are of the encoder "
                    f"{found!r} and give {indexer.inputs.dim}: they do not belong together."
                )
        return indexer

    @torch.no_grad()
    def start_codebooks(self, latents: torch.Tensor) -> None:
        """Starts every level's codebook anew by k-means over `latents` [users, code_dim]."""
        training = self.training
        for layer in self.quantizer.layers:
            layer._codebook.initted.fill_(False)
        self.quantizer.train()
        self.quantizer(latents)
        self.train(training)

    @torch.no_grad()
    def refit_codebooks(self, latents: torch.Tensor, seed: int = 0) -> None:
        """Sets every level's codebook to k-means, from a k-means++ start, of what the levels before leave of `latents`.

        Args:
            latents: float [users, code_dim], on the CPU.
            seed: of the start.
        """
        from sklearn.cluster import KMeans

        residuals = latents.numpy().copy()
        for layer in self.quantizer.layers:
            kmeans = KMeans(min(self.codebook_size, len(residuals)), max_iter=100, random_state=seed).fit(residuals)
            centres = np.resize(kmeans.cluster_centers_, (self.codebook_size, self.code_dim))  # few users: repeated
            layer._codebook.embed.copy_(torch.from_numpy(centres))
            layer._codebook.initted.fill_(True)  # or the library would start them anew
            residuals -= centres[kmeans.labels_]


class UserDataset(Dataset):
    """One row a user: the vectors of the newest interactions, and of the id string; read from tables as they are asked.

    Args:
        inputs: whose vectors, at length 1, are weighed and joined; an interaction with none, or zeros, is left out.
        offsets: int64 [users + 1]; user u has the interactions `offsets[u]` to `offsets[u + 1]`, oldest first.
        user_ids: a table with a row for each user's id string; None where it is not read.
        max_reviews: how many of the newest interactions are used.
    """

    def __init__(self, inputs: Sequence[Input], offsets: np.ndarray, user_ids: Table | None, max_reviews: int):
        told = np.any([part.ids >= 0 for part in inputs], axis=0)
        self.inputs = [replace(part, ids=part.ids[told]) for part in inputs]
        self.offsets = np.concatenate([[0], np.cumsum(told, dtype=np.int64)])[offsets]
        self.user_ids, self.max_reviews = user_ids, max_reviews

    @property
    def dim(self) -> int:
        """Length of an interaction's vector."""
        return sum(part.table.dim for part in self.inputs)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, user: int) -> int:
        return user

    def collate(self, users: Sequence[int]) -> dict[str, torch.Tensor]:
        """The padded batch that `UserIndexer.forward` takes."""
        users = np.asarray(users)
        ends = self.offsets[users + 1]
        counts = np.minimum(ends - self.offsets[users], self.max_reviews)
        width = max(1, int(counts.max(initial=0)))
        mask = np.arange(width) < counts[:, None]
        places = (ends - counts)[:, None] + np.arange(width)
        texts = np.zeros((len(users), width, self.dim), np.float32)
        begin = 0
        for part in self.inputs:
            ids = np.full(mask.shape, -1, np.int64)
            ids[mask] = part.ids[places[mask]]
            texts[ids >= 0, begin : begin + part.table.dim] = part.weight * unit(part.table.rows(ids[ids >= 0]))
            begin += part.table.dim
        mask &= texts.any(axis=2)
        ids = np.zeros((len(users), 0), np.float32) if self.user_ids is None else self.user_ids.rows(users)
        return {
            "texts": torch.from_numpy(texts),
            "mask": torch.from_numpy(mask),
            "user_ids": torch.from_numpy(np.ascontiguousarray(ids)),
        }


def train_indexer(
    indexer: UserIndexer,
    dataset: UserDataset,
    *,
    steps: int,
    autoencoder_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    refit_codebooks: bool = False,
) -> None:
    """Trains under `transformers.Trainer`: first the plain autoencoder, then, from a k-means start, with codes.

    On Amazon Beauty, batches with codes cost the preset "default" lift that as many more without them bring.

    Args:
        steps: batches with codes.
        autoencoder_steps: batches before that without; from an untrained encoder k-means starts poor codebooks.
        refit_codebooks: end with codebooks by k-means over the trained encoder's latent vectors; those that came with
            the training lag behind it.

    Raises:
        ValueError: the training diverged.
    """
    from transformers import Trainer, TrainingArguments

    for quantize, batches in ((False, autoencoder_steps), (True, steps)):
        indexer.quantize = quantize
        if quantize and (batches or not refit_codebooks):
            indexer.start_codebooks(latent_vectors(indexer, dataset, limit=_KMEANS_USERS))
        if not batches:
            continue
        with tempfile.TemporaryDirectory() as folder:  # the Trainer wants one, but nothing is saved there
            arguments = TrainingArguments(
                folder,
                max_steps=batches,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine" if quantize else "constant",
                max_grad_norm=1.0,
                seed=seed,
                save_strategy="no",
                logging_steps=100,
                report_to="none",
                remove_unused_columns=False,
                # DataParallel, which the Trainer takes for several devices, would lose the codebooks' running means.
                use_cpu=torch.cuda.device_count() != 1,
            )
            Trainer(indexer, arguments, train_dataset=dataset, data_collator=dataset.collate).train()
    indexer.cpu().eval()
    latents = latent_vectors(indexer, dataset, limit=_KMEANS_USERS)
    if not latents.isfinite().all():
        raise ValueError(f"learning_rate is {learning_rate}, with which the training diverged: lower it.")
    if refit_codebooks:
        indexer.refit_codebooks(latents, seed)


@torch.no_grad()
def latent_vectors(indexer: UserIndexer, dataset: UserDataset, limit: int | None = None) -> torch.Tensor:
    """float32 [users, code_dim], of an even sample of at most `limit` users where one is given."""
    step = 1 if limit is None else max(1, -(-len(dataset) // limit))
    every = range(0, len(dataset), step)
    return torch.cat([indexer.encoder(vectors) for vectors in user_vectors(indexer, dataset, every)])


@torch.no_grad()
def reconstruction_errors(indexer: UserIndexer, dataset: UserDataset, codes: np.ndarray) -> list[float]:
    """Mean squared length of `x_u - x_hat_u`, with `x_hat_u` decoded from the first 1, 2, ... codes."""
    codebooks, codes = indexer.codebooks, torch.from_numpy(codes.astype(np.int64))
    errors, begin = torch.zeros(indexer.levels, dtype=torch.float64), 0
    for vectors in user_vectors(indexer, dataset, range(len(dataset))):
        quantized = torch.zeros(len(vectors), indexer.code_dim)
        for level, codebook in enumerate(codebooks):
            quantized = quantized + codebook[codes[begin : begin + len(vectors), level]]
            errors[level] += (vectors - indexer.decoder(quantized)).square().sum().double()
        begin += len(vectors)
    return [round(error, 4) for error in (errors / len(dataset)).tolist()]


@torch.no_grad()
def user_vectors(indexer: UserIndexer, dataset: UserDataset, users: range) -> Iterator[torch.Tensor]:
    """`x_u` of these users in batches, float32 [batch, embedding_dim]."""
    device = next(indexer.parameters()).device
    for begin in range(0, len(users), _ENCODE_BATCH):
        batch = dataset.collate(list(users[begin : begin + _ENCODE_BATCH]))
        yield indexer.pool(**{name: value.to(device) for name, value in batch.items()})


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
