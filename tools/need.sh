#!/bin/sh
# need.sh build|test|bpf|fuzz|profile|counts PYTHON: that this machine has what the `make` target of that name needs.
# As root on a machine with apt, what is missing is installed, and one line says so; otherwise one line names it.
# Only compilers, headers and client programs: nothing here starts a service on the host.
set -eu

stage=$1
python=$2
missing= # packages of Debian and Ubuntu

die() {
    echo "make: $*" >&2
    exit 1
}

ask() { # ask EXPRESSION: whether it is true in the chosen Python
    "$python" -c "import os, sys, sysconfig, importlib.util as find; sys.exit(not ($1))"
}

program() { # program NAME PACKAGE...
    name=$1
    shift
    command -v "$name" >/dev/null || missing="$missing $*"
}

for_python() { # for_python SUFFIX WHAT: the distribution packages parts of its own Python alone
    if ask "sys.base_prefix == '/usr'"; then
        missing="$missing python$version-$1"
    else
        die "$python ($("$python" -c 'import sys; print(sys.executable)')) has no $2: install it for that Python, or choose another: make PYTHON=/usr/bin/python3"
    fi
}

compiler_for_bpf() {
    program clang clang
    [ -e /usr/include/bpf/bpf_helpers.h ] || missing="$missing libbpf-dev"
}

compiler_for_fuzz() { # a compiler with libFuzzer: the run-time libraries of clang are a package of their own
    program clang clang
    [ -n "$(find "$(clang -print-resource-dir 2>/dev/null || echo /none)" -name 'libclang_rt.fuzzer-*.a' 2>/dev/null)" ] ||
        missing="$missing libclang-rt-dev"
}

perf_of_distribution() { # Ubuntu has another name for it than Debian
    case $(cat /etc/os-release 2>/dev/null) in
    *ID=ubuntu*) program perf linux-tools-generic ;;
    *) program perf linux-perf ;;
    esac
}

take_promtool() { # its package would start a service, so the one program is taken out; where that fails, its tests say so
    command -v dpkg-deb >/dev/null || return 0
    command -v promtool >/dev/null && return 0
    tools=$(cd "${0%/*}/.." && pwd)/build/tools
    [ ! -e "$tools/promtool" ] || return 0
    echo "need: taking promtool out of Debian's package prometheus"
    place=$(mktemp -d)
    (
        cd "$place"
        apt-get download prometheus || { [ "$(id -u)" = 0 ] && apt-get update && apt-get download prometheus; }
        dpkg-deb --extract prometheus_*.deb . && mkdir -p "$tools" && mv usr/bin/promtool "$tools"
    ) >/dev/null 2>&1 </dev/null || :
    rm -rf "$place"
}

command -v "$python" >/dev/null || die "$python is not here: install Python 3.11 or newer, or name it: make PYTHON=python3.12"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ask "sys.version_info >= (3, 11)" || die "$python is Python $version, tt needs 3.11 or newer: name one with make PYTHON=python3.12"

case $stage in
build)
    program gcc gcc libc6-dev
    [ -e /usr/include/stdio.h ] || missing="$missing libc6-dev"
    ask "find.find_spec('ensurepip')" || for_python venv "module ensurepip"
    ask "os.path.exists(sysconfig.get_path('include') + '/Python.h')" || for_python dev "header Python.h"
    ;;
bpf)
    compiler_for_bpf
    ;;
fuzz)
    compiler_for_fuzz
    ;;
test)
    compiler_for_bpf
    compiler_for_fuzz
    program bpftool bpftool
    program mount mount
    program nmap nmap
    program man man-db
    program mandoc mandoc
    program zsh zsh
    program fish fish
    [ -e /usr/share/bash-completion/bash_completion ] || missing="$missing bash-completion"
    program curl curl
    program chromium chromium
    program openssl openssl
    program ssh openssh-client
    program haproxy haproxy
    program nft nftables
    program jq jq
    program fail2ban-regex fail2ban
    program cscli crowdsec
    program chattr e2fsprogs
    program ip iproute2
    program pidof procps
    program tmux tmux
    program systemd-analyze systemd
    program unshare util-linux
    program valgrind valgrind
    perf_of_distribution
    take_promtool
    ;;
profile)
    perf_of_distribution
    ;;
counts)
    program valgrind valgrind
    ;;
*) die "need.sh: $stage: no such stage" ;;
esac

[ -n "$missing" ] || exit 0
missing=$(printf '%s\n' $missing | sort -u | tr '\n' ' ')
install="apt-get install --yes --no-install-recommends ${missing% }"
command -v apt-get >/dev/null || die "missing for '$stage', in Debian's names: ${missing% }: install them with your package manager"
[ "$(id -u)" = 0 ] || die "missing for '$stage': ${missing% }: run: sudo $install"

echo "need: installing with apt: ${missing% }"
# shellcheck disable=SC2086 -- a list of words
"${0%/*}/apt.sh" $missing || die "apt could not install ${missing% }: see above, then try: $install"
