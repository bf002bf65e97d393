"""What is installed outside the checkout serves and pings; that it installs at all is in test_build.py."""

from pathlib import Path

from harness import HOST
from process import Process
from test_build import built, installed, run, source

__all__ = ["built", "installed", "source"]  # fixtures, found by their names


def test_an_installed_wheel_serves_and_pings(installed: Path, tmp_path: Path) -> None:
    commands = installed / "bin"
    with Process(tmp_path, command=(str(commands / "TapeTrackServer"),)) as server:
        assert f"{installed}/" in next(
            line for line in Path(f"/proc/{server.pid}/maps").read_text().splitlines() if "_core" in line
        )
        answers = run(
            commands / "TMSS10Ping", "-c", "3", "-i", "0", f"{HOST}:{server.port}",
            cwd=tmp_path, XDG_CONFIG_HOME=server.environ["XDG_CONFIG_HOME"],
        )  # fmt: skip
        assert "3 packets transmitted, 3 received, 0% loss" in answers
