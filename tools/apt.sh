#!/bin/sh
# apt.sh PACKAGE...: install packages of Debian or Ubuntu, as root; no service is started, nobody outside is told.
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

if [ ! -e "$policy" ]; then
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

# CrowdSec's package would register this machine at its makers' over the network; where this file holds anything it does
# not (its postinst), and nothing here asks anybody outside.
online=/etc/crowdsec/online_api_credentials.yaml
case " $* " in
*" crowdsec "*)
    if [ ! -e "$online" ]; then
        mkdir -p "${online%/*}"
        echo '# Made by tools/apt.sh: this machine is not registered at the central API.' >"$online"
        chmod 600 "$online"
    fi
    ;;
esac

export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install --yes --no-install-recommends "$@"; } >"$log" 2>&1 </dev/null || {
    cat "$log" >&2
    exit 1
}
