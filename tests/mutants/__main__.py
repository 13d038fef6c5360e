"""Turn off one defence at a time and see whether a test notices: ``python -m tests.mutants [PATH ...] [--simulate]``.

Each mutant of ``*.txt`` beside this file is applied alone, in a copy of the tree, and the tests near its file run
until one fails. Printed is what nobody notices, and what does not fit the code any more. Of use after a change of these
files: a new defence is one more ``@@`` with its lines. Some twenty mutants a minute.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

import msgspec

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEFT_OUT = (".*", "__pycache__")
# A mutant may go round in circles.
TEST_S_MAX, RUN_S_MAX = 20, 300

_FRONT = "tests/front_proxy/test_"
_FLOW = f"{_FRONT}request_flow.py {_FRONT}request_resume.py {_FRONT}shown.py {_FRONT}retries.py {_FRONT}stall.py"
_RUN = f"{_FRONT}request_run.py {_FRONT}dispatcher.py {_FRONT}dispatcher_resume.py {_FRONT}first_token.py"
# The tests near a file or folder; the longest that fits counts.
NEAR = {
    "decode_worker": "tests/decode_worker tests/worker/test_service.py",
    "engine/late_releases.py": "tests/engine/test_late_releases.py",
    "front_proxy": f"{_FLOW} {_FRONT}held_handoff.py {_RUN}",
    "front_proxy/outage_planner.py": f"{_FRONT}outage_planner.py",
    "front_proxy/plan_desk.py": f"{_FRONT}plan_desk.py {_FRONT}plan_desk_waits.py",
    "front_proxy/pending_question.py": f"{_FRONT}plan_desk_waits.py",
    "front_proxy/worker_link.py": f"{_FRONT}worker_link_slots.py {_FRONT}worker_link.py",
    "kv_transfer": "tests/kv_transfer tests/prefill_worker/test_leases.py tests/decode_worker --ignore="
    "tests/kv_transfer/test_nixl_connector.py",
    "prefill_worker": "tests/prefill_worker/test_leases.py tests/prefill_worker/test_role.py tests/prefill_worker",
    "scheduler": "tests/scheduler/test_turns.py tests/scheduler --ignore-glob=*kubernetes* --ignore-glob=*leadership* "
    "--ignore-glob=*standing_by* --ignore-glob=*test_service*",
    "worker": "tests/worker/test_admission.py tests/worker/test_front_stream.py tests/worker/test_service.py "
    "tests/worker/test_storm.py tests/prefill_worker/test_every_release.py",
}
SIMULATION = "tests/simulation/test_core_seeds.py -k every_invariant"


class Mutant(msgspec.Struct, frozen=True):
    """Whole lines of one file, as they are and as they would be without the defence."""

    path: str
    before: str
    after: str


def listed() -> Iterator[Mutant]:
    """All of them, as ``@@ path``, then lines that stay (a space), go (``-``) and come (``+``)."""
    for text in sorted(HERE.glob("*.txt")):
        for part in text.read_text().split("@@ ")[1:]:
            path, *lines = part.splitlines()
            before, after = ("\n".join(line[1:] for line in lines if line[:1] in kept) for kept in ("- ", "+ "))
            yield Mutant(path, before, after)


def mutated(text: str, mutant: Mutant) -> str | None:
    """The file without the defence; None when its lines are not there, or more than once."""
    before, after = f"\n{mutant.before}\n", f"\n{mutant.after}\n" if mutant.after else "\n"
    return text.replace(before, after) if text.count(before) == 1 else None


def near(path: str) -> str:
    """The tests that should notice."""
    return NEAR[max((at for at in NEAR if path == at or path.startswith(f"{at}/")), key=len)]


def noticed(copy: pathlib.Path, tests: str) -> bool:
    """Whether a test fails."""
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--timeout={TEST_S_MAX}", "--hypothesis-seed=0"]
    command = [sys.executable, "-m", "pytest", *options, *tests.split()]
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, timeout=RUN_S_MAX, check=False)
    except subprocess.TimeoutExpired:
        return True
    finally:
        shutil.rmtree(copy / ".hypothesis", ignore_errors=True)
    return done.returncode != 0


def write(copy: pathlib.Path, path: str, text: str) -> None:
    """Replace a file, and what was compiled of it: two versions may be of one second and one length."""
    (copy / path).write_text(text)
    for compiled in (copy / path).parent.glob(f"__pycache__/{pathlib.Path(path).stem}.*"):
        compiled.unlink()


def run(mutants: Sequence[Mutant], copy: pathlib.Path, *, simulate: bool) -> int:
    """How many nobody noticed, or could not be applied."""
    left = 0
    for mutant in mutants:
        whole = (ROOT / mutant.path).read_text()
        without = mutated(whole, mutant)
        if without is None:
            verdict = "does not fit the code any more"
        else:
            write(copy, mutant.path, without)
            found = noticed(copy, near(mutant.path)) or (simulate and noticed(copy, SIMULATION))
            write(copy, mutant.path, whole)
            if found:
                continue
            verdict = "nobody notices"
        left += 1
        print(f"{verdict}: {mutant.path}\n{mutant.before}\n  ->\n{mutant.after}\n", flush=True)
    return left


def main() -> int:
    """Exit code 1 when a mutant survived or could not be applied."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files whose path begins so; all without any")
    parser.add_argument("--simulate", action="store_true", help="run the simulation for what the tests do not notice")
    asked = parser.parse_args()
    chosen = [mutant for mutant in listed() if mutant.path.startswith(tuple(asked.paths) or "")]
    with tempfile.TemporaryDirectory(prefix="baton-mutants-") as folder:
        copy = pathlib.Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        assert not noticed(copy, near(chosen[0].path)), "the tests fail without any mutant"
        left = run(chosen, copy, simulate=asked.simulate)
    print(f"{len(chosen)} mutants, {left} left")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
