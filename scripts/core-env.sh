#!/usr/bin/env bash
# Makes (once) .cache/core-VERSION: an environment with that ansible-core and what the tests with it need. Prints its bin folder,
# or nothing when no Python that it runs on is at hand (then a line on standard error says so).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

core=${1:?version of ansible-core, such as 2.20}
venv=$PWD/.cache/core-$core
wanted="ansible-core==$core.* $(sed -n -E 's/^(proxmoxer|requests|PyYAML|fakepve\[pytest\]|pytest|pytest-xdist)([<>=].*)$/\1\2/p' requirements-dev.txt | tr '\n' ' ')"

if [ "$(cat "$venv/installed" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    printf '%s\n' "$venv/bin"
    exit 0
fi

# ansible-core 2.20 and 2.21 run on Python 3.12 to 3.14; interpreters of a version manager are not on the PATH.
shopt -s nullglob
python=
for candidate in python3.13 python3.12 python3.14 "$HOME"/.pyenv/versions/3.1[234].*/bin/python3 /opt/python/3.1[234]*/bin/python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "No Python 3.12 or newer here: ansible-core $core is not tested." >&2
    exit 0
fi
rm -rf "$venv"
"$python" -m venv "$venv"
shopt -u nullglob
set -f
# shellcheck disable=SC2086 # requirements, one a word
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $wanted >"$venv/pip.log" 2>&1; then
    cat "$venv/pip.log" >&2
    echo "Error: ansible-core $core could not be installed (see above)." >&2
    exit 1
fi
printf '%s\n' "$wanted" >"$venv/installed"
printf '%s\n' "$venv/bin"
