# One entry point for all checks, the same here and in CI (.ci/run).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# Ansible wants a UTF-8 locale; a bare system may have none set.
ifeq ($(findstring UTF-8,$(subst utf8,UTF-8,$(or $(LC_ALL),$(LC_CTYPE),$(LANG)))),)
export LC_ALL := C.UTF-8
endif
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONDONTWRITEBYTECODE := 1

WORKERS ?= auto
PYTEST = .venv/bin/python -m pytest -q -n $(WORKERS) --dist worksteal
PYTEST_ARGS ?=
ROWS ?=
RUNS ?= 5
SOAK_MINUTES ?= 10
SOAK_SANDBOXES ?= 0
SOAK_RATE ?= 0
MINUTES ?= 15
SEED ?=
KINDS ?=
SHARD ?=
IN_PLACE ?=
SHIPPED ?=
CORES ?= 2.16 2.17 2.18 2.19 2.20 2.21

.PHONY: help setup demo test lint lint-python lint-ansible lint-meta sanity unit scenarios test-daemon test-molecule test-faults changelog build clean

.PHONY: scenarios-everyday test-cli-oldest test-monitoring

.PHONY: check gates gates-daily test-awx test-cores demo-installed importer docs faults-everyday test-faults-all test-inventory release-check

.PHONY: bench bench-engines bench-short test-chaos test-bare test-disk soak

help: ## Show this list
	@echo "Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON (interpreter for .venv), WORKERS (parallel tests, default auto), PYTEST_ARGS (e.g. '-k lease'), SOAK_MINUTES (default 10), SHARD, CORES"

setup: ## Make .venv with all tools (again when requirements-dev.txt changes)
	@scripts/setup.sh

demo: setup ## Show the collection at work against a fake Proxmox VE
	@.venv/bin/python tests/support/demo.py

test: unit faults-everyday lint scenarios-everyday ## Everyday checks, under 5 minutes
	@echo "==> All everyday checks passed"

check: test test-daemon test-cli-oldest test-monitoring gates ## Every gate: the everyday checks, and all that Galaxy, AWX and other releases of ansible-core ask for
	@echo "==> All gates passed"

# The gates test on the release of .venv already: test-cores adds only what is left of it.
gates-daily: export AGENTLAB_GATES = 1
gates-daily: scenarios bench-short sanity test-cores test-inventory docs demo-installed importer ## The gates beyond `make test` that CI takes every day

gates: gates-daily test-awx ## The gates beyond `make test`

lint: lint-python lint-ansible lint-meta ## All linters and the type checker

lint-python: setup ## ruff, mypy, shellcheck
	@echo "==> ruff"
	@ruff check --quiet .
	@echo "==> mypy"
	@mypy --no-error-summary
	@echo "==> shellcheck"
	@shellcheck .ci/run scripts/*.sh

lint-ansible: setup ## ansible-lint with the production profile
	@echo "==> ansible-lint"
	@# It renders expressions without the variables in them, and Ansible then warns of values that no play has.
	@ANSIBLE_DEPRECATION_WARNINGS=False ansible-lint -q --offline --profile production

lint-meta: setup ## Changelog, module documentation, licences
	@echo "==> antsibull-changelog lint"
	@antsibull-changelog lint
	@echo "==> antsibull-docs lint-collection-docs"
	@antsibull-docs lint-collection-docs --plugin-docs .
	@echo "==> reuse lint"
	@reuse lint --quiet || { reuse lint --lines; exit 1; }

sanity: setup ## ansible-test sanity, on a copy of the collection
	@echo "==> ansible-test sanity"
	@scripts/ansible-test.sh sanity

unit: setup ## Tests of rules, store and operations, and of what the files of the repository promise one another
	@echo "==> Unit tests"
	@$(PYTEST) tests/unit tests/repository $(PYTEST_ARGS)

scenarios: setup ## Every module in real playbooks against a fake Proxmox VE, in place and shipped (IN_PLACE=2/2 SHIPPED=1/2: half of each)
	@echo "==> Scenarios"
	@SHARD=$(IN_PLACE) $(PYTEST) tests/scenarios $(PYTEST_ARGS)
	@echo "==> Scenarios, modules shipped as to another host"
	@AGENTLAB_TEST_SHIPPED=1 SHARD=$(SHIPPED) $(PYTEST) tests/scenarios $(PYTEST_ARGS)

scenarios-everyday: setup ## A life of each module in real playbooks, and what holds for all of them
	@echo "==> Scenarios, the everyday ones"
	@$(PYTEST) tests/scenarios -m everyday $(PYTEST_ARGS)

test-daemon: setup ## Daemon and command line as real processes against a fake Proxmox VE
	@echo "==> Daemon"
	@$(PYTEST) tests/cli tests/daemon $(PYTEST_ARGS)

soak: setup ## The daemon under churn for SOAK_MINUTES (beside SOAK_SANDBOXES, with SOAK_RATE requests a second): a table of its memory, and an error when that grows
	@echo "==> Soak, $(SOAK_MINUTES) minutes"
	@.venv/bin/python tests/support/soak.py $(SOAK_MINUTES) $(SOAK_SANDBOXES) $(SOAK_RATE)

test-chaos: setup ## The daemon under kills, faults, a full disk, restarts and rude clients for MINUTES, and whether the promises hold (SEED replays the choices; KINDS="kill process fault" leaves out the rest; CONTROLLERS=3: so many daemons on PostgreSQL; OPERATIONS=100000: so many writes to the records by CONTROLLERS processes)
	@echo "==> Chaos, $(if $(OPERATIONS),$(OPERATIONS) operations,$(MINUTES) minutes)"
	@$(if $(OPERATIONS),.venv/bin/python tests/support/operations.py --controllers $(or $(CONTROLLERS),3) $(if $(SEED),--seed $(SEED)) $(OPERATIONS),.venv/bin/python tests/support/chaos.py $(if $(CONTROLLERS),--controllers $(CONTROLLERS)) $(MINUTES) $(or $(SEED),$(if $(KINDS),$$RANDOM)) $(KINDS))

test-cli-oldest: setup ## The command line and the requests to Proxmox with the releases of the libraries that Debian 12 has
	@echo "==> Command line with click 8.1.3"
	@rm -rf .cache/debian12
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --target .cache/debian12 click==8.1.3
	@AGENTLAB_TEST_CLI_LIBRARIES=$(CURDIR)/.cache/debian12 $(PYTEST) tests/cli -k 'not manual' $(PYTEST_ARGS)
	@echo "==> Requests to Proxmox with requests 2.28.1, urllib3 1.26.12"
	@rm -rf .cache/debian12-requests
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target .cache/debian12-requests requests==2.28.1 urllib3==1.26.12 charset-normalizer==2.1.1
	@PYTHONPATH=$(CURDIR)/.cache/debian12-requests $(PYTEST) tests/unit/test_client_errors.py $(PYTEST_ARGS)

test-monitoring: setup ## Alert rules and dashboard (needs promtool, of the Debian package prometheus)
	@echo "==> Monitoring"
	@.venv/bin/python -m pytest -q tests/monitoring $(PYTEST_ARGS)

faults-everyday: setup ## The thirteen ways in which others destroyed strangers' VMs (docs/safety.md)
	@echo "==> Thirteen ways"
	@$(PYTEST) tests/faults -m way $(PYTEST_ARGS)

test-faults: setup ## Interrupted, broken and racing operations; takes up to half an hour (AGENTLAB_FAULTS_SEED replays another day's choice)
	@echo "==> Faults"
	@$(PYTEST) tests/faults --durations=10 $(PYTEST_ARGS)

test-faults-all: setup ## As test-faults, with all of the thousands of cases: hours (SHARD=2/5 does the second of five parts)
	@echo "==> Faults, all of them"
	@AGENTLAB_FAULTS=all SHARD=$(SHARD) $(PYTEST) tests/faults --durations=10 $(PYTEST_ARGS)

test-disk: setup ## 29 full disks, 31 of write errors, 20 times no descriptor left, at points drawn by AGENTLAB_FAULTS_SEED; needs root for small disks
	@echo "==> Disk and descriptors"
	@AGENTLAB_FAULTS=all AGENTLAB_TEST_SMALL_DISKS=1 unshare --mount --propagation private $(PYTEST) tests/faults/test_disk.py $(PYTEST_ARGS)

test-molecule: setup ## The role on Debian 12 and 13, booted under systemd-nspawn; needs root
	@echo "==> Molecule"
	@scripts/molecule.sh

test-bare: ## README's two commands on bare Debian 12 and 13, with Debian's own Python; needs root
	@echo "==> Bare Debian"
	@scripts/test-bare.sh

test-cores: setup ## Sanity, units, integration and everyday scenarios on ansible-core 2.16 to 2.21 (CORES="2.16 2.21" for some)
	@WORKERS=$(WORKERS) PYTEST_ARGS="$(PYTEST_ARGS)" scripts/test-core.sh $(CORES)

test-awx: setup ## The playbooks as AWX runs them (ansible-runner), and its set-up against a small AWX API
	@echo "==> AWX"
	@AGENTLAB_TEST_AWX_CORES="2.17 2.21" $(PYTEST) tests/awx $(PYTEST_ARGS)

test-inventory: setup ## Sandboxes as hosts, by the inventory plugin of community.proxmox (fetched from PyPI once)
	@echo "==> Inventory"
	@.venv/bin/python -m pytest -q tests/inventory $(PYTEST_ARGS)

docs: setup ## The documentation as HTML in build/docs/html, without a warning
	@echo "==> Documentation"
	@scripts/docs.sh

demo-installed: setup ## The demo, from the archive as users install it
	@echo "==> The archive, installed, and the demo from it"
	@scripts/installed.sh

importer: setup ## What Galaxy does with an uploaded archive
	@echo "==> galaxy-importer"
	@scripts/importer.sh

bench-engines: setup ## Measure records on PostgreSQL beside records in SQLite, with a million destroyed ones: ten minutes
	@.venv/bin/python benchmarks/engines.py --runs $(RUNS)

bench: setup ## Measure us and the peers side by side, on a quiet machine, about an hour; ROWS="1 2" for some rows, RUNS=5
	@.venv/bin/python benchmarks/run.py --runs $(RUNS) --rows "$(ROWS)"

bench-short: setup ## What the benchmarks count and weigh: requests exactly, payload of the modules, no times
	@echo "==> Requests and payload"
	@.venv/bin/python -m pytest -q tests/benchmarks/test_counts.py $(PYTEST_ARGS)

changelog: setup ## Release: turn the changelog fragments into CHANGELOG.md
	@echo "==> antsibull-changelog release"
	@antsibull-changelog release

release-check: setup ## A release without the tag, in a scratch clone: changelog, archive, installation, importer
	@echo "==> Release, tried"
	@scripts/release-check.sh

build: setup ## Build the collection archive into build/
	@echo "==> ansible-galaxy collection build"
	@ansible-galaxy collection build --force --output-path build

clean: ## Remove everything that was generated, .venv included
	@echo "==> Clean"
	@rm -rf .venv .ansible .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .schemathesis build tests/output changelogs/.plugin-cache.yaml
	@find . -path ./.git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
