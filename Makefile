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
PYTEST = .venv/bin/python -m pytest -q -n $(WORKERS)
PYTEST_ARGS ?=

.PHONY: check gates test-cores demo-installed importer
