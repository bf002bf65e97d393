"""The state of a connection, and the queues it stands in: the ready queue, and one of the classes of deadlines.

All in constant time.
"""

from libc.stdint cimport uint8_t, uint32_t

from chain cimport chain_append, chain_remove
from model cimport DUE_NONE, LINK_DUE, LINK_READY, QUEUED, conn, loop
from names cimport S_WAITING, tt_state


cdef inline void set_state(loop* l, conn* c, tt_state state) noexcept nogil:
    l.count.states[c.state] -= 1
    l.count.states[<int>state] += 1
    c.state = state


cdef inline void queue_due(loop* l, conn* c, uint8_t due) noexcept nogil:
    """Moves the connection to the end of a class of deadlines; DUE_NONE takes it out."""
    cdef uint32_t i = <uint32_t>(c - l.conns)
    if c.due != DUE_NONE:
        chain_remove(&l.due[c.due], &l.conns[0].links[LINK_DUE], sizeof(conn), i)
    c.due = due
    if due != DUE_NONE:
        c.due_since = l.now
        chain_append(&l.due[due], &l.conns[0].links[LINK_DUE], sizeof(conn), i)


cdef inline void queue_ready(loop* l, conn* c) noexcept nogil:
    if not c.flags & QUEUED and c.state != S_WAITING:  # who waits for his handshake is not served before it
        c.flags |= QUEUED
        l.ready_count += 1
        chain_append(&l.ready, &l.conns[0].links[LINK_READY], sizeof(conn), <uint32_t>(c - l.conns))


cdef inline conn* next_ready(loop* l) noexcept nogil:
    cdef conn* c = &l.conns[l.ready.head]
    unqueue_ready(l, c)
    return c


cdef inline void unqueue_ready(loop* l, conn* c) noexcept nogil:
    if c.flags & QUEUED:
        c.flags &= ~QUEUED
        l.ready_count -= 1
        chain_remove(&l.ready, &l.conns[0].links[LINK_READY], sizeof(conn), <uint32_t>(c - l.conns))
