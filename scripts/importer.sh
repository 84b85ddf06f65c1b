#!/usr/bin/env bash
# What Galaxy does with an uploaded archive: galaxy-importer, in an environment of its own (it pins versions of its own). No error, no warning.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted="galaxy-importer>=0.4.44,<0.5"
venv=$PWD/.cache/galaxy-importer
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    rm -rf "$venv"
    "$(scripts/find-python.sh)" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$wanted" >"$venv/pip.log" 2>&1 || { cat "$venv/pip.log" >&2; exit 1; }
    printf '%s\n' "$wanted" >"$venv/installed"
fi
work=$PWD/build/importer
rm -rf "$work"
mkdir -p "$work/home"
.venv/bin/ansible-galaxy collection build --force --output-path "$work" >/dev/null
log=$work/importer.log
cd "$work"
# Its own home: it is not to see anybody's configuration. Its ansible-lint must not look for a newer version of itself.
status=0
HOME=$work/home PATH=$venv/bin:$PATH ANSIBLE_HOME=$work/home "$venv/bin/python" -m galaxy_importer.main agentlab-proxmox-*.tar.gz >"$log" 2>&1 </dev/null || status=$?
if [ "$status" -ne 0 ] || grep -qE '^(WARNING|ERROR|CRITICAL)' "$log" || ! grep -q 'Importer processing completed successfully' "$log"; then
    cat "$log"
    echo "Error: galaxy-importer found something." >&2
    exit 1
fi
echo "galaxy-importer: no errors, no warnings"
