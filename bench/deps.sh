#!/bin/sh
# deps.sh: install what `make bench` compares with and needs to compile its generator (Debian and Ubuntu, as root).
# No service is started: for the time of the installation policy-rc.d answers 101 (Debian policy, section 9.3.3).  At the
# end nothing listens that did not before; if something does, that is an error.
set -eu

packages='haproxy nginx-light redis-server postgresql libssl-dev gcc libc6-dev openssl iproute2 util-linux bpftool nftables'
policy=/usr/sbin/policy-rc.d

die() {
    echo "bench-deps: $*" >&2
    exit 1
}

listening() {
    ss --listening --tcp --numeric --processes --no-header 2>/dev/null |
        sed -n 's/.*users:(("\(haproxy\|nginx\|postgres\|redis-server\)".*/\1/p' | sort -u
}

command -v apt-get >/dev/null || die "needs apt; install with your package manager, starting no service: $packages"
missing=
for package in $packages; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -q '^installed$' || missing="$missing $package"
done
[ -n "$missing" ] || { echo 'bench-deps: all there'; exit 0; }
[ "$(id -u)" = 0 ] || die "missing:$missing: run: sudo make bench-deps"

before=$(listening)
log=$(mktemp)
made=
cleanup() {
    rm -f "$log"
    [ -z "$made" ] || rm -f "$policy"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    made=yes
else # another one that forbids is as good; one that allows would start the services
    status=0
    "$policy" nginx start >/dev/null 2>&1 || status=$?
    [ "$status" = 101 ] || die "$policy is there and does not forbid starting services: move it away for the time of this"
fi

echo "bench-deps: installing with apt, no service is started:$missing"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 -- a list of words
{ apt-get update && apt-get install --yes --no-install-recommends $missing; } >"$log" 2>&1 </dev/null || {
    cat "$log" >&2
    die "apt could not install$missing: see above"
}
after=$(listening)
[ "$before" = "$after" ] || die "a service was started and listens: $after: stop it, it would disturb the figures"
echo 'bench-deps: done, nothing new listens'
