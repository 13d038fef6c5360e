"""The model of the overhead benchmark: random weights, the demo model's tokenizer. Its answers mean nothing.

Its shape gives a prefill of realistic length (docs/benchmarks.md): about 50 ms for 512 tokens on one core of a server.
``python -m bench.bench_model TOKENIZER_DIR DIR`` writes it; imports torch and transformers, so in a process of its own.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SEED = 0
SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
_WRITE_TIMEOUT_S = 300.0
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def ensure(cache_dir: Path, tokenizer_dir: Path) -> Path:
    """The model's folder below ``cache_dir``; written first if it is missing. Raises ValueError if it cannot be."""
    key = hashlib.sha256(repr((SEED, SHAPE, tokenizer_dir.name)).encode()).hexdigest()[:12]
    wanted = cache_dir / f"bench-{key}"
    if (wanted / "config.json").is_file():
        return wanted
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=cache_dir) as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        argv = [sys.executable, "-m", "bench.bench_model", str(tokenizer_dir), str(folder)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_WRITE_TIMEOUT_S, check=False)
        if done.returncode:
            raise ValueError(f"the benchmark's model cannot be written:\n{done.stderr[-2000:]}")
        for file in folder.iterdir():
            file.chmod(0o644)
        folder.rename(wanted)  # whole or not at all
    return wanted


def write(tokenizer_dir: Path, folder: Path) -> None:
    """Save weights, configuration and tokenizer."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = AutoConfig.from_pretrained(tokenizer_dir)
    for name, value in SHAPE.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).float().save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copy(tokenizer_dir / name, folder / name)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
