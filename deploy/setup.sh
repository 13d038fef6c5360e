#!/usr/bin/env bash
# Makes a virtual environment that holds exactly the pinned packages of one profile, and this project.
# Called by `make setup`. Reads PYTHON, PROFILE (cpu or cuda), VENV and TORCH_INDEX from the environment.
set -euo pipefail

python="${PYTHON:-python3}"
profile="${PROFILE:-cpu}"
venv="${VENV:-.venv}"
torch_index="${TORCH_INDEX:-}"
# Back to the start of a terminal's line, which is emptied.
clear=$'\r\033[K'

fail() {
    echo "setup: $1" >&2
    exit 1
}

# What pip says, as one line of progress: on a terminal it is written over, elsewhere only large downloads are told.
# $1: how many packages there are.
show() {
    local total="$1" count=0 line file size name version
    while IFS= read -r line; do
        case "$line" in
        "Collecting "* | "Processing "* | "Requirement already satisfied: "*)
            count=$((count + 1))
            continue
            ;;
        "  Downloading "*.whl*)
            line="${line#  Downloading }"
            file="${line%% *}" size="${line#* }"
            IFS=- read -r name version _ <<<"${file##*/}"
            line="$count of $total: $name $version $size"
            ;;
        "Installing collected packages: "*,*) line="unpacking what is new" size=MB ;;
        *) continue ;;
        esac
        if [ -t 1 ]; then
            printf '%s  %s' "$clear" "$line"
        elif [[ "$size" == *MB* ]]; then
            echo "  $line"
        fi
    done
    if [ -t 1 ]; then printf '%s' "$clear"; fi
}

# What pip complains of. Folders that it is told to look in and that are not there are none of the user's business.
complain() {
    local line
    while IFS= read -r line; do
        [[ "$line" == "WARNING: Location '"*"is ignored"* ]] && continue
        if [ -t 2 ]; then printf '%s' "$clear" >&2; fi
        echo "$line" >&2
    done
}

# $1: how many packages; the rest goes to pip.
install() {
    local total="$1"
    shift
    # Every pin is exact and the closure is complete, so nothing may be resolved beside it.
    "$venv/bin/python" -m pip install --no-deps --disable-pip-version-check --progress-bar off "$@" \
        2> >(complain) | show "$total"
}

pins() {
    grep -c '==' "$1"
}

has_torch() {
    "$venv/bin/python" - "$1" <<'PY'
import importlib.metadata
import sys

try:
    found = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    found = ""
sys.exit(found != sys.argv[1])
PY
}

# PyTorch's CPU build is in no general registry: pip finds it in a local file or mirror it was configured with, or in
# PyTorch's own CPU index, whose address TORCH_INDEX gives.
install_cpu_torch() {
    local pin version
    pin="$(grep '^torch==' requirements/cpu.txt)"
    version="${pin#torch==}"
    if has_torch "$version"; then
        return
    fi
    if install 1 "$pin" 2>/dev/null; then
        echo "setup: $pin came from where this machine's pip is configured to look"
    elif [ -n "$torch_index" ]; then
        echo "setup: this machine's pip does not find $pin; taking it from TORCH_INDEX"
        install 1 --index-url "$torch_index" "$pin" || fail "$pin is not at TORCH_INDEX=$torch_index either"
    else
        fail "this machine's pip does not find $pin, the CPU build of PyTorch.
  Run:  make setup TORCH_INDEX=<PyTorch's CPU wheel index>
  Its address is what the PyTorch web site's 'Get Started' page prints for pip, platform CPU, after --index-url.
  Or put the wheel in a folder and name the folder in PIP_FIND_LINKS."
    fi
}

command -v "$python" >/dev/null || fail "no $python here; install Python 3.11, 3.12 or 3.13, or say PYTHON=..."
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    fail "$python is $("$python" -V 2>&1); Baton needs Python 3.11, 3.12 or 3.13 (say make setup PYTHON=python3.12)"
[ -f "requirements/$profile.txt" ] || fail "no profile $profile: PROFILE is cpu or cuda"

if [ ! -x "$venv/bin/python" ]; then
    echo "setup: making $venv with $("$python" -V)"
    "$python" -m venv "$venv" || fail "$python cannot make virtual environments (on Debian: install python3-venv)"
fi

# Whatever was installed before is no longer what a stamp says once this begins.
rm -f "$venv"/installed-*

echo "setup: installing the tools for development (requirements/dev.txt)"
install "$(pins requirements/dev.txt)" -r requirements/dev.txt
# After the tools: where the two differ in a pin, the profile's is the one that serves.
echo "setup: installing profile $profile (requirements/$profile.txt); the first time takes minutes"
if [ "$profile" = cpu ]; then
    install_cpu_torch
    install "$(pins requirements/cpu.txt)" -r <(grep -v '^torch==' requirements/cpu.txt)
else
    install "$(pins "requirements/$profile.txt")" -r "requirements/$profile.txt"
fi
echo "setup: installing what checks the Helm chart (requirements/deploy.txt)"
install "$(pins requirements/deploy.txt)" -r requirements/deploy.txt
echo "setup: installing Ray (requirements/ray.txt), which the tests of \`baton up --backend ray\` need"
install "$(pins requirements/ray.txt)" -r requirements/ray.txt
echo "setup: installing Baton itself"
install 1 --no-build-isolation --editable .
echo "setup: done; make serve serves the demo model"
