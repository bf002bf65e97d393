#!/bin/sh
# deps.sh: install what `make bench` compares with and needs to compile its generator (Debian and Ubuntu, as root).
# No service is started (tools/apt.sh): at the end nothing listens that did not before; if something does, that is an error.
set -eu

packages='haproxy nginx-light redis-server memcached postgresql fail2ban python3-pyinotify crowdsec crowdsec-firewall-bouncer
    libssl-dev gcc libc6-dev openssl iproute2 util-linux bpftool nftables'

die() {
    echo "bench-deps: $*" >&2
    exit 1
}

listening() {
    ss --listening --tcp --numeric --processes --no-header 2>/dev/null |
        sed -n 's/.*users:(("\(crowdsec\|haproxy\|memcached\|nginx\|postgres\|redis-server\)".*/\1/p' | sort -u
}

command -v apt-get >/dev/null || die "needs apt; install with your package manager, starting no service: $packages"
missing=
for package in $packages; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -q '^installed$' || missing="$missing $package"
done
[ -n "$missing" ] || { echo 'bench-deps: all there'; exit 0; }
[ "$(id -u)" = 0 ] || die "missing:$missing: run: sudo make bench-deps"

before=$(listening)
echo "bench-deps: installing with apt, no service is started:$missing"
# shellcheck disable=SC2086 -- a list of words
"$(dirname "$0")/../tools/apt.sh" $missing || die "apt could not install$missing: see above"
after=$(listening)
[ "$before" = "$after" ] || die "a service was started and listens: $after: stop it, it would disturb the figures"
echo 'bench-deps: done, nothing new listens'
