"""What all indexers share: inputs, a vector for each user, unique codes from codebooks, new users, files."""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import nn

from ..files import read_json, write_json
from ..protocol import target_positions
from ..stages import with_settings
from ..tables import LeaveOneOut
from ..user_index import EarlierCodes, UserIndex
from .arguments import INDEXERS, IndexArguments
from .assignment import Assignment, assign_new, assign_unique, check_capacity, nearest_codes
from .dataset import UserDataset
from .encoder import TextEncoder, fit_encoder
from .inputs import InputEncoder, TrainPart

KMEANS_USERS = 65_536  # codebooks are made from at most so many
_BATCH = 1024  # users encoded at once
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexerConfig:
    """What every indexer's config.json holds, beside its name.

    Attributes:
        embedding_dim: length of an interaction's vector.
        codebook_size: codes per level (K).
        levels: codes per user (p).
        code_dim: length of a latent vector.
        encoder_name: which text encoder the vectors come from; empty without texts.
        index_kind: how the indices are spelled, one of `user_index.KINDS`.
        evidence: which interactions it was made from, see `IndexArguments`.
    """

    embedding_dim: int = 384
    codebook_size: int = 256
    levels: int = 4
    code_dim: int = 32
    encoder_name: str = "tfidf"
    index_kind: str = "codes"
    evidence: str = "train"


class Indexer(nn.Module, PyTorchModelHubMixin, ABC):
    """Turns what users did into latent vectors, and these into unique codes, the nearest of one codebook a level.

    A subclass sets `name` and `codebooks` and implements `train_on`; where a latent vector is not the users' vector
    itself, it also implements `pool`, `encode`, `decode` and `configure`. It is a plain module with
    `PyTorchModelHubMixin`, since `PreTrainedModel` would not restore a quantiser's buffers.

    Attributes:
        name: what the setting `indexer` calls it.
        reads_user_ids: whether it weighs a user's texts by the user id where the setting `attention` is on.
        settings: what its config.json holds. Not `config`: `transformers.Trainer` writes into a model's.
        codebooks: float [levels, codebook_size, code_dim], a buffer or a property.
        inputs: what turns interactions into vectors; None until it is set. Saved and loaded with the rest.
    """

    name: ClassVar[str]
    reads_user_ids: ClassVar[bool] = False
    codebooks: torch.Tensor

    def __init__(self, config: IndexerConfig):
        super().__init__()
        # the hub mixin gives a dict to a subclass whose __init__ has no annotation
        self.settings = config if isinstance(config, IndexerConfig) else IndexerConfig(**config)
        self.inputs: InputEncoder | None = None
        self._fitted: tuple[LeaveOneOut, UserDataset] | None = None

    @classmethod
    def fit(cls, data: LeaveOneOut, args: IndexArguments | None = None, **settings: Any) -> Self:
        """An indexer trained on the train part of every user, whose vectors it keeps for `index` until it is saved.

        Args:
            args: all settings; `indexer` is not read. Or
            settings: those of `IndexArguments` that differ from its defaults.

        Raises:
            ValueError: both are given, a setting is bad, the data lacks an input, there are more users than indices,
                or the training diverged.
        """
        if args is not None and settings:
            raise ValueError(f"give args or single settings, not both; got args and {', '.join(settings)}.")
        args = args or with_settings(IndexArguments(preset=settings.get("preset", "default")), settings)
        check_capacity(len(data), args.levels, args.codebook_size)
        train = TrainPart.read(data, args.inputs, args.input_weights, args.evidence)
        inputs = cls.fit_inputs(args, train, fit_encoder(args, train.texts))
        dataset = inputs.dataset(train)
        indexer = cls.fit_encoded(args, inputs, dataset)
        indexer._fitted = data, dataset
        return indexer

    @classmethod
    def fit_inputs(cls, args: IndexArguments, train: TrainPart, encoder: TextEncoder | None) -> InputEncoder:
        """What turns interactions into vectors; `encoder` is what `fit_encoder` gave for the train part's texts."""
        sizes = {"cooccurrence_dim": args.cooccurrence_dim, "max_reviews": args.max_reviews}
        return InputEncoder.fit(train, encoder, user_ids=args.attention and cls.reads_user_ids, **sizes)

    @classmethod
    def fit_encoded(cls, args: IndexArguments, inputs: InputEncoder, dataset: UserDataset) -> Self:
        """An indexer trained on users whose vectors are known: `dataset` is what `inputs.dataset` gave."""
        from transformers import set_seed

        set_seed(args.seed)
        indexer = cls(cls.configure(args, inputs, dataset))
        indexer.inputs = inputs
        indexer.train_on(dataset, args)
        return indexer.eval()

    @classmethod
    def configure(cls, args: IndexArguments, inputs: InputEncoder, dataset: UserDataset) -> IndexerConfig:
        """The configuration of an indexer of these users; latent vectors are as long as the users' vectors."""
        name = inputs.encoder.name if inputs.encoder else ""
        sizes = (dataset.dim, args.codebook_size, args.levels, dataset.dim)
        return IndexerConfig(*sizes, name, index_kind=args.index_kind, evidence=args.evidence)

    @abstractmethod
    def train_on(self, dataset: UserDataset, args: IndexArguments) -> None:
        """Learns the codebooks, and all other weights, from these users."""

    def pool(self, texts: torch.Tensor, mask: torch.Tensor, user_ids: torch.Tensor) -> torch.Tensor:
        """A user's vector `x_u`: here the mean of the interactions' vectors, at length 1.

        Args:
            texts: float [users, texts, embedding_dim].
            mask: bool [users, texts], true where there is a text; a user without any gets zeros.
            user_ids: float [users, user_dim], the embedded id strings; of length 0 where they are not read.

        Returns:
            float32 [users, embedding_dim].
        """
        return F.normalize(weighted_mean(texts, mask, torch.zeros_like(mask, dtype=texts.dtype)), dim=-1)

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Latent vectors, float [users, code_dim], of users' vectors [users, embedding_dim]; here themselves."""
        return vectors

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`, as far as there is one."""
        return latents

    @torch.no_grad()
    def vectors(self, dataset: UserDataset, step: int = 1) -> Iterator[torch.Tensor]:
        """`x_u` of every `step`-th user in batches, float32 [batch, embedding_dim]."""
        users = range(0, len(dataset), step)
        for begin in range(0, len(users), _BATCH):
            batch = dataset.collate(list(users[begin : begin + _BATCH]))
            yield self.pool(**{name: value.to(self.codebooks.device) for name, value in batch.items()})

    @torch.no_grad()
    def latents(self, dataset: UserDataset, limit: int | None = None) -> torch.Tensor:
        """float32 [users, code_dim], of an even sample of at most `limit` users where one is given."""
        step = 1 if limit is None else max(1, -(-len(dataset) // limit))
        return torch.cat([self.encode(vectors) for vectors in self.vectors(dataset, step)])

    @torch.no_grad()
    def assign(self, dataset: UserDataset) -> Assignment:
        """Unique codes of these users, from one pass over their vectors, which are never held as a whole.

        Raises:
            ValueError: there are more users than indices, or a vector is not finite.
        """
        config, codebooks = self.settings, self.codebooks
        check_capacity(len(dataset), config.levels, config.codebook_size)
        latents = np.empty((len(dataset), config.code_dim), np.float32)
        nearest = np.empty((len(dataset), config.levels), np.int64)
        errors, begin, silent = torch.zeros(config.levels, dtype=torch.float64), 0, 0
        for vectors in self.vectors(dataset):
            rows = slice(begin, begin := begin + len(vectors))
            latents[rows] = self.encode(vectors).numpy()
            nearest[rows] = nearest_codes(latents[rows], codebooks.numpy())
            quantized = torch.zeros(len(vectors), config.code_dim)
            for level, codebook in enumerate(codebooks):
                quantized = quantized + codebook[nearest[rows, level]]
                errors[level] += (vectors - self.decode(quantized)).square().sum().double()
            silent += int((~vectors.any(dim=1)).sum())
        if silent:
            logger.warning("%d users have nothing in their train part to be indexed by: their vector is zero", silent)
        codes = assign_unique(latents, codebooks.numpy(), nearest)
        errors = [round(error, 4) for error in (errors / max(1, len(dataset))).tolist()]
        return Assignment(codes, nearest, latents, errors, silent)

    @torch.no_grad()
    def earlier_codes(self, dataset: UserDataset, data: LeaveOneOut, train_positions: int = 5) -> EarlierCodes | None:
        """The nearest codes of these users before each of their training targets, from the frozen codebooks.

        Args:
            dataset: what `inputs.dataset` gave for the train part of `data`.
            train_positions: how many of a user's newest training targets; 0 = all.

        Returns:
            None where the indexer was made from all interactions: then there is one index for all rows.
        """
        if self.settings.evidence == "all":
            return None
        users, positions = target_positions(data.sequences.lengths, "train", train_positions)
        positions = positions[np.lexsort((-positions, users))]
        codes = np.empty((len(users), self.settings.levels), np.uint16)
        for group, unseen in self._known_inputs().without_own_choices(dataset, data):
            rows = np.flatnonzero(np.isin(users, group))
            begin = 0
            for vectors in self.vectors(unseen.before(users[rows], positions[rows])):
                nearest = nearest_codes(self.encode(vectors).numpy(), self.codebooks.numpy())
                codes[rows[begin : begin + len(nearest)]] = nearest
                begin += len(nearest)
        return EarlierCodes(np.searchsorted(users, np.arange(len(dataset) + 1)), codes)

    def index(self, data: LeaveOneOut, train_positions: int = 5) -> UserIndex:
        """The index of all users of the data, from their train part and the frozen codebooks.

        Args:
            train_positions: for how many of a user's newest training targets there are `earlier` codes, which have not
                seen the target; at least as many as the tasks have; 0 = all.

        Raises:
            ValueError: there are more users than indices, the data lacks an input, or the indexer lacks its `inputs`.
        """
        if self._fitted is not None and self._fitted[0] is data:
            dataset = self._fitted[1]
        else:
            check_capacity(len(data), self.settings.levels, self.settings.codebook_size)
            inputs = self._known_inputs()
            weights = [*inputs.weights], [*inputs.weights.values()]
            dataset = inputs.dataset(TrainPart.read(data, *weights, self.settings.evidence))
        codes, config = self.assign(dataset).codes, self.settings
        earlier = self.earlier_codes(dataset, data, train_positions)
        return UserIndex(data.user_ids, codes, config.codebook_size, config.index_kind, earlier=earlier)

    @torch.no_grad()
    def index_new(
        self, reviews: Iterable[str] = (), *, used: UserIndex, user_id: str = "", **others: Sequence
    ) -> UserIndex:
        """A free index near those of similar users, from the frozen codebooks.

        Args:
            reviews: what the user wrote, oldest first; omit it where the index was not made from reviews.
            used: the indices in use; `used.merge` of the result gives the extended map.
            others: other inputs that the index was made from, see `InputEncoder.encode`.

        Returns:
            A `UserIndex` of this one user, of the same kind; a number is the user's own only after the merge.

        Raises:
            ValueError: the user has an index already, all indices are in use, the indexer lacks its `inputs`, or an
                input does not fit.
        """
        inputs, config = self._known_inputs(), self.settings
        if not isinstance(user_id, str):
            raise ValueError(f"user_id must be a string, {str(user_id)!r} say; got {user_id!r}.")
        if user_id in used:
            raise ValueError(f"User {user_id!r} has an index already: {used.spell(user_id)}.")
        if used.codebook_size != config.codebook_size or used.levels != config.levels:
            raise ValueError(
                f"the map has {used.levels} levels of {used.codebook_size} codes, this indexer {config.levels} of "
                f"{config.codebook_size}: they do not belong together."
            )
        reviews = reviews if isinstance(reviews, str) else list(() if reviews is None else reviews)
        vectors = torch.from_numpy(inputs.encode(**({"reviews": reviews} if reviews else {}) | others))[None]
        known = vectors.any(-1)
        if not known.any():
            logger.warning("User %r has nothing to be indexed by, and gets an index that means nothing.", user_id)
        ids = torch.from_numpy(inputs.encode_user_ids([user_id])) if inputs.user_ids else torch.zeros(1, 0)
        latents = self.encode(self.pool(vectors[:, known[0]], known[:, known[0]], ids))
        codes = assign_new(latents.numpy(), self.codebooks.numpy(), used.keys)
        return UserIndex([user_id], codes, config.codebook_size, used.kind)

    def _known_inputs(self) -> InputEncoder:
        if self.inputs is None:
            raise ValueError(
                f"this {type(self).__name__} has no inputs to read texts with: load it from the folder index/indexer."
            )
        return self.inputs

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        write_json(save_directory / "config.json", {"indexer": self.name, **asdict(self.settings)})
        if self.inputs is not None:
            self.inputs.save(save_directory)
        self._fitted = None

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **settings: Any) -> Self:
        folder = model_id
        if not os.path.isdir(folder):
            hub = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            folder = snapshot_download(model_id, **{name: settings.get(name) for name in hub})
        config = Path(folder) / "config.json"
        saved = read_json(config).get("indexer") if config.is_file() else None
        if saved not in (None, cls.name):
            raise ValueError(f"{folder} holds an indexer {saved}, not {cls.name}: load it by load_indexer.")
        indexer = super()._from_pretrained(model_id=str(folder), **settings).eval()
        if (Path(folder) / "inputs.json").is_file():
            inputs = indexer.inputs = InputEncoder.load(folder)
            found, config = inputs.encoder.name if inputs.encoder else "", indexer.settings
            if (config.encoder_name, config.embedding_dim) != (found, inputs.dim):
                raise ValueError(
                    f"{folder}: the indexer was made for the encoder {config.encoder_name!r} and vectors of length "
                    f"{config.embedding_dim}; its inputs ({', '.join(inputs.weights)}) are of the encoder {found!r} "
                    f"and give {inputs.dim}: they do not belong together."
                )
        return indexer


def weighted_mean(texts: torch.Tensor, mask: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The mean of each user's texts, weighed by the softmax of `scores` [users, texts]; for the rest see `pool`."""
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1) * mask
    return torch.einsum("un,und->ud", weights, texts)


def load_indexer(folder: str | os.PathLike) -> Indexer:
    """Loads what an indexer's `save_pretrained` wrote.

    Raises:
        ValueError: the folder holds no indexer, or one that is not among `INDEXERS`.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no indexer: {path.name} is missing there.")
    name = read_json(path).get("indexer")
    return INDEXERS[INDEXERS.check(name, f"indexer in {path}")].from_pretrained(folder)
