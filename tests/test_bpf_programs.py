"""tt/bpf_programs.py is what bpf/ compiles to, and the generator refuses what it cannot hand over."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
from process import need

from tt import bpf_programs


def load_generator() -> ModuleType:
    """bpf/generate.py."""
    path = Path(__file__).resolve().parent.parent / "bpf" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """It, where there is a compiler for it."""
    module = load_generator()
    need(module.CLANG)
    monkeypatch.delenv("LD_PRELOAD", raising=False)  # the sanitizer's library is not for the compiler
    return module


def test_what_is_loaded_is_what_the_c_compiles_to(generate: ModuleType) -> None:
    if generate.version() != bpf_programs.CLANG:
        reason = f"{generate.version()} is here, and tt/bpf_programs.py was made with {bpf_programs.CLANG}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{reason}: run make bpf with one of them")
    committed = Path(bpf_programs.__file__).read_text("ascii")
    assert generate.generate() == committed, "tt/bpf_programs.py is not what bpf/ compiles to: run make bpf"


CALL = """
__attribute__((noinline)) static int f(int n) { return n * monotonic_ns(); }
SEC("socket") int p(struct __sk_buff *skb) { return f(skb->len) + ipv4_key_size; }
"""
DATA = 'int data = 1; SEC("socket") int p(void) { return data + ipv4_key_size; }'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(CALL, "which is no map and no constant", id="call"),
        pytest.param(DATA, "needs data, which is no map and no constant", id="data"),
    ],
)
def test_c_that_needs_more_than_maps_and_constants_is_refused(
    generate: ModuleType, tmp_path: Path, text: str, reason: str
) -> None:
    source = tmp_path / "p.bpf.c"
    source.write_text(f'#include "{generate.HERE}/tt_ban.h"\n{text}\n')
    compiled = generate.compile_object(source)
    with pytest.raises(SystemExit, match=f"^make bpf: .*{reason}"):
        generate.read_program(compiled, "socket")


def test_c_that_does_not_compile_is_one_line_behind_the_compilers(
    generate: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "p.bpf.c"
    source.write_text("int p(void) { return x; }\n")
    with pytest.raises(SystemExit, match=r"^make bpf: clang does not compile p\.bpf\.c: see above"):
        generate.compile_object(source)
    assert "undeclared identifier" in capfd.readouterr().err


def test_without_a_compiler_what_to_install_is_named(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "CLANG", "no-such-clang")
    with pytest.raises(SystemExit, match=r"^make bpf: there is no no-such-clang: install clang and libbpf-dev"):
        generate.generate()


def test_the_object_files_stay_for_who_loads_one_with_another_loader(generate: ModuleType, tmp_path: Path) -> None:
    generate.generate(tmp_path)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["tt_listener.bpf.o", "tt_xdp.bpf.o"]
    assert generate.read_program((tmp_path / "tt_xdp.bpf.o").read_bytes(), "xdp.frags") == tuple(bpf_programs.XDP)
