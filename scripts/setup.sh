#!/usr/bin/env bash
# Makes or updates .venv from requirements-dev.txt. Does nothing if it is up to date: the stamp holds what was installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/requirements-dev.txt

if cmp -s requirements-dev.txt "$stamp" && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

python=$(scripts/find-python.sh)
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "==> .venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

echo "==> pip install -r requirements-dev.txt"
rm -f "$stamp"
# pip explains a failure at length on standard error; success needs no words.
log=$venv/pip.log
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade --requirement requirements-dev.txt >"$log" 2>&1; then
    cat "$log" >&2
    echo "Error: the packages could not be installed (see above)." >&2
    exit 1
fi
cp requirements-dev.txt "$stamp"
