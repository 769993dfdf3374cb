"""UserIndexer: attention over a user's texts (eq. 1) and the residual-quantised autoencoder (eqs. 2-6)."""

import itertools
import tempfile
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from vector_quantize_pytorch import ResidualVQ

from .arguments import PRESETS, IndexArguments
from .base import KMEANS_USERS, Indexer, IndexerConfig, weighted_mean
from .dataset import UserDataset
from .inputs import InputEncoder
from .residual_kmeans import fit_codebooks


@dataclass(frozen=True)
class UserIndexerConfig(IndexerConfig):
    """What a `UserIndexer`'s config.json holds.

    Attributes:
        hidden_sizes: widths of the encoder's hidden layers; the decoder has them mirrored.
        preset, attention: see `IndexArguments`.
        beta: weight of the commitment term.
        user_dim: length of an embedded id string; None = embedding_dim.
    """

    hidden_sizes: tuple = (512, 256, 128)
    preset: str = "default"
    attention: bool = True
    beta: float = 0.25
    user_dim: int | None = None

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {self.preset!r}.")


class UserIndexer(Indexer):
    """Turns a user's text embeddings into a latent vector and its codes.

    The preset "paper" learns its codebooks by the loss of eqs. (4)-(6). In "default" a user's vector has length 1, and
    codebooks are running means of what falls to them, with dead codes revived. Both start them by k-means.
    """

    name = "rq_vae"
    reads_user_ids = True

    def __init__(self, config: UserIndexerConfig):
        super().__init__(config)
        dim = config.embedding_dim
        # Zeros are uniform attention, and no saddle: the gradient of A there is that of any other start.
        self.attention = nn.Parameter(torch.zeros(dim, config.user_dim or dim)) if config.attention else None
        sizes = [dim, *config.hidden_sizes, config.code_dim]
        self.encoder = _mlp(sizes)
        self.decoder = _mlp(sizes[::-1])
        self.quantizer = ResidualVQ(
            dim=config.code_dim,
            num_quantizers=config.levels,
            codebook_size=config.codebook_size,
            learnable_codebook=config.preset == "paper",
            ema_update=config.preset == "default",
            threshold_ema_dead_code=2 if config.preset == "default" else 0,
            kmeans_init=True,
            kmeans_iters=20,
            rotation_trick=False,
            commitment_weight=0.0,  # the loss is `quantization_loss`: the library's own has no stop-gradients
        )
        self.quantize = True  # off: a plain autoencoder, for the first epochs of training

    @classmethod
    def configure(cls, args: IndexArguments, inputs: InputEncoder, dataset: UserDataset) -> UserIndexerConfig:
        """See `Indexer`."""
        shared = asdict(super().configure(args, inputs, dataset)) | {"code_dim": args.code_dim}
        user_dim = dataset.user_ids.shape[1] if args.attention else None
        return UserIndexerConfig(**shared, preset=args.preset, attention=args.attention, user_dim=user_dim)

    @property
    def codebooks(self) -> torch.Tensor:
        """float [levels, codebook_size, code_dim]."""
        return self.quantizer.codebooks.detach()

    def pool(self, texts: torch.Tensor, mask: torch.Tensor, user_ids: torch.Tensor) -> torch.Tensor:
        """`x_u` of eq. (1): `alpha_i = softmax_i(e_wi^T A e_ou)`, `x_u = sum_i alpha_i e_wi`; see `Indexer.pool`."""
        scores = torch.zeros(mask.shape, device=texts.device, dtype=texts.dtype)
        if self.attention is not None:
            scores = torch.einsum("und,ud->un", texts, user_ids @ self.attention.T)
        vectors = weighted_mean(texts, mask, scores)
        # At equal length, users differ by what they like, not by how much it varies.
        return F.normalize(vectors, dim=-1) if self.settings.preset == "default" else vectors

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """See `Indexer`."""
        return self.encoder(vectors)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Indexer`."""
        return self.decoder(latents)

    def forward(self, texts: torch.Tensor, mask: torch.Tensor, user_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gives `loss`, `vectors` [users, embedding_dim] and `latents` [users, code_dim] of a batch (see `pool`)."""
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
            loss = loss + self.settings.beta * commitment
            if self.settings.preset == "paper":
                loss = loss + (residuals.detach() - nearest).square().sum(dim=-1).mean()
            residuals = residuals - nearest.detach()
        return loss

    def train_on(self, dataset: UserDataset, args: IndexArguments) -> None:
        """Trains under `transformers.Trainer`: first the plain autoencoder, then, from a k-means start, with codes.

        From an untrained encoder k-means starts poor codebooks. On Amazon Beauty, batches with codes cost the preset
        "default" lift that as many more without them bring. Codebooks that are trained along lag behind the encoder;
        `refit_codebooks` fits them again at the end.

        Raises:
            ValueError: the training diverged.
        """
        from transformers import Trainer, TrainingArguments

        for quantize, batches in ((False, args.autoencoder_steps), (True, args.steps)):
            self.quantize = quantize
            if quantize and (batches or not args.refit_codebooks):
                self.start_codebooks(self.latents(dataset, KMEANS_USERS))
            if not batches:
                continue
            with tempfile.TemporaryDirectory() as folder:  # required by the Trainer; nothing is saved there
                arguments = TrainingArguments(
                    folder,
                    max_steps=batches,
                    per_device_train_batch_size=args.batch_size or 4 * args.codebook_size,
                    learning_rate=args.learning_rate,
                    lr_scheduler_type="cosine" if quantize else "constant",
                    max_grad_norm=1.0,
                    seed=args.seed,
                    save_strategy="no",
                    logging_steps=100,
                    report_to="none",
                    remove_unused_columns=False,
                    # with several devices the Trainer takes DataParallel, which loses the codebooks' running means
                    use_cpu=torch.cuda.device_count() != 1,
                )
                Trainer(self, arguments, train_dataset=dataset, data_collator=dataset.collate).train()
        self.cpu().eval()
        latents = self.latents(dataset, KMEANS_USERS)
        if not latents.isfinite().all():
            raise ValueError(f"learning_rate is {args.learning_rate}, with which the training diverged: lower it.")
        if args.refit_codebooks:
            self.refit_codebooks(latents, args.seed)

    @torch.no_grad()
    def start_codebooks(self, latents: torch.Tensor) -> None:
        """Starts every level's codebook again by k-means over `latents` [users, code_dim]."""
        training = self.training
        for layer in self.quantizer.layers:
            layer._codebook.initted.fill_(False)
        self.quantizer.train()
        self.quantizer(latents)
        self.train(training)

    @torch.no_grad()
    def refit_codebooks(self, latents: torch.Tensor, seed: int = 0) -> None:
        """Sets every level's codebook by `fit_codebooks` from `latents`, float [users, code_dim], on the CPU."""
        seeds = [seed] * self.settings.levels
        codebooks = fit_codebooks(latents.numpy(), self.settings.codebook_size, seeds, max_iter=100)
        for layer, codebook in zip(self.quantizer.layers, codebooks, strict=True):
            layer._codebook.embed.copy_(torch.from_numpy(codebook))
            layer._codebook.initted.fill_(True)  # or the library would start them again


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
