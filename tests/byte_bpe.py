"""A byte-level BPE tokenizer made on the spot, for tests."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def byte_bpe(
    corpus: Sequence[str] = (),
    *,
    vocab_size: int = 300,
    merges: Sequence[tuple[str, str]] = (),
    end: str | None = "</s>",
    added: Sequence[str] = (),
    use_regex: bool = True,
) -> PreTrainedTokenizerFast:
    """One token a byte, and those that are learned from a corpus or given as merges.

    Args:
        corpus: what is trained on, to `vocab_size` tokens.
        merges: pairs of symbols that are one token.
        end: the end token; None = none.
        added: strings that are whole tokens.
        use_regex: split text into words first, as GPT-2 does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    if corpus:
        settings = {"vocab_size": vocab_size, "special_tokens": [end], "show_progress": False}
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **settings)
        backend.train_from_iterator(corpus, trainer)
    backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
