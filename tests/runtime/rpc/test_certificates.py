"""Certificates: what is wrong with them is said in a sentence; changed files are used from the next handshake on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
import pytest

from runtime.rpc.certificates import BadCertificate, Certificates, TlsFiles, rehearse
from tests.runtime.rpc.made_ca import MadeCa


def test_a_good_certificate_says_when_it_ends(tmp_path: Path) -> None:
    files = MadeCa(tmp_path).sign(days=30)
    assert rehearse(files) == pytest.approx(time.time() + 30 * 86_400, abs=86_400)
    alone = msgspec.structs.replace(files, ca=None, name="")
    assert rehearse(alone) == rehearse(files)


def _expired(ca: MadeCa, _: MadeCa) -> TlsFiles:
    return ca.sign(days=-2)


def _of_another_cluster(ca: MadeCa, other: MadeCa) -> TlsFiles:
    return msgspec.structs.replace(other.sign(), ca=ca.file)


def _of_another_name(ca: MadeCa, _: MadeCa) -> TlsFiles:
    return ca.sign(dns="elsewhere")


def _with_another_key(ca: MadeCa, _: MadeCa) -> TlsFiles:
    return msgspec.structs.replace(ca.sign("one"), key=ca.sign("two").key)


def _without_key(ca: MadeCa, _: MadeCa) -> TlsFiles:
    files = ca.sign()
    files.key.unlink()
    return files


def _that_is_none(ca: MadeCa, _: MadeCa) -> TlsFiles:
    files = ca.sign()
    files.cert.write_text("no certificate")
    return files


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_expired, "process.pem has expired."),
        (_of_another_cluster, "was signed by another CA than that of the CA file."),
        (_of_another_name, "does not carry the DNS name 'baton' (tls.name)."),
        (_with_another_key, "two.key is not that of the certificate"),
        (_without_key, "process.key cannot be read: No such file or directory."),
        (_that_is_none, "hold no certificate with its key in PEM."),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(tmp_path: Path, make: object, says: str) -> None:
    assert callable(make)
    files = make(MadeCa(tmp_path / "ours"), MadeCa(tmp_path / "theirs"))
    with pytest.raises(BadCertificate) as raised:
        Certificates(files)
    assert says in str(raised.value)


def test_changed_files_are_used_if_they_are_good(tmp_path: Path) -> None:
    ca = MadeCa(tmp_path)
    files = ca.sign(days=3)
    held = Certificates(files)
    ends_s = held.expires_at_s
    held.look()
    assert held.version == 0
    files.cert.write_text("half a file")
    held.look()
    assert (held.version, held.expires_at_s) == (0, ends_s)
    ca.sign(days=60)
    os.utime(files.cert)
    held.look()
    assert held.version == 1 and held.expires_at_s > ends_s
