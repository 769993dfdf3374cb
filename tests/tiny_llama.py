"""A 2-layer Llama with random weights and a tokenizer made here, for tests."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.byte_bpe import byte_bpe


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 280 tokens, each letter one of them."""
    return byte_bpe(["red soap green tea blue cup"] * 5)


def make_base(folder: Path, *, tied: bool, positions: int = 256) -> Path:
    """Writes model and tokenizer to `folder`; sizes are multiples of 64, as 4-bit weights on a CPU need them."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
