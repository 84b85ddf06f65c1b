#!/usr/bin/env bash
# Links every file of the core into the role's files, so that daemon and tests run from a checkout and the core exists once. Run it when the
# core gains or loses a file. Files are linked one by one: ansible-test sanity allows no links to folders.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

core=plugins/module_utils/_core
links=roles/agentlabd/files/agentlab_core
rm -rf "$links"
find "$core" -name '*.py' -printf '%P\n' | sort | while IFS= read -r file; do
    mkdir -p "$links/$(dirname "$file")"
    ln -s --relative "$core/$file" "$links/$file"
done
