"""What real shells offer to complete a command line: bash, zsh and fish, each started once for many lines.

The scripts come from files that are read as a user's start-up file reads them, or from a folder like /usr/share, where
the shell has to find them by itself.
"""

import os
import pty
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from process import BIN, need, plain_environment

END = "-- end of line --"
LONG = 120.0  # s: for all the lines together, on a busy machine
BASH_COMPLETION = "/usr/share/bash-completion/bash_completion"

# Each reads command lines from standard input and prints what it offers for each.
BASH = f"""
while IFS= read -r line; do
    read -ra COMP_WORDS <<<"$line"
    [[ $line != *" " ]] || COMP_WORDS+=("")
    COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMP_LINE=$line COMP_POINT=${{#line}} COMPREPLY=()
    if ! complete -p "$COMP_WORDS" >/dev/null 2>&1; then # what the shell does at the first try
        loader=$(complete -p -D) && loader=${{loader##*-F }} && "${{loader%% *}}" "$COMP_WORDS"
    fi
    of=$(complete -p "$COMP_WORDS") && of=${{of##*-F }} && "${{of%% *}}" "$COMP_WORDS" "${{COMP_WORDS[COMP_CWORD]}}"
    printf '%s\\n' "${{COMPREPLY[@]}}" '{END}'
done
"""
FISH = f"""
while read --local line
    complete --do-complete "$line" | string split --fields 1 \\t
    echo '{END}'
end
"""
# zsh completes in its line editor alone, which needs a terminal; the lines and what was offered are in files.
ZSH = f"""
compadd() {{
    local -a offered
    # Other functions of the completion use these to ask for matches, and add none.
    if [[ " $* " != *" -"[OAD]" "* ]]; then
        builtin compadd -O offered "$@"
        print -rl -- $offered >>offered
    fi
    builtin compadd "$@"
}}
zle-line-init() {{
    local line
    while IFS= read -r line; do
        BUFFER=$line CURSOR=$#line
        zle list-choices
        print -r -- '{END}' >>offered
    done <lines
    exit
}}
zle -N zle-line-init
"""


def offered(shell: str, lines: Sequence[str], place: Path, *, script: Path | None = None,
            share: Path | None = None) -> list[set[str]]:  # fmt: skip
    """What `shell` offers for each of the lines, in the folder `place`, with a script or with what is in `share`."""
    need(shell)
    said = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]("\n".join([*lines, ""]), place, script, share)
    blocks = said.split(f"{END}\n")
    assert len(blocks) == len(lines) + 1, said
    # A folder may have its stroke behind it, and zsh offers a space with its escape.
    return [{one.rstrip("/").replace("\\", "") for one in block.splitlines()} - {""} for block in blocks[:-1]]


def _run(words: Sequence[str], lines: str, place: Path, **environ: str) -> str:
    path = f"{BIN}:{os.environ['PATH']}"  # fish looks for the completion of programs that are there
    done = subprocess.run(
        words, input=lines, cwd=place, env=plain_environment() | {"PATH": path} | environ, capture_output=True,
        text=True, timeout=LONG, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def _bash(lines: str, place: Path, script: Path | None, share: Path | None) -> str:
    if not script and not Path(BASH_COMPLETION).exists():
        need("bash-completion")
    code = f"source {script or BASH_COMPLETION}\n{BASH}"
    return _run(["bash", "--norc", "-c", code], lines, place, XDG_DATA_DIRS=str(share or ""))


def _fish(lines: str, place: Path, script: Path | None, share: Path | None) -> str:
    first = f"source {script}" if script else f"set --prepend fish_complete_path {share}/fish/vendor_completions.d"
    return _run(["fish", "--no-config", "-c", f"{first}\n{FISH}"], lines, place, HOME=str(place), TERM="dumb")


def _zsh(lines: str, place: Path, script: Path | None, share: Path | None) -> str:
    (place / "lines").write_text(lines)
    (place / ".zshrc").write_text(
        f"fpath=({share}/zsh/site-functions $fpath)\n" * bool(share)
        + "autoload -Uz compinit; compinit -D -u\n"
        + f'eval "$(cat {script})"\n' * bool(script)
        + ZSH
    )
    ours, terminal = pty.openpty()
    shell = subprocess.Popen(
        ["zsh", "-d", "-i"], cwd=place, env=plain_environment() | {"ZDOTDIR": str(place), "TERM": "dumb"},
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    screen = bytearray()
    reader = threading.Thread(target=read_all, args=(ours, screen))
    reader.start()
    try:
        assert shell.wait(LONG) == 0, bytes(screen)
    finally:
        shell.kill()
        reader.join()
        os.close(ours)
    return (place / "offered").read_text()


def read_all(terminal: int, into: bytearray) -> bytearray:
    """All that is shown on a pseudo-terminal until its other side is closed: one read may give a part of it."""
    with suppress(OSError):  # EIO: it is
        while some := os.read(terminal, 1 << 16):
            into += some
    return into
