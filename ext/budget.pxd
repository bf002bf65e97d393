"""What one source may use before anybody has logged in: connections, HELLOs, refusals.

A source has a slot while it has a connection, and afterwards until another source needs it: of the sources without a
connection the one that left first gives way.  There are more slots than connections, so a slot is always to be had, and
forgetting a source that left early costs no more than its counts.  Time is an argument, in ns of CLOCK_MONOTONIC.
Knows no socket; `guests` and `connections` are kept by the loop.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from chain cimport NONE, chain, chain_append, chain_clear, chain_remove, link
from source cimport NO_SLOT, index_drop, index_find, index_free, index_init, index_put, source_index, source_key

cdef struct budget:
    chain guests            # its connections that are not logged in
    link order              # in budget_table.idle
    uint32_t guest_count
    uint32_t connections    # all of them
    int64_t hello_due       # when the next HELLO would be on time at the steady rate
    int64_t refused_at      # when the last REFUSE was sent; INT64_MIN/2: never
    int64_t versions_since  # when the minute began in which `versions` counts
    uint16_t versions       # HELLOs of an unknown version in that minute

cdef struct budget_table:
    source_index index
    budget* slots
    chain idle              # sources without a connection, in the order in which they left
    uint32_t used           # slots [0, used) have been given out at least once
    uint32_t capacity


cdef inline int budgets_init(budget_table* t, uint32_t capacity, uint64_t k0, uint64_t k1) noexcept nogil:
    """0, or -1 without memory."""
    t.capacity = capacity
    t.used = 0
    chain_clear(&t.idle)
    t.slots = <budget*>calloc(capacity, sizeof(budget))
    if t.slots == NULL or index_init(&t.index, capacity, k0, k1) < 0:
        return -1
    return 0


cdef inline void budgets_free(budget_table* t) noexcept nogil:
    index_free(&t.index)
    free(t.slots)
    t.slots = NULL


cdef inline uint32_t budget_claim(budget_table* t, source_key key) noexcept nogil:
    """The slot of the source, counting one connection more; NONE when every slot has connections."""
    cdef uint32_t slot = index_find(&t.index, key)
    cdef budget* b
    if slot != NO_SLOT:
        b = &t.slots[slot]
        if b.connections == 0:
            chain_remove(&t.idle, &t.slots[0].order, sizeof(budget), slot)
        b.connections += 1
        return slot
    if t.used < t.capacity:
        slot = t.used
        t.used += 1
    elif t.idle.head != NONE:
        slot = t.idle.head
        chain_remove(&t.idle, &t.slots[0].order, sizeof(budget), slot)
        index_drop(&t.index, slot)
    else:
        return NONE
    index_put(&t.index, key, slot)
    b = &t.slots[slot]
    chain_clear(&b.guests)
    b.guest_count = 0
    b.connections = 1
    b.hello_due = 0
    b.refused_at = -(<int64_t>1 << 62)
    b.versions = 0
    return slot


cdef inline void budget_release(budget_table* t, uint32_t slot) noexcept nogil:
    """One connection of the source has ended."""
    cdef budget* b = &t.slots[slot]
    b.connections -= 1
    if b.connections == 0:
        chain_append(&t.idle, &t.slots[0].order, sizeof(budget), slot)


cdef inline bint budget_hello(budget* b, int64_t now, int64_t interval, int64_t burst) noexcept nogil:
    """May the source have a handshake now?  `interval` ns apart, `burst` of them at once.

    The generic cell rate algorithm (ITU-T I.371): one time instead of a level and a time.
    """
    cdef int64_t due = b.hello_due if b.hello_due > now else now
    if due + interval - now > interval * burst:
        return False
    b.hello_due = due + interval
    return True


cdef inline uint16_t budget_version(budget* b, int64_t now, int64_t window) noexcept nogil:
    """Counts a HELLO of an unknown version; which one of the running window it is, from 1."""
    if b.versions == 0 or now - b.versions_since >= window:
        b.versions_since = now
        b.versions = 0
    if b.versions < 0xFFFF:
        b.versions += 1
    return b.versions
