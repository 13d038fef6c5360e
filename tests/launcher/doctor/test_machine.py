"""What is wrong on this machine is a row that fails or warns, and says what to do."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import preflight
from engine.config import EngineConfig
from kv_transfer.tiers.config import KvConfig
from launcher.config import BatonConfig
from launcher.doctor import machine
from launcher.doctor.report import Row, as_json, as_table, failed
from runtime.rpc import trust
from runtime.tls import TlsConfig
from scheduler.config import SchedulerConfig
from tests.runtime.rpc.made_ca import MadeCa

FAKE = EngineConfig(kind="fake")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    trust.forget()
    yield
    trust.forget()


def rows(config: BatonConfig, check: str, *, running: bool = False) -> list[Row]:
    return [row for row in machine.look(config, running=running) if row.check == check]


def test_nothing_fails_where_nothing_is_wrong() -> None:
    found = machine.look(BatonConfig(engine=FAKE), running=True)
    assert not failed(found)
    assert as_table(found).splitlines()[0].split() == ["CHECK", "OF", "VERDICT", "FOUND", "DO"]
    assert '"verdict": "ok"' in as_json(found)


def test_a_port_that_is_taken_fails_before_the_start_and_not_after() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = BatonConfig(engine=FAKE, scheduler=SchedulerConfig(port=other.getsockname()[1]))
        (row,) = (row for row in rows(config, "port") if row.of == "scheduler.port")
        assert row.verdict == "fail" and "cannot be bound: Address already in use" in row.found
        assert rows(config, "port", running=True) == []


def test_a_tier_whose_folder_is_missing_fails(tmp_path: Path) -> None:
    _, row = rows(BatonConfig(kv=KvConfig(tiers=("host:1MiB", f"file:{tmp_path}/none:1GiB"))), "kv tier")
    assert (row.verdict, row.do) == ("fail", f"there is no folder {tmp_path}/none")
    _, row = rows(BatonConfig(kv=KvConfig(tiers=("host:1MiB", f"file:{tmp_path}:1GiB"))), "kv tier")
    assert row.verdict == "ok" and row.found.endswith(" free")


@pytest.mark.parametrize(("devices", "rdma", "locked"), [([], "fail", "ok"), (["mlx5_0"], "ok", "fail")])
def test_where_rdma_is_required_there_must_be_a_device_and_memory_to_lock(
    devices: list[str], rdma: str, locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "rdma_devices", lambda: devices)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 16, 1 << 16))
    config = BatonConfig(engine=EngineConfig(kind="fake", transport_required="rdma"))
    assert [row.verdict for row in rows(config, "rdma")] == [rdma]
    assert [row.verdict for row in rows(config, "limit") if row.of == "locked memory"] == [locked]


@pytest.mark.parametrize(("days", "verdict"), [(5.0, "warn"), (60.0, "ok"), (-1.0, "fail")])
def test_a_certificate_shows_the_days_it_has_left(days: float, verdict: str, tmp_path: Path) -> None:
    ca = MadeCa(tmp_path)
    files = ca.sign("it", days=days)
    tls = TlsConfig(cert_file=str(files.cert), key_file=str(files.key), ca_file=str(ca.file))
    (row,) = rows(BatonConfig(engine=FAKE, tls=tls), "protection")
    assert row.verdict == verdict
    assert "has expired" in row.do if days < 0 else row.found.endswith("days left")


def test_open_ports_without_certificates_or_token_are_a_warning(tmp_path: Path) -> None:
    everywhere = SchedulerConfig(host="0.0.0.0")
    (row,) = rows(BatonConfig(engine=FAKE, scheduler=everywhere), "protection")
    assert row.verdict == "warn" and "tls.token_file" in row.do
    on_ray = machine.look(BatonConfig(engine=FAKE), running=True, hosts={"127.0.0.1", "10.0.0.1"})
    assert [row.found for row in on_ray if row.check == "protection"] == ["none: 10.0.0.1 answers all that reach it"]
    token = tmp_path / "token"
    token.write_text("t" * 40)
    token.chmod(0o600)
    config = BatonConfig(engine=FAKE, scheduler=everywhere, tls=TlsConfig(token_file=str(token)))
    (row,) = rows(config, "protection")
    assert (row.verdict, row.found) == ("ok", "token, not encrypted")
