"""An API server of Kubernetes, over real TLS on 127.0.0.1, with the troubles that one can have.

No cluster is at hand: this stands for it, by what Kubernetes' documents and sources say of it.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.scheduler.lease_store import NAMESPACE, Answer, LeaseStore

Trouble = Literal["hangs", "hangs_when_done", "cut", "cut_when_done", "error"]
HOST = "127.0.0.1"


class ApiServer:
    """Serves ``store`` to each client with the present token. One trouble after the other befalls the next requests."""

    def __init__(self, folder: Path, store: LeaseStore | None = None) -> None:
        self.store = store or LeaseStore()
        self.account_dir = folder
        self.port = 0
        self.troubles: list[Trouble] = []
        self._token = ""
        self._writers: set[asyncio.StreamWriter] = set()
        self.rotate_token("first")

    def rotate_token(self, token: str, *, told: bool = True) -> None:
        """Only this one is good from now on; ``told``: and the pod's file has it."""
        self._token = token
        if told:
            (self.account_dir / "token").write_text(token + "\n")

    def drop_connections(self) -> None:
        """As a server does with idle ones."""
        for writer in self._writers:
            writer.transport.abort()

    def kube_config(self) -> Path:
        """What a pod finds in its service account, as a file for KUBECONFIG."""
        cluster = {
            "server": f"https://{HOST}:{self.port}",
            "certificate-authority": str(self.account_dir / "ca.crt"),
        }
        config = {
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}],
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"tokenFile": str(self.account_dir / "token")}}],
        }
        file = self.account_dir / "kubeconfig"
        file.write_text(json.dumps(config))
        return file

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[ApiServer]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*make_certificate(self.account_dir))
        server = await asyncio.start_server(self._serve, HOST, 0, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.drop_connections()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while not writer.transport.is_closing():
                await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *fields = head.split("\r\n")
        headers = dict(field.lower().split(": ", 1) for field in fields if field)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = line.split()
        trouble = self.troubles.pop(0) if self.troubles else None
        if trouble == "hangs":
            await self._hang()
        if trouble == "cut":
            writer.transport.abort()
            return
        if headers.get("authorization") != f"bearer {self._token}".lower():
            answer = Answer(401, b'{"kind":"Status","message":"Unauthorized"}')
        elif trouble == "error":
            answer = Answer(500, b'{"kind":"Status","message":"etcdserver: leader changed"}')
        else:
            answer = self.store.ask(method, path, body)
        if trouble == "hangs_when_done":
            await self._hang()
        if trouble == "cut_when_done":
            writer.transport.abort()
            return
        if answer.stream is None:
            await _write(writer, answer)
        else:
            await _write_stream(writer, answer.stream)

    async def _hang(self) -> None:
        """Until the other side has had enough."""
        await asyncio.get_running_loop().create_future()


async def _write(writer: asyncio.StreamWriter, answer: Answer) -> None:
    writer.write(f"HTTP/1.1 {answer.status} Whatever\r\nContent-Type: application/json\r\n".encode())
    writer.write(b"Content-Length: %d\r\n\r\n" % len(answer.body) + answer.body)
    await writer.drain()


async def _write_stream(writer: asyncio.StreamWriter, lines: AsyncGenerator[bytes]) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    async with aclosing(lines):
        async for line in lines:
            writer.write(b"%x\r\n" % len(line) + line + b"\r\n")
            await writer.drain()
    writer.write(b"0\r\n\r\n")
    await writer.drain()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Files of a certificate for 127.0.0.1 and its key; ``ca.crt`` says that it can be trusted."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kube-apiserver of a test")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    files = folder / "server.crt", folder / "server.key"
    files[0].write_bytes(public)
    files[1].write_bytes(secret)
    (folder / "ca.crt").write_bytes(public)
    return files
