#!/usr/bin/env bash
# Runs the molecule scenarios on the built collection; further arguments go to molecule instead of `test --all`, for example
# `converge`, `verify` or `destroy` (with -s SCENARIO).
#
# Needs root, systemd-container and mmdebstrap: the hosts are Debian 12 and 13, booted under systemd-nspawn. Their trees are kept in ~/.cache.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
export AGENTLAB_MOLECULE=$root/build/molecule
bin=$root/.venv/bin
hosts=$root/extensions/molecule/hosts.py

if [ "$(id -u)" -ne 0 ]; then
    echo "Error: the test hosts need root. Run 'sudo make test-molecule', or the other targets of 'make help' as you are." >&2
    exit 1
fi
missing=()
for pair in systemd-nspawn:systemd-container mmdebstrap:mmdebstrap ssh-keygen:openssh-client tar:tar; do
    command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
done
if [ "${#missing[@]}" -gt 0 ]; then
    echo "Error: missing on this machine. apt-get install ${missing[*]}" >&2
    exit 1
fi

# Addresses and names are the machine's: one run at a time, whichever checkout it is from.
exec 9>/run/agentlab-test-hosts.lock
flock --wait 1800 9 || { echo "Error: another run of this script did not end within half an hour." >&2; exit 1; }

keep=
if [ "$#" -eq 0 ]; then
    # MOLECULE_EXCLUDE names a scenario that is not run this time.
    set -- test --all ${MOLECULE_EXCLUDE:+--exclude "$MOLECULE_EXCLUDE"}
else
    keep=1
fi
finish() {
    status=$?
    trap - EXIT
    if [ -z "$keep" ]; then
        "$bin/python" "$hosts" stop-all || status=1
        for folder in "$AGENTLAB_MOLECULE"/double-*; do
            if [ -d "$folder" ]; then "$bin/python" "$root/extensions/molecule/double.py" stop "$folder" || status=1; fi
        done
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mkdir -p "$AGENTLAB_MOLECULE"
[ -f "$AGENTLAB_MOLECULE/key" ] || ssh-keygen -q -t ed25519 -N '' -C agentlab-test-hosts -f "$AGENTLAB_MOLECULE/key"

# As a user gets it: built and installed, not the checkout.
rm -rf "$AGENTLAB_MOLECULE"/*.tar.gz "$AGENTLAB_MOLECULE/collections" "$AGENTLAB_MOLECULE/newer"
"$bin/ansible-galaxy" collection build --force --output-path "$AGENTLAB_MOLECULE" >/dev/null
"$bin/ansible-galaxy" collection install --offline --force --collections-path "$AGENTLAB_MOLECULE/collections" "$AGENTLAB_MOLECULE"/*.tar.gz >/dev/null

[ -z "${OVERLAY:-}" ] || "$OVERLAY" "$AGENTLAB_MOLECULE/collections"

# A release to come, for upgrade and rollback: another version, and records of a newer schema.
cp -a "$AGENTLAB_MOLECULE/collections" "$AGENTLAB_MOLECULE/newer"
newer=$AGENTLAB_MOLECULE/newer/ansible_collections/agentlab/proxmox
sed -i 's/^__version__ = .*/__version__ = "99.0.0"/' "$newer/roles/agentlabd/files/agentlabd/__init__.py"
sed -i 's/^VERSION = len(MIGRATIONS)$/MIGRATIONS += (("CREATE TABLE to_come (id INTEGER PRIMARY KEY)",),)\nVERSION = len(MIGRATIONS)/' \
    "$newer/plugins/module_utils/_core/store/schema.py"
grep -q to_come "$newer/plugins/module_utils/_core/store/schema.py"

export PATH=$bin:$PATH ANSIBLE_COLLECTIONS_PATH=$AGENTLAB_MOLECULE/collections ANSIBLE_CONFIG=$AGENTLAB_MOLECULE/ansible.cfg
: >"$ANSIBLE_CONFIG"
cd extensions
"$bin/molecule" "$@" 9>&-
