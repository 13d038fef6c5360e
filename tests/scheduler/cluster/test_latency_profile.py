"""The laws of a step and of a hand-off, by hand, and the file that has them."""

from pathlib import Path

import msgspec
import pytest

from scheduler.api.worker_progress import EngineStep
from scheduler.cluster.latency_profile import ASSUMED, BadLatencyProfile, LatencyProfile, load
from scheduler.cluster.step_law import LinkLaw, StepLaw

LAW = StepLaw(
    fixed_s=0.01, prefill_token_s=1e-4, prefill_pair_s=1e-7, decode_request_s=1e-3, decode_context_token_s=1e-6
)


def written(tmp_path: Path, text: bytes) -> Path:
    file = tmp_path / "profile.json"
    file.write_bytes(text)
    return file


def test_a_step_is_the_sum_of_its_parts() -> None:
    step = EngineStep(9.9, prefill_tokens=100, prefill_pairs=5000, decode_requests=3, decode_context_tokens=2000)
    assert LAW.step_s(step) == pytest.approx(0.01 + 0.01 + 0.0005 + 0.003 + 0.002)


def test_a_prompt_is_its_chunks_and_their_pairs() -> None:
    whole_s = 3 * 0.01 + 2500e-4 + 1e-7 * 3_125_000
    assert LAW.prompt_s(2500, 0, 1000) == pytest.approx(whole_s)
    assert LAW.prompt_s(2500, 400, 1000) == pytest.approx(whole_s + 1e-7 * 2500 * 400)
    assert LAW.prompt_s(0, 400, 1000) == 0.0


def test_a_hand_off_is_latency_and_bytes() -> None:
    link = LinkLaw(gigabytes_per_s=1.0, latency_s=0.002)
    assert link.transfer_s(5e6) == pytest.approx(0.002 + 0.005)
    assert link.occupied_s(5e6) == pytest.approx(0.005)


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = LatencyProfile(step=LAW, chunk_tokens=8192)
    assert load(written(tmp_path, msgspec.json.encode(profile))) == profile
    assert load(written(tmp_path, b'{"version": 1}')) == ASSUMED


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "no latency profile"),
        (b'{"version": 4}', "$.version"),
        (b'{"step": {"fixed_s": -1, "prefill_token_s": 0}}', "$.step.fixed_s"),
        (b'{"chunk_token": 3}', "unknown field `chunk_token`; did you mean chunk_tokens?"),
        (b'{"step": {"fixed": 1, "prefill_token_s": 0, "fixed_s": 1}}', "unknown field `fixed` - at `$.step`; did you"),
    ],
)
def test_a_bad_profile_is_refused_by_name(tmp_path: Path, text: bytes, said: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(BadLatencyProfile) as error:
        load(file)
    assert said in str(error.value)
    assert str(file) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadLatencyProfile, match=r"absent\.json cannot be read: No such file"):
        load(tmp_path / "absent.json")
