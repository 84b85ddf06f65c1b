#!/usr/bin/env bash
# Test the collection on releases of ansible-core, one after the other: scripts/test-core.sh 2.16 2.21
# Each gets ansible-test sanity, units and integration, and the everyday scenarios. ARGUMENTS for pytest come from PYTEST_ARGS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "$#" -eq 0 ]; then
    echo "Error: give releases of ansible-core, such as 2.16 2.21." >&2
    exit 2
fi
for core; do
    bin=$(scripts/core-env.sh "$core")
    # No Python for it here; core-env.sh has said so.
    if [ -z "$bin" ]; then continue; fi
    # The other targets test on the release of .venv: what is left to do with that one is integration.
    if [ "$bin" = "$PWD/.venv/bin" ] && [ -n "${AGENTLAB_GATES:-}" ]; then
        echo "==> ansible-core $core: ansible-test integration"
        scripts/ansible-test.sh --core "$core" integration
        continue
    fi
    kinds="sanity units integration"
    # ansible-test starts a process for each unit test; in CI pytest runs them side by side, in a third of the time.
    if [ -n "${AGENTLAB_GATES:-}" ]; then
        kinds="sanity integration"
        echo "==> ansible-core $core: units"
        "$bin/python" -m pytest -q -n "${WORKERS:-auto}" --dist worksteal tests/unit
    fi
    echo "==> ansible-core $core: ansible-test $kinds"
    for kind in $kinds; do scripts/ansible-test.sh --core "$core" "$kind"; done
    echo "==> ansible-core $core: the everyday scenarios"
    # shellcheck disable=SC2086 # arguments, one a word
    "$bin/python" -m pytest -q -n "${WORKERS:-auto}" --dist worksteal tests/scenarios -m everyday ${PYTEST_ARGS:-}
done
