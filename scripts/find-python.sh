#!/usr/bin/env bash
# Prints the path of a Python >= 3.11 that can make virtual environments; fails and says what is missing otherwise.
# PYTHON names one, and then no other is taken. Every candidate is run: a version manager may have commands on the PATH that start nothing.
set -euo pipefail

probe='
import sys
import venv, ensurepip
if sys.version_info < (3, 11):
    sys.exit(1)
print(sys.executable)'

candidates=(python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3)
if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi

for candidate in "${candidates[@]}"; do
    if path=$("$candidate" -c "$probe" 2>/dev/null) && [ -n "$path" ]; then
        printf '%s\n' "$path"
        exit 0
    fi
done

{
    echo "Error: no usable Python found. Needed: Python 3.11 or newer with the modules venv and ensurepip."
    if [ -n "${PYTHON:-}" ]; then
        echo "PYTHON=${PYTHON} is not one."
    elif version=$(python3 --version 2>/dev/null); then
        echo "python3 here is ${version}; on Debian the modules are in the package python3-venv."
    else
        echo "On Debian: apt-get install python3 python3-venv"
    fi
    echo "Another interpreter can be named with PYTHON=/path/to/python3."
} >&2
exit 1
