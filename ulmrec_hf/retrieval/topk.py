"""Top-k and ranks over the whole catalogue from a batch of scores; of tied items the lower id comes first."""

from collections.abc import Sequence

import numpy as np
import torch

_NAN = "the retriever's scores are NaN: its training diverged; lower learning_rate and fit again."


def seen_places(histories: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [items in all histories, 2]: the places (row, item) of the scores that belong to a history."""
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    items = np.concatenate([np.asarray(history, dtype=np.int64) for history in histories] or [np.empty(0, np.int64)])
    return torch.from_numpy(np.stack([rows, items], axis=1))


def hide(scores: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
    """The same tensor of scores, changed in place to -inf at padding and at `places` (see `seen_places`)."""
    scores[:, 0] = -torch.inf
    if places is not None:
        scores[places[:, 0], places[:, 1]] = -torch.inf
    return scores


def ranks_of(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The targets' places in the whole catalogue without the seen items.

    Args:
        scores: float [batch, num_items + 1], padding and seen items at -inf (see `hide`).
        targets: int64 [batch].

    Returns:
        int64 [batch, 3]: the rank, 1 = best, of tied items the lower id first; the first rank of the items that tie
        with the target; and how many these are, itself counted. All 0 where the target itself was seen, and so cannot
        be retrieved.

    Raises:
        ValueError: the scores are NaN.
    """
    target_scores = scores.gather(1, targets[:, None])
    if torch.isnan(target_scores).any():
        raise ValueError(_NAN)
    # int32: summing bools into the default int64 is four times slower
    first = 1 + (scores > target_scores).sum(1, dtype=torch.int32)
    equal = scores == target_scores
    count = equal.sum(1, dtype=torch.int32)
    ranks, tied = first.clone(), count > 1
    if tied.any():
        before = torch.arange(scores.shape[1], device=scores.device) < targets[tied, None]
        ranks[tied] += (equal[tied] & before).sum(1, dtype=torch.int32)
    return torch.stack([ranks, first, count], 1).long().masked_fill_(torch.isneginf(target_scores), 0)


def top_items(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best items of each row in descending order.

    Args:
        scores: float32 [batch, num_items + 1], padding and seen items at -inf.
        k: how many; fewer are returned from a smaller catalogue.

    Returns:
        Items, int64 [batch, k], and their scores, float32 [batch, k]; -inf where the row has no more items.

    Raises:
        ValueError: the scores are NaN.
    """
    k = min(k, scores.shape[1] - 1)
    values, items = scores.topk(k + 1)
    if torch.isnan(values).any():
        raise ValueError(_NAN)
    tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > -torch.inf)
    values, items = values[:, :k], items[:, :k]
    if tied.any():  # topk may keep any of the items that tie for the last place
        edge, kept = values[tied, -1:], items[tied]
        last = values[tied] == edge
        row, item = (scores[tied] == edge).nonzero(as_tuple=True)
        nth = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)  # of its row's tied items
        kept[last] = item[nth < last.sum(1)[row]]
        items[tied] = kept
    items, by_item = items.sort(dim=1)
    values, by_score = values.gather(1, by_item).sort(dim=1, descending=True, stable=True)
    return items.gather(1, by_score), values
