#!/usr/bin/env bash
# Runs ansible-test on a copy of the collection: scripts/ansible-test.sh [--core 2.20] sanity|units|integration [ARGUMENTS]
# Further arguments go to ansible-test, for example `sanity --test pep8`. With --core, another ansible-core than the one of .venv
# is taken, in an environment of its own under .cache/ (on the newest Python at hand that it runs on); none at hand: says so, and passes.
#
# ansible-test wants the collection at .../ansible_collections/agentlab/proxmox and in a git repository of its own: it follows
# no symlinks, and skips everything in a folder that an outer repository ignores. It keeps its environments in the home
# folder, so it gets one under build/, where they are found again by the next run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
bin=$root/.venv/bin
core=
if [ "${1:-}" = --core ]; then
    core=$2
    shift 2
fi
kind=${1:?sanity, units or integration}
shift
if [ -n "$core" ]; then
    bin=$(scripts/core-env.sh "$core")
    if [ -z "$bin" ]; then exit 0; fi
fi
work=$root/build/ansible-test${core:+-$core}
home=$work/home
copy=$work/ansible_collections/agentlab/proxmox
log=$work/$kind.log

if ! git -C "$root" rev-parse --is-inside-work-tree >/dev/null; then
    echo "Error: ansible-test needs a git checkout." >&2
    exit 1
fi

copy_collection() {
    rm -rf "$copy"
    mkdir -p "$copy"
    # Files that are deleted but still tracked are listed too, and are not there to be packed.
    git ls-files -z --cached --others --exclude-standard -- . ':!.collections' |
        while IFS= read -r -d '' file; do
            if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
        done |
        tar --create --null --no-recursion --files-from=- | tar --extract --directory="$copy"
    git -C "$copy" init --quiet --template=
    git -C "$copy" add --all
}

# ansible-test passes neither PIP_* nor proxy variables on, so what pip needs to know is written down for it: the user's own
# settings by a link in the older place, the environment's in the newer one, which wins.
write_pip_settings() {
    mkdir -p "$home/.pip" "$home/.config/pip"
    rm -f "$home/.pip/pip.conf" "$home/.netrc"
    local own
    for own in "${PIP_CONFIG_FILE:-}" "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf" "$HOME/.pip/pip.conf"; do
        if [ -n "$own" ] && [ -f "$own" ]; then
            ln -s "$(realpath "$own")" "$home/.pip/pip.conf"
            break
        fi
    done
    if [ -f "$HOME/.netrc" ]; then ln -s "$HOME/.netrc" "$home/.netrc"; fi
    (
        umask 077
        PIP_PROXY=${PIP_PROXY:-${HTTPS_PROXY:-${https_proxy:-}}} PIP_CERT=${PIP_CERT:-${REQUESTS_CA_BUNDLE:-}} \
            "$bin/python" - >"$home/.config/pip/pip.conf" <<'PYTHON'
import os

settings = {
    name[4:].lower().replace("_", "-"): " ".join(value.split())
    for name, value in os.environ.items()
    if name.startswith("PIP_") and name != "PIP_CONFIG_FILE" and value
}
settings["quiet"] = "2"  # errors only
print("[global]")
for name, value in sorted(settings.items()):
    print(f"{name} = {value}")
PYTHON
    )
}

# ansible-test fetches a get-pip script for its environments from a server of the Ansible project. Python brings pip along:
# a stand-in with the name it looks for first needs no download. The versions are those of the installed ansible-test.
write_get_pip() {
    mkdir -p "$home/.ansible/test/cache"
    "$bin/python" - "$home/.ansible/test/cache" <<'PYTHON'
import importlib.util
import pathlib
import re
import sys

STAND_IN = """\
import subprocess
import sys

# In a process of its own: ensurepip switches pip's configuration off where it runs.
subprocess.check_call([sys.executable, "-m", "ensurepip"], stdout=subprocess.DEVNULL)
# The pip that Python brings will do; fetching the one that is asked for takes a while for each environment.
packages = [argument for argument in sys.argv[1:] if not argument.startswith(("-", "pip=="))]
if packages:
    sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", *packages]))
"""
package = pathlib.Path(importlib.util.find_spec("ansible_test").submodule_search_locations[0])
source = (package / "_internal" / "python_requirements.py").read_text(encoding="utf-8")
for version in set(re.findall(r"pip='([\d.]+)'", source)):
    name = f"get_pip_{version.replace('.', '_')}.py"
    (pathlib.Path(sys.argv[1]) / name).write_text(STAND_IN, encoding="utf-8")
PYTHON
}

python_version=$("$bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
copy_collection
write_pip_settings
write_get_pip

cd "$copy"
status=0
# The tests' own tools (pytest, the fake Proxmox) are in the environment already; only sanity makes environments of its own.
HOME=$home PATH=$bin:$PATH "$bin/ansible-test" "$kind" --local --python "$python_version" --color no \
    "$@" >"$log" 2>&1 </dev/null || status=$?

if [ "$status" -ne 0 ]; then
    # Not which packages went where, unless that is what failed.
    if grep -q '^ERROR: Found ' "$log"; then
        grep -E '^(ERROR|FATAL|[a-z0-9-]+$)' "$log"
    else
        cat "$log"
    fi
    echo "Error: ansible-test $kind failed; the whole output is in ${log#"$root"/}." >&2
    exit 1
fi
case $kind in
    sanity) ran=$(grep -c '^Running sanity test ' "$log" || true) what="sanity tests passed" ;;
    units) ran=$(sed -n 's/.*[= ]\([0-9]*\) passed.*/\1/p' "$log" | awk '{n += $1} END {print n + 0}') what="unit tests passed" ;;
    integration) ran=$(grep -c '^Running .* integration test' "$log" || true) what="integration targets passed" ;;
esac
if grep -q 'All targets skipped' "$log" || [ "$ran" -eq 0 ]; then
    cat "$log"
    echo "Error: ansible-test tested nothing." >&2
    exit 1
fi
if [ "$kind" = sanity ]; then
    grep '^WARNING' "$log" | grep -v -e 'Using locale' -e 'Reviewing previous' || true
fi
echo "$ran $what ($("$bin/ansible" --version | sed -n '1s/ansible \[\(.*\)\]/\1/p'), Python $python_version)"
