#!/usr/bin/env bash
# Type README's two commands, `make demo` and `make test`, on a bare Debian with its own Python: scripts/test-bare.sh [bookworm|trixie ...]
# Without arguments: both. `scripts/test-bare.sh --today`: the one whose turn it is, by date.
#
# A bare Debian is a tree that mmdebstrap made of git, make, python3 and python3-venv, entered with systemd-nspawn (host network,
# read-only but for the user's home folder and /tmp). Trees are kept in ~/.cache and made again when this list changes.
# What is tested is what is committed: a fresh clone, by a user without rights. Needs root, systemd-container and mmdebstrap.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
packages=git,make,python3,python3-venv
# Part of the name of a tree: raise it when the way a tree is made changes.
recipe=1
cache=${XDG_CACHE_HOME:-$HOME/.cache}/agentlab-bare
scratch=$root/build/bare
user=newcomer

if [ "${1:-}" = --today ]; then
    # AGENTLAB_BARE_DAY replays another day's turn (days since 1970).
    day=${AGENTLAB_BARE_DAY:-$(($(date -u +%s) / 86400))}
    if [ $((day % 2)) -eq 0 ]; then set -- bookworm; else set -- trixie; fi
elif [ "$#" -eq 0 ]; then
    set -- bookworm trixie
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "Error: bare trees need root. Run 'sudo make test-bare', or the other targets of 'make help' as you are." >&2
    exit 1
fi
missing=()
for pair in systemd-nspawn:systemd-container mmdebstrap:mmdebstrap; do
    command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
done
if [ "${#missing[@]}" -gt 0 ]; then
    echo "Error: missing on this machine. apt-get install ${missing[*]}" >&2
    exit 1
fi
mkdir -p "$cache/pip"
exec 9>"$cache/lock"
flock --wait 1800 9 || { echo "Error: another run of this script did not end within half an hour." >&2; exit 1; }

# Make the tree of a release unless it is there, and print its path.
make_tree() {
    local release=$1 tree draft options=() option key attempt
    # What the machine's apt needs to reach its servers (proxies, dates), mmdebstrap's apt needs too.
    while IFS= read -r option; do options+=("--aptopt=$option"); done < <(
        apt-config dump | grep -E '^Acquire::(https?::.*|Check-Date|Check-Valid-Until) ".+";' | sort
        echo 'Acquire::Retries "5";'
    )
    key=$(printf '%s\n' "$recipe" "$packages" "${AGENTLAB_DEBIAN_MIRROR:-}" "${options[@]}" | sha256sum | cut -c1-12)
    tree=$cache/$release-$key
    if [ ! -d "$tree" ]; then
        rm -rf "$cache/$release"-*
        # Under another name until it is whole: a run that is killed leaves no half tree behind.
        draft=$cache/.$release.draft
        for attempt in 1 2 3; do
            rm -rf "$draft"
            # shellcheck disable=SC2016 # mmdebstrap's shell fills in the tree
            if mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" "${options[@]}" \
                --customize-hook="chroot \"\$1\" useradd --create-home --uid 1000 --shell /bin/bash $user" \
                "$release" "$draft" ${AGENTLAB_DEBIAN_MIRROR:+"$AGENTLAB_DEBIAN_MIRROR"} >"$cache/$release.log" 2>&1; then
                break
            elif [ "$attempt" -eq 3 ]; then
                cat "$cache/$release.log" >&2
                echo "Error: the tree of $release could not be made (see above)." >&2
                return 1
            fi
            sleep $((attempt * 10))
        done
        mv "$draft" "$tree"
    fi
    printf '%s\n' "$tree"
}

# Print the arguments that hand the machine's pip settings into a tree: variables, files, and the folders that these name.
pip_arguments() {
    local tree=$1 name value file folder
    local variables=() files=()
    while IFS='=' read -r name value; do
        case $name in
            PIP_CONFIG_FILE) ;;
            PIP_* | REQUESTS_CA_BUNDLE | SSL_CERT_FILE | http_proxy | https_proxy | no_proxy | HTTP_PROXY | HTTPS_PROXY | NO_PROXY)
                printf -- '--setenv=%s=%s\n' "$name" "$value"
                variables+=("$value")
                ;;
        esac
    done < <(env)
    printf -- '--setenv=PIP_CACHE_DIR=/home/%s/.cache/pip\n' "$user"
    bind "$tree" "$cache/pip" "/home/$user/.cache/pip" --bind
    for file in /etc/pip.conf /etc/xdg/pip /etc/ssl/certs/ca-certificates.crt; do
        if [ -e "$file" ]; then bind "$tree" "$file" "$file"; fi
    done
    for file in "${PIP_CONFIG_FILE:-}" "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf" "$HOME/.pip/pip.conf"; do
        if [ -n "$file" ] && [ -f "$file" ]; then
            bind "$tree" "$file" "/home/$user/.config/pip/pip.conf"
            files+=("$file")
            break
        fi
    done
    # An index in a folder refers to its files beside it (../files), so its parent is needed.
    {
        printf '%s\n' "${variables[@]}"
        cat /etc/pip.conf "${files[@]}" 2>/dev/null || true
    } | grep -oE '(file://)?/[A-Za-z0-9/._+-]+' | while IFS= read -r folder; do
        case $folder in file://*) folder=$(dirname "${folder#file://}") ;; esac
        case $folder in /etc* | / | /home | /root | /usr | /opt | /srv | /var | /tmp) continue ;; esac
        if [ -d "$folder" ]; then bind "$tree" "$folder" "$folder"; fi
    done | sort -u
}

# Print the argument that shows a file or folder in the tree. The tree is entered read-only, so the place is made beforehand.
bind() {
    local tree=$1 source target=$3 how=${4:---bind-ro}
    source=$(realpath "$2")
    case $target in
        # The home folder is the scratch folder, not the tree's.
        "/home/$user/"*) tree=$scratch/home target=${target#"/home/$user"} ;;
    esac
    if [ -d "$source" ]; then
        mkdir -p "$tree$target"
    elif [ ! -e "$tree$target" ]; then
        mkdir -p "$(dirname "$tree$target")"
        : >"$tree$target"
    fi
    printf -- '%s=%s:%s\n' "$how" "$source" "$3"
}

test_release() {
    local release=$1 tree arguments begun
    tree=$(make_tree "$release")
    rm -rf "$scratch"
    mkdir -p "$scratch/home" "$scratch/tmp"
    chmod 1777 "$scratch/tmp"
    mapfile -t arguments < <(pip_arguments "$tree")
    git clone --quiet --bare --no-hardlinks "$root" "$scratch/home/repository.git"
    chown -R 1000:1000 "$scratch/home" "$cache/pip"
    begun=$SECONDS
    # shellcheck disable=SC2016 # the shell in the tree fills these in
    if ! SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn --quiet --directory="$tree" --machine="agentlab-bare-$release" --register=no \
        --keep-unit --as-pid2 --resolv-conf=copy-host --timezone=off --console=pipe --read-only \
        --bind="$scratch/home:/home/$user" --bind="$scratch/tmp:/tmp" "${arguments[@]}" --user="$user" --chdir="/home/$user" \
        /bin/bash -euc '
            . /etc/os-release
            echo "==> $PRETTY_NAME, $(python3 --version), as $(id -un)"
            git clone --quiet repository.git agentlab.proxmox
            cd agentlab.proxmox
            make demo >demo.log 2>&1 || { cat demo.log; exit 1; }
            tail -n 1 demo.log
            make test
        ' </dev/null; then
        echo "Error: README's commands failed on a bare $release; what they left is in ${scratch#"$root"/}." >&2
        return 1
    fi
    echo "$release: make demo and make test passed on bare Debian ($((SECONDS - begun)) s)"
    rm -rf "$scratch"
}

for release; do
    test_release "$release"
done
