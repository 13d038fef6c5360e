"""`baton kv`: what it says of tiers, and its exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cli.app import main
from kv_transfer.stores import folder as folders
from kv_transfer.stores.folder import SegmentFolder
from kv_transfer.stores.sealing import Sealer
from kv_transfer.tiers.segment import About, offset
from tests.kv_transfer.stores.segments import FINGERPRINT, Memory, key, write, write_order


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BATON_"):
            monkeypatch.delenv(name)


async def filled(place: Path, sealer: Sealer | None = None) -> Path:
    """A folder with one segment of two blocks; the segment."""
    folders.describe(place / FINGERPRINT, About(model="m", vllm="v", block_tokens=32, block_bytes=4096, parts=1))
    memory = Memory(2)
    store = SegmentFolder(place / FINGERPRINT / "0", 1 << 20, memory, sealer)
    for slot in (0, 1):
        memory.fill(slot)
    order = write_order(memory, [key(0), key(1)], (0, 1))
    assert (await write(store, order)).fault is None
    store.close()
    return place / FINGERPRINT / "0" / order.segment


async def test_a_folder_is_listed_verified_and_cleaned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used = folders.in_use(tmp_path / FINGERPRINT)
    segment = await filled(tmp_path)
    tier = ["--kv-tier", "host:1GiB", "--kv-tier", f"file:{tmp_path}:1MiB"]
    assert main(["kv", "ls", "--json", *tier]) == 0
    (found,) = json.loads(capsys.readouterr().out)["found"]
    assert {name: found[name] for name in ("tier", "model", "segments", "bytes", "scopes")} == {
        "tier": "file", "model": "m", "segments": 1, "bytes": segment.stat().st_size, "scopes": 1,
    }  # fmt: skip
    assert main(["kv", "verify", *tier]) == 0
    assert "1 segments, 0 corrupt" in capsys.readouterr().out
    with segment.open("r+b") as file:
        file.seek(offset(1, 4096))
        file.write(b"other")
    assert main(["kv", "verify", "--remove", *tier]) == 1
    out = capsys.readouterr().out
    assert f"{segment}: 1 blocks are not what was stored: {key(1).hex()}" in out
    assert "1 segments, 1 corrupt, removed" in out
    assert not segment.exists()
    os.close(used)
    assert main(["kv", "gc", *tier]) == 0
    assert list(tmp_path.iterdir()) == []


async def test_what_is_encrypted_is_verified_with_its_key_and_without_it_what_was_not_checked_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("ab" * 32)
    key_file.chmod(0o600)
    (tmp_path / "kv").mkdir()
    used = folders.in_use(tmp_path / "kv" / FINGERPRINT)
    await filled(tmp_path / "kv", Sealer(bytes.fromhex("ab" * 32)))
    tier = ["--kv-tier", "host:1GiB", "--kv-tier", f"file:{tmp_path / 'kv'}:1MiB"]
    assert main(["kv", "verify", *tier, "--remove"]) == 1
    only = "1 segments, 0 corrupt, 1 of which only names and sizes were checked: it is encrypted with a key that"
    assert only in capsys.readouterr().out
    tier[-1] += f",key_file={key_file}"
    assert main(["kv", "verify", *tier]) == 0
    assert capsys.readouterr().out == "1 segments, 0 corrupt\n"
    key_file.chmod(0o644)
    assert main(["kv", "verify", *tier]) == 1
    assert f"key_file: {key_file} may be read by others" in capsys.readouterr().err
    os.close(used)


def test_what_cannot_be_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (["ls"], "kv.tiers names no file or s3 tier"),
        (["ls", "--kv-tier", "hots:1GiB"], "did you mean 'host'?"),
        (["stat", "--state-dir", str(tmp_path)], "error:"),
        (["warm", str(tmp_path / "none")], "cannot be read"),
    ):
        assert main(["kv", *words]) != 0
        assert told in capsys.readouterr().err
    (tmp_path / "prompts").write_text('{"text": "x"}\n')
    assert main(["kv", "warm", str(tmp_path / "prompts"), "--url", "http://127.0.0.1:9"]) == 1
    assert "has neither prompt nor messages" in capsys.readouterr().err
    (tmp_path / "prompts").write_text("a prompt\n")
    assert main(["kv", "warm", str(tmp_path / "prompts"), "--url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err
