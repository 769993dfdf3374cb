"""The parts of a prompt: text made harmless, titles, users, histories and candidates, fitted to a length."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .user_index import KINDS, UserIndex, user_token
from .verbalizer import LETTERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = "(none)"

# Every character that a tokenizer's normalizer (NFKC) may fold back into markup, and two that spell user tokens.
_LOOKALIKES = str.maketrans("＜＞﹤﹥｜＃﹟［］﹇﹈＿／", "<><>|##[][]_/")
# Control, zero-width and direction characters, some of which a normalizer drops, so that markup closes up again.
_INVISIBLE = re.compile(
    "[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]+"
)
_MARKUP = re.compile(r"<(?=[^\s<>]+>)|\[(?=/?[A-Z_]+\])|#(?=#)")


def neutralise(text: str, reserved: Iterable[str] = ()) -> str:
    """Makes text from users or items harmless as prompt text: one line, no control token, no section header.

    A space is put into what a tokenizer could read as a control token (`<a_3>`, `</s>`, `<|im_start|>`, `[INST]`) or a
    reader as a section header (`### Response:`), and into `reserved` strings, see `reserved_tokens`.
    """
    text = " ".join(_INVISIBLE.sub(" ", text.translate(_LOOKALIKES)).split())
    text = _MARKUP.sub(lambda match: match.group() + " ", text)
    for token in reserved:
        cut = len(token) - len(token.lstrip()) + 1  # behind its first visible character
        # repeatedly, since a token such as "aa" occurs again in what a first pass makes of "aaa"
        while len(token.strip()) > 1 and token in text:
            text = text.replace(token, token[:cut] + " " + token[cut:])
    return text


def reserved_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The tokenizer's added and special tokens that `neutralise` would not break up by its general rules alone."""
    added = {*(str(token) for token in tokenizer.added_tokens_decoder.values()), *tokenizer.all_special_tokens}
    return sorted(token for token in added if token in neutralise(token))


def clean_titles(
    titles: Sequence[str | None], tokenizer: "PreTrainedTokenizerBase", max_tokens: int, reserved: Iterable[str]
) -> tuple[list[str], list[int]]:
    """Titles as a prompt shows them: neutralised, cut to `max_tokens` tokens, `(none)` where nothing is left.

    Args:
        tokenizer: a fast one, since only these say where a token begins.
        reserved: what `reserved_tokens(tokenizer)` returned.

    Returns:
        The titles, and at most how many tokens each has.
    """
    cleaned, counts = [], []
    for begin in range(0, len(titles), 1000):
        texts = [neutralise(title or "", reserved) or NONE for title in titles[begin : begin + 1000]]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, offsets in zip(texts, encoded["offset_mapping"], strict=True):
            # where the first dropped token begins: a character that is several tokens goes as a whole
            cleaned.append(text[: offsets[max_tokens][0]].rstrip() or NONE if len(offsets) > max_tokens else text)
            counts.append(min(len(offsets), max_tokens))
    return cleaned, counts


def spell_user(user_index: UserIndex, user_id: str, reserved: Iterable[str] = (), before: int = 0) -> str:
    """A user's index as prompts and completions show it: user tokens, or neutralised text, for an id may be anything.

    See `UserIndex.spell` for `before` and the errors.
    """
    text = user_index.spell(user_id, before)
    return text if KINDS[user_index.kind].adds_tokens else neutralise(text, reserved) or NONE


def check_spellings(user_index: UserIndex, tokenizer: "PreTrainedTokenizerBase", reserved: Sequence[str]) -> None:
    """Raises ValueError where a model cannot tell users by how they are spelled.

    That is where the tokenizer lacks an index's tokens, or where two ids become the same text; numbers always differ.

    Args:
        user_index: of any kind.
        tokenizer: tokens are compared, since its normalizer may fold what differs as text.
        reserved: what `reserved_tokens(tokenizer)` returned.
    """
    if KINDS[user_index.kind].adds_tokens and len(user_index):
        vocabulary = tokenizer.get_vocab()
        used = [user_index.codes, *([user_index.earlier.codes] if user_index.earlier else [])]
        most = np.max([codes.max(axis=0, initial=0) for codes in used], axis=0)
        largest = [user_token(level, code) for level, code in enumerate(most)]
        if missing := [token for token in largest if token not in vocabulary]:
            raise ValueError(
                f"the tokenizer has no token {missing[0]} of this user index ({user_index.levels} levels of "
                f"{user_index.codebook_size} codes): make it for these users, by load_base or UserTokenizer.from_base."
            )
    seen: dict[bytes, str] = {}
    user_ids = user_index.user_ids if user_index.kind == "id" else []
    for begin in range(0, len(user_ids), 1000):
        part = user_ids[begin : begin + 1000]
        texts = [neutralise(user_id, reserved) or NONE for user_id in part]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for user_id, text, ids in zip(part, texts, encoded, strict=True):
            first = seen.setdefault(np.array(ids, np.int32).tobytes(), user_id)
            if first != user_id:
                raise ValueError(
                    f"index_kind is id, but the users {first!r} and {user_id!r} are both spelled {text!r} in a prompt: "
                    "rename one of them, or choose another index_kind."
                )


def render_history(titles: Sequence[str], ratings: Sequence[str] | None = None) -> str:
    """One line an item, oldest first: `- title`, or `- title: rating` where ratings are given; `(none)` if empty."""
    if not titles:
        return NONE
    if ratings is None:
        return "\n".join(f"- {title}" for title in titles)
    return "\n".join(f"- {title}: {rating}" for title, rating in zip(titles, ratings, strict=True))


def render_candidates(titles: Sequence[str]) -> str:
    """One line a candidate: `A. title`, `B. title`, ...

    Raises:
        ValueError: there are more candidates than letters (52).
    """
    if len(titles) > len(LETTERS):
        raise ValueError(f"{len(titles)} candidates, but only {len(LETTERS)} letters (A-Z, a-z): lower num_candidates.")
    return "\n".join(f"{letter}. {title}" for letter, title in zip(LETTERS, titles, strict=False))


def count_tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str, completion: str = "") -> int:
    """Tokens of prompt and completion with the end token; an empty completion counts as a letter.

    The prompt of a miss, which has no letter, is thus as long as that of a hit: the target decides nothing about it.
    """
    return len(tokenizer(prompt + (completion or LETTERS[0]), verbose=False)["input_ids"]) + 1


def fit_history(
    render: Callable[[int], tuple[str, str]],
    removable: int,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    subject: str,
    advice: str,
    bound: float = float("inf"),
) -> tuple[str, str]:
    """Renders a prompt with as much of the newest history as `max_length` tokens allow.

    Args:
        render: gives prompt and completion, the given number of oldest history items left out.
        removable: how many items may be left out.
        max_length: most tokens of prompt, completion and end token, see `count_tokens`.
        subject, advice: whose prompt it is and what to do, for the error.
        bound: tokens that the whole row certainly does not exceed; where it fits, nothing is counted, which is slow.

    Raises:
        ValueError: without the removable history there are still more tokens.
    """
    for dropped in range(removable + 1):
        prompt, completion = render(dropped)
        if bound <= max_length or (length := count_tokens(tokenizer, prompt, completion)) <= max_length:
            return prompt, completion
    raise ValueError(f"max_length is {max_length}, but {subject} has {length} tokens even without history: {advice}.")
