#!/usr/bin/env bash
# Lint, types and tests, in an environment that it installs itself: ./tools/test.sh
# With arguments only pytest runs, with those arguments: ./tools/test.sh -k fold tests/adapters
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./tools/setup.sh

# No test may reach a model hub. One thread a process, or the two workers slow each other down.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

stage() {
    echo "==> $1 (at $SECONDS s)"
    shift
    "$@"
}

if [ "$#" -gt 0 ]; then
    stage "tests" .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
else
    stage "lint" .venv/bin/ruff check .
    stage "format" .venv/bin/ruff format --check .
    stage "types" .venv/bin/mypy
    stage "tests" .venv/bin/python -m pytest -n 2 --dist worksteal
fi
echo "==> all passed in $SECONDS s"
