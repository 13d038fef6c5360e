"""A small stand-in for a process of a cluster: says that it is ready, and writes down when it is told to stop."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from launcher.backend import Member

_SCRIPT = """
import ctypes, signal, sys, threading
ctypes.CDLL(None).prctl(1, 9)
name, behaviour, notes = sys.argv[1:]
if behaviour == "fails":
    sys.exit(3)
def stop(*_):
    open(notes, "a").write(name + "\\n")
    sys.exit()
signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "deaf" else stop)
print("noise on stdout", flush=True)
if behaviour != "loads":
    print('BATON-READY {"address": "127.0.0.1:2", "grpc_address": "127.0.0.1:1"}', flush=True)
threading.Event().wait()
"""
_NOTES = "notes"


def command(process_id: str, behaviour: str, folder: Path) -> list[str]:
    """How it is started; it ends with the process that started it."""
    return [sys.executable, "-ISc", _SCRIPT, process_id, behaviour, str(folder / _NOTES)]


def told_to_stop(folder: Path) -> list[str]:
    """Those that were told to stop and did, in that order."""
    notes = folder / _NOTES
    return notes.read_text().split() if notes.exists() else []


def kill(member: Member) -> None:
    """Kill one as the kernel would."""
    os.kill(int(member.incarnation.partition(".")[0]), signal.SIGKILL)
