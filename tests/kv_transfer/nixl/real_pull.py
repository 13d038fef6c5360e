"""One NIXL pull from a process to another; the taker prints the transport that UCX's log names."""

from __future__ import annotations

import base64
import ctypes
import subprocess
import sys
import time

from kv_transfer.nixl.ucx_log import UcxLog

BYTES = 1 << 16
TIMEOUT_S = 30.0


def main(role: str) -> None:
    log = UcxLog()
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(role, nixl_agent_config(enable_prog_thread=role == "holder", backends=["UCX"]))
    log.opened()
    memory = ctypes.create_string_buffer(BYTES)
    agent.register_memory([(ctypes.addressof(memory), BYTES, 0, "")], "DRAM")
    if role == "holder":
        sys.stdout.write(f"{base64.b64encode(agent.get_agent_metadata()).decode()} {ctypes.addressof(memory)}\n")
        sys.stdout.flush()
        sys.stdin.read()
        return
    command = [sys.executable, "-m", "tests.kv_transfer.nixl.real_pull", "holder"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        metadata, address = holder.stdout.readline().split()
        peer = agent.add_remote_agent(base64.b64decode(metadata))
        ours = agent.get_xfer_descs([(ctypes.addressof(memory), BYTES, 0)], "DRAM")
        theirs = agent.get_xfer_descs([(int(address), BYTES, 0)], "DRAM")
        pull = agent.initialize_xfer("READ", ours, theirs, peer, b"done")
        ends_s = time.monotonic() + TIMEOUT_S
        state = agent.transfer(pull)
        while state not in ("DONE", "ERR") and time.monotonic() < ends_s:
            state = agent.check_xfer_state(pull)
        assert state == "DONE", state
        agent.release_xfer_handle(pull)
        holder.stdin.close()
    sys.stdout.write(" ".join(sorted(log.read()[0])))


if __name__ == "__main__":
    main(sys.argv[1])
