"""The grammar of user tokens, and UserIndex: user id -> codes. Unique, or it raises."""

import os
import re
import string
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .files import write_table
from .registry import Registry

MAX_CODEBOOK_SIZE = 2**16  # codes are uint16
MAX_LEVELS = len(string.ascii_lowercase)
_USER_TOKEN = re.compile(r"<([a-z])_(0|[1-9][0-9]*)>")
# One or more adjacent user tokens, of whatever levels.
USER_INDEX_PATTERN = re.compile(r"(?:<[a-z]_(?:0|[1-9][0-9]*)>)+")


def user_token(level: int, code: int) -> str:
    """The user token of a code, such as `<a_219>`; levels count from 0."""
    return f"<{string.ascii_lowercase[level]}_{code}>"


def user_tokens(levels: int, codebook_size: int) -> list[list[str]]:
    """All user tokens, [levels][codebook_size]."""
    return [[user_token(level, code) for code in range(codebook_size)] for level in range(levels)]


def spell_codes(codes: Sequence[int]) -> str:
    """Spells codes as user tokens: (219, 2, 95, 238) -> `<a_219><b_2><c_95><d_238>`."""
    return "".join(user_token(level, int(code)) for level, code in enumerate(codes))


def parse_codes(text: str) -> tuple[int, ...]:
    """Reads what `spell_codes` wrote.

    Raises:
        ValueError: the text is anything but user tokens of the levels a, b, c, ... in this order.
    """
    found = _USER_TOKEN.findall(text) if USER_INDEX_PATTERN.fullmatch(text) else []
    if not found or "".join(letter for letter, _ in found) != string.ascii_lowercase[: len(found)]:
        raise ValueError(f"{text!r} is not a user index; one is spelled like <a_219><b_2><c_95><d_238>.")
    return tuple(int(code) for _, code in found)


def perplexity(codes: np.ndarray, codebook_size: int) -> float:
    """exp of the entropy of how often each code is used: between 1 (one code) and `codebook_size` (all alike)."""
    counts = np.bincount(codes, minlength=codebook_size)
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(share * np.log(share)).sum()))


def pack_codes(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """One int64 a row: the codes read as a number in base `codebook_size`, the first level the most significant.

    They fit where `check_indices` raises nothing.
    """
    keys = np.zeros(len(codes), np.int64)
    for level in np.asarray(codes).T:
        keys = keys * codebook_size + level
    return keys


def check_indices(levels: int, codebook_size: int) -> None:
    """Raises ValueError where an index is not a number below 2^62, see `pack_codes`."""
    if codebook_size**levels > 2**62:
        raise ValueError(
            f"{levels} levels of {codebook_size} codes are more than 2^62 indices: lower levels or codebook_size."
        )


@dataclass(frozen=True)
class IndexKind:
    """A way to spell a user's index in prompts.

    Attributes:
        spell: from (index, row, codes) to the text of a user; the codes, uint16 [levels], may be earlier ones.
        by_number: the text depends on the user's entry in `UserIndex.numbers`.
        adds_tokens: the text consists of user tokens, which the base model's tokenizer is extended by.
    """

    spell: Callable[["UserIndex", int, np.ndarray], str]
    by_number: bool = False
    adds_tokens: bool = False


# The paper's Figure 9 compares codes, numbers and ids.
KINDS = Registry(
    "index_kind",
    codes=IndexKind(lambda index, row, codes: spell_codes(codes), adds_tokens=True),  # user tokens
    text=IndexKind(lambda index, row, codes: "-".join(map(str, codes))),  # the same codes as plain text
    number=IndexKind(lambda index, row, codes: str(index.numbers[row]), by_number=True),  # the user's row in the map
    id=IndexKind(lambda index, row, codes: index.user_ids[index.numbers[row]], by_number=True),
)


@dataclass(frozen=True)
class EarlierCodes:
    """The codes of users without their newest train interactions, which training rows spell.

    Attributes:
        offsets: int64 [users + 1]; user u has the rows `offsets[u]` to `offsets[u + 1]`, which may be none.
        codes: uint16 [rows, levels]: a user's without the newest interaction, without the newest two, ...; not unique.
    """

    offsets: np.ndarray
    codes: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """int64 [users], how many rows each has."""
        return np.diff(self.offsets)

    def shuffled(self, order: np.ndarray, codes: np.ndarray) -> "EarlierCodes":
        """As many rows for each user u as before, from user `order[u]`: past the last one that one, or `codes[u]`."""
        users = np.repeat(np.arange(len(order)), self.counts)
        begin, end = self.offsets[:-1][order][users], self.offsets[1:][order][users]
        rows = np.minimum(begin + np.arange(len(users)) - self.offsets[users], end - 1)
        return EarlierCodes(self.offsets, np.where((begin < end)[:, None], self.codes[rows], codes[users]))


class UserIndex:
    """The codes of every user, and how they are spelled.

    Args:
        user_ids: one id a user, all different.
        codes: integers, shape [users, levels], each in [0, codebook_size), all rows different.
        codebook_size: codes per level, at most 65,536.
        kind: what `spell` writes, one of `KINDS`; `id` is the user id, unchanged (see `ulmrec_hf.prompts.spell_user`).
        numbers: the row whose number and id each user has: its own, except in a shuffled map.
        earlier: for an index that was made from the train part, the users' codes before their newest interactions.

    Raises:
        ValueError: two users share an id or a row of codes (the first such pair is named), a code is out of range,
            there is no such kind, numbers do not hold every row once, or earlier codes are not of these users.
    """

    def __init__(
        self,
        user_ids: Sequence[str],
        codes: np.ndarray,
        codebook_size: int,
        kind: str = "codes",
        numbers: np.ndarray | None = None,
        earlier: EarlierCodes | None = None,
    ):
        KINDS.check(kind)
        codes = np.asarray(codes)
        if codes.ndim != 2 or not 1 <= codes.shape[1] <= MAX_LEVELS or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(
                f"codes must be integers of shape [users, levels] with 1 to {MAX_LEVELS} levels; "
                f"got {codes.dtype} of shape {list(codes.shape)}."
            )
        if len(user_ids) != len(codes):
            raise ValueError(f"{len(user_ids)} user ids but {len(codes)} rows of codes: each user needs one row.")
        if not 1 <= codebook_size <= MAX_CODEBOOK_SIZE:
            raise ValueError(f"codebook_size must be between 1 and {MAX_CODEBOOK_SIZE}, got {codebook_size}.")
        check_indices(codes.shape[1], codebook_size)
        outside = np.argwhere((codes < 0) | (codes >= codebook_size))
        if len(outside):
            row, level = outside[0]
            raise ValueError(
                f"User {user_ids[row]!r} has the code {codes[row, level]} at level {level + 1}, "
                f"outside of 0..{codebook_size - 1}."
            )
        self.user_ids = list(user_ids)
        self.codes = np.ascontiguousarray(codes, dtype=np.uint16)
        self.codes.flags.writeable = False
        self.codebook_size = int(codebook_size)
        self.kind = kind
        rows = np.arange(len(codes), dtype=np.int32)
        self.numbers = rows if numbers is None else np.array(numbers, dtype=np.int32)
        if not np.array_equal(np.sort(self.numbers), rows):
            raise ValueError(f"numbers must hold each of 0 to {len(codes) - 1} once, one for each user.")
        self.numbers.flags.writeable = False
        self._rows: dict[str, int] = {}
        for row, user_id in enumerate(self.user_ids):
            if not isinstance(user_id, str):
                raise ValueError(f"User ids must be strings; row {row} has {user_id!r}.")
            first = self._rows.setdefault(user_id, row)
            if first != row:
                raise ValueError(f"User id {user_id!r} occurs twice, in rows {first} and {row}: ids must be unique.")
        self._check_unique_codes()
        self.earlier = earlier and self._checked(earlier)

    def _checked(self, earlier: EarlierCodes) -> EarlierCodes:
        offsets, codes = np.asarray(earlier.offsets, np.int64), np.asarray(earlier.codes)
        codes = codes if len(codes) else self.codes[:0]
        shaped = offsets.shape == (len(self) + 1,) and codes.shape == (offsets[-1], self.levels) and not offsets[0]
        whole = np.issubdtype(codes.dtype, np.integer) and (np.diff(offsets) >= 0).all()
        if not (shaped and whole and 0 <= codes.min(initial=0) <= codes.max(initial=0) < self.codebook_size):
            raise ValueError(f"earlier must hold rows of {self.levels} codes in 0..{self.codebook_size - 1} by user.")
        return EarlierCodes(offsets, codes.astype(np.uint16, copy=False))

    def _check_unique_codes(self) -> None:
        if (self.keys[1:] > self.keys[:-1]).all():
            return
        keys = pack_codes(self.codes, self.codebook_size)
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        repeated = np.flatnonzero(first[inverse] != np.arange(len(keys)))
        self._refuse(repeated[0], self.user_ids[first[inverse[repeated[0]]]], len(repeated))

    def _refuse(self, row: int, owner: str, count: int) -> None:
        raise ValueError(
            f"Users {owner!r} and {self.user_ids[row]!r} share the index {spell_codes(self.codes[row])} "
            f"({count} such rows): a user index must be unique."
        )

    @property
    def levels(self) -> int:
        """Codes per user."""
        return self.codes.shape[1]

    def __len__(self) -> int:
        return len(self.user_ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.user_ids)

    def __contains__(self, user_id: str) -> bool:
        return user_id in self._rows

    def __getitem__(self, user_id: str) -> tuple[int, ...]:
        return tuple(self.codes[self._row(user_id)].tolist())

    def _row(self, user_id: str) -> int:
        if user_id not in self._rows:
            raise KeyError(f"User {user_id!r} is not among the {len(self)} users of this index.")
        return self._rows[user_id]

    def __repr__(self) -> str:
        return f"UserIndex(users={len(self)}, levels={self.levels}, codebook_size={self.codebook_size})"

    def spell(self, user_id: str, before: int = 0) -> str:
        """The user's index as text: by default user tokens, such as `<a_219><b_2><c_95><d_238>`; see `kind`.

        Args:
            before: how many of the newest train interactions the index must not have seen. Without `earlier` codes, and
                for kinds spelled by number, all have the same index.

        Raises:
            KeyError: the map does not hold the user.
            ValueError: there are `earlier` codes, but not so many of this user.
        """
        kind, row, earlier = KINDS[self.kind], self._row(user_id), self.earlier
        if not before or earlier is None or kind.by_number:
            return kind.spell(self, row, self.codes[row])
        begin, end = earlier.offsets[row : row + 2]
        if before > end - begin:
            raise ValueError(
                f"user_index: user {user_id!r} has no codes without the newest {before} train interactions, only up to "
                f"{end - begin}: raise train_positions of the indexing (YAML index_config)."
            )
        return kind.spell(self, row, earlier.codes[begin + before - 1])

    @cached_property
    def keys(self) -> np.ndarray:
        """int64 [users], sorted: every user's codes as one number, see `pack_codes`."""
        return np.sort(pack_codes(self.codes, self.codebook_size))

    def merge(self, other: "UserIndex") -> "UserIndex":
        """The users of both maps, of this map's kind; users who are new in `other` come last and get the next numbers.

        Raises:
            ValueError: the maps have other levels or codebook sizes, a user has another index in each, or two users
                have the same one; the first of them is named.
        """
        if (self.levels, self.codebook_size) != (other.levels, other.codebook_size):
            raise ValueError(
                f"a map of {self.levels} levels of {self.codebook_size} codes and one of {other.levels} of "
                f"{other.codebook_size} cannot be merged."
            )
        conflicts = [user for user in other if user in self and self[user] != other[user]]
        if conflicts:
            raise ValueError(
                f"{len(conflicts)} users have two different indices, such as {conflicts[0]!r}: "
                f"{spell_codes(self[conflicts[0]])} and {spell_codes(other[conflicts[0]])}. Keep one map's and leave "
                "them out of the other."
            )
        new = [row for row, user in enumerate(other) if user not in self]
        codes, users = other.codes[new], [other.user_ids[row] for row in new]
        keys = pack_codes(codes, self.codebook_size)
        places = np.searchsorted(self.keys, keys)
        taken = np.flatnonzero(self.keys[np.minimum(places, len(self) - 1)] == keys) if len(self) else []
        if len(taken):
            owner = np.flatnonzero((self.codes == codes[taken[0]]).all(axis=1))[0]
            other._refuse(new[taken[0]], self.user_ids[owner], len(taken))
        # Both maps are valid, so only what is new is checked: one user may join a million.
        merged = copy(self)
        merged.user_ids = self.user_ids + users
        merged.codes = np.concatenate([self.codes, codes])
        merged.numbers = np.concatenate([self.numbers, np.arange(len(self), len(self) + len(new), dtype=np.int32)])
        merged.codes.flags.writeable = merged.numbers.flags.writeable = False
        merged._rows = self._rows | {user: len(self) + place for place, user in enumerate(users)}
        order = keys.argsort()
        merged.keys = np.insert(self.keys, places[order], keys[order])
        merged.earlier = _joined(self, other, new)
        return merged

    def shuffled(self, seed: int) -> "UserIndex":
        """The same users with the same codes (numbers, ids) permuted among them: what a placebo run uses."""
        order = np.random.default_rng(seed).permutation(len(self))
        codes, earlier = self.codes[order], self.earlier and self.earlier.shuffled(order, self.codes[order])
        return UserIndex(self.user_ids, codes, self.codebook_size, self.kind, self.numbers[order], earlier)

    def to_parquet(self, path: str | os.PathLike, *, earlier: bool = True) -> None:
        """Writes user_id, codes (list<uint16>) and, for kinds spelled by number, number (int32), atomically.

        With `earlier`, and where they are known, earlier (list<list<uint16>>) too. The schema's metadata hold
        codebook_size and, for a kind other than codes, index_kind.
        """
        table = pa.table({"user_id": pa.array(self.user_ids, pa.string()), "codes": _lists(self.codes)})
        if earlier and self.earlier is not None:
            rows = pa.ListArray.from_arrays(self.earlier.offsets.astype(np.int32), _lists(self.earlier.codes))
            table = table.append_column("earlier", rows)
        metadata = {"codebook_size": str(self.codebook_size)}
        if self.kind != "codes":
            metadata["index_kind"] = self.kind
        if KINDS[self.kind].by_number:
            table = table.append_column("number", pa.array(self.numbers))
        write_table(path, table.replace_schema_metadata(metadata))

    @classmethod
    def from_parquet(cls, path: str | os.PathLike) -> "UserIndex":
        """Reads what `to_parquet` wrote.

        Raises:
            ValueError: the file is missing or holds no user index.
        """
        if not os.path.isfile(path):
            raise ValueError(f"User index {path} does not exist. recipes/index_users.py makes one.")
        table = pq.read_table(path)
        metadata = table.schema.metadata or {}
        if not {"user_id", "codes"} <= set(table.column_names) or b"codebook_size" not in metadata:
            raise ValueError(
                f"{path} is not a user index: it needs the columns user_id and codes, and codebook_size in its "
                f"schema metadata; it has the columns {', '.join(table.column_names)}."
            )
        codes = _read_lists(table["codes"].combine_chunks())
        if codes is None or not len(codes):
            raise ValueError(f"{path} is not a user index: it needs users, and a list of as many codes for each.")
        kind = metadata.get(b"index_kind", b"codes").decode()
        size, numbers = int(metadata[b"codebook_size"]), None
        try:
            if KINDS[KINDS.check(kind)].by_number and "number" in table.column_names:
                numbers = table["number"].to_numpy()
            earlier = _read_earlier(table["earlier"].combine_chunks()) if "earlier" in table.column_names else None
            return cls(table["user_id"].to_pylist(), codes, size, kind, numbers, earlier)
        except ValueError as error:
            raise ValueError(f"{path} is not a user index: {error}") from None

    def report(self) -> dict:
        """`users`; `codes_used` and `perplexity` by level; `users_alone` under their 1-code and 2-code prefix."""
        alone = [
            int((np.unique(self.codes[:, :length], axis=0, return_counts=True)[1] == 1).sum())
            for length in range(1, min(2, self.levels) + 1)
        ]
        return {
            "users": len(self),
            "codes_used": [len(np.unique(level)) for level in self.codes.T],
            "perplexity": [round(perplexity(level, self.codebook_size), 3) for level in self.codes.T],
            "users_alone": alone,
        }


def _joined(one: UserIndex, other: UserIndex, new: list[int]) -> EarlierCodes | None:
    """The earlier codes of `one` and of the rows `new` of `other`; no rows for the users of a map that has none."""
    if one.earlier is None and other.earlier is None:
        return None
    nothing = [EarlierCodes(np.zeros(len(each) + 1, np.int64), each.codes[:0]) for each in (one, other)]
    old, theirs = one.earlier or nothing[0], other.earlier or nothing[1]
    is_new = np.isin(np.arange(len(other)), new)
    codes = np.concatenate([old.codes, theirs.codes[np.repeat(is_new, theirs.counts)]])
    return EarlierCodes(np.append(old.offsets, old.offsets[-1] + np.cumsum(theirs.counts[is_new])), codes)


def _lists(codes: np.ndarray) -> pa.ListArray:
    offsets = np.arange(0, codes.size + 1, codes.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(codes.ravel()))


def _read_lists(lists: pa.Array) -> np.ndarray | None:
    """Lists of one length as an array [rows, length]; None where they are something else."""
    if not pa.types.is_list(lists.type) or lists.null_count or lists.flatten().null_count:
        return None
    lengths = np.unique(lists.value_lengths().to_numpy())
    return lists.flatten().to_numpy().reshape(-1, *lengths) if len(lengths) <= 1 else None


def _read_earlier(lists: pa.Array) -> EarlierCodes:
    codes = _read_lists(lists.flatten()) if pa.types.is_list(lists.type) and not lists.null_count else None
    if codes is None:
        raise ValueError("earlier must hold a list of lists of as many codes as `codes` for each user, none missing.")
    return EarlierCodes(np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy(), dtype=np.int64)]), codes)
