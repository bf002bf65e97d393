"""A short run of the fuzzers in fuzz/, and their corpus; `make fuzz` runs them longer."""

import importlib.util
import platform
import random
import subprocess
import sys
from pathlib import Path

import pytest
from process import need, plain_environment

FUZZ = Path(__file__).parents[1] / "fuzz"
sys.path.insert(0, str(FUZZ))

import decoders  # noqa: E402
import run  # noqa: E402

RUNS = {"frame_verdict": 100_000, "proxy_header": 100_000, "table_stream": 2000, "decoders": 3000}
CORPUS = sorted((FUZZ / "corpus/decoders").iterdir())


def has_libfuzzer() -> bool:
    """Whether clang has its run-time libraries, which are a package of their own."""
    words = ["clang", "-print-resource-dir"]
    place = Path(subprocess.check_output(words, text=True, env=plain_environment()).strip())
    return bool(list(place.rglob(f"libclang_rt.fuzzer-{platform.machine()}.a")))


@pytest.mark.parametrize("target", RUNS)
def test_a_short_run_finds_nothing(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if target == "decoders":
        if importlib.util.find_spec("atheris") is None:
            pytest.skip("it needs atheris, which `make fuzz` installs")
    else:
        need("clang")
        if not has_libfuzzer():
            pytest.skip("it needs libFuzzer: libclang-rt-dev")
        monkeypatch.delenv("LD_PRELOAD", raising=False)  # it has a sanitizer of its own
    run.run(target, RUNS[target], tmp_path)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_a_decoder_keeps_its_word_on_an_input_of_the_corpus_and_on_what_is_near_it(path: Path) -> None:
    dice = random.Random(path.name)
    data = path.read_bytes()
    decoders.one_input(data)
    for _ in range(50):
        near = bytearray(data)
        for _ in range(dice.randrange(1, 4)):
            near[dice.randrange(len(near))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        decoders.one_input(bytes(near))
        decoders.one_input(bytes(near[: dice.randrange(len(near))]))


def test_every_decoder_has_an_input_that_it_takes() -> None:
    assert {path.read_bytes()[0] % len(decoders.DECODERS) for path in CORPUS} == set(range(len(decoders.DECODERS)))


def test_the_corpus_is_small() -> None:
    assert set(run.SHORT) == {path.name for path in (FUZZ / "corpus").iterdir()}
    files = list((FUZZ / "corpus").glob("*/*"))
    assert len(files) <= 400
    assert all(path.stat().st_size <= run.LONGEST[path.parent.name] for path in files)
