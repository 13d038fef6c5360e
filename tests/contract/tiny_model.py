"""A random Llama of a few hundred kilobytes. Its answers mean nothing; only their equality does."""

from __future__ import annotations

from pathlib import Path

VOCAB_SIZE = 512
CONTEXT_TOKENS = 1024


def save(folder: Path, seed: int = 0) -> None:
    """Write model and tokenizer. Wide weights keep its logits far from ties, so batch shapes do not flip tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.float().save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of ``VOCAB_SIZE`` words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(VOCAB_SIZE)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t0", eos_token="t1", unk_token="t2", pad_token="t2"
    ).save_pretrained(folder)
