"""The benchmark's own model: written once, whole, with the demo model's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import bench_model


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    about = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_the_model_has_its_shape_and_the_given_tokenizer(tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = bench_model.ensure(tmp_path / "cache", tokenizer_dir)
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in bench_model.SHAPE} == bench_model.SHAPE
    assert config["vocab_size"] == 64
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "model.safetensors").stat().st_mode & 0o444 == 0o444
    written_ns = (folder / "config.json").stat().st_mtime_ns
    assert bench_model.ensure(tmp_path / "cache", tokenizer_dir) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written_ns
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_what_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        bench_model.ensure(tmp_path / "cache", tmp_path / "missing")
    assert list((tmp_path / "cache").iterdir()) == []
