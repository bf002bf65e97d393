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
# Below PREFIX/share: where man and the shells look.
FOLDERS  := man/man1 man/man8 bash-completion/completions zsh/site-functions fish/vendor_completions.d
# For systemd, which looks below /usr/local and /usr by itself; for /usr, options are in /etc.
UNITS     = $(PREFIX)/lib/systemd/system
SYSUSERS  = $(PREFIX)/lib/sysusers.d
ETC       = $(if $(filter /usr,$(PREFIX)),/etc,$(PREFIX)/etc)
# What decides whether the extension is compiled again; Python files take effect without (editable install).
SOURCES  := $(wildcard ext/*.pyx ext/*.pxd ext/*.pxi ext/*.h) setup.py pyproject.toml
# One stamp a flavour: `make build TT_BUILD=asan` after a release build must compile.
BUILT    := .venv/.built-$(TT_BUILD)

# Python itself is not built with the sanitizer, so its library must come first; its own leaks at exit are not ours.
SANITIZER = $(if $(filter asan,$(TT_BUILD)),env LD_PRELOAD=$$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1)

MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.PHONY: help venv build serve test asan-test fuzz lint bpf bench bench-figures bench-deps profile counts install install-units uninstall clean

help:
	@echo 'make serve      build, then run the server in the foreground: port 5000, data in ./var   (ARGS="--timeout 5")'
	@echo 'make test       build, then run the whole test suite, two at a time    (ARGS="-k config", ARGS="-n 0 --pdb")'
	@echo 'make asan-test  the same suite on a build with AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make fuzz       a short run of the fuzzers                            (ARGS="--runs 10000000 frame_verdict")'
	@echo 'make build      virtual environment and extension: .venv/bin/tt, .venv/bin/TapeTrackServer, .venv/bin/TMSS10Ping'
	@echo 'make lint       check style and types'
	@echo 'make bpf        compile the kernel programs again: bpf/*.bpf.c into tt/bpf_programs.py'
	@echo 'make bench      measure beside redis, nginx, HAProxy and the kernel; bench/README.md     (QUICK=1, ARGS="pings")'
	@echo 'make bench-deps install these peers (as root, with apt); none of them is started'
	@echo 'make bench-figures  draw bench/results/quoted.json, or ARGS=FILE, and put its table into bench/README.md'
	@echo 'make profile    a flame graph of the server under LOAD=pings|gets|flood|handshakes; docs/profiling.md'
	@echo 'make counts     count instructions, and keep them in bench/counts/counts.json, which `make test` compares'
	@echo 'make install    private environment in PREFIX/lib/tapetrack; in PREFIX/bin and PREFIX/share links to its commands,'
	@echo '                man pages and completion for bash, zsh and fish                          (PREFIX=/usr/local)'
	@echo 'make uninstall  undo make install                                                        (PREFIX=/usr/local)'
	@echo 'make clean      remove all that make made, but not the data in ./var'
	@echo 'PYTHON=python3.12 chooses the interpreter; TT_BUILD=release|debug|asan the flavour of the extension.'

serve: build
	@exec $(SANITIZER) $(BIN)/TapeTrackServer $(ARGS)

test: build .venv/.test-tools .venv/.bench-tools
	@tools/need.sh test $(PYTHON)
	@$(SANITIZER) $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# --capture=sys: a sanitizer ends the process, and what it says must not end with it.
asan-test:
	@$(MAKE) test TT_BUILD=asan ARGS="--capture=sys $(ARGS)"

fuzz: build
	@tools/need.sh fuzz $(PYTHON)
	@$(BIN)/pip install --quiet 'atheris>=3,<4'
	@$(BIN)/python fuzz/run.py $(ARGS)

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
	@PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-build-isolation --editable '.[cli]'
	@touch $@

.venv/.test-tools: .venv/.made pyproject.toml
	@echo 'test: installing the test tools'
	@$(BIN)/pip install --quiet --group test
	@touch $@

# The programs of the bench: compiled for this machine, never shipped.
BENCH := $(addprefix build/bench/,load drop offend)

build/bench/load: bench/options.c bench/options.h bench/noise.c bench/noise.h bench/script.c bench/script.h bench/latency.c bench/latency.h
build/bench/load build/bench/offend: bench/base.c bench/base.h
$(BENCH): build/bench/%: bench/%.c
	@mkdir -p build/bench
	@echo '#include <openssl/ssl.h>' | gcc -E -o /dev/null - 2>/dev/null || { \
		echo 'bench: the headers of OpenSSL are missing: run: make bench-deps' >&2; exit 1; }
	@gcc -std=gnu11 -O2 -g -Wall -Wextra -o $@ $(filter %.c,$^) -lssl -lcrypto

build/bench/lookup.so: bench/lookup.pyx $(BUILT)
	@mkdir -p build/bench
	@$(BIN)/cython -3 -I ext -o build/bench/lookup.c $<
	@gcc -std=gnu11 -O2 -fPIC -shared -Iext -o $@ build/bench/lookup.c \
		-I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')"

# For drawing, and a peer: where no package index can be reached the bench does without both, and says so.
.venv/.bench-tools: .venv/.made
	@$(BIN)/pip install --quiet 'matplotlib>=3.8' 'uvloop>=0.19' && touch $@ || \
		echo 'bench: pip could not install matplotlib and uvloop: no pictures, and uvloop is not measured' >&2

bench: build .venv/.bench-tools $(BENCH) build/bench/lookup.so
	@$(BIN)/python -m bench $(if $(QUICK),--quick) $(ARGS)

bench-figures: .venv/.bench-tools
	@$(BIN)/python -m bench.pictures $(ARGS)

bench-deps:
	@bench/deps.sh

LOAD ?= pings
profile: build build/bench/load
	@tools/need.sh profile $(PYTHON)
	@$(BIN)/python -m bench.profile $(LOAD) $(ARGS)

counts: build
	@tools/need.sh counts $(PYTHON)
	@$(BIN)/python -m bench.counts

# Built from a copy: `sudo make install` must leave nothing of root's in the checkout.
install:
	@tools/need.sh build $(PYTHON)
	@echo 'install: environment in $(LIB), commands in $(PREFIX)/bin, man pages and completion in $(PREFIX)/share'
	@$(PYTHON) -m venv --clear '$(LIB)'
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && \
		cp -R setup.py pyproject.toml README.md ext tt "$$copy" && '$(LIB)/bin/python' -m pip install --quiet "$$copy[cli]"
	@mkdir -p '$(PREFIX)/bin'
	@for name in $(COMMANDS); do ln -sfn "../lib/tapetrack/bin/$$name" "$(PREFIX)/bin/$$name"; done
	@'$(LIB)/bin/tt' manual '$(LIB)/manual'
	@for name in $$(cd '$(LIB)/manual' && echo */*/*); do mkdir -p "$(PREFIX)/share/$${name%/*}" && \
		ln -sfn "../../../lib/tapetrack/manual/$$name" "$(PREFIX)/share/$$name" || exit 1; done
	@$(MAKE) install-units

# A file of options that is there is the operator's, and stays.
install-units:
	@mkdir -p '$(UNITS)' '$(SYSUSERS)' '$(ETC)'
	@for name in tapetrack.service tapetrack.socket; do \
		sed -e 's|@PREFIX@|$(abspath $(PREFIX))|' -e 's|@ETC@|$(abspath $(ETC))|' deploy/$$name >'$(UNITS)'/$$name && \
		chmod 644 '$(UNITS)'/$$name || exit 1; done
	@install -m 644 deploy/tapetrack.sysusers '$(SYSUSERS)/tapetrack.conf'
	@[ -e '$(ETC)/tapetrack.toml' ] || install -m 644 deploy/tapetrack.toml '$(ETC)/tapetrack.toml'
	@echo 'install: units in $(UNITS), options in $(ETC)/tapetrack.toml; deploy/README.md says how to start the service'

# Only links into our environment go: a command of the same name from elsewhere is not ours.
uninstall:
	@for name in $(COMMANDS); do \
		case "$$(readlink "$(PREFIX)/bin/$$name")" in ../lib/tapetrack/*) rm -f "$(PREFIX)/bin/$$name";; esac; done
	@for name in $(FOLDERS); do [ ! -d "$(PREFIX)/share/$$name" ] || \
		find "$(PREFIX)/share/$$name" -maxdepth 1 -lname '../../../lib/tapetrack/*' -delete; done
	@rm -rf '$(LIB)' '$(UNITS)/tapetrack.service' '$(UNITS)/tapetrack.socket' '$(SYSUSERS)/tapetrack.conf'
	@for name in '$(UNITS)' '$(PREFIX)/lib/systemd' '$(SYSUSERS)'; do rmdir "$$name" 2>/dev/null || :; done
	@if cmp -s deploy/tapetrack.toml '$(ETC)/tapetrack.toml'; then rm '$(ETC)/tapetrack.toml'; fi
	@echo 'uninstall: removed $(LIB), the links to it from $(PREFIX), and the units; data and changed options stay'

clean:
	@rm -rf .venv build dist *.egg-info tt/_core*.so ext/*.c ext/*.html
	@rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find tt tests -name __pycache__ -type d -prune -exec rm -rf {} +
