"""UserIndexer: attention over a user's texts (eq. 1) and the residual-quantised autoencoder (eqs. 2-6)."""

import itertools
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.utils.data import Dataset
from vector_quantize_pytorch import ResidualVQ

_ENCODE_BATCH = 1024
_KMEANS_USERS = 65_536
PRESETS = ("default", "paper")


class UserIndexer(nn.Module, PyTorchModelHubMixin):
    """Turns a user's text embeddings into a latent vector and its codes.

    The preset "paper" learns its codebooks by the loss of eqs. (4)-(6); "default" keeps them as running means of what
    falls to them, starts them by k-means and revives dead codes, and has the other terms of the loss in common.

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
    ):
        super().__init__()
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
        self.attention = nn.Parameter(torch.zeros(embedding_dim, embedding_dim)) if attention else None
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
            user_ids: float [users, embedding_dim], the embedded id strings.

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
    def start_codebooks(self, latents: torch.Tensor) -> None:
        """Starts every level's codebook anew by k-means over `latents` [users, code_dim]."""
        training = self.training
        for layer in self.quantizer.layers:
            layer._codebook.initted.fill_(False)
        self.quantizer.train()
        self.quantizer(latents)
        self.train(training)


class UserDataset(Dataset):
    """One row a user: the newest texts, as rows of a table of text embeddings, and the embedded id string.

    Args:
        text_embeddings: float32 [texts, dim].
        text_ids: for each user the rows of their texts, oldest first.
        user_embeddings: float32 [users, dim].
        max_reviews: how many of the newest texts are used.
    """

    def __init__(self, text_embeddings: np.ndarray, text_ids: list, user_embeddings: np.ndarray, max_reviews: int):
        self.text_embeddings = torch.from_numpy(text_embeddings)
        self.user_embeddings = torch.from_numpy(user_embeddings)
        self.text_ids = [torch.as_tensor(ids[-max_reviews:], dtype=torch.long) for ids in text_ids]

    def __len__(self) -> int:
        return len(self.text_ids)

    def __getitem__(self, user: int) -> int:
        return user

    def collate(self, users: list[int]) -> dict[str, torch.Tensor]:
        """The padded batch that `UserIndexer.forward` takes."""
        ids = nn.utils.rnn.pad_sequence([self.text_ids[user] for user in users], batch_first=True, padding_value=-1)
        mask = ids >= 0
        return {
            "texts": F.embedding(ids.clamp(min=0), self.text_embeddings),
            "mask": mask,
            "user_ids": self.user_embeddings[torch.as_tensor(users)],
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
) -> None:
    """Trains under `transformers.Trainer`: first the plain autoencoder, then, from a k-means start, with codes.

    Args:
        steps: batches with codes.
        autoencoder_steps: batches before that without; from an untrained encoder k-means starts poor codebooks.
    """
    from transformers import Trainer, TrainingArguments

    for quantize, batches in ((False, autoencoder_steps), (True, steps)):
        indexer.quantize = quantize
        if quantize:
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


@torch.no_grad()
def latent_vectors(indexer: UserIndexer, dataset: UserDataset, limit: int | None = None) -> torch.Tensor:
    """float32 [users, code_dim], of an even sample of at most `limit` users where one is given."""
    step = 1 if limit is None else max(1, -(-len(dataset) // limit))
    return torch.cat([indexer.encoder(vectors) for vectors in _vectors(indexer, dataset, range(0, len(dataset), step))])


@torch.no_grad()
def reconstruction_errors(indexer: UserIndexer, dataset: UserDataset, codes: np.ndarray) -> list[float]:
    """Mean squared length of `x_u - x_hat_u`, with `x_hat_u` decoded from the first 1, 2, ... codes."""
    codebooks, codes = indexer.codebooks, torch.from_numpy(codes.astype(np.int64))
    errors, begin = torch.zeros(indexer.levels, dtype=torch.float64), 0
    for vectors in _vectors(indexer, dataset, range(len(dataset))):
        quantized = torch.zeros(len(vectors), indexer.code_dim)
        for level, codebook in enumerate(codebooks):
            quantized = quantized + codebook[codes[begin : begin + len(vectors), level]]
            errors[level] += (vectors - indexer.decoder(quantized)).square().sum().double()
        begin += len(vectors)
    return [round(error, 4) for error in (errors / len(dataset)).tolist()]


def _vectors(indexer: UserIndexer, dataset: UserDataset, users: range) -> Iterator[torch.Tensor]:
    device = next(indexer.parameters()).device
    for begin in range(0, len(users), _ENCODE_BATCH):
        batch = dataset.collate(list(users[begin : begin + _ENCODE_BATCH]))
        yield indexer.pool(**{name: value.to(device) for name, value in batch.items()})


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
