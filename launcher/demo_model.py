"""Keeps the demo model in a cache folder, training it once when it is missing. Never imports torch itself.

``python -m launcher.demo_model [DIR]`` prints the folder of the model, made in DIR (default: the user's cache).
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from launcher.environment import child_environment
from runtime.user_error import UserError

NAME = "baton-demo"
CHAT_TOOL_PARSER = "hermes"
DTYPE = "float32"
_TRAINING_TIMEOUT_S = 1800.0
_KEY_LENGTH = 12
_SOURCES = ("demo_text.py", "demo_training.py")
_LIBRARIES = ("torch", "transformers", "tokenizers")
_TOLD_ON_FAILURE_LINES = 20

Progress = Callable[[str], None]


class DemoModelError(UserError):
    """The demo model could not be made; the message says why, in a sentence."""


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """Where models lie when nobody says otherwise."""
    base = environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if base else Path.home() / ".cache") / "baton"


def _tell_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def ensure(cache_dir: Path | None = None, progress: Progress = _tell_on_stderr) -> Path:
    """The folder of the demo model below ``cache_dir`` (the user's cache when None); trains it first if it is missing.

    Raises DemoModelError when it cannot be trained.
    """
    cache_dir = cache_dir or default_cache_dir(os.environ)
    wanted = cache_dir / f"demo-{key()}"
    if _complete(wanted):
        return wanted
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _only_one(cache_dir / ".demo.lock", progress):
            if not _complete(wanted):
                _train_into(wanted, progress)
    except OSError as error:
        raise DemoModelError(f"cannot keep the demo model in {cache_dir}: {error.strerror}") from error
    return wanted


def key() -> str:
    """Digest of all that the weights follow from: the text, the code and the libraries' versions."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    for library in _LIBRARIES:
        digest.update(f"{library} {_version(library)}\n".encode())
    return digest.hexdigest()[:_KEY_LENGTH]


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        raise DemoModelError(
            f"the demo model needs {library}, which is not installed here; name a model with --model"
        ) from None


def _complete(directory: Path) -> bool:
    # The folder appears by one rename, whole; a file of it stands for all.
    return (directory / "config.json").is_file()


@contextlib.contextmanager
def _only_one(lock: Path, progress: Progress) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another process is training the demo model; waiting for it")
            # Bounded by that process: the kernel frees the lock when it ends, and its training has a time limit.
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _train_into(wanted: Path, progress: Progress) -> None:
    for left_behind in wanted.parent.glob(".training-*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    progress("training the demo model (once, about a minute on two cores)")
    directory = Path(tempfile.mkdtemp(prefix=".training-", dir=wanted.parent))
    try:
        _run_training(directory, progress)
        directory.chmod(0o755)
        for file in directory.iterdir():
            file.chmod(0o644)
        directory.rename(wanted)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    progress(f"the demo model is ready in {wanted}")


def _run_training(directory: Path, progress: Progress) -> None:
    environ = child_environment(os.environ) | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    child = subprocess.Popen(
        [sys.executable, "-m", "launcher.demo_training", str(directory)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ,
        start_new_session=True,
    )
    limit = threading.Timer(_TRAINING_TIMEOUT_S, _kill_group, (child.pid,))
    limit.start()
    last: collections.deque[str] = collections.deque(maxlen=_TOLD_ON_FAILURE_LINES)
    try:
        assert child.stdout is not None
        with child.stdout:
            for line in child.stdout:
                last.append(line.rstrip())
                if line.startswith("step "):
                    progress(f"training the demo model: {line.rstrip()}")
        code = child.wait()
    except BaseException:  # a signal ends this process: the child must not train on
        _kill_group(child.pid)
        child.wait()
        raise
    finally:
        limit.cancel()
    if code != 0:
        raise DemoModelError(f"training the demo model ended with exit code {code}:\n" + "\n".join(last))


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def main() -> int:
    """Make the model and print its folder."""
    try:
        print(ensure(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
    except DemoModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
