"""What the tiers' spec says when they cannot be as an operator asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from kv_transfer.offload.spec import OBJECTION, HostTierSpec


@pytest.mark.parametrize("there", [True, False])
def test_the_sentence_is_raised_whatever_becomes_of_its_file(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "objection" if there else tmp_path / "gone" / "objection"
    spec = HostTierSpec.__new__(HostTierSpec)
    spec.extra_config = {OBJECTION: str(path)}
    with pytest.raises(ValueError, match="it does not fit"), spec._telling():
        raise ValueError("it does not fit")
    assert not there or path.read_text() == "it does not fit"
