"""What the man pages say and the parser does not: environment, files, examples.

An entry of ENVIRONMENT or FILES goes to each page that has one of the options before it or is about one of the
sub-commands, and so to tt(1).  The examples are command lines that the parser takes.
Must not know how a page is written.
"""

from tt import config
from tt.block_maps import DEFAULTS
from tt.catalog.accounts import FIRST_PASSWORD
from tt.catalog.service import FILE as CATALOG
from tt.cli.server_option import VARIABLE

KNOWN = ("known", "--key")
# (options or sub-commands, name, text)
ENVIRONMENT = (
    (("serve", "config"), f"{config.ENVIRONMENT}NAME", "The server's option NAME. Commas separate several values."),
    (("--data",), f"{config.ENVIRONMENT}DATA", "The data directory, where `--data` is not given."),
    (("-S",), VARIABLE, "The server and the user, where `-S` is not given."),
    (KNOWN, "XDG_CONFIG_HOME", "The folder below which the known servers are kept, instead of `~/.config`."),
)
FILES = (
    (("serve",), "DIR/server.key", "The server's private key, made at its first start. Only its user may read it."),
    (("serve",), "DIR/server.key.old", "The key before, in force too for as long as the operator leaves it there."),
    (("serve",), "DIR/server.pub", "Its public key, as `tt known add` and `--key` take it."),
    (("serve",), f"DIR/{FIRST_PASSWORD}", "The password for the first login of `tapemaster`, to be used once."),
    (("serve", "verify", "backup"), f"DIR/{CATALOG}", "The catalogue, and the history with its chain of custody."),
    (("serve",), "DIR/timeouts", "The time-outs, kept over a restart."),
    (("serve", "--control"), f"DIR/{config.CONTROL_SOCKET}", "The socket on which commands ask the running server."),
    (KNOWN, "~/.config/tt/known_servers", "The servers that this user trusts, and their keys."),
    (("--map",), " ".join(map(str, DEFAULTS)), "The pinned maps of timed-out sources, for IPv4 and for IPv6."),
)

# Sub-command -> lines for a shell, with comments.
EXAMPLES = {
    "": """\
# Is the server there, and what does it do?
tt ping -c 1 tapes.example.com
tt status
# Where are the tapes?
export TT_SERVER=jsmith:/etc/tapetrack/password@tapes.example.com
tt volume list US01
# What does a command take?
man tt-volume
""",
    "serve": f"""\
# Try it, with short time-outs
TapeTrackServer --listen 127.0.0.1:5055 --data var/trial --timeout 5
# As a service, from a file of options, and as a user without rights
TapeTrackServer -c /etc/tapetrack.toml --data /var/lib/tapetrack --user tapetrack
# Let the kernel drop who is timed out
TapeTrackServer -B {DEFAULTS[0]}
# Only say who would be timed out
TapeTrackServer --observe
""",
    "config": """\
# Begin a file of options
tt config show --toml > tapetrack.toml
# Find what is wrong with it
tt config check tapetrack.toml
""",
    "ping": """\
# Is the server there?
TMSS10Ping -c 4 tapes.example.com
# How fast is it at its best?
tt ping -c 1000 -i 0 tapes.example.com:5001
""",
    "known": """\
# Trust a server by the line in its file server.pub
tt known add tapes.example.com tt1-pKbRbN-2OxK3ndJdK8-oXsHsAWwPn6FEGju6DQPElHqV-fwr
# Forget it
tt known remove tapes.example.com
""",
    "bans": """\
# Who of this network is timed out?
tt bans list 192.0.2.0/24
# Time out a source for a day
tt bans add 192.0.2.7 --for 1d --reason 'asked to stop'
# Let one in again
tt bans remove 192.0.2.7
# A page about the last week
tt bans report -o report.html --since 7d
""",
    "status": """\
# What does the server do?
tt status --data /var/lib/tapetrack
""",
    "top": """\
# Watch a server by its data directory
tt top --data /var/lib/tapetrack
# One picture of it, for a log
tt top --once --ascii
""",
    "exempt": """\
# Never time out the machines of the office
tt exempt add 192.0.2.0/24 --reason office
# What is exempt, and since when
tt exempt list
""",
    "bpf": """\
# Drop at the interface, and watch it
tt bpf load --dev eth0
tt bpf status --entries
# Undo it
tt bpf unload
""",
    "customer": """\
# A new Customer
tt customer add US01 --description 'Example Archives'
""",
    "media": """\
# A Media type for it
tt media add US01.LTO --max-volumes 100000
""",
    "repository": """\
# A vault, and a library whose Volumes go there next
tt repository add US01.LTO.VLT1 --kind vault --offsite
tt repository add US01.LTO.LIB --kind library --next VLT1
""",
    "volume": """\
# Ask for two Volumes to be moved, by a day
tt volume move US01.LTO.A00001 US01.LTO.A00002 --to VLT1 --move-date 2031-11-30
# The pick list of a Repository
tt volume list US01 --moving --from US01.LTO.LIB
# What began with A000 is to be deleted, and is named by a list
tt volume list 'US01.LTO.A000*' --csv | cut -d, -f1 | sed 1d | tt volume delete -
""",
    "scan": """\
# Volumes leave, and arrive; a scanner sends a barcode a line
tt scan out --repository US01.LTO.LIB < /dev/ttyACM0
tt scan in --repository US01.LTO.VLT1 < barcodes
""",
    "reconcile": """\
# A library with what its robot says
mtx -f /dev/sg3 status | tt reconcile --repository US01.LTO.LIB --mtx -
# What came of it before
tt reconcile --repository US01.LTO.LIB --list
""",
    "move-pending": """\
# From cron, each morning; -S is in the environment
tt move-pending --scope US01.LTO
""",
    "sync": """\
# What would an inventory change?
tt sync -d inventory.toml --dry-run < inventory.csv
""",
    "history": """\
# The last ten events of a Volume
tt history US01.LTO.A00001 -n 10
""",
    "user": """\
# A user for the night shift, who sees and moves one Customer's Volumes
tt user add jsmith --description 'night shift' --networks 192.0.2.0/24
tt user access set jsmith US01 write
# The password of tapemaster is lost; on the server's host
tt user reset tapemaster --data /var/lib/tapetrack
""",
    "verify": """\
# Does the chain of custody hold?
tt verify --data /var/lib/tapetrack
""",
    "backup": """\
# Copy the catalogue of a running server
tt backup --data /var/lib/tapetrack /backup/tapetrack.db
""",
    "completion": """\
# In ~/.bashrc
source <(tt completion bash)
# In ~/.zshrc, behind compinit
eval "$(tt completion zsh)"
# In ~/.config/fish/config.fish
tt completion fish | source
""",
    "manual": """\
# For a package of a distribution
tt manual /tmp/package/usr/share
""",
}
