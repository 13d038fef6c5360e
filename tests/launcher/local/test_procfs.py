"""What the kernel says of processes, whatever their names."""

from __future__ import annotations

import subprocess
import sys

from launcher.local import procfs

NAMED = "open('/proc/self/comm', 'wb').write(b'\\xff) \\xe2\\x82'); print(flush=True); input()"


def test_a_process_whose_name_is_not_text_is_seen() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", NAMED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        assert procfs.group_members(child.pid) == [child.pid]
