#!/usr/bin/env bash
# Builds the collection, looks at what is in the archive, installs it into an empty folder and runs the demo from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

where=$PWD/build/installed
rm -rf "$where"
mkdir -p "$where"
export PATH=$PWD/.venv/bin:$PATH
ansible-galaxy collection build --force --output-path "$where" >/dev/null
archive=$(echo "$where"/agentlab-proxmox-*.tar.gz)

# What users need, and nothing else. A new folder at the top has to be told here, or to be left out by galaxy.yml's build_ignore.
allowed='CHANGELOG.md|CODE_OF_CONDUCT.md|CONTRIBUTING.md|FILES.json|LICENSE|LICENSES|MANIFEST.json|README.md|SECURITY.md|awx|bindep.txt|changelogs|docs|meta|playbooks|plugins|requirements.txt|roles'
others=$(tar --list --file "$archive" | sed 's,^\./,,; s,/.*,,' | sort -u | grep -vxE "$allowed" || true)
if [ -n "$others" ]; then
    echo "Error: in the archive, though users do not need it: $others" >&2
    exit 1
fi
if tar --list --file "$archive" | grep -E '(^|/)(__pycache__|\.[a-z_]+_cache|\.git|\.venv|tests)(/|$)|\.pyc$|\.db$'; then
    echo "Error: the archive holds the files above, which no user needs." >&2
    exit 1
fi

export ANSIBLE_COLLECTIONS_PATH=$where
ansible-galaxy collection install --offline --force --collections-path "$where" "$archive" >/dev/null
ansible-galaxy collection verify --offline --collections-path "$where" agentlab.proxmox >/dev/null
echo "$(basename "$archive"): $(du -h "$archive" | cut -f1), $(tar --list --file "$archive" | grep -vc '/$') files"
.venv/bin/python tests/support/demo.py --installed "$where" >"$where/demo.log" 2>&1 || { cat "$where/demo.log"; exit 1; }
tail -n 1 "$where/demo.log"
