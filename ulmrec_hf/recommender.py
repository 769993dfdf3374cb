"""Recommender: a user id, or a new user's history and reviews, in; the best items with titles and scores out."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from scipy.special import log_softmax
from tqdm.auto import tqdm

from .files import write_json, write_table
from .indexing.base import Indexer, load_indexer
from .publishing import RANKER_FILE, read_ranker_file
from .ranker import UserRanker
from .retrieval.base import Retriever, load_retriever
from .tables import LeaveOneOut
from .user_index import KINDS, UserIndex

logger = logging.getLogger(__name__)
RETRIEVER, INDEXER, SEQUENCES_FILE = "retriever", "indexer", "sequences.parquet"
_BLOCK = 256  # requests that are retrieved and ranked together
_NEW_USER = "new user"


@dataclass(frozen=True)
class Request:
    """Who asks for recommendations, and what is known of them.

    Attributes:
        user_id: a known user; None for a new one.
        history: item ids or titles, oldest first; None = what the data knows of the user.
        reviews: what a user without an index wrote, oldest first.
    """

    user_id: str | None = None
    history: Sequence[str] | None = None
    reviews: Sequence[str] = ()

    def __post_init__(self):
        if self.user_id is not None and not isinstance(self.user_id, str):
            raise ValueError(f"user ids are strings, {str(self.user_id)!r} for example; got {self.user_id!r}.")
        for name, empty in (("history", None), ("reviews", ())):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name} is the string {value!r}; it must be a list of strings.")
            object.__setattr__(self, name, empty if value is None else list(value))

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """A request from a dict of its fields.

        Raises:
            ValueError: it has other fields, or values of another type.
        """
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"a request has no {', '.join(sorted(unknown))}; it has user_id, history and reviews.")
        return cls(**fields)


@dataclass(frozen=True)
class Fusion:
    """How much one unit of each log-probability over the candidates counts in a candidate's score.

    Attributes:
        ranker: of the softmax over the language model's letter logits.
        retriever: of the softmax over the retriever's log-scores of the same candidates.
    """

    ranker: float = 1.0
    retriever: float = 0.0


@dataclass(frozen=True)
class _Asker:
    """A request with everything looked up."""

    user_id: str | None
    history: list[str]  # item ids where they are known, else titles
    items: np.ndarray  # dense ids of the known ones
    index: UserIndex | None  # where theirs is; None without one


class Recommender:
    """Retrieves candidates for a user, ranks them by a language model that knows the user, and fuses both scores.

    Args:
        data: gives the catalogue, and the histories of known users.
        retriever: fitted on the same catalogue.
        ranker: the tuned model; it shows as many candidates as it was tuned with.
        users: the user index; the ranker's own by default.
        indexer: gives new users an index; without one they are ranked by history alone.
        fusion: the weights of the two scores.

    Raises:
        ValueError: the retriever belongs to another catalogue.
    """

    def __init__(
        self,
        data: LeaveOneOut,
        retriever: Retriever,
        ranker: UserRanker,
        users: UserIndex | None = None,
        indexer: Indexer | None = None,
        *,
        fusion: Fusion | None = None,
    ):
        retriever.check_catalogue(data.sequences.catalogue)
        self.data, self.retriever, self.ranker, self.indexer = data, retriever, ranker, indexer
        self.users = ranker.user_index if users is None else users
        self.fusion = fusion or Fusion()
        self._rows = {user_id: row for row, user_id in enumerate(data.user_ids)}
        self._items = {title: item for item, title in reversed(list(enumerate(data.titles, 1)))}
        self._items |= {item_id: item for item, item_id in enumerate(data.item_ids, 1)}
        self._warned: set[str] = set()

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, base: str | os.PathLike | None = None, **settings: Any) -> Self:
        """Loads the folder `model/` of a run, or what `save_pretrained` wrote, wherever it was moved.

        It holds a `UserRanker`'s files, retriever/, items.parquet and, where they were saved, indexer/ and
        sequences.parquet, the users' histories. For `base` and `settings` see `UserRanker.from_pretrained`.

        Raises:
            ValueError: something is missing there.
        """
        folder = Path(folder)
        ranker = UserRanker.from_pretrained(folder, base, **settings)
        fusion = Fusion(**read_ranker_file(folder).get("fusion", {}))
        indexer = load_indexer(folder / INDEXER) if (folder / INDEXER).is_dir() else None
        data = LeaveOneOut(folder=folder)
        if not (folder / SEQUENCES_FILE).is_file():  # histories were not to be published
            no_users = pa.schema([("user", pa.int32()), ("user_id", pa.string()), ("items", pa.list_(pa.int32()))])
            data = LeaveOneOut({"items": data.catalogue, "sequences": no_users.empty_table()})
        return cls(data, load_retriever(folder / RETRIEVER), ranker, indexer=indexer, fusion=fusion)

    def save_pretrained(self, folder: str | os.PathLike, *, user_map: bool = True, merged: bool = False) -> None:
        """Writes what `from_pretrained` reads, with `user_map` also indices and histories with the users' ids.

        For the arguments see `UserRanker.save_pretrained`.
        """
        self.ranker.save_pretrained(folder, user_map=user_map, merged=merged)
        write_parts(folder, self.data if user_map else None, self.retriever, self.indexer, self.fusion)

    def recommend(
        self,
        user_id: str | None = None,
        *,
        history: Sequence[str] | None = None,
        reviews: Sequence[str] = (),
        k: int = 10,
    ) -> list[dict[str, Any]]:
        """The best k items for one user, best first.

        Args:
            user_id, history, reviews: see `Request`. What is in the history is not recommended.
            k: how many, at most as many as the ranker shows candidates.

        Returns:
            One dict an item: item_id, title, score (see `Fusion`), ranker_score (the letter's logit) and
            retriever_score; fewer than k where the catalogue has no more.

        Raises:
            ValueError: k is out of range, or an argument has another type.
        """
        return next(self.recommend_many([Request(user_id, history, reviews)], k, progress=False))

    def recommend_many(
        self,
        requests: Iterable[Request | Mapping[str, Any] | str],
        k: int = 10,
        *,
        batch_size: int = 32,
        progress: bool = True,
    ) -> Iterator[list[dict[str, Any]]]:
        """What `recommend` gives, for any number of requests, streamed in their order; see there for the errors.

        Args:
            requests: `Request`s, dicts of their fields, or ids of known users.
            batch_size: prompts a forward pass.
            progress: show a bar.
        """
        if isinstance(requests, str | Mapping | Request):
            raise ValueError(f"requests is one request, {requests!r}; give a list of them, or call recommend.")
        most = self.ranker.settings.num_candidates
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= most:
            raise ValueError(f"k is {k!r}; it must be a whole number of 1 to {most}, as many as this model ranks.")
        requests = iter(requests)
        with tqdm(desc="recommending", unit=" users", disable=not progress) as bar:
            while block := [self._look_up(request) for request in islice(requests, _BLOCK)]:
                for items in self._recommend(block, k, batch_size):
                    bar.update()
                    yield items

    def _recommend(self, askers: list[_Asker], k: int, batch_size: int) -> Iterator[list[dict[str, Any]]]:
        histories = [asker.items for asker in askers]
        items, retrieved = self.retriever.top(histories, self.ranker.settings.num_candidates)
        counts = np.isfinite(retrieved).sum(1)
        ids = self.data.item_ids
        offered = [[ids[item - 1] for item in row[:count]] for row, count in zip(items, counts, strict=True)]
        asked = [row for row, count in enumerate(counts) if count]
        prompts = [
            self.ranker.prompt(askers[row].user_id, askers[row].history, offered[row], index=askers[row].index)
            for row in asked
        ]
        letters = np.full(items.shape, -np.inf)
        letters[asked] = self.ranker.scores(prompts, items.shape[1], batch_size=batch_size)
        letters[np.arange(items.shape[1]) >= counts[:, None]] = -np.inf
        fused = self._fuse(letters, histories, items)
        for row, count in enumerate(counts):
            order = np.argsort(-fused[row, :count], kind="stable")[:k]
            yield [
                {
                    "item_id": offered[row][place],
                    "title": self.data.titles[items[row, place] - 1],
                    "score": float(fused[row, place]),
                    "ranker_score": float(letters[row, place]),
                    "retriever_score": float(retrieved[row, place]),
                }
                for place in order.tolist()
            ]

    def _fuse(self, letters: np.ndarray, histories: list[np.ndarray], items: np.ndarray) -> np.ndarray:
        """float64 [requests, candidates]; see `Fusion`."""
        fused = self.fusion.ranker * _log_probabilities(letters)
        if self.fusion.retriever:
            scores = self.retriever.log_scores(histories).cpu().double().numpy()
            scores = np.where(np.isfinite(letters), np.take_along_axis(scores, items, 1), -np.inf)
            fused += self.fusion.retriever * _log_probabilities(scores)
        return fused

    def _look_up(self, request: Request | Mapping[str, Any] | str) -> _Asker:
        if isinstance(request, Mapping):
            request = Request.parse(request)
        elif not isinstance(request, Request):
            request = Request(request)
        user_id = request.user_id
        ids = self.data.item_ids
        if request.history is None:
            row = self._rows.get(user_id)
            items = np.empty(0, np.int32) if row is None else self.data.sequences[row]
            history = [ids[item - 1] for item in items]
        else:
            found = [self._items.get(item, 0) for item in request.history]
            history = [ids[item - 1] if item else name for item, name in zip(found, request.history, strict=True)]
            items = np.array([item for item in found if item], np.int32)
            if len(items) < len(found):
                unknown = history[found.index(0)]
                self._warn_once("%r is not in the catalogue: it is shown to the ranker as a title", unknown)
        index = self.users
        if index is not None and (user_id is None or user_id not in index):
            index = self._index_of_new_user(user_id, history, request.reviews)
            user_id = user_id if index is None else index.user_ids[-1]
        return _Asker(user_id, history, items, index)

    def _index_of_new_user(self, user_id: str | None, history: list[str], reviews: Sequence[str]) -> UserIndex | None:
        """A free index from what the indexer reads of a new user; None where there is nothing for it to read."""
        if self.indexer is None or self.indexer.inputs is None:
            return None
        titles = [self.ranker.titles.get(item, item) for item in history]
        known = {"reviews": list(reviews), "titles": titles, "cooccurrence": history}
        values = {name: known[name] for name in self.indexer.inputs.weights if known.get(name)}
        if not values:
            return None
        longest = max(map(len, values.values()))  # one value for each interaction; the newest ones belong together
        values = {name: [None] * (longest - len(part)) + part for name, part in values.items()}
        name = _NEW_USER if user_id is None else user_id
        while name in self.users:  # somebody may bear that very id
            name += "+"
        new = self.indexer.index_new(**values, used=self.users, user_id=name)
        # a number is the user's own only in the map of all
        return self.users.merge(new) if KINDS[new.kind].by_number else new

    def _warn_once(self, message: str, *values: Any) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message + "; further cases are not logged.", *values)


def _log_probabilities(scores: np.ndarray) -> np.ndarray:
    """Each row's log-softmax; 0 where a score is -inf, past a request's candidates."""
    with np.errstate(invalid="ignore"):  # a row without any candidate
        return np.nan_to_num(log_softmax(scores, axis=1), nan=0.0, neginf=0.0)


def write_parts(
    folder: str | os.PathLike,
    data: LeaveOneOut | None,
    retriever: Retriever,
    indexer: Indexer | None,
    fusion: Fusion,
) -> None:
    """Adds to a published ranker's folder what a `Recommender` needs besides; histories where `data` is given."""
    folder = Path(folder)
    for name, part in ((RETRIEVER, retriever), (INDEXER, indexer)):
        if part is not None:
            (folder / name).mkdir(exist_ok=True)
            part.save_pretrained(folder / name)
    (folder / SEQUENCES_FILE).unlink(missing_ok=True)  # of an earlier save
    if data is not None:
        sequences = data.sequences
        lists = pa.ListArray.from_arrays(pa.array(sequences.offsets, pa.int32()), pa.array(sequences.items))
        users = pa.array(range(len(sequences)), pa.int32())
        write_table(folder / SEQUENCES_FILE, pa.table({"user": users, "user_id": data.user_ids, "items": lists}))
    write_json(folder / RANKER_FILE, {**read_ranker_file(folder), "fusion": asdict(fusion)})
