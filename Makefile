# Two commands do everything on a fresh Debian or Ubuntu: `make serve` and `make test`.
# What the machine misses is installed with apt where you are root, and named in one line where not (tools/need.sh).
# Everything made here stays in .venv, build, var and tt/_core*.so, except for `make install`.

PYTHON   ?= python3
PREFIX   ?= /usr/local
TT_BUILD ?= release
ARGS     ?=
export TT_BUILD

BIN      := .venv/bin
LIB       = $(PREFIX)/lib/tapetrack
COMMANDS := tt TapeTrackServer TMSS10Ping
# What decides whether the extension is compiled again; Python files take effect without (editable install).
SOURCES  := $(wildcard ext/*.pyx ext/*.pxd ext/*.pxi ext/*.h) setup.py pyproject.toml
# One stamp a flavour: `make build TT_BUILD=asan` after a release build must compile.
BUILT    := .venv/.built-$(TT_BUILD)

# Python itself is not built with the sanitizer, so its library must come first; its own leaks at exit are not ours.
SANITIZER = $(if $(filter asan,$(TT_BUILD)),env LD_PRELOAD=$$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0)

MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.PHONY: help venv build serve test lint bpf install uninstall clean

help:
	@echo 'make serve      build, then run the server in the foreground: port 5000, data in ./var   (ARGS="--timeout 5")'
	@echo 'make test       build, then run the whole test suite                                     (ARGS="-k config")'
	@echo 'make build      virtual environment and extension: .venv/bin/tt, .venv/bin/TapeTrackServer, .venv/bin/TMSS10Ping'
	@echo 'make lint       check style and types'
	@echo 'make bpf        compile the kernel programs again: bpf/*.bpf.c into tt/bpf_programs.py'
	@echo 'make install    private environment in PREFIX/lib/tapetrack, commands in PREFIX/bin      (PREFIX=/usr/local)'
	@echo 'make uninstall  undo make install                                                        (PREFIX=/usr/local)'
	@echo 'make clean      remove all that make made, but not the data in ./var'
	@echo 'PYTHON=python3.12 chooses the interpreter; TT_BUILD=release|debug|asan the flavour of the extension.'

serve: build
	@exec $(SANITIZER) $(BIN)/TapeTrackServer $(ARGS)

test: build .venv/.test-tools
	@tools/need.sh test $(PYTHON)
	@$(SANITIZER) $(BIN)/python -m pytest $(ARGS)

lint: build .venv/.test-tools
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check --quiet || { echo 'lint: put these right with: $(BIN)/ruff format' >&2; exit 1; }
	@$(BIN)/mypy

bpf:
	@tools/need.sh bpf $(PYTHON)
	@$(PYTHON) bpf/generate.py

venv: .venv/.made

build: $(BUILT)
	@:

# pip >= 25.1 installs dependency groups; what a distribution's venv holds is older.
.venv/.made:
	@tools/need.sh build $(PYTHON)
	@echo 'venv: making .venv with $(PYTHON)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(BUILT): .venv/.made $(SOURCES)
	@tools/need.sh build $(PYTHON)
	@echo 'build: compiling tt._core ($(TT_BUILD))'
	@rm -f .venv/.built-*
	@$(BIN)/pip install --quiet --group build
	@PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-build-isolation --editable .
	@touch $@

.venv/.test-tools: .venv/.made pyproject.toml
	@echo 'test: installing the test tools'
	@$(BIN)/pip install --quiet --group test
	@touch $@

# Built from a copy: `sudo make install` must leave nothing of root's in the checkout.
install:
	@tools/need.sh build $(PYTHON)
	@echo 'install: environment in $(LIB), commands in $(PREFIX)/bin'
	@$(PYTHON) -m venv --clear '$(LIB)'
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && \
		cp -R setup.py pyproject.toml README.md ext tt "$$copy" && '$(LIB)/bin/python' -m pip install --quiet "$$copy"
	@mkdir -p '$(PREFIX)/bin'
	@for name in $(COMMANDS); do ln -sfn "../lib/tapetrack/bin/$$name" "$(PREFIX)/bin/$$name"; done

# Only links into our environment go: a command of the same name from elsewhere is not ours.
uninstall:
	@for name in $(COMMANDS); do \
		case "$$(readlink "$(PREFIX)/bin/$$name")" in ../lib/tapetrack/*) rm -f "$(PREFIX)/bin/$$name";; esac; done
	@rm -rf '$(LIB)'
	@echo 'uninstall: removed $(LIB) and its commands from $(PREFIX)/bin; data directories are left alone'

clean:
	@rm -rf .venv build dist *.egg-info tt/_core*.so ext/*.c ext/*.html
	@rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find tt tests -name __pycache__ -type d -prune -exec rm -rf {} +
