# Every target makes or reuses .venv by itself; `make` alone lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# tools/make_venv.py tells a Python or a folder that was asked for from these defaults by the environment.
bin := $(VENV)/bin

# Folders that may hold shell scripts; shfmt -f finds them by name or first line.
shell_folders = $(wildcard .ci benchmarks examples megatron_rocm tests tools)

.PHONY: help venv demo test images soak lint bench

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 13
	@printf '\nVariables: ARGS (for demo, test, images, soak, bench), PYTHON, VENV, TORCH_INDEX_URL (an index with torch for this machine)\n'

venv: ## make .venv, or update it if what it is made from has changed
	@command -v $(PYTHON) >/dev/null || { echo "make venv: no $(PYTHON) on PATH: install Python 3.10 to 3.13" >&2; exit 2; }
	@VENV=$(VENV) $(PYTHON) tools/make_venv.py

demo: venv ## train a small Llama on real text, then let it write (ARGS: KEY=VALUE)
	@$(bin)/megatron-rocm demo $(ARGS)

test: venv ## run the tests, two files at a time (ARGS: pytest's arguments)
	@$(bin)/python -m pytest -n 2 --dist loadfile $(ARGS)

images: venv ## as root: build both images over a stand-in for the vendors' and train in them (ARGS: rocm or cuda)
	@$(bin)/python tests/images/build.py $(ARGS)

soak: venv ## kill training that saves with kill -9, 200 times on a folder and 200 with an S3 server (ARGS: for tests/checkpoint/killer.py)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && kill=(tests/checkpoint/killer.py --kills 200 $(ARGS)) \
		&& $(bin)/python -W ignore "$${kill[@]}" "$$folder/one" \
		&& $(bin)/python -W ignore tests/s3.py $(bin)/python -W ignore "$${kill[@]}" "$$folder/two" --bare 0.4 \
			--set 'save="s3://checkpoints/soak"' --upload record file part manifest tracker retention

lint: venv ## check the style, the shell scripts, the Dockerfiles and the types
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/shfmt -d -i 2 $(shell_folders)
	$(bin)/shfmt -f $(shell_folders) | xargs $(bin)/shellcheck
	$(bin)/hadolint Dockerfile.*
	$(bin)/mypy megatron_rocm

bench: venv ## run the benchmarks
	@for script in benchmarks/*.py; do echo "== $$script"; $(bin)/python "$$script" $(ARGS); done
