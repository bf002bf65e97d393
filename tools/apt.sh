#!/bin/sh
# apt.sh PACKAGE...: install packages of Debian or Ubuntu, as root, and start none of their services.
# For that time policy-rc.d answers 101 (Debian policy, section 9.3.3).  What apt prints is shown only where it failed.
set -eu

policy=/usr/sbin/policy-rc.d
log=$(mktemp)
made=
cleanup() {
    rm -f "$log"
    [ -z "$made" ] || rm -f "$policy"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

if [ ! -w "${policy%/*}" ]; then
    : # apt-get will say what is wrong
elif [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    made=yes
else # another one that forbids is as good; one that allows would start the services
    status=0
    "$policy" nginx start >/dev/null 2>&1 || status=$?
    [ "$status" = 101 ] || {
        echo "apt.sh: $policy is there and does not forbid starting services: move it away for the time of this" >&2
        exit 1
    }
fi

export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install --yes --no-install-recommends "$@"; } >"$log" 2>&1 </dev/null || {
    cat "$log" >&2
    exit 1
}
