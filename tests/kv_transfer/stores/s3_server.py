"""A real S3 server for tests: moto's, in a process of its own, over HTTP."""

from __future__ import annotations

import collections
import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

from botocore.session import get_session

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
REGION = "us-east-1"
_ADDRESS = re.compile(rb"http://127\.0\.0\.1:\d+")


@contextlib.contextmanager
def s3_server(*buckets: str) -> Iterator[str]:
    """Its address. Credentials are to be in the environment."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            assert server.stdout is not None
            found = next(match for line in server.stdout if (match := _ADDRESS.search(line)))
            address = found[0].decode()
            # It writes a line for each request, and stands still when nothing reads them.
            threading.Thread(target=collections.deque, args=(server.stdout, 0), daemon=True).start()
            client = get_session().create_client("s3", endpoint_url=address, region_name=REGION)
            for bucket in buckets:
                client.create_bucket(Bucket=bucket)
            yield address
        finally:
            server.kill()
