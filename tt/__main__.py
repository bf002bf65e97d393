"""`python -m tt` and the console scripts: each hands over to tt.cli."""

import sys

from tt import cli


def main() -> int:
    """`tt`."""
    return cli.main()


def serve() -> int:
    """`TapeTrackServer`: `tt serve`."""
    return cli.main(["serve", *sys.argv[1:]])


def ping() -> int:
    """`TMSS10Ping`: `tt ping`."""
    return cli.main(["ping", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
