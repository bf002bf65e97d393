"""`make profile`: stacks made readable, the picture of them, and perf on a process that works."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import until
from process import need, plain_environment

from bench import flame, profile
from bench.kit import NotMeasuredError

ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"
MOST = 150_000  # bytes of a picture that is kept in docs/

# As perf 6.1 prints it: a command, its stack with the innermost function first, an empty line.
SCRIPT = """TapeTrackServer 
\tffffffff82123456 tcp_ack ([kernel.kallsyms])
\tffffffff81123456 do_syscall_64 ([kernel.kallsyms])
\t    7f0000000010 __send (/usr/lib/x86_64-linux-gnu/libc.so.6)
\t    7f0000000020 __pyx_f_2tt_5_core_put (/srv/tt/_core.cpython-311-x86_64-linux-gnu.so)
\t    7f0000000030 __pyx_pf_2tt_5_core_6Server_16run (/srv/tt/_core.cpython-311-x86_64-linux-gnu.so)
\t    7f0000000040 _PyEval_EvalFrameDefault (/usr/lib/libpython3.11.so.1.0)
\t    7f0000000050 _start (/usr/bin/python3.11)

TapeTrackServer 
\t    7f0000000060 <a::B as c::D>::e (f; g) (/srv/cryptography/_rust.abi3.so)
\t    7f0000000070 py::Session.receive:/srv/tt/dispatch.py (/tmp/perf-1.map)
\t    7f0000000030 __pyx_pf_2tt_5_core_6Server_16run (/srv/tt/_core.cpython-311-x86_64-linux-gnu.so)
\t    7f0000000050 _start (/usr/bin/python3.11)

TapeTrackServer 
\t    7f0000000080 [unknown] (/srv/zstd.so)
\t    7f0000000090 PyObject_Call (/usr/bin/python3.11)

"""  # noqa: W291 - perf pads the command


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("__pyx_f_2tt_5_core_judge", "judge"),
        ("__pyx_f_2tt_5_core_judge.constprop.0", "judge"),
        ("__pyx_f_2tt_5_core_read_turn.part.0.isra.0", "read_turn"),
        ("__pyx_pf_2tt_5_core_6Server_16run", "Server.run"),
        ("__pyx_pw_2tt_5_core_6Server_17run", "Server.run"),
        ("__pyx_pw_2tt_5_core_6Server_4time_out", "Server.time_out"),  # whose number is the length of "time"
        ("__pyx_f_2tt_5_core_12TimeoutTable_record", "TimeoutTable.record"),
        ("__pyx_pw_2tt_5_core_1judge_frame", "judge_frame"),
        ("__pyx_f_13timeout_table_table_find", "table_find"),
        ("__pyx_tp_dealloc_2tt_5_core_Server", "__pyx_tp_dealloc_2tt_5_core_Server"),
        ("tcp_ack", "tcp_ack"),
    ],
)
def test_a_function_of_the_extension_has_the_name_that_it_has_in_the_source(symbol: str, name: str) -> None:
    assert profile.plain(symbol) == name


def test_stacks_begin_at_the_loop_or_at_their_command_and_each_frame_says_whose_it_is() -> None:
    assert profile.read_script(SCRIPT + SCRIPT) == {
        ("Server.run_[t]", "put_[t]", "__send", "do_syscall_64_[k]", "tcp_ack_[k]"): 2,
        ("Server.run_[t]", "Session.receive (dispatch.py)_[j]", "<a::B as c::D>::e (f: g)"): 2,
        ("TapeTrackServer", "PyObject_Call_[i]", "[zstd.so]"): 2,
    }


@pytest.mark.parametrize(
    ("version", "trampoline", "frame_pointers", "environment"),
    [
        ((3, 11), False, True, {}),
        ((3, 12), True, False, {}),
        ((3, 12), True, True, {"PYTHONPERFSUPPORT": "1"}),
        ((3, 13), True, False, {"PYTHON_PERF_JIT_SUPPORT": "1"}),
        ((3, 13), False, False, {}),
    ],
)
def test_pythons_functions_are_named_where_the_interpreter_can_and_else_the_title_says_that_they_are_not(
    version: tuple[int, int], trampoline: bool, frame_pointers: bool, environment: dict[str, str]
) -> None:
    named = profile.naming(version, trampoline, frame_pointers)
    assert named.environment == environment
    assert ("no names" in named.note) == (not environment)


# ---- the picture ----------------------------------------------------------------------------------------------------


STACKS = {("a", "b<c>_[k]"): 3, ("a", "d_[t]"): 1, ("e",): 4}


def boxes(text: str) -> dict[str, ET.Element]:
    """By what each says to the pointer: the name before the bracket."""
    groups = ET.fromstring(text).find(f"{SVG}g[@id='boxes']")
    assert groups is not None
    return {str(group.findtext(f"{SVG}title")).rpartition(" (")[0]: group for group in groups}


def rectangle(box: ET.Element, *names: str) -> list[float]:
    found = box.find(f"{SVG}rect")
    assert found is not None
    return [float(str(found.get(name))) for name in names]


def test_folded_stacks_are_read_as_they_were_written() -> None:
    assert flame.unfold(flame.fold(STACKS)) == STACKS
    assert flame.fold({("b",): 1, ("a", "b c"): 2}) == "a;b c 2\nb 1\n"


@pytest.mark.parametrize("line", ["a;b", "a;b x", " 3", "a -1"])
def test_a_line_that_is_no_folded_stack_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 2 is"):
        flame.unfold(f"a 1\n{line}\n")


def test_widths_are_counts_and_a_box_stands_on_its_caller() -> None:
    drawn = boxes(flame.svg(STACKS, "title", "subtitle"))
    assert list(drawn) == ["all", "a", "b<c>", "d", "e"]
    (whole,) = rectangle(drawn["all"], "width")
    for name, count, caller in (("a", 4, "all"), ("e", 4, "all"), ("b<c>", 3, "a"), ("d", 1, "a")):
        x, y, width = rectangle(drawn[name], "x", "y", "width")
        at, below, room = rectangle(drawn[caller], "x", "y", "width")
        assert width == pytest.approx(whole * count / 8, abs=0.1)
        assert y == below - flame.ROW
        assert at <= x
        assert x + width <= at + room + 0.1
    assert drawn["b<c>"].get("class") == "k"
    assert drawn["b<c>"].findtext(f"{SVG}title") == "b<c> (3 of 8, 37.5%)"


def test_the_picture_needs_nothing_else_and_takes_names_as_text() -> None:
    text = flame.svg({("</script><script>alert(1)",): 1, ("]]>&",): 1}, "<title>", "&")
    assert "]]>&" in boxes(text)
    assert "<script>alert" not in text
    assert text.count("://") == text.count("http://www.w3.org/2000/svg"), "no address but the namespace"


def test_what_is_too_narrow_to_see_is_not_drawn_and_what_is_nothing_is_refused() -> None:
    assert list(boxes(flame.svg({("wide",): 100_000, ("narrow",): 1}, "", ""))) == ["all", "wide"]
    with pytest.raises(ValueError, match="nothing to draw"):
        flame.svg({}, "", "")


def test_a_name_is_cut_to_its_box_and_left_out_where_three_letters_would_be_left() -> None:
    assert flame.fitting("abcdefgh", 8 * flame.LETTER + 7) == "abcdefgh"
    assert flame.fitting("abcdefgh", 7 * flame.LETTER + 7) == "abcde.."
    assert flame.fitting("abcdefgh", 4 * flame.LETTER + 7) == ""


def test_own_counts_are_those_of_the_innermost_function() -> None:
    assert list(flame.own_counts(STACKS | {("b", "e"): 1}).items()) == [("e", 5), ("b<c>_[k]", 3), ("d_[t]", 1)]


def test_the_pictures_in_the_documents_are_small_whole_and_have_the_loop_in_them() -> None:
    pictures = sorted(ROOT.glob("docs/profile*.svg"))
    assert pictures
    for path in pictures:
        assert path.stat().st_size <= MOST
        assert "Server.run" in boxes(path.read_text())
        assert f"({path.name})" in (ROOT / "docs/profiling.md").read_text()


# ---- perf -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"], env=plain_environment()) as process:
        yield process
        process.kill()


def cpu_ticks(pid: int) -> int:
    return sum(int(word) for word in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])


def test_perf_samples_a_process_and_its_functions_have_names(
    busy: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("perf", "taskset")
    monkeypatch.delenv("LD_PRELOAD", raising=False)  # the sanitizer's library is not for perf
    named = profile.naming((3, 11), trampoline=False, frame_pointers=False)
    try:
        with profile.sampling(busy.pid, tmp_path / "data", named):
            begun = cpu_ticks(busy.pid)
            until("0.5 s of CPU time", lambda: cpu_ticks(busy.pid) >= begun + os.sysconf("SC_CLK_TCK") // 2, 60)
    except NotMeasuredError as error:
        pytest.skip(str(error))
    stacks = profile.stacks_of(tmp_path / "data", named)
    assert sum(stacks.values()) >= profile.FREQUENCY // 10
    names = {name for stack in stacks for name in stack}
    assert any(name.startswith("_PyEval_EvalFrame") for name in names), names


def test_what_perf_says_when_it_cannot_sample_is_passed_on(tmp_path: Path) -> None:
    need("perf", "taskset")
    named = profile.naming((3, 11), trampoline=False, frame_pointers=False)
    with subprocess.Popen(["true"]) as gone:
        pass
    with (
        pytest.raises(NotMeasuredError, match=r"perf cannot sample here: \w"),
        profile.sampling(gone.pid, tmp_path / "data", named),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], "LOAD=nosuch: no such load; there are pings, gets, flood, handshakes"),
        (["pings", "--seconds", "0"], "--seconds 0: it must be 1..600"),
    ],
)
def test_a_wrong_argument_is_named_with_what_there_is(arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.profile", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
