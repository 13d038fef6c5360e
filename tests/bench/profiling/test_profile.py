"""The profile of a fake engine says what the fake engine was told; it is resumed, and other settings are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from bench.profiling import grid, profile_file
from bench.profiling.profile_file import OtherProfile, Part
from cli.app import main
from cli.planning import profile as command
from engine.config import EngineConfig
from scheduler.cluster import latency_profile
from scheduler.cluster.latency_profile import Fingerprint
from scheduler.cluster.measurements import DecodeCell, HandoffCell, PrefillCell
from simulation.replay.cluster_model import StepTimes
from simulation.sizing import profile_fit

FAKE = ["--set", "engine.kind=fake", "--set", "engine.max_num_seqs=8"]


@pytest.fixture(autouse=True)
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "PREFILL_MAX_TOKENS", 1024)
    monkeypatch.setattr(grid, "CACHED_TOKENS", (512,))
    monkeypatch.setattr(grid, "CONTEXTS", (64, 512))
    monkeypatch.setattr(command, "BUSY_MAX", 1000.0)


def test_the_profile_of_an_engine_is_what_it_was_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "profile.json"
    main(["profile", "--output", str(file), *FAKE])
    assert "decode steps:" in capsys.readouterr().out
    found = latency_profile.load(file)
    assert found.version == 2
    assert found.measured is not None
    law = profile_fit.model_of(found, file).step
    # The fake engine's defaults: 50 us a token; 2 ms a decode step and 0.1 ms for each sequence. On a busy machine its
    # steps come later, and never sooner.
    assert law.prompt_s(1024, 0, found.chunk_tokens) > 0.7 * 0.0512
    assert law.fixed_s + law.decode_s(8, 8 * 70) > 0.7 * 0.0028
    assert not (tmp_path / "profile.json.part").exists()
    page = (tmp_path / "profile.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"(src|href)=|https?://|@import|<script", page)
    assert main(["plan", "--workload", "agents", "--requests", "30", "--workers", "2", "--rate", "1", "--seeds", "1",
                 "--profile", str(file), "--quick", "--processes", "1"]) == 0  # fmt: skip


def test_an_interrupted_profile_goes_on_where_it_was(tmp_path: Path) -> None:
    output, mine = tmp_path / "profile.json", Fingerprint(engine="e", hardware="h")
    part = Part.begin(output, mine, force=False)
    cell = grid.Prefill(32, 0)
    part.add(output, cell, PrefillCell(seconds=1.0, spread=0.0, samples=3, uncached_tokens=32))
    assert Part.begin(output, mine, force=False).has(cell)
    assert not Part.begin(output, mine, force=False).has(grid.Prefill(64, 0))
    with pytest.raises(OtherProfile, match="engine 'e'"):
        Part.begin(output, Fingerprint(engine="f", hardware="h"), force=False)
    assert not Part.begin(output, Fingerprint(engine="f", hardware="h"), force=True).has(cell)


def test_a_busy_machine_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "BUSY_MAX", -1.0)
    file = tmp_path / "profile.json"
    assert main(["profile", "--output", str(file), "--alone", *FAKE]) == 1
    assert "its numbers are not good: " in capsys.readouterr().err
    assert json.loads(file.read_text())["measured"]["not_good"]


LAW = StepTimes(
    fixed_s=0.005, prefill_token_s=1e-4, decode_request_s=1e-4, decode_sqrt_request_s=1e-3, decode_context_token_s=1e-7
)


def decode_cells() -> list[DecodeCell]:
    return [
        DecodeCell(seconds=LAW.fixed_s + LAW.decode_s(n, n * c), spread=0, samples=9, requests=n, context_tokens=n * c)
        for n in (1, 2, 4, 16, 64)
        for c in (64, 1024)
    ]


def prefill_cells(bent: float = 1.0) -> list[PrefillCell]:
    """``bent``: how much longer prompts of 256 tokens take than the law says."""
    return [
        PrefillCell(
            seconds=(bent if tokens == 256 else 1.0) * (0.005 + 1e-4 * tokens) + 1e-8 * tokens * (cached + tokens / 2),
            spread=0,
            samples=5,
            uncached_tokens=tokens,
            cached_tokens=cached,
        )
        for tokens in (64, 128, 256, 512, 1024)
        for cached in (0, 2048)
    ]


def test_the_fit_finds_the_law_of_exact_cells() -> None:
    law = profile_fit.fit_prefill(profile_fit.fit_decode(decode_cells()), prefill_cells())
    assert law.fixed_s == pytest.approx(LAW.fixed_s, rel=0.05)
    assert law.decode_s(32, 32 * 500) == pytest.approx(LAW.decode_s(32, 32 * 500), rel=0.05)
    assert law.prefill_pair_s == pytest.approx(1e-8, rel=0.01)
    assert law.prompt_s(700, 0, 2048) == pytest.approx(0.005 + 0.07 + 1e-8 * 700 * 350, rel=0.03)
    assert law.prompt_s(700, 2048, 2048) - law.prompt_s(700, 0, 2048) == pytest.approx(1e-8 * 700 * 2048, rel=0.01)
    found = profile_fit.errors(prefill_cells(), decode_cells(), 2048)
    assert found.decode_worst < 0.02
    assert not [each for each in found.flagged if "1024" not in each and " 64 " not in each]


def test_a_cell_that_its_neighbours_do_not_predict_is_flagged() -> None:
    found = profile_fit.errors(prefill_cells(bent=2.0), decode_cells(), 2048)
    assert any(each.startswith("a prompt of 256 tokens behind 0") for each in found.flagged)


def test_the_curve_of_prompts_never_falls_and_goes_on_beyond_its_ends() -> None:
    law = profile_fit.fit_prefill(LAW, prefill_cells(bent=4.0))
    seconds = [law.prefill_s(tokens, 0.0) for tokens in range(1, 3000, 7)]
    assert seconds == sorted(seconds)
    assert law.prefill_s(32, 0.0) == pytest.approx(law.prefill_s(64, 0.0) / 2)
    assert law.prefill_s(2048, 0.0) > law.prefill_s(1024, 0.0)


def test_a_link_is_a_line_through_single_pulls() -> None:
    cells = [
        HandoffCell(seconds=pulls * (0.01 + 0.004 + size / 2e9), spread=0, samples=5, pulls=pulls, size_bytes=size)
        for size in (10_000_000, 40_000_000)
        for pulls in (1, 2)
    ]
    link = profile_fit.fit_link(cells, step_s=0.01)
    assert link.gigabytes_per_s == pytest.approx(2.0)
    assert link.latency_s == pytest.approx(0.004)
    assert profile_fit.fit_link([], step_s=0.01) == latency_profile.ASSUMED.link


def test_a_profile_without_measurements_is_refused_for_replays(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_bytes(msgspec.json.encode(latency_profile.ASSUMED))
    with pytest.raises(Exception, match="how much KV"):
        profile_fit.read_model(file)


def test_flags_are_part_of_the_fingerprint() -> None:
    assert "max_num_seqs 64" in _flags(EngineConfig())
    assert "quantization fp8" in _flags(EngineConfig(args={"quantization": "fp8"}))


def _flags(config: EngineConfig) -> str:
    from engine.protocol import EngineInfo

    info = EngineInfo(
        epoch=1, engine_id="e", model="m", engine_version="1", layout_fingerprint="l", block_size_tokens=16,
        block_bytes=16, kv_blocks_total=9, context_tokens_max=99,
    )  # fmt: skip
    return profile_file.fingerprint(info, config, "h").flags
