"""Compile the kernel programs, and write them as tt/bpf_programs.py, so that running needs no compiler: `make bpf`.

CLANG in the environment names another compiler; the file says which one made it.

A program is taken from its object file (ELF, R_BPF_64_64 relocations: the kernel's Documentation/bpf/llvm_reloc.rst) as
its instructions, which of them load a map's descriptor or the address of a constant, and where each constant lies in
.rodata; what a constant is set to there is for other loaders.  Whatever else an object could hold (calls between
functions, data) is refused, not guessed.
It must not know tt: it needs Python alone, clang, and the headers of libbpf and Linux.
"""

import os
import platform
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "tt" / "bpf_programs.py"
OBJECTS = HERE.parent / "build"  # where the object files stay, for who loads one with another loader
PROGRAMS = {  # name in Python: source, section
    "LISTENER": ("tt_listener.bpf.c", "socket"),
    "XDP": ("tt_xdp.bpf.c", "xdp.frags"),
}
CLANG = os.environ.get("CLANG", "clang")
# -mcpu=v2: what every kernel we run on verifies.  The last: clang for this target lacks Debian's folder of asm/types.h.
FLAGS = ("-target", "bpfel", "-mcpu=v2", "-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror")
HEADERS = f"-I/usr/include/{platform.machine()}-linux-gnu"
R_BPF_64_64 = 1
STT_OBJECT = 1

HEAD = '''"""The kernel programs, compiled.  Made from bpf/*.bpf.c by `make bpf`: change those, not this file."""

from typing import NamedTuple


class Program(NamedTuple):
    """A compiled program, and what is to be filled in before the kernel takes it.

    An instruction that loads a map or a constant is the first of a pair (BPF_LD | BPF_IMM | BPF_DW), counted from 0.
    """

    instructions: bytes  # 8 bytes each, little-endian
    maps: dict[int, str]  # instruction to the name of the map whose descriptor it loads
    constants: dict[int, int]  # instruction to the offset in .rodata, bytes, whose address it loads
    layout: dict[str, tuple[int, int]]  # constant to its offset and size in .rodata, bytes


'''


class Section(NamedTuple):
    """A section of an object file."""

    name: str
    data: bytes
    info: int  # of a section of relocations: the section they are for


class Symbol(NamedTuple):
    """A symbol of an object file: `section` counts from 0, `value` is the offset in it, `size` in bytes."""

    name: str
    kind: int
    section: int
    value: int
    size: int


Tables = tuple[bytes, dict[int, str], dict[int, int], dict[str, tuple[int, int]]]  # the fields of Program, see HEAD


def compile_object(source: Path) -> bytes:
    """The object file of a source.  Exits with the compiler's message where it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "program.o")
        try:
            subprocess.run([CLANG, *FLAGS, HEADERS, "-c", source, "-o", made], check=True, cwd=HERE)  # noqa: S603
        except FileNotFoundError:
            sys.exit(f"make bpf: there is no {CLANG}: install clang and libbpf-dev, or name one with CLANG")
        except subprocess.CalledProcessError:
            sys.exit(f"make bpf: {CLANG} does not compile {source.name}: see above; it needs libbpf-dev, too")
        return made.read_bytes()


def version() -> str:
    """What the compiler calls itself: another one makes other instructions of the same source."""
    said = subprocess.run([CLANG, "--version"], check=True, capture_output=True, text=True)  # noqa: S603
    return said.stdout.splitlines()[0]


def text_at(table: bytes, offset: int) -> str:
    """The name at an offset of a string table."""
    return table[offset : table.index(0, offset)].decode("ascii")


def read_sections(data: bytes) -> list[Section]:
    """The sections of a little-endian ELF64 file."""
    (start,) = struct.unpack_from("<Q", data, 40)
    size, count, names_at = struct.unpack_from("<HHH", data, 58)
    heads = [struct.unpack_from("<IIQQQQIIQQ", data, start + i * size) for i in range(count)]
    parts = [data[head[4] : head[4] + head[5]] for head in heads]
    return [Section(text_at(parts[names_at], h[0]), part, h[7]) for h, part in zip(heads, parts, strict=True)]


def read_program(data: bytes, section: str) -> Tables:
    """The one program in a section of an object file.  Exits where it needs more than maps and constants."""
    sections = read_sections(data)
    number = {part.name: i for i, part in enumerate(sections)}
    names, instructions = sections[number[".strtab"]].data, sections[number[section]].data
    symbols = [
        Symbol(text_at(names, name), info & 15, at, value, size)
        for name, info, at, value, size in struct.iter_unpack("<IBxHQQ", sections[number[".symtab"]].data)
    ]
    rodata = number[".rodata"]
    maps: dict[int, str] = {}
    constants: dict[int, int] = {}
    for offset, info in struct.iter_unpack("<QQ", sections[number[f".rel{section}"]].data):
        symbol, at = symbols[info >> 32], offset // 8
        if info & 0xFFFFFFFF != R_BPF_64_64 or symbol.section not in (rodata, number[".maps"]):
            sys.exit(f"make bpf: instruction {at} of {section} needs {symbol.name}, which is no map and no constant")
        if symbol.section == rodata:
            (addend,) = struct.unpack_from("<i", instructions, offset + 4)
            constants[at] = symbol.value + addend
        else:
            maps[at] = symbol.name
    layout = {s.name: (s.value, s.size) for s in symbols if s.section == rodata and s.kind == STT_OBJECT}
    return instructions, maps, constants, layout


def write_table(name: str, entries: dict[int, str] | dict[int, int] | dict[str, tuple[int, int]]) -> str:
    """A dict as the formatter wants it: one entry a line."""
    lines = "".join(f"        {key!r}: {value!r},\n".replace("'", '"') for key, value in sorted(entries.items()))
    return f"    {name}={{\n{lines}    }},\n"


def write_program(name: str, program: Tables) -> str:
    """A program as Python."""
    instructions, maps, constants, layout = program
    digits = instructions.hex()
    lines = "".join(f'        "{digits[i : i + 96]}"\n' for i in range(0, len(digits), 96))
    tables = write_table("maps", maps) + write_table("constants", constants) + write_table("layout", layout)
    return f"{name} = Program(\n    instructions=bytes.fromhex(\n{lines}    ),\n{tables})\n"


def generate(objects: Path | None = None) -> str:
    """The text of tt/bpf_programs.py; the object files stay in the folder `objects`."""
    programs = []
    for name, (source, section) in PROGRAMS.items():
        compiled = compile_object(HERE / source)
        if objects:
            objects.joinpath(source).with_suffix(".o").write_bytes(compiled)
        programs.append(write_program(name, read_program(compiled, section)))
    return HEAD + f'CLANG = "{version()}"\n\n' + "\n".join(programs)


if __name__ == "__main__":
    OBJECTS.mkdir(exist_ok=True)
    OUTPUT.write_text(generate(OBJECTS), "ascii")
