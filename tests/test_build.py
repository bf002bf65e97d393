"""The build and the tree: what is shipped runs outside the checkout, hot code is free of Python, files stay small."""

import ast
import html
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from process import need as need_programs
from shells import offered

from tt import __version__

ROOT = Path(__file__).parents[1]
COMMANDS = ("tt", "TapeTrackServer", "TMSS10Ping")

# The functions of ext/_core.pyx that run for strangers' packets: not one of their lines may touch the Python C-API.
HOT = frozenset(
    {
        "accept_turn", "admit", "ask_handshake", "cannot_send", "condemn", "drain", "end", "expire_turn",
        "finish", "flush", "gate", "handshake_turn", "hello_arrived", "hold", "is_sending",
        "join_guests", "judge", "last_look", "leave_guests", "leave_hellos", "make_room", "may_read",
        "milliseconds_to_wait", "most_of_turn", "new_record", "overdue", "put", "read_turn", "refuse",
        "reject", "release_held", "release_output", "reset_guests", "say_end", "serve", "source_of",
        "sweep_turn", "table_of", "take_event", "takes_frames", "time_out", "turn", "turn_away", "unsent",
        "write_turn",
    }
)  # fmt: skip

PYTHON_LINES = 600
CORE_LINES = 1050  # of ext/_core.pyx: one file, so that the life of a connection reads in one piece
FUNCTION_LINES = 60


def run(*command: object, cwd: Path, **environ: str) -> str:
    """Standard output and error of a command that must succeed, run as from a plain shell."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    kept |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "http", "HTTP", "SSL_"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=kept | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# ---- what is shipped ----------------------------------------------------------------------------------------------


class Built(NamedTuple):
    source: Path  # the copy of the checkout that was built
    sdist: Path
    wheel: Path
    log: str  # of the compilation


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the checkout holds, without anything built."""
    copy = tmp_path_factory.mktemp("source") / "tt"
    made = shutil.ignore_patterns(".*", "build", "dist", "var", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=made)
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The source distribution, and the wheel made from it and nothing else, as a release build."""
    out = tmp_path_factory.mktemp("dist")
    log = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out, TT_BUILD="release")
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(source, sdist, wheel, log)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment outside the checkout that has the wheel; the dependencies are borrowed from this one."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", built.wheel,
        cwd=home)  # fmt: skip
    (site,) = home.glob("lib/python3*/site-packages")
    borrowed = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    return home


def commands_work(folder: Path) -> None:
    for command in COMMANDS:
        assert run(folder / command, "--help", cwd=folder).startswith("usage: tt")
    for command in ("tt", "TapeTrackServer"):
        assert run(folder / command, "--version", cwd=folder) == f"tt {__version__}\n"


def test_the_source_distribution_carries_every_source_of_the_extension(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("ext/*.[ph]*")} <= shipped


def test_an_installed_wheel_has_its_commands_and_runs_its_own_code(installed: Path) -> None:
    place = run(installed / "bin/python", "-c", "import tt._core; print(tt._core.__file__)", cwd=installed)
    assert Path(place.strip()).is_relative_to(installed)
    commands_work(installed / "bin")


def test_make_install_installs_from_any_checkout_and_make_uninstall_undoes_it(source: Path, tmp_path: Path) -> None:
    probe = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), "setuptools"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no package index can be reached, and make install takes the dependencies from one")
    python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    before = sorted(source.rglob("*"))
    prefix = tmp_path / "prefix"
    run("make", "install", f"PREFIX={prefix}", f"PYTHON={python}", cwd=source)
    assert sorted(source.rglob("*")) == before, "nothing is left in the checkout"
    commands_work(prefix / "bin")
    shells_and_man_find(prefix)
    (prefix / "bin/other").symlink_to("tt")
    run("make", "uninstall", f"PREFIX={prefix}", cwd=source)
    assert [path for path in prefix.rglob("*") if path.is_symlink() or not path.is_dir()] == [prefix / "bin/other"]
    assert not (prefix / "lib/tapetrack").exists()


def shells_and_man_find(prefix: Path) -> None:
    need_programs("man")
    man = "man", "-M", str(prefix / "share/man"), "-w"
    for page in ("man1/tt.1", "man1/tt-bans.1", "man8/TapeTrackServer.8", "man1/TMSS10Ping.1"):
        assert Path(run(*man, Path(page).stem, cwd=prefix).strip()).samefile(prefix / "share/man" / page)
    for shell in ("bash", "zsh", "fish"):
        place = prefix.parent / shell
        place.mkdir()
        assert offered(shell, ["tt user acc", "TMSS10Ping --ti"], place, share=prefix / "share") == [
            {"access"},
            {"--timeout"},
        ]


# ---- tools/need.sh: what the machine misses -----------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Path]:
    """A PATH with next to nothing: a Python, an apt-get that only notes its arguments, and no client program."""
    for name in ("sh", "sort", "tr", "mktemp", "rm", "cat", "chmod", "mkdir"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    for folder in ("tools", "usr/sbin"):
        (tmp_path / folder).mkdir(parents=True)
    for script in (ROOT / "tools").glob("*.sh"):  # theirs is this host but for what they would write to it
        copy = tmp_path / "tools" / script.name
        copy.write_text(re.sub(r"=(/usr/sbin|/etc)/", rf"={tmp_path}\1/", script.read_text()))
        copy.chmod(0o755)
    policy = tmp_path / "usr/sbin/policy-rc.d"
    (tmp_path / "apt-get").write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n{policy}; echo $? >>{tmp_path}/policy\n'
    )
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for name in ("apt-get", "python"):
        (tmp_path / name).chmod(0o755)
    return tmp_path


def need(path: Path, stage: str, user: int) -> subprocess.CompletedProcess[str]:
    (path / "id").write_text(f"#!/bin/sh\necho {user}\n")
    (path / "id").chmod(0o755)
    return subprocess.run(
        [path / "tools/need.sh", stage, "python"], env={"PATH": str(path)}, capture_output=True, text=True, check=False
    )


def test_without_root_what_is_missing_is_named_in_one_line_and_nothing_is_installed(bare: Path) -> None:
    done = need(bare, "test", user=1000)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "sudo apt-get install --yes --no-install-recommends " in done.stderr
    assert all(name in done.stderr for name in ("curl", "iproute2", "nmap", "openssh-client", "openssl", "clang"))
    assert not (bare / "asked").exists()


def test_as_root_what_is_missing_is_installed_and_one_line_says_so(bare: Path) -> None:
    done = need(bare, "test", user=0)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("need: installing with apt: ")
    assert all(name in done.stdout for name in ("curl", "iproute2", "nmap", "openssh-client", "openssl", "clang"))
    assert done.stdout.count("\n") == 1
    update, install = (bare / "asked").read_text().splitlines()
    assert update == "update"
    assert install.startswith("install --yes --no-install-recommends ")
    assert "server" not in install
    assert (bare / "policy").read_text().split() == ["101", "101"]  # no service is started meanwhile
    assert list((bare / "usr/sbin").iterdir()) == []
    assert (bare / "etc/crowdsec/online_api_credentials.yaml").read_text()  # and nobody is told


def test_a_python_that_is_too_old_is_named(bare: Path) -> None:
    (bare / "python").write_text(
        '#!/bin/sh\ncase "$2" in *version_info*print* | *print*) echo 3.9 ;; *) exit 1 ;; esac\n'
    )
    done = need(bare, "build", user=0)
    assert done.returncode != 0
    assert done.stderr == "make: python is Python 3.9, tt needs 3.11 or newer: name one with make PYTHON=python3.12\n"


# ---- hot code -----------------------------------------------------------------------------------------------------


def touches_python(page: str, hot: frozenset[str]) -> list[str]:
    """What Cython's annotated page says against the hot functions: lines with a score, and names it does not have."""
    wrong: list[str] = []
    seen: set[str] = set()
    function = ""
    for score, markup in re.findall(r'<pre class="cython line score-(\d+)"[^>]*>(.*?)</pre>', page, re.DOTALL):
        line = html.unescape(re.sub(r"<[^>]+>", "", markup)).strip("\n")
        code = re.sub(r"^[+\xa0\N{MINUS SIGN}\s]*\d+: ?", "", line)
        if code[:1].strip() and not code.startswith((")", "#")):
            begin = re.match(r"cdef\b[^(=]*?\b(\w+)\s*\(", code)
            function = begin[1] if begin else ""
            seen.add(function)
        if function in hot and score != "0":
            wrong.append(f"{function}: {line.strip()}")
    return wrong + [f"{name}: not in the page" for name in sorted(hot - seen)]


def annotated(*lines: tuple[int, str]) -> str:
    return "\n".join(
        f'<pre class="cython line score-{score}">+<span class="">{number:04d}</span>: {html.escape(text)}</pre>'
        for number, (score, text) in enumerate(lines, 1)
    )


def test_the_gate_sees_a_hot_line_that_touches_python() -> None:
    page = annotated(
        (0, "cdef inline bint judge(loop* l,"),
        (0, "                       size_t n) noexcept nogil:"),
        (0, "    return n > 4"),
        (9, "    raise ValueError"),
        (9, "cdef void cold(object o) except *:"),
        (9, "    o.x()"),
    )
    assert touches_python(page, frozenset({"judge"})) == ["judge: +0004:     raise ValueError"]
    assert touches_python(page.replace("score-9", "score-0"), frozenset({"judge"})) == []


def test_the_gate_sees_a_hot_function_that_was_renamed() -> None:
    page = annotated((0, "cdef void gate_all(loop* l) noexcept nogil:"))
    assert touches_python(page, frozenset({"gate"})) == ["gate: not in the page"]
    assert touches_python("", frozenset({"gate"})) == ["gate: not in the page"]


def test_no_line_of_a_hot_function_touches_python(built: Built) -> None:
    page = (built.source / "build/ext/_core.html").read_text("utf-8")
    assert touches_python(page, HOT) == []


def test_the_compiler_has_no_performance_hint(built: Built) -> None:
    assert "ext/_core.c" in built.log, "the log is that of the compilation"
    assert [line for line in built.log.splitlines() if "performance hint" in line.lower()] == []


def test_every_function_of_the_shared_declarations_runs_without_python() -> None:
    # They are inlined into the hot functions, and the annotated page does not show them.
    wrong = []
    for path in sorted(ROOT.glob("ext/*.pxd")):
        for name, signature, _ in cython_functions(path.read_text("utf-8")):
            if not re.search(r"\) noexcept nogil:", signature):
                wrong.append(f"{path.name}: {name}")
    assert wrong == []


# ---- size ---------------------------------------------------------------------------------------------------------


def cython_functions(text: str) -> Iterator[tuple[str, str, int]]:
    """Name, signature and number of lines of each function, found by indentation; what ends in ":" has a body."""
    lines = text.splitlines()
    for start, line in enumerate(lines):
        match = re.match(r"(\s*)(?:def|cdef|cpdef)\b[^(=]*?\b(\w+)\s*\(", line)
        if match is None:
            continue
        head = start
        while (signature := " ".join(lines[start : head + 1])).count("(") > signature.count(")"):
            head += 1
        if not re.search(r":\s*(#.*)?$", lines[head]):
            continue  # a declaration
        end = last = head + 1
        while end < len(lines) and (not lines[end].strip() or lines[end].startswith(match[1] + " ")):
            end += 1
            last = end if lines[end - 1].strip() else last
        yield match[2], signature, last - start


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


PYTHON_FILES = sorted(
    [ROOT / "setup.py", *(path for tree in ("tt", "tests", "bench") for path in (ROOT / tree).rglob("*.py"))]
)
CYTHON_FILES = sorted(path for path in ROOT.glob("ext/*") if path.suffix in (".pyx", ".pxd", ".pxi"))


def test_no_file_is_longer_than_its_budget() -> None:
    budgets = dict.fromkeys([*PYTHON_FILES, *CYTHON_FILES], PYTHON_LINES) | {ROOT / "ext/_core.pyx": CORE_LINES}
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in budgets}
    assert [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > budgets[path]] == []


def test_no_function_is_longer_than_its_budget() -> None:
    lengths = [(path, name, n) for path in PYTHON_FILES for name, n in python_functions(path.read_text("utf-8"))]
    lengths += [(path, name, n) for path in CYTHON_FILES for name, _, n in cython_functions(path.read_text("utf-8"))]
    assert [f"{path.relative_to(ROOT)}: {name}: {n} lines" for path, name, n in lengths if n > FUNCTION_LINES] == []


def test_the_count_of_a_function_is_that_of_its_lines() -> None:
    text = "cdef int f(int a,\n  int b) noexcept nogil:\n    cdef int c = g(a)\n\n    return c\n\n\ncdef int g(int a)\n"
    assert [(name, n) for name, _, n in cython_functions(text)] == [("f", 5)]
    assert list(python_functions("def f():\n\n    x = 1\n    return x\n\n\ny = 1\n")) == [("f", 4)]


# ---- README -------------------------------------------------------------------------------------------------------


def test_the_file_map_names_every_source_file_and_no_other() -> None:
    match = re.search(
        r"^## [^\n]*\b(?i:map|files)\b[^\n]*\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text(), re.M | re.S
    )
    if match is None:
        pytest.skip("README.md has no section of files")
    named = set(re.findall(r"`((?:[\w.]+/)+[\w.]+)`", match[1]))
    sources = [*ROOT.glob("tt/**/*.py"), *ROOT.glob("ext/*.[ph]*"), *ROOT.glob("tools/*")]
    missing = {str(path.relative_to(ROOT)) for path in sources} - named
    assert (sorted(missing), sorted(name for name in named if not (ROOT / name).exists())) == ([], [])
