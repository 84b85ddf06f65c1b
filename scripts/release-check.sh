#!/usr/bin/env bash
# A release without the tag, in a scratch clone of what is committed: changelog, archive, installation, demo, galaxy-importer. The checkout stays as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
version=$(sed -n 's/^version: //p' galaxy.yml)
work=$root/build/release
rm -rf "$work"
mkdir -p "$work"
git clone --quiet --no-hardlinks "$root" "$work/agentlab.proxmox"
cd "$work/agentlab.proxmox"
ln -s "$root/.venv" .venv
mkdir -p .cache
if [ -d "$root/.cache/galaxy-importer" ]; then ln -s "$root/.cache/galaxy-importer" .cache/galaxy-importer; fi
export PATH=$root/.venv/bin:$PATH

if [ -n "$(git tag --list "$version")" ]; then
    echo "Error: there is a tag $version already; set the next version in galaxy.yml and in the core (see docs/releasing.md)." >&2
    exit 1
fi
if ! find changelogs/fragments -name '*.yml' | grep -q .; then
    echo "Error: no fragment in changelogs/fragments: nothing to release, or it was done already." >&2
    exit 1
fi
antsibull-changelog lint
antsibull-changelog release >"$work/changelog.log" 2>&1 || { cat "$work/changelog.log" >&2; exit 1; }
antsibull-changelog lint-changelog-yaml changelogs/changelog.yaml
# As it stands in Markdown: a full stop is escaped.
title="## v${version//./\\.}"
if ! grep -qxF "$title" CHANGELOG.md || find changelogs/fragments -name '*.yml' | grep -q .; then
    echo "Error: the changelog was not made of all fragments." >&2
    exit 1
fi
echo "CHANGELOG.md: v$version, $(grep -c '^\* ' CHANGELOG.md) entries"
scripts/installed.sh
scripts/importer.sh
archive=build/installed/agentlab-proxmox-$version.tar.gz
if ! tar --extract --to-stdout --file "$archive" CHANGELOG.md 2>/dev/null | grep -qxF "$title"; then
    echo "Error: the changelog is not in $archive." >&2
    exit 1
fi
cp "$archive" "$work/"
echo "${work#"$root"/}/$(basename "$archive"): $(sha256sum <"$archive" | cut -c1-64)"
