"""Letters as answers: which token each candidate's letter is, and its score."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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

    def scores(self, model: "PreTrainedModel", inputs: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """The letters' next-token logits, float32 [batch, num_candidates], of one forward pass without gradients.

        They are float32 products of the letters' rows of the output matrix and the last hidden state, whatever the
        model computes in: in bfloat16 every fourth or fifth answer would tie with another. What a model does after its
        output layer (scaling, soft caps) is done to them. An output layer that is no plain matrix, such as one with
        LoRA weights of its own, keeps its own product.

        Args:
            model: any causal language model, with or without an adapter, also wrapped for distributed evaluation. The
                dtype in its attribute `autocast`, if any, is the one that it is autocast to.
            inputs: input_ids, attention_mask and position_ids [batch, length], padded on the left.
        """
        import torch
        from accelerate.utils import extract_model_from_parallel

        plain = extract_model_from_parallel(model)
        head, dtype = plain.get_output_embeddings(), getattr(plain, "autocast", None)
        device = inputs["input_ids"].device.type
        hook = head.register_forward_hook(self._in_float32)
        try:
            with torch.no_grad(), torch.autocast(device, getattr(torch, dtype)) if dtype else nullcontext():
                logits = model(**inputs, logits_to_keep=1, use_cache=False).logits
        finally:
            hook.remove()
        return logits[:, -1, self.ids].float()

    def _in_float32(self, head: "torch.nn.Module", inputs: tuple, logits: "torch.Tensor") -> "torch.Tensor":
        """A forward hook: the output layer's logits as float32, those of the letters computed as such."""
        import torch

        logits, hidden = logits.float(), inputs[0]
        adapter = getattr(head, "token_adapter", None)  # peft's, around the rows of the user tokens
        trained = {row for rows in adapter.token_indices.values() for row in rows} if adapter is not None else set()
        if adapter is not None and adapter.base_layer.bias is None and trained.isdisjoint(self.ids):
            head = adapter.base_layer  # the letters' rows are its own
        # weights that are elsewhere or in 4 bits are no rows to multiply with
        if type(head) is torch.nn.Linear and head.weight.device == hidden.device:
            bias = None if head.bias is None else head.bias[self.ids].float()
            with torch.autocast(hidden.device.type, enabled=False):
                letters = torch.nn.functional.linear(hidden.float(), head.weight[self.ids].float(), bias)
            logits[..., self.ids] = letters
        return logits


def candidate_letters(num_candidates: int) -> Sequence[str]:
    """The first letters of A-Z, a-z, one a candidate; ValueError beyond 52."""
    if not 1 <= num_candidates <= len(LETTERS):
        raise ValueError(
            f"num_candidates must be 1 to {len(LETTERS)}, the letters A-Z and a-z; got {num_candidates}. "
            "Lower the number of candidates."
        )
    return LETTERS[:num_candidates]
