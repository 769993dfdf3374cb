"""Tokenizers made on the spot, for tests: a byte-level BPE, and one as SentencePiece makes it."""

import json
from collections.abc import Sequence
from string import ascii_letters

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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


def sentence_bpe(corpus: Sequence[str], *, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A BPE as SentencePiece makes it: spaces are part of words, what it does not know are bytes, <s> comes first."""
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(symbols), initial_alphabet=["▁", *ascii_letters], show_progress=False
    )
    learned.train_from_iterator(corpus, trainer)
    model = json.loads(learned.to_str())["model"]
    symbols += sorted(model["vocab"], key=model["vocab"].get)
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
