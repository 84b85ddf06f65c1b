#!/usr/bin/env bash
# community.proxmox, for the test of docs/inventory.md: taken out of PyPI's package `ansible` (54 MB), once. Prints the folder to put on
# ANSIBLE_COLLECTIONS_PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The release for the ansible-core at hand: 12 for 2.19, 13 for 2.20, and so on.
release=$(.venv/bin/python -c 'from ansible import release; print(int(release.__version__.split(".")[1]) - 7)')
wanted="ansible>=$release,<$((release + 1))"
peers=$PWD/.cache/peers
if [ "$(cat "$peers/installed" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$peers"
    mkdir -p "$peers/download"
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$peers/download" "$wanted" >"$peers/pip.log" 2>&1 || {
        cat "$peers/pip.log" >&2
        exit 1
    }
    .venv/bin/python - "$peers" <<'PYTHON'
import pathlib
import sys
import zipfile

folder = pathlib.Path(sys.argv[1])
wheel, = (folder / "download").glob("ansible-*.whl")
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder, [name for name in archive.namelist() if name.startswith("ansible_collections/community/proxmox/")])
PYTHON
    rm -rf "$peers/download"
    printf '%s\n' "$wanted" >"$peers/installed"
fi
echo "$peers"
