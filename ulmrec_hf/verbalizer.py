"""Letters as answers: which token each candidate's letter is, and its score."""

from collections.abc import Sequence
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

LETTERS = ascii_uppercase + ascii_lowercase


class LetterVerbalizer:
    """The token ids of the candidates' letters, read off a rendered prompt.

    A letter alone and a letter after a prompt may be different tokens (Llama-2: 319 and, after a newline, 29909), so
    each id is taken from the joint tokenisation of prompt and letter.

    Args:
        tokenizer: of the model that reads the prompts.
        prompt: a rendered prompt; only its end matters.
        num_candidates: how many letters of A-Z, a-z are read, 1 to 52.

    Attributes:
        ids: list[int], the token id of each letter.

    Raises:
        ValueError: more candidates than letters, or a letter that is not one token of its own after the prompt.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: str, num_candidates: int):
        letters = candidate_letters(num_candidates)
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        self.ids: list[int] = []
        for letter in letters:
            joint = tokenizer(prompt + letter, add_special_tokens=False)["input_ids"]
            if joint[: len(before)] != before or len(joint) != len(before) + 1:
                raise ValueError(
                    f"letters are not single tokens of the tokenizer {name!r}: after a prompt that ends in "
                    f"{prompt[-20:]!r} the letter {letter!r} becomes {joint[len(before) :]} instead of one id that "
                    "leaves the prompt's ids as they are. End the prompt with a newline or choose another base model."
                )
            if joint[-1] in self.ids or joint[-1] == getattr(tokenizer, "unk_token_id", None):
                raise ValueError(
                    f"letters are not single tokens of the tokenizer {name!r}: the letter {letter!r} has the id "
                    f"{joint[-1]}, which is the unknown token or another letter's. Choose another base model."
                )
            self.ids.append(joint[-1])

    def scores(self, logits: "torch.Tensor") -> "torch.Tensor":
        """The letters' logits, float32 [batch, num_candidates], of the next-token logits [batch, vocabulary]."""
        return logits[..., self.ids].float()


def candidate_letters(num_candidates: int) -> Sequence[str]:
    """The first letters of A-Z, a-z, one a candidate; ValueError beyond 52."""
    if not 1 <= num_candidates <= len(LETTERS):
        raise ValueError(
            f"num_candidates must be 1 to {len(LETTERS)}, the letters A-Z and a-z; got {num_candidates}. "
            "Lower the number of candidates."
        )
    return LETTERS[:num_candidates]
