"""Print an inventory of 10,000 tapes as CSV, the same at every run: python3 make_inventory.py > inventory.csv

Tapes A00001 to A10000 were written from 2021 on, one after the other.  The newest 36 are in the tape library, every
fourth of the others is in the vault until its day of return, and the rest stand in the rack.
"""

import csv
import sys
from datetime import date, timedelta

TAPES = 10_000
IN_LIBRARY = 36
FIRST_DAY = date(2021, 1, 1)
TAPES_A_DAY = 5
KEPT = 7 * 365  # days in the vault
HOSTS = ("mail", "files", "db", "web", "erp", "build", "scan")


def row(number: int) -> list[str]:
    """The line of one tape: barcode, location, contents, encrypted, day of return."""
    written = FIRST_DAY + timedelta(days=(number - 1) // TAPES_A_DAY)
    in_vault = number % 4 == 0
    # A multiplication modulo a prime stands for what varies from tape to tape, and is the same on every machine.
    chance = number * 48_271 % 2_147_483_647
    host = f"{HOSTS[chance % len(HOSTS)]}{chance // 7 % 12 + 1:02}"
    kind = "full" if in_vault else "incremental"
    contents = f"{written} {kind} backup of {host}, job {chance // 84 % 90_000 + 10_000}"
    if number > TAPES - IN_LIBRARY:
        return [f"A{number:05}", "Library", contents, "no", ""]
    if in_vault:
        return [f"A{number:05}", "Vault", contents, "yes", f"{written + timedelta(days=KEPT):%d/%m/%Y}"]
    return [f"A{number:05}", "Rack", contents, "no", ""]


def main() -> None:
    """Write the CSV to stdout."""
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["Barcode", "Location", "Contents", "Encrypted", "Return on"])
    out.writerows(row(number) for number in range(1, TAPES + 1))


if __name__ == "__main__":
    main()
