#!/usr/bin/env bash
# Lint, types and tests, in an environment that it installs itself: ./tools/test.sh
# The tests marked `slow` too, among them the wheel in an environment of its own: ./tools/test.sh --all
# With other arguments only pytest runs, with those arguments: ./tools/test.sh -k fold tests/adapters
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

tests=(.venv/bin/python -m pytest -n 2 --dist worksteal --durations=40)
if [ "${1:-}" = --all ]; then
    shift
    tests+=(-m "")
    checks=yes
elif [ "$#" -eq 0 ]; then
    checks=yes
fi
if [ "${checks:-}" ]; then
    stage "lint" .venv/bin/ruff check .
    stage "format" .venv/bin/ruff format --check .
    # mypy has one process, so it runs beside the tests; what it says comes after theirs.
    said="$(mktemp)"
    .venv/bin/mypy >"$said" 2>&1 &
    mypy=$!
    trap 'kill "$mypy" 2>/dev/null || true; rm -f "$said"' EXIT
fi
stage "tests" "${tests[@]}" "$@"
if [ "${checks:-}" ]; then
    passed=yes
    wait "$mypy" || passed=
    stage "types" cat "$said"
    [ "$passed" ]
fi
echo "==> all passed in $SECONDS s"
