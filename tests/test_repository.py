"""The repository holds to its own rules: sizes, names, docstrings, pins, light imports and generated code."""

from __future__ import annotations

import ast
import functools
import itertools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from launcher.config import BatonConfig
from runtime.configuration import load, settings

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
FILE_LINES_MAX = 500
# More than that wants rooms.
PACKAGE_FILES_MAX = 15
# The fake engine's not counted.
SETTINGS_MAX = 121
FUNCTION_LINES_MAX = 70
BANNED_WORDS = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "handler"}
LIGHT_FORBIDS = ("torch", "vllm", "transformers", "nixl", "numpy", "fastapi")
COMMAND_TIMEOUT_S = 120


def tracked(pattern: str) -> list[Path]:
    """Files that git holds or would hold, so that a virtual environment is never looked at."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", pattern]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=COMMAND_TIMEOUT_S)
    return sorted(path for name in set(listed.stdout.splitlines()) if (path := ROOT / name).is_file())


def is_generated(path: Path) -> bool:
    return re.search(r"_pb2(_grpc)?\.pyi?$", path.name) is not None


def modules() -> list[Path]:
    return [path for path in tracked("*.py") if not is_generated(path)]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def test_every_root_package_is_shipped() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    for package in (*PACKAGES, "baton_llm.py"):
        assert pyproject.count(f'"{package}"') >= 2, f"{package} is missing from the wheel or from the import contracts"


def test_no_file_is_longer_than_one_can_hold_in_mind() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in [*modules(), *tracked("*.md")]}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES_MAX} == {}


def test_no_package_is_a_corridor_of_doors() -> None:
    files = Counter(name_of(path.parent) for path in modules() if path.name not in ("__init__.py", "conftest.py"))
    assert {package: count for package, count in files.items() if count > PACKAGE_FILES_MAX} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    long = {}
    for path in modules():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long[f"{name_of(path)}:{node.name}"] = lines
    assert long == {}


def test_every_module_says_what_it_holds() -> None:
    silent = []
    for path in modules():
        text = path.read_text()
        bare_package = path.name == "__init__.py" and {"tests", "protos"} & set(path.parts) and not text.strip()
        if not bare_package and not ast.get_docstring(tree_of(path)):
            silent.append(name_of(path))
    assert silent == []


def test_nothing_is_named_for_having_no_better_name() -> None:
    found = []
    for path in modules():
        if words(path.stem) & BANNED_WORDS:
            found.append(name_of(path))
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and words(node.name) & BANNED_WORDS:
                found.append(f"{name_of(path)}:{node.name}")
    assert found == []


@pytest.mark.parametrize("name", ["cpu", "cuda", "scheduler", "dev", "bench", "dynamo", "s3", "deploy"])
def test_requirements_are_exact_and_name_no_source(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert text.strip()
    for line in text.splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z0-9,]+\])?==[A-Za-z0-9.+!]+( ; .+)?", line), line
    source = (ROOT / "requirements" / f"{name}.in").read_text()
    assert not re.search(r"://|--|\s@\s", source)


def test_every_test_that_a_document_names_exists() -> None:
    missing, named = [], 0
    for document in tracked("*.md"):
        for file, function in re.findall(r"\b(tests/[\w/]+\.py)(?:::(\w+))?", document.read_text()):
            named += bool(function)
            path = ROOT / file
            if not path.is_file() or (function and not re.search(rf"def {function}\(", path.read_text())):
                missing.append(f"{name_of(document)}: {file}::{function}")
    assert named > 20, "the pattern finds none"
    assert missing == []


def test_no_committed_file_names_a_package_index() -> None:
    # The words are built here, so that this file does not name one either.
    hosts = re.compile("|".join(("py" + r"pi\.org", r"download\.pytor" + r"ch\.org", "pythonhosted" + r"\.org")))
    texts = [path for path in tracked("*") if path.suffix in {".md", ".txt", ".in", ".toml", ".sh", ".py", ".yaml", ""}]
    assert [name_of(path) for path in texts if hosts.search(path.read_text(errors="replace"))] == []


@pytest.mark.parametrize(
    ("program", "forbidden"),
    [
        ("import launcher.run_process, launcher.hosted.status, launcher.up, scheduler.run", LIGHT_FORBIDS),
        ("import cli.app; cli.app.main(['--help'])", (*LIGHT_FORBIDS, "grpc")),
        ("import front_proxy.grpc_api.client", LIGHT_FORBIDS),
    ],
)
def test_the_launcher_the_scheduler_and_help_import_no_heavy_library(program: str, forbidden: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", f"{program}; import sys; print([x for x in {forbidden!r} if x in sys.modules])"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"


def test_the_generated_code_is_what_the_protos_give(tmp_path: Path) -> None:
    protos = [name_of(path) for path in tracked("protos/*.proto")]
    assert protos
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, *protos]
    subprocess.run(command, cwd=ROOT, check=True, timeout=COMMAND_TIMEOUT_S)
    made = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*_pb2*.py*")}
    kept = {name_of(path): path.read_text() for path in tracked("protos/*") if is_generated(path)}
    assert sorted(made) == sorted(kept)
    assert [name for name in made if made[name] != kept[name]] == [], "run make proto"


_TOLD_IN_A_PROTO = re.compile(
    r"""\s*(?:
        (?:message|service|enum|oneof|rpc)\s+\w+
        | (?:(?:optional|repeated)\s+)?(?:map<[^>]*>|[\w.]+)\s+\w+\s*=\s*\d+\s*[;\[]  # a field
        | \w+\s*=\s*-?\d+\s*[;\[]  # a value of an enum
    )""",
    re.VERBOSE,
)


def uncommented(proto: str) -> list[str]:
    """Declarations of a .proto text with no comment directly above them or behind them on their line."""
    lines = proto.splitlines()
    return [
        line.strip()
        for above, line in itertools.pairwise(["", *lines])
        if _TOLD_IN_A_PROTO.match(line) and "//" not in line and not above.lstrip().startswith("//")
    ]


def test_every_declaration_of_the_protos_is_documented() -> None:
    assert uncommented("message Open {\n  // Where.\n  uint32 slot = 1;\n  A b = 2;\n") == [
        "message Open {",
        "A b = 2;",
    ]
    told = {name_of(path): path.read_text() for path in tracked("protos/*.proto")}
    assert told
    assert {name: bare for name, text in told.items() if (bare := uncommented(text))} == {}


def test_every_link_in_the_documents_leads_to_a_file() -> None:
    broken = []
    for path in tracked("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{name_of(path)} -> {target}")
    assert broken == []


def test_every_invariant_names_one_to_three_tests_that_exist() -> None:
    text = (ROOT / "docs" / "invariants.md").read_text()
    rows = re.findall(r"^\| I(\d+) \|.*$", text, flags=re.MULTILINE)
    assert rows
    assert [int(number) for number in rows] == list(range(1, len(rows) + 1))
    for row in re.findall(r"^\| I\d+ \|.*$", text, flags=re.MULTILINE):
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::\w+)?`", row)  # that they exist, another test checks
        assert 1 <= len(named) <= 3, row


def code_map() -> list[list[str]]:
    """The rows of the code map in ARCHITECTURE.md, each as its cells."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    section = text.split("## Where is the thing that does X")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return [row for row in rows[2:] if row[1]]


def test_the_code_map_names_files_that_exist_and_what_is_in_them() -> None:
    rows = code_map()
    assert len(rows) >= 30
    wrong = []
    for subject, where, what in rows:
        paths = [ROOT / path for path in re.findall(r"`([\w.-]+(?:/[\w.-]+)+)`", where)]
        texts = "".join(path.read_text() for path in paths if path.is_file())
        wrong += [f"{subject}: {name_of(path)}" for path in paths if not path.exists()]
        wrong += [
            f"{subject}: {name}"
            for name in re.findall(r"`(\w+)`", what)
            if not re.search(rf"^(?:class|def|async def) {name}\b", texts, flags=re.MULTILINE)
        ]
    assert wrong == []


# Reports of their day, and the list of what is gone.
DATED_DOCUMENTS = ("docs/adr/", "docs/upgrading.md")


def test_every_file_that_a_document_names_exists() -> None:
    roots = "|".join((*PACKAGES, "tests", "docs", "deploy", "requirements"))
    named = re.compile(rf"`((?:{roots})/[\w./-]+\.(?:py|md|proto|toml|sh|yaml|txt|in))`")
    missing = [
        f"{name_of(document)}: {path}"
        for document in tracked("*.md")
        if not name_of(document).startswith(DATED_DOCUMENTS)
        for path in named.findall(document.read_text())
        if not (ROOT / path).is_file()
    ]
    assert missing == []


def test_every_setting_that_a_document_names_exists() -> None:
    # A star stands for the rest of a name, CLASS for any priority class.
    known = {setting.path for setting in settings(load(BatonConfig, file=None, environ={}, sets=()))}
    sections = "|".join({name.split(".")[0] for name in known})
    named = re.compile(rf"`((?:{sections})\.(?!(?:py|md|in|txt)`)[a-z_][\w.]*)(\*?)`")
    unknown = [
        f"{name_of(document)}: {name}{star}"
        for document in tracked("*.md")
        if not name_of(document).startswith(DATED_DOCUMENTS)
        for name, star in named.findall(document.read_text().replace(".CLASS.", ".interactive."))
        if not any(each == name or each.startswith(name if star else f"{name}.") for each in known)
    ]
    assert unknown == []


def test_an_operator_can_oversee_the_settings() -> None:
    paths = [each.path for each in settings(load(BatonConfig, file=None, environ={}, sets=()))]
    assert len([path for path in paths if not path.startswith("engine.fake.")]) <= SETTINGS_MAX


# Processes and requests are "it".
BANNED_IN_PROSE = re.compile(r"\b(?:whom|whoever|whomever|nobody|somebody|everybody)\b", re.IGNORECASE)


def test_no_process_is_spoken_of_as_a_person() -> None:
    texts = [*tracked("*.md"), *modules(), *tracked("*.proto")]
    here = ROOT / "tests" / "test_repository.py"
    assert [name_of(path) for path in texts if path != here and BANNED_IN_PROSE.search(path.read_text())] == []


# Commits before this one had no such check.
SUBJECTS_CHECKED_SINCE = "da5d248"
SUBJECT_CHARACTERS_MAX = 72


def test_the_subjects_of_commits_are_short() -> None:
    command = ["git", "log", "--no-merges", "--format=%h %s", f"{SUBJECTS_CHECKED_SINCE}..HEAD"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    if listed.returncode != 0:
        pytest.skip("this clone does not have the history")
    lines = [line.partition(" ") for line in listed.stdout.splitlines()]
    assert [f"{commit} {subject}" for commit, _, subject in lines if len(subject) > SUBJECT_CHARACTERS_MAX] == []


def test_ci_runs_what_the_readme_tells_people_to_run() -> None:
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    for command in ("make check", "make test"):
        assert command in readme
        assert command in script
