"""The model folder of the front-door benchmark: the demo model's tokenizer, with a whole word for every token id.

Dynamo's mocker makes up token ids from 1,000 to 1,999, Baton's fake engine from 3 to the size of its vocabulary. The
demo model has 1,024 tokens, some of them parts of characters: an id without text gives no chunk, and a stream of such
tokens would cost less than it should. Here each id that an engine makes up is text that can be sent at once.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

# What engines make up is below; above are the parts of characters, which only prompts may use.
WHOLE_TOKENS = 2048
_FIRST_ORDINARY = 3
_FILES = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def write_folder(demo: Path, folder: Path) -> Path:
    """Write configuration and tokenizer, no weights: the engines in this benchmark compute nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((demo / "tokenizer.json").read_text())
    # A token that is added keeps its id only if the vocabulary has it.
    vocab = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokenizer["model"]["vocab"] = vocab = whole_vocab(vocab)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    config = json.loads((demo / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": max(vocab.values()) + 1}))
    for name in _FILES:
        shutil.copyfile(demo / name, folder / name)
    return folder


def whole_vocab(vocab: Mapping[str, int]) -> dict[str, int]:
    """The vocabulary with a whole text at each id from 3 to 2047; parts of characters have ids from 2048 on."""
    whole = {token: number for token, number in vocab.items() if _is_whole(token) or number < _FIRST_ORDINARY}
    parts = [token for token in vocab if token not in whole]
    taken = set(whole.values())
    words = (word for word in _words() if word not in vocab)
    free = (number for number in range(_FIRST_ORDINARY, WHOLE_TOKENS) if number not in taken)
    made = {word: number for number, word in zip(free, words, strict=False)}
    return {**whole, **made, **{token: WHOLE_TOKENS + index for index, token in enumerate(parts)}}


def _words() -> Iterator[str]:
    """Words of four letters with the space before them, as byte-level BPE writes it."""
    for letters in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=4):
        yield "\u0120" + "".join(letters)


def _is_whole(token: str) -> bool:
    """Whether a byte-level BPE token is text by itself."""
    # Printable Latin-1 stands for its own byte; the other bytes are written as 256 and up, in order.
    try:
        bytes(_BYTE_OF[character] for character in token).decode()
    except UnicodeDecodeError:
        return False
    return True


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + index): byte for index, byte in enumerate(_OTHERS)}
