#!/usr/bin/env bash
# Builds the documentation as HTML into build/docs/html: modules and role by antsibull-docs, the pages of docs/ as they are. A warning is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PATH=$PWD/.venv/bin:$PATH
work=$PWD/build/docs
pages=$work/source
rm -rf "$work"
mkdir -p "$pages"
# The pages keep their places, so that the links between them lead where they lead on GitHub; what else they link to comes along.
git ls-files -z --cached --others --exclude-standard -- '*.md' ':!scripts' ':!.github' docs awx meta playbooks roles/agentlabd/files/monitoring roles/agentlabd/files/postgresql changelogs LICENSE ':!.collections' |
    while IFS= read -r -d '' file; do
        if [ -f "$file" ]; then printf '%s\0' "$file"; fi
    done | tar --create --null --files-from=- | tar --extract --directory="$pages"
cp -r scripts/docs/. "$pages/"
mkdir -p "$pages/collection"
ANSIBLE_COLLECTIONS_PATH=$PWD/.collections antsibull-docs collection --use-current --fail-on-error --squash-hierarchy --no-add-antsibull-docs-version \
    --dest-dir "$pages/collection" agentlab.proxmox >"$work/antsibull-docs.log" 2>&1 || { cat "$work/antsibull-docs.log" >&2; exit 1; }
# A label of Ansible's own documentation, which is not at hand here.
sed -i 's|:ref:\x60action plugin <action_plugins>\x60|\x60action plugin <https://docs.ansible.com/ansible/latest/plugins/action.html>\x60__|' "$pages"/collection/*.rst
# Ansible's own environment variables have no page here.
sed -i -E 's#:(envvar|ansenvvarref):\x60(ANSIBLE[A-Z\\_]*)\x60#\2#g' "$pages"/collection/*.rst
sphinx-build --quiet -W --keep-going --jobs auto --doctree-dir "$work/doctrees" "$pages" "$work/html"
echo "build/docs/html/index.html: $(find "$work/html" -name '*.html' | wc -l) pages, no warnings"
