"""Customers, Media types and Repositories: added, listed, changed; never deleted, since history names them.

Rules: one short function an operation; it gets its records from a Reader or a Writer, which ask the right.  Lists are
generators, which give None where others may be served.
Must not know Volumes, nor how requests arrive.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

from msgspec import UNSET, Struct
from msgspec.structs import replace

from tt.catalog.messages import (
    AddCustomer,
    AddMedia,
    AddRepository,
    Arguments,
    ChangeCustomer,
    ChangeMedia,
    ChangeRepository,
    CustomerRecord,
    Customers,
    MediaRecord,
    MediaTypes,
    Repositories,
    RepositoryRecord,
    Scope,
    Written,
)
from tt.catalog.model import (
    Customer,
    Invalid,
    Media,
    Repository,
    check,
    check_name,
    check_number,
    own_id,
    parent,
)
from tt.catalog.rights import KINDS, TITLES, Account, R, Reader, Writer, missing
from tt.dispatch import OperationError

MAX_CUSTOMERS = 10_000
MAX_MEDIA = 1000  # of a Customer
MAX_REPOSITORIES = 1000  # of a Media type
MAX_VOLUMES = 1_000_000_000  # the highest limit of a Media type
SLICE = 500  # records of a list that are looked at before others are served

T = TypeVar("T")


# ---- add and change -------------------------------------------------------------------------------------------------


def add_customer(at: Writer, asked: AddCustomer) -> Written:
    at.permit("customer", check_name("customer", asked.customer))
    customer = _checked_customer(Customer(asked.customer, asked.description))
    _must_have_room(at, customer, "", MAX_CUSTOMERS)
    return at.put(customer, "add")


def change_customer(at: Writer, asked: ChangeCustomer) -> Written:
    customer = at.record(Customer, asked.customer)
    return at.put(_checked_customer(replace(customer, **given(asked, "customer"))), "change")


def add_media(at: Writer, asked: AddMedia) -> Written:
    at.record(Customer, parent(check_name("media", asked.media)))
    media = _checked_media(Media(asked.media, asked.description, asked.max_volumes))
    _must_have_room(at, media, f"{parent(media.name)}.", MAX_MEDIA)
    return at.put(media, "add")


def change_media(at: Writer, asked: ChangeMedia) -> Written:
    media = at.record(Media, asked.media)
    return at.put(_checked_media(replace(media, **given(asked, "media"))), "change")


def add_repository(at: Writer, asked: AddRepository) -> Written:
    at.record(Media, parent(check_name("repository", asked.repository)))
    repository = Repository(
        asked.repository, asked.description, asked.kind, asked.offsite, asked.next, asked.allow_deletes
    )
    repository = _checked_repository(at, repository)
    _must_have_room(at, repository, f"{parent(repository.name)}.", MAX_REPOSITORIES)
    return at.put(repository, "add")


def change_repository(at: Writer, asked: ChangeRepository) -> Written:
    repository = at.record(Repository, asked.repository)
    return at.put(_checked_repository(at, replace(repository, **given(asked, "repository"))), "change")


def given(asked: Struct, *without: str) -> dict[str, object]:
    """The fields that the client gave, by name."""
    fields = ((field, getattr(asked, field)) for field in asked.__struct_fields__ if field not in without)
    return {field: value for field, value in fields if value is not UNSET}


def _checked_customer(customer: Customer) -> Customer:
    check("customer description", customer.description, "description")
    return customer


def _checked_media(media: Media) -> Media:
    check("media description", media.description, "description")
    check_number("max_volumes", media.max_volumes, 0, MAX_VOLUMES)
    return media


def _checked_repository(at: Writer, repository: Repository) -> Repository:
    check("repository description", repository.description, "description")
    check("kind", repository.kind)
    if repository.next:
        check("repository", repository.next, "next")
        if repository.next == own_id(repository.name):
            raise Invalid(f"next: must be another Repository than {repository.name} itself")
        place(at, parent(repository.name), repository.next)
    return repository


def place(at: Writer, media: str, own: str) -> Repository:
    """The Repository with this id in a Media type.  Raises OperationError "not_found"."""
    name = f"{media}.{own}"
    repository = at.get(Repository, name)
    if repository is None:
        raise missing("repository", name)
    return repository


def _must_have_room(at: Writer, record: Customer | Media | Repository, prefix: str, most: int) -> None:
    """Room for a new record.  Counts what is committed: the limit bounds memory, and a batch may go a little beyond."""
    kind = type(record)
    at.must_be_new(kind, record.name)
    if len(at.store.all(kind, prefix)) >= most:
        whole = prefix[:-1] or "this server"
        raise OperationError("full", f"{whole} has {most} of {TITLES[KINDS[kind]]} already, which is the most")


# ---- lists ----------------------------------------------------------------------------------------------------------


def list_customers(at: Reader, _: Arguments) -> Generator[None, None, Customers]:
    found = yield from listed(at, Customer, "", lambda each: CustomerRecord(each.name, each.description))
    return Customers(found)


def list_media(at: Reader, asked: Scope) -> Generator[None, None, MediaTypes]:
    found = yield from listed(
        at, Media, asked.scope, lambda each: MediaRecord(each.name, each.description, each.max_volumes)
    )
    return MediaTypes(found)


def list_repositories(at: Reader, asked: Scope) -> Generator[None, None, Repositories]:
    found = yield from listed(at, Repository, asked.scope, _shown_repository)
    return Repositories(found)


def _shown_repository(one: Repository) -> RepositoryRecord:
    return RepositoryRecord(one.name, one.description, one.kind, one.offsite, one.next, one.allow_deletes)


def scope_of(at: Reader, scope: str) -> Customer | Media:
    """The Customer or the Media type that a scope names, which the user may read."""
    return at.record(Media, scope) if "." in scope else at.record(Customer, scope)


def _prefix(at: Reader, kind: type, scope: str) -> str:
    """What begins the names of this kind within a scope, which is there, and which the user may read."""
    if not scope:
        return ""
    return f"{(at.record(Customer, scope) if kind is Media else scope_of(at, scope)).name}."


def listed(at: Reader, kind: type[R], scope: str, shown: Callable[[R], T]) -> Generator[None, None, list[T]]:
    """What the user may read of it, shown; an administrator also reads the names of Customers."""
    while True:
        found = yield from _readable(at, kind, _prefix(at, kind, scope), shown)
        if found is not None:
            return found


def _readable(at: Reader, kind: type[R], prefix: str, shown: Callable[[R], T]) -> Generator[None, None, list[T] | None]:
    """None where the user's rights have changed under way: what was found may not be his to see."""
    rights = rights_of(at.account)
    found: list[T] = []
    for number, record in enumerate(at.store.all(kind, prefix)):
        if number % SLICE == SLICE - 1:
            yield
            if rights_of(at.rights.current(at.account)) != rights:
                return None
        if f"{record.name}.".startswith(at.account.prefixes) or (kind is Customer and at.account.administrator):
            found.append(shown(record))
    return found


def rights_of(account: Account) -> tuple[dict[str, int], bool]:
    """What a list goes by.  That another user's rights change is no reason to begin it anew."""
    return account.patterns, account.administrator
