"""A small MoE model, random weights and the demo model's tokenizer: 4 layers of 16 experts. Its answers mean nothing.

``python -m tests.e2e.experts.moe_model TOKENIZER_DIR DIR`` writes it; imports torch, so in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LAYERS, EXPERTS, TOP_K = 4, 16, 4
WRITE_TIMEOUT_S = 120.0


def make(tokenizer_dir: Path, folder: Path) -> Path:
    """Write the model's folder."""
    argv = [sys.executable, "-m", "tests.e2e.experts.moe_model", str(tokenizer_dir), str(folder)]
    subprocess.run(argv, check=True, timeout=WRITE_TIMEOUT_S, cwd=Path(__file__).parent.parent.parent.parent)
    return folder


def _write(tokenizer_dir: Path, folder: Path) -> None:
    import shutil

    import torch
    from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    demo = AutoConfig.from_pretrained(tokenizer_dir)
    config = Qwen3MoeConfig(
        vocab_size=demo.vocab_size,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=4096,
        # Large enough that one token leads clearly: a sum in another order must not change the greedy one.
        initializer_range=0.4,
        bos_token_id=demo.bos_token_id,
        eos_token_id=demo.eos_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (tokenizer_dir / name).is_file():
            shutil.copy(tokenizer_dir / name, folder / name)


if __name__ == "__main__":
    _write(Path(sys.argv[1]), Path(sys.argv[2]))
