"""Where user tokens start: at the embedding rows of the words that their users write, instead of at noise."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from .prompts import NONE, neutralise, reserved_tokens
from .user_index import UserIndex

if TYPE_CHECKING:
    from .tokenization_user import UserTokenizer

MOST_USERS = 65_536  # an even sample of so many tells what a code means


@torch.no_grad()
def start_from_texts(
    matrices: Iterable[torch.nn.Module], tokenizer: "UserTokenizer", users: UserIndex, texts: Sequence[str | None]
) -> None:
    """Sets the rows of the user tokens to what the users of each code write.

    A text's vector is the mean of its tokens' rows, rare tokens counting more (idf). The row of a first-level code is
    the mean vector of its users, that of a later code the mean of what the codes before it leave over, as in residual
    quantisation. All are scaled by one factor, so that the first level's rows lie as far from the mean row as a word's
    do. A code without users gets the mean row.

    Args:
        matrices: layers whose `weight` [tokens, dim] has a row for each token of the tokenizer; changed in place.
        tokenizer: has the user tokens.
        users: whose codes these tokens spell.
        texts: one for each of `users`, in their order; None or "" where nothing is known.

    Raises:
        ValueError: there are not as many texts as users.
    """
    if len(texts) != len(users):
        raise ValueError(f"{len(texts)} texts for {len(users)} users: give one for each, None where there is none.")
    known = np.flatnonzero([bool(text) for text in texts])
    known = known[:: max(1, -(-len(known) // MOST_USERS))]
    reserved, levels = reserved_tokens(tokenizer), tokenizer.user_token_ids
    written = [neutralise(texts[user], reserved) for user in known]
    ids = tokenizer(written, add_special_tokens=False)["input_ids"] if written else []
    known, ids = known[[bool(row) for row in ids]], [row for row in ids if row]
    if not ids:
        return
    frequency = Counter(token for row in ids for token in set(row))
    idf = [torch.tensor([np.log(len(ids) / frequency[token]) for token in row], dtype=torch.float32) for row in ids]
    codes = torch.from_numpy(users.codes[known].astype(np.int64))
    own = {token for level in levels for token in level}
    words = [token for token in range(len(tokenizer)) if token not in own]
    for weight in (module.weight for module in matrices):
        rows = weight.cpu().float()
        center = rows[words].mean(0)
        typical = (rows[words] - center).norm(dim=1).mean()
        vectors = [(part[:, None] * (rows[row] - center)).mean(0) for part, row in zip(idf, ids, strict=True)]
        left = torch.stack(vectors)
        left -= left.mean(0)
        scale = None
        for level, tokens in enumerate(levels):
            meanings = _means(left, codes[:, level], len(tokens))
            left -= meanings[codes[:, level]]
            if scale is None:
                lengths = meanings.norm(dim=1)
                scale = typical / lengths[lengths > 0].mean() if lengths.any() else 0.0
            weight[tokens] = (center + scale * meanings).to(weight)


def newest_preferences(preferences: pa.Table, users: UserIndex) -> list[str | None]:
    """Each user's preference from the whole train part; None where there is none.

    Args:
        preferences: user_id, position, preference; see `tables.PREFERENCES`.
    """
    newest: dict[str, tuple[int, str]] = {}
    for user, *found in zip(
        *(preferences[name].to_pylist() for name in ("user_id", "position", "preference")), strict=True
    ):
        newest[user] = max(newest.get(user, (-1, "")), tuple(found))
    texts = (newest.get(user, (-1, ""))[1] for user in users)
    return [None if text in ("", NONE) else text for text in texts]


def _means(vectors: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """The mean vector of each group, float32 [count, dim]; 0 of an empty one."""
    sums = vectors.new_zeros(count, vectors.shape[1]).index_add_(0, groups, vectors)
    return sums / torch.bincount(groups, minlength=count).clamp(min=1)[:, None]
