#!/usr/bin/env bash
# Make .cache/core-VERSION once: an environment with that ansible-core and what the tests need beside it. Print its bin folder.
# Print nothing when this machine has no Python that the release runs on; a line on standard error then says so.
# `scripts/core-env.sh --today` prints the release whose turn it is: one a day, all in six days.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# AGENTLAB_CORES_DAY replays another day's turn (days since 1970).
if [ "${1:-}" = --today ]; then
    day=${AGENTLAB_CORES_DAY:-$(($(date -u +%s) / 86400))}
    releases=(2.16 2.17 2.18 2.19 2.20 2.21)
    echo "${releases[day % 6]}"
    exit 0
fi

core=${1:?version of ansible-core, such as 2.20, or --today}
# The Pythons that a control node of that release may have. 3.11 is the oldest that our modules run on.
case $core in
    2.16 | 2.17) pythons="3.11 3.12" ;;
    2.18 | 2.19) pythons="3.11 3.12 3.13" ;;
    *) pythons="3.13 3.12 3.14" ;;
esac
venv=$PWD/.cache/core-$core
# What modules, daemon, command line and their tests import. Linters and molecule stay with .venv.
names='proxmoxer|requests|PyYAML|aiohttp|click|prometheus-client|sdnotify|fakepve\[pytest\]|hypothesis|psutil|psycopg\[binary\]|pytest|pytest-xdist'
packages=$(sed -n -E "s/^($names)([<>=].*)\$/\1\2/p" requirements-dev.txt)
requirements="ansible-core==$core.* $(tr '\n' ' ' <<<"$packages")"

# The development environment has what the tests need; where its release is asked for, no other is made.
if [ "$(.venv/bin/python -c 'from ansible.release import __version__ as v; print(".".join(v.split(".")[:2]))' 2>/dev/null)" = "$core" ]; then
    printf '%s\n' "$PWD/.venv/bin"
    exit 0
fi
if [ "$(cat "$venv/installed" 2>/dev/null)" = "$requirements" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    printf '%s\n' "$venv/bin"
    exit 0
fi

# Interpreters of a version manager are not on the PATH.
find_python() {
    local version candidate
    shopt -s nullglob
    for version in $pythons; do
        for candidate in "python$version" "$HOME/.pyenv/versions/$version".*/bin/python3 /opt/python/"$version"*/bin/python3; do
            if "$candidate" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
                printf '%s\n' "$candidate"
                return
            fi
        done
    done
}
python=$(find_python)
if [ -z "$python" ]; then
    echo "No Python of ${pythons// /, } here: ansible-core $core is not tested." >&2
    exit 0
fi
rm -rf "$venv"
"$python" -m venv "$venv"
set -f
# shellcheck disable=SC2086 # requirements, one a word
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $requirements >"$venv/pip.log" 2>&1; then
    cat "$venv/pip.log" >&2
    echo "Error: ansible-core $core could not be installed (see above)." >&2
    exit 1
fi
printf '%s\n' "$requirements" >"$venv/installed"
printf '%s\n' "$venv/bin"
