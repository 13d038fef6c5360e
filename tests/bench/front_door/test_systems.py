"""What the compared front ends are started with: models, step times, packages, checkouts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from bench.front_door import checkout as checkouts
from bench.front_door import packages
from bench.front_door.flames import sampler_argv, why_refused
from bench.front_door.systems import Rig, baton_argv, dynamo_environment, write_step_times
from bench.front_door.tokens import WHOLE_TOKENS, write_folder
from launcher.demo import model as demo_model


def test_every_token_that_an_engine_makes_up_is_text_and_prompts_are_as_before(tmp_path: Path) -> None:
    folder = write_folder(demo_model.SHIPPED, tmp_path / "model")
    made, demo = (Tokenizer.from_file(str(of / "tokenizer.json")) for of in (folder, demo_model.SHIPPED))
    texts = [made.decode([number]) for number in range(3, WHOLE_TOKENS)]
    assert [text for text in texts if not text or "\N{REPLACEMENT CHARACTER}" in text] == []
    said = "The scheduler says w\u00f6rld \u65e5\u672c <think> yes<|im_end|>"
    assert made.encode(said).tokens == demo.encode(said).tokens
    assert made.decode(made.encode(said).ids, skip_special_tokens=False) == said


def test_baton_runs_fake_engines_of_the_same_steps_with_one_token_a_chunk(tmp_path: Path) -> None:
    rig = Rig(model=tmp_path, step_ms=2.5, folder=tmp_path, sets=["a.b=c"])
    words = " ".join(baton_argv(rig, tmp_path / "state", ["baton"]))
    assert "engine.kind=fake" in words
    assert "engine.fake.decode_step_us=2500.0" in words
    assert "worker.output_interval_ms=0" in words
    assert words.endswith("--set a.b=c")
    assert "--host 127.0.0.1 --port 0 --grpc-port 0" in words


def test_dynamo_gets_the_same_steps_and_keeps_to_this_machine_and_folder(tmp_path: Path) -> None:
    # Whole numbers too: the mocker reads floats only.
    write_step_times(tmp_path / "times.npz", 25)
    with np.load(tmp_path / "times.npz") as times:
        assert times["decode_itl"].tolist() == [[25.0, 25.0], [25.0, 25.0]]
        assert {times[name].dtype.kind for name in times} == {"f"}
    environ = dynamo_environment(Rig(model=tmp_path, step_ms=25, folder=tmp_path), "packages")
    assert environ["PYTHONPATH"] == "packages"
    assert {environ[name] for name in environ if name.endswith("_HOST")} == {"127.0.0.1"}
    assert all(Path(environ[name]).is_relative_to(tmp_path) for name in ("HOME", "DYN_FILE_KV"))


def test_a_peer_that_cannot_be_installed_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "REQUIREMENTS", tmp_path)
    assert packages.why_missing("json, asyncio", "none.txt", tmp_path) == ""
    why = packages.why_missing("no_such_peer", "none.txt", tmp_path)
    assert "none.txt" in why
    assert "pip install --no-deps --target DIR -r requirements/none.txt" in why
    assert "\n" not in why
    (tmp_path / "no_such_peer.py").touch()
    assert packages.why_missing("no_such_peer", "none.txt", tmp_path) == ""


def test_another_commit_has_a_worktree_of_its_own_that_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        named = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *named, *words], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    git("init", "--quiet")
    (tmp_path / "file").write_text("before")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    (tmp_path / "file").write_text("after")
    monkeypatch.setattr(checkouts, "ROOT", tmp_path)
    with checkouts.checkout("HEAD") as folder:
        assert (folder / "file").read_text() == "before"
    assert not folder.exists()
    assert len(git("worktree", "list").splitlines()) == 1
    with checkouts.checkout(str(tmp_path)) as folder:
        assert folder == tmp_path
    with pytest.raises(ValueError, match="git worktree add failed"), checkouts.checkout("no-such-commit"):
        pass


def test_a_refused_ptrace_is_explained() -> None:
    assert "--gil" in sampler_argv("py-spy", 7, 20, "raw", Path("out.txt"))
    assert "CAP_SYS_PTRACE" in why_refused("py-spy front_proxy", "Error: Permission Denied: Try running again ...")
    assert "CAP_SYS_PTRACE" in why_refused("py-spy front_proxy", "Error: Operation not permitted (os error 1)")
    assert "No such file" in why_refused("py-spy front_proxy", "Error: No such file")
