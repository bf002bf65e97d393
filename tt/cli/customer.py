"""`tt customer`: Customers, added, changed and listed."""

import argparse

from tt.catalog.messages import AddCustomer, Arguments, ChangeCustomer, CustomerRecord
from tt.cli import actions, output, table


def register(commands: actions.Actions) -> None:
    """Add `tt customer add`, `change` and `list`."""
    group = actions.add_group(commands, "customer", "Add, change or list Customers.")
    for name, text in (("add", "Add a Customer."), ("change", "Describe a Customer.")):
        parser = group.add(name, text, _write)
        parser.add_argument("customer", metavar="CUSTOMER", type=actions.fitting("customer"), help="Its id, as US01.")
        parser.add_argument("--description", metavar="TEXT", required=name == "change", help="At most 40 characters.")
        parser.set_defaults(operation=f"customer.{name}", arguments=AddCustomer if name == "add" else ChangeCustomer)
    group.add("list", "List the Customers that you may see.", _list)


def _write(args: argparse.Namespace) -> int:
    arguments = args.arguments(args.customer, **actions.given(args, "description"))
    return actions.change(args, args.customer, args.operation, arguments)


def _list(args: argparse.Namespace) -> int:
    entries: list[CustomerRecord] = actions.ask(args, "customer.list", Arguments()).entries
    table.show(
        args, CustomerRecord, entries, {"CUSTOMER": lambda one: one.name, "DESCRIPTION": lambda one: one.description}
    )
    return output.OK
