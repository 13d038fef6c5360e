"""The folder of a process's temporary files: private, short enough for sockets, gone afterwards."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from launcher.local import temp_dirs


def test_a_socket_named_by_a_uuid_fits_even_where_the_temporary_folder_has_a_long_name(tmp_path: Path) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    folder = temp_dirs.make((str(tmp_path / "missing"), str(long), "/tmp"))
    try:
        assert folder.parent == Path("/tmp") and folder.stat().st_mode & 0o777 == 0o700
        assert list(long.iterdir()) == []
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / str(uuid.uuid4())))
    finally:
        temp_dirs.remove(folder)
    assert not folder.exists()
    temp_dirs.remove(folder)


def test_a_temporary_folder_whose_name_is_not_text_is_passed_over() -> None:
    with tempfile.TemporaryDirectory(suffix="\udcff", dir="/tmp") as odd:
        folder = temp_dirs.make((odd, "/tmp"))
        temp_dirs.remove(folder)
        assert folder.parent == Path("/tmp")
        assert list(Path(odd).iterdir()) == []


def test_sockets_and_temporary_files_lie_there_and_compiled_code_does_not() -> None:
    environ = temp_dirs.environment(Path("/there"), {"TMPDIR": "/var/tmp"})
    assert environ["TMPDIR"] == environ["VLLM_RPC_BASE_PATH"] == "/there"
    assert not environ["TORCHINDUCTOR_CACHE_DIR"].startswith("/there")
    own = {"VLLM_RPC_BASE_PATH": "/run/x", "TORCHINDUCTOR_CACHE_DIR": "/c"}
    assert temp_dirs.environment(Path("/there"), own) == own | {"TMPDIR": "/there"}


def test_vllm_puts_its_sockets_and_rendezvous_files_there() -> None:
    folder = temp_dirs.make()
    code = (
        "from vllm.utils.network_utils import get_file_store_init_method, get_open_zmq_ipc_path\n"
        "print(get_open_zmq_ipc_path(), get_file_store_init_method())"
    )
    try:
        environ = temp_dirs.environment(folder, {"PYTHONPATH": ":".join(sys.path)})
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=120)
    finally:
        temp_dirs.remove(folder)
    address, rendezvous = done.stdout.splitlines()[-1].split()
    assert address.startswith(f"ipc://{folder}/") and rendezvous.startswith(f"file://{folder}/")
