"""tt._core: the event loop, compiled.  It reads like the life of a connection:

    accept -> gate -> read -> frame -> dispatch -> write -> close -> expire        class Server in server.pxi

Rules.  The thread blocks in epoll_wait and nowhere else.  Epoll is edge-triggered: an edge marks a connection readable or
writable, and the mark stays until the socket said that it has no more, so whoever hits a bound waits on the ready queue
and not for an edge that will not come again.  The GIL is taken to hand whole frames of an accepted source to the
application, and once a turn to tell it of new and ended time-outs; everything else is `noexcept nogil` C.  A connection
owns memory only while it holds a partial frame or unsent output.  Functions that may close the connection return whether
it is still open.  It must not know what a tape is, what a message says, or how anything is encrypted.
"""

import os
from collections import namedtuple
from ipaddress import ip_address
from types import MappingProxyType
from typing import NamedTuple

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcpy, memset

from budget cimport (
    budget, budget_claim, budget_hello, budget_release, budget_version, budgets_free, budgets_init,
)
from chain cimport NONE, chain_append, chain_clear, chain_remove
from frame cimport (
    DATA, DATA_LEAST, DATA_MOST, DATA_MOST_GUEST, FRAME_MORE, FRAME_WHOLE, HEADER, HELLO, HELLO_LEAST, HELLO_MOST,
    PROTOCOL_VERSION, REFUSE, TAG, WELCOME, frame_verdict,
)
from linux cimport (
    AF_INET, AF_INET6, EAGAIN, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL,
    EPOLL_CTL_MOD, EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP, INET6_ADDRSTRLEN, MSG_NOSIGNAL, SFD_CLOEXEC,
    SFD_NONBLOCK, SHUT_WR, SOCK_CLOEXEC, SOCK_NONBLOCK, accept4, close, epoll_create1, epoll_ctl, epoll_event,
    epoll_wait, errno, htonl, inet_ntop, is_readable, monotonic_ns, ntohl, ntohs, read, recv, send, set_linger, shutdown,
    sigaddset, sigemptyset, signalfd, signalfd_siginfo, sigset_t, sockaddr, sockaddr_in, sockaddr_in6, sockaddr_storage,
    socklen_t,
)
from model cimport (
    ACCEPT_PAUSE, DEAF, DUE_CLOSING, DUE_FRAME_GUEST, DUE_FRAME_USER, DUE_HELLO, DUE_IDLE_GUEST, DUE_IDLE_USER, DUE_NONE,
    DUE_RETRY, DUES, EVENTS_PER_TURN, EXPIRIES_PER_TURN, FIRST_BYTES, GUEST, HEADER_DUE, HUNG_UP, LINK_GUEST, LINK_READY,
    LISTENER, ON_TIME, OPEN_VERDICT, PARKED, PROXIED, READABLE, RECORDS, REFUSE_INTERVAL, SIGNALS, SOURCES_LEAST,
    STOP_DEADLINE, TICK, TURN_SHARE, VERSION_WINDOW, WATCHED, WRITABLE, conn, limits, listener, loop, network, record, span,
)
from names cimport (
    R_ADOPTED, R_BAD_HELLO, R_BAD_PROXY, R_BAD_VERSION, R_IDLE, R_INTERNAL, R_NOT_PROTOCOL, R_OPERATOR, R_PEER_CLOSED,
    R_SHUTDOWN, R_SILENT, R_SLOW_READER, R_STALLED, R_TIMED_OUT, R_TOO_MANY, REASONS_COUNT, S_CLOSING, S_FREE,
    S_LOGGED_IN, S_NEW, S_OPEN, S_WAITING, STATES_COUNT, tt_reason, tt_reasons, tt_state, tt_states,
)
from proxy cimport PROXY_MOST, proxied, proxy_verdict
from queues cimport next_ready, queue_due, queue_ready, set_state, unqueue_ready
from source cimport (
    NO_SLOT, index_drop, index_find, index_free, index_init, index_put, read_big_endian, source_from_v4, source_from_v6,
    source_hash, source_index, source_is_link_local, source_is_v4, source_key, source_mask,
)
from timeout_table cimport (
    LONGEST, NEVER, entry_is_sane, slot_is_known, slot_save, table_add, table_clock, table_expire, table_find,
    table_free, table_init, table_next, table_remove, table_restore, timeout_entry, timeout_slot, timeout_table,
)

include "faces.pxi"

cdef object NO_MORE = object()  # of an iterator that has ended


# ---------------------------------------------------------------------------------------------------------------------
# Accept: a bounded number a turn, so that a flood of connections cannot keep the others from their turn
# ---------------------------------------------------------------------------------------------------------------------

cdef void accept_turn(loop* l, listener* s) noexcept nogil:
    cdef sockaddr_storage address
    cdef socklen_t size
    cdef uint32_t i, failures = 0
    cdef int fd
    for i in range(l.limits.accepts):
        size = sizeof(address)
        fd = accept4(s.fd, <sockaddr*>&address, &size, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd >= 0:
            failures = 0
            l.count.accepted += 1
            gate(l, fd, &address)
        elif errno == EAGAIN:
            s.ready = False
            return
        elif errno == EMFILE or errno == ENFILE or errno == ENOBUFS or errno == ENOMEM:
            # accept(2) wants a descriptor before it looks for a connection: ask whether there is one at all.
            if not is_readable(s.fd):
                s.ready = False
                return
            l.count.accept_failures += 1
            failures += 1
            if failures > 1 or not make_room(l):  # room that was made did not help: it is not ours that lacks
                l.accept_after = l.now + ACCEPT_PAUSE
                return
        # else: that connection died in the backlog; the next one may live


cdef bint make_room(loop* l) noexcept nogil:
    """Closes who has waited longest with the least claim: closing, without a HELLO, idle without a login.  Never a user."""
    cdef int due
    for due in range(DUE_FRAME_USER):
        if l.due[due].head != NONE:
            end(l, &l.conns[l.due[due].head], R_TOO_MANY, True)
            return True
    if l.hellos.head != NONE:
        end(l, &l.conns[l.hellos.head], R_TOO_MANY, True)
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Gate: the time-out table, the source's share, the server's capacity
# ---------------------------------------------------------------------------------------------------------------------

cdef inline timeout_table* table_of(loop* l, source_key source) noexcept nogil:
    return &l.tables[not source_is_v4(source)]


cdef inline source_key source_of(loop* l, sockaddr_storage* address) noexcept nogil:
    if address.ss_family == AF_INET:
        return source_from_v4(ntohl((<sockaddr_in*>address).sin_addr.s_addr))
    return source_from_v6((<sockaddr_in6*>address).sin6_addr.s6_addr, l.ipv6_prefix)


cdef inline void turn_away(loop* l, int fd, tt_reason reason) noexcept nogil:
    # SO_LINGER 0 is inherited from the listener: this close is a reset, and leaves nothing behind.
    l.count.closed[<int>reason] += 1
    close(fd)


cdef void gate(loop* l, int fd, sockaddr_storage* address) noexcept nogil:
    cdef source_key source = source_of(l, address)
    cdef bint by_proxy = l.proxy_count and is_proxy(l, address)
    cdef tt_reason why = R_TOO_MANY
    # A proxy is its clients' way in: it is neither looked up nor held to the share of one source.
    cdef uint32_t place = budget_claim(&l.budgets, source) if by_proxy else claim(l, source, &why)
    if place == NONE:
        turn_away(l, fd, why)
        return
    # After the source's share: who is over his share must not cost another one his place.
    if l.open >= l.limits.connections and not make_room(l):
        budget_release(&l.budgets, place)
        turn_away(l, fd, R_TOO_MANY)
        return
    admit(l, fd, address, source, place, HEADER_DUE if by_proxy else 0)


cdef inline bint is_proxy(loop* l, sockaddr_storage* address) noexcept nogil:
    """By its whole address as it stands, not by its source: who shares a proxy's /64 may not speak for others."""
    cdef source_key peer
    if address.ss_family == AF_INET:
        peer = source_from_v4(ntohl((<sockaddr_in*>address).sin_addr.s_addr))
    else:
        peer.hi = read_big_endian((<sockaddr_in6*>address).sin6_addr.s6_addr)
        peer.lo = read_big_endian((<sockaddr_in6*>address).sin6_addr.s6_addr + 8)
    return is_touched(peer, 128, l.proxies, l.proxy_count)


cdef inline uint32_t claim(loop* l, source_key source, tt_reason* why) noexcept nogil:
    """A place among the source's connections; NONE, and why: its time-out runs, or it has its share."""
    cdef timeout_slot* slot = table_find(table_of(l, source), source, l.now)
    cdef uint32_t place
    if slot != NULL:
        slot.dropped += 1
        why[0] = R_TIMED_OUT
        return NONE
    why[0] = R_TOO_MANY
    place = budget_claim(&l.budgets, source)
    if place != NONE and l.budgets.slots[place].guest_count >= l.limits.guests:
        budget_release(&l.budgets, place)
        return NONE
    return place


cdef void admit(
    loop* l, int fd, sockaddr_storage* address, source_key source, uint32_t place, uint16_t flags
) noexcept nogil:
    cdef uint32_t i = l.unused.head
    cdef conn* c
    cdef uint32_t generation
    cdef epoll_event event
    if i != NONE:
        chain_remove(&l.unused, &l.conns[0].links[LINK_READY], sizeof(conn), i)
    else:  # l.open < l.limits.connections <= l.places: there is one
        i = l.used
        l.used += 1
    c = &l.conns[i]
    generation = (c.generation + 1) & 0x7FFFFFFF
    memset(c, 0, sizeof(conn))
    c.generation = generation
    c.fd = fd
    c.source = source
    if address.ss_family == AF_INET:
        c.address[10] = c.address[11] = 0xFF
        memcpy(&c.address[12], &(<sockaddr_in*>address).sin_addr, 4)
        c.port = ntohs((<sockaddr_in*>address).sin_port)
    else:
        memcpy(c.address, &(<sockaddr_in6*>address).sin6_addr, 16)
        c.port = ntohs((<sockaddr_in6*>address).sin6_port)
    c.due = DUE_NONE
    c.verdict = OPEN_VERDICT
    c.budget = place
    c.since = l.now
    l.open += 1
    set_state(l, c, S_NEW)
    c.flags |= READABLE | flags
    if not c.flags & HEADER_DUE:
        join_guests(l, c)
    queue_due(l, c, DUE_HELLO)
    if not read_turn(l, c):  # a scanner's bytes are often there already: judged now, they cost no turn and no edge
        return
    if may_read(l, c):
        queue_ready(l, c)
    event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET
    event.data.u64 = <uint64_t>generation << 32 | i
    if epoll_ctl(l.epoll, EPOLL_CTL_ADD, fd, &event) < 0:
        end(l, c, R_INTERNAL, True)


cdef inline void join_guests(loop* l, conn* c) noexcept nogil:
    cdef budget* b = &l.budgets.slots[c.budget]
    c.flags |= GUEST
    b.guest_count += 1
    chain_append(&b.guests, &l.conns[0].links[LINK_GUEST], sizeof(conn), <uint32_t>(c - l.conns))


cdef inline void leave_guests(loop* l, conn* c) noexcept nogil:
    cdef budget* b = &l.budgets.slots[c.budget]
    if not c.flags & GUEST:
        return
    c.flags &= ~GUEST
    b.guest_count -= 1
    chain_remove(&b.guests, &l.conns[0].links[LINK_GUEST], sizeof(conn), <uint32_t>(c - l.conns))


# ---------------------------------------------------------------------------------------------------------------------
# A turn of one connection, and reading
# ---------------------------------------------------------------------------------------------------------------------

cdef void serve(loop* l, conn* c) noexcept nogil:
    """What the application decided, then what can be sent, then what can be read."""
    if c.verdict != OPEN_VERDICT:
        finish(l, c, <tt_reason>c.verdict)
        return
    if c.flags & WRITABLE and not c.flags & PARKED and is_sending(c) and not write_turn(l, c):
        return
    if c.state == S_CLOSING:
        drain(l, c)
        return
    if may_read(l, c) and read_turn(l, c) and may_read(l, c):
        queue_ready(l, c)


cdef inline uint64_t unsent(conn* c) noexcept nogil:
    return c.output_size - c.output_sent


cdef inline bint is_sending(conn* c) noexcept nogil:
    return unsent(c) > 0 or c.more != NULL


cdef inline bint may_read(loop* l, conn* c) noexcept nogil:
    """Nothing is read while the peer leaves its replies unread, a long reply goes out, or its handshake is to come."""
    return c.flags & READABLE and c.state != S_WAITING and takes_frames(l, c)


cdef inline bint takes_frames(loop* l, conn* c) noexcept nogil:
    return c.more == NULL and unsent(c) < (l.limits.output if c.state == S_LOGGED_IN else l.limits.output_guest)


cdef inline size_t most_of_turn(loop* l, conn* c) noexcept nogil:
    """Before login a frame's worth, so that the replies to one turn stay near the bound of unsent output."""
    if c.state == S_NEW:
        return (PROXY_MOST if c.flags & HEADER_DUE else 0) + HEADER + HELLO_MOST - c.held_size
    return l.limits.read if c.state == S_LOGGED_IN else HEADER + DATA_MOST_GUEST


cdef bint read_turn(loop* l, conn* c) noexcept nogil:
    """One recv(): a connection gets one a turn.  Bytes are judged before a reset or a close that followed them."""
    cdef size_t room = most_of_turn(l, c)
    cdef ssize_t n = recv(c.fd, l.buffer + c.held_size, room, 0)
    if n < 0:
        if errno == EAGAIN and not c.flags & DEAF:
            c.flags &= ~READABLE
            return True
        return errno == EINTR or end(l, c, R_PEER_CLOSED, False)
    if n == 0:
        return finish(l, c, R_PEER_CLOSED)
    if <size_t>n < room and not c.flags & HUNG_UP:
        c.flags &= ~READABLE  # epoll(7): a short read means that the socket is empty; new bytes make a new edge
    if c.held_size:
        memcpy(l.buffer, c.held, c.held_size)
        n += c.held_size
        release_held(c)
    return judge(l, c, l.buffer, n)


cdef inline void release_held(conn* c) noexcept nogil:
    free(c.held)
    c.held = NULL
    c.held_size = 0


cdef bint hold(loop* l, conn* c, const uint8_t* p, size_t n) noexcept nogil:
    """Keeps a copy of n bytes until more arrive."""
    c.held = <uint8_t*>malloc(n)
    if c.held == NULL:
        return end(l, c, R_INTERNAL, True)
    memcpy(c.held, p, n)
    c.held_size = <uint32_t>n
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Frame: whole ones are handed on together, a partial one is kept, what cannot be ours is evidence
# ---------------------------------------------------------------------------------------------------------------------

cdef bint judge(loop* l, conn* c, const uint8_t* p, size_t n) noexcept nogil:
    cdef size_t at = 0
    cdef uint32_t total, count = 0
    cdef int verdict = FRAME_MORE
    if c.flags & HEADER_DUE:
        return judge_header(l, c, p, n)
    while at < n:
        verdict = frame_verdict(p + at, n - at, <tt_state>c.state, &total)
        if verdict != FRAME_WHOLE:
            break
        l.count.frames += 1
        if c.state == S_NEW:
            return hello_arrived(l, c, p, n)
        l.spans[count].at = <uint32_t>at
        l.spans[count].size = total
        count += 1
        at += total
    if count and not dispatch(l, c, p, count):
        return False
    if c.state == S_CLOSING:
        return True
    if at == n:
        queue_due(l, c, DUE_IDLE_USER if c.state == S_LOGGED_IN else DUE_IDLE_GUEST)
        return True
    if verdict != FRAME_MORE:
        return reject(l, c, <tt_reason>verdict, p + at, n - at)
    if c.state != S_NEW and (count or c.due != DUE_FRAME_USER and c.due != DUE_FRAME_GUEST):
        # While we do not read, because his replies are unread, the rest of his frame cannot come.
        if not takes_frames(l, c):
            queue_due(l, c, DUE_IDLE_USER if c.state == S_LOGGED_IN else DUE_IDLE_GUEST)
        else:
            queue_due(l, c, DUE_FRAME_USER if c.state == S_LOGGED_IN else DUE_FRAME_GUEST)
    return hold(l, c, p + at, n - at)


cdef bint judge_header(loop* l, conn* c, const uint8_t* p, size_t n) noexcept nogil:
    """A proxy says first for whom it speaks; from there on the connection is the client's."""
    cdef proxied client
    cdef uint32_t total
    cdef int verdict = proxy_verdict(p, n, &total, &client)
    if verdict == FRAME_MORE:
        return hold(l, c, p, n)
    if verdict != FRAME_WHOLE:
        return end(l, c, <tt_reason>verdict, True)
    c.flags &= ~HEADER_DUE
    if not client.told:
        join_guests(l, c)
    elif not pass_on(l, c, &client):
        return False
    c.since = l.now  # the client's time begins here: a header that came late is not his fault
    queue_due(l, c, DUE_HELLO)
    return n == total or judge(l, c, p + total, n - total)


cdef bint pass_on(loop* l, conn* c, const proxied* client) noexcept nogil:
    """What the gate did not know: the client is looked up, and the connection counts as one of his."""
    cdef source_key source = source_from_v6(client.address, l.ipv6_prefix)
    cdef tt_reason why
    cdef uint32_t place = claim(l, source, &why)
    if place == NONE:
        return end(l, c, why, True)
    budget_release(&l.budgets, c.budget)
    c.budget = place
    c.source = source
    c.flags |= PROXIED
    memcpy(c.address, client.address, sizeof(c.address))
    c.port = client.port
    join_guests(l, c)
    return True


cdef bint reject(loop* l, conn* c, tt_reason reason, const uint8_t* p, size_t n) noexcept nogil:
    if reason == R_BAD_VERSION:
        return refuse(l, c, p, n)
    if tt_reasons[<int>reason].times_out:
        return condemn(l, c, reason, p, n)
    return finish(l, c, reason)


cdef bint refuse(loop* l, conn* c, const uint8_t* p, size_t n) noexcept nogil:
    """Right magic, unknown version: say which ones are spoken, at most once a second to a source."""
    cdef budget* b = &l.budgets.slots[c.budget]
    cdef uint8_t answer[HEADER + 1]
    if budget_version(b, l.now, VERSION_WINDOW) >= l.limits.versions:
        return condemn(l, c, R_NOT_PROTOCOL, p, n)
    if l.now - b.refused_at < REFUSE_INTERVAL:
        return end(l, c, R_BAD_VERSION, True)
    b.refused_at = l.now
    memcpy(answer, b"TT\0\0\0\0\0\1", HEADER)
    answer[2] = answer[HEADER] = PROTOCOL_VERSION
    answer[3] = REFUSE
    set_linger(c.fd, False)
    return put(l, c, answer, sizeof(answer)) and finish(l, c, R_BAD_VERSION)


# ---------------------------------------------------------------------------------------------------------------------
# Verdict: evidence puts the source into the table
# ---------------------------------------------------------------------------------------------------------------------

cdef bint condemn(loop* l, conn* c, tt_reason reason, const uint8_t* p, size_t n) noexcept nogil:
    """Times out the source of the connection, and resets it."""
    cdef source_key source = c.source
    cdef record* r
    cdef bint vouched, exempt = is_exempt(l, c)
    if exempt or l.limits.observe:
        r = new_record(l, source, reason)
        r.exempt = exempt
        r.proxied = c.flags & PROXIED != 0
    else:
        vouched = reason == R_NOT_PROTOCOL and is_vouched_for(l, source)
        r = time_out(l, source, reason, l.limits.vouched if vouched else l.limits.length[<int>reason],
                     c.flags & PROXIED != 0, l.limits.hard[<int>reason] and not vouched)
    r.first_size = <uint8_t>min(n, <size_t>FIRST_BYTES)
    if n:
        memcpy(r.first, p, r.first_size)
    end(l, c, reason, True)
    if r.end:
        reset_guests(l, source)
    return False


cdef inline bint is_exempt(loop* l, conn* c) noexcept nogil:
    """Who is named so, and whoever has a source with a proxy, which is its clients' way in."""
    return (is_touched(c.source, l.ipv6_prefix, l.exempt, l.exempt_count)
            or is_touched(c.source, l.ipv6_prefix, l.proxies, l.proxy_count))


cdef inline bint is_vouched_for(loop* l, source_key source) noexcept nogil:
    """A good login came from there: a link that is clicked in an office does not cut the office off."""
    return l.vouched != NULL and l.limits.vouched and table_find(&l.vouched[not source_is_v4(source)], source, l.now) != NULL


cdef record* time_out(
    loop* l, source_key source, tt_reason reason, int64_t length, bint behind_proxy, bint hard
) noexcept nogil:
    """Into the table; the record goes to the application at the end of the turn."""
    cdef record* r = new_record(l, source, reason)
    cdef source_key evicted
    cdef bint gave_way
    cdef timeout_slot* slot = table_add(
        table_of(l, source), source, l.now, length, <uint8_t>reason, behind_proxy, hard, l.limits.longest,
        &evicted, &gave_way)
    r.start, r.end, r.before, r.proxied = slot.start, slot.end, slot.before, slot.proxied
    if gave_way:
        l.ended[l.ended_count] = evicted
        l.ended_count += 1
    return r


cdef record* new_record(loop* l, source_key source, tt_reason reason) noexcept nogil:
    cdef record* r
    if l.added_count == RECORDS or l.ended_count == RECORDS:
        report(l)
    r = &l.added[l.added_count]
    l.added_count += 1
    memset(r, 0, sizeof(record))
    r.source = source
    r.reason = <uint8_t>reason
    return r


cdef void reset_guests(loop* l, source_key source) noexcept nogil:
    """Logged-in connections stay: one bad machine behind a gateway must not cut off its colleagues."""
    cdef uint32_t place = index_find(&l.budgets.index, source)
    if place != NO_SLOT:
        while l.budgets.slots[place].guest_count:
            end(l, &l.conns[l.budgets.slots[place].guests.head], R_TIMED_OUT, True)


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch: the HELLO within its source's rate, then frames, to the application.  Here the GIL is taken.
# ---------------------------------------------------------------------------------------------------------------------

cdef bint hello_arrived(loop* l, conn* c, const uint8_t* p, size_t n) noexcept nogil:
    if not hold(l, c, p, n):
        return False
    set_state(l, c, S_WAITING)
    return ask_handshake(l, c)


cdef bint ask_handshake(loop* l, conn* c) noexcept nogil:
    if budget_hello(&l.budgets.slots[c.budget], l.now, l.limits.hello_interval, l.limits.hello_burst):
        queue_due(l, c, DUE_NONE)
        c.flags |= ON_TIME
        chain_append(&l.hellos, &l.conns[0].links[LINK_READY], sizeof(conn), <uint32_t>(c - l.conns))
    else:
        queue_due(l, c, DUE_RETRY)
    return True


cdef inline void leave_hellos(loop* l, conn* c) noexcept nogil:
    if c.flags & ON_TIME:
        c.flags &= ~ON_TIME
        chain_remove(&l.hellos, &l.conns[0].links[LINK_READY], sizeof(conn), <uint32_t>(c - l.conns))


cdef void handshake_turn(loop* l) noexcept nogil:
    """A bounded number a turn: each costs as much as dozens of frames."""
    cdef uint32_t i, total
    cdef conn* c
    cdef size_t n
    for i in range(l.limits.handshakes):
        if l.hellos.head == NONE:
            return
        c = &l.conns[l.hellos.head]
        leave_hellos(l, c)
        set_state(l, c, S_OPEN)
        n = c.held_size
        frame_verdict(c.held, n, S_NEW, &total)
        memcpy(l.buffer, c.held, n)
        release_held(c)
        if not handshake(l, c, l.buffer, total):
            continue
        queue_due(l, c, DUE_IDLE_GUEST)
        if (n == total or judge(l, c, l.buffer + total, n - total)) and may_read(l, c):
            queue_ready(l, c)


cdef bint handshake(loop* l, conn* c, const uint8_t* p, size_t n) noexcept with gil:
    cdef bytes welcome
    try:
        connection = Connection.__new__(Connection)
        (<Connection>connection).bind(l, c)
        answer = (<object>l.app).hello(connection, PyBytes_FromStringAndSize(<const char*>p, n))
        if c.state == S_FREE:  # the application timed out this very source
            return False
        if answer is None:
            return condemn(l, c, R_BAD_HELLO, p, n)
        session, welcome = answer
        Py_INCREF(session)
        c.session = <PyObject*>session
        l.count.handshakes += 1
        set_linger(c.fd, False)  # from here on a close is graceful
        return put(l, c, <const uint8_t*>PyBytes_AS_STRING(welcome), PyBytes_GET_SIZE(welcome))
    except BaseException as error:
        return failed(l, c, error)


cdef bint dispatch(loop* l, conn* c, const uint8_t* p, uint32_t count) noexcept with gil:
    """Hands the frames over, sends what comes back.  The application may have decided to close."""
    cdef uint32_t i
    cdef list frames = []
    try:
        for i in range(count):
            frames.append(PyBytes_FromStringAndSize(<const char*>p + l.spans[i].at, l.spans[i].size))
        answer = (<object>c.session).receive(frames)
        if c.state == S_FREE:  # the application timed out this very source
            return False
        # A verdict that times out comes before the answer: it must not depend on whether that can still be sent.
        if answer is not None and not is_timing_out(c) and not answer_with(l, c, answer):
            return False
    except BaseException as error:
        return failed(l, c, error)
    return c.verdict == OPEN_VERDICT or finish(l, c, <tt_reason>c.verdict)


cdef inline bint is_timing_out(conn* c) noexcept nogil:
    return c.verdict != OPEN_VERDICT and tt_reasons[c.verdict].times_out


cdef bint answer_with(loop* l, conn* c, object answer) except -1:
    """bytes go out now; an iterator of bytes goes out part by part, as the socket takes them; a None in it parks."""
    if isinstance(answer, bytes):
        return put(l, c, <const uint8_t*>PyBytes_AS_STRING(answer), PyBytes_GET_SIZE(answer))
    Py_INCREF(answer)
    c.more = <PyObject*>answer
    return send_parts(l, c)


cdef bint send_parts(loop* l, conn* c) noexcept with gil:
    """Parts of a long reply, until the socket takes no more, a turn's share has gone, or the reply is complete."""
    cdef object part
    cdef uint64_t gone = 0
    cdef int64_t began = monotonic_ns()
    try:
        while unsent(c) == 0:
            if gone >= l.limits.read or monotonic_ns() - began > TURN_SHARE:
                queue_ready(l, c)
                break
            part = next(<object>c.more, NO_MORE)
            if c.state == S_FREE:
                return False
            if part is NO_MORE:
                release_more(c)
                break
            if part is None:
                c.flags |= PARKED
                break
            gone += len(<bytes?>part)
            if not put(l, c, <const uint8_t*>PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part)):
                return False
            if c.more == NULL:  # nobody reads it
                break
        return True
    except BaseException as error:
        return failed(l, c, error)


cdef bint failed(loop* l, conn* c, object error) noexcept with gil:
    """A failure of our own: said, and never held against the peer."""
    say_failure(l, error)
    return c.state != S_FREE and end(l, c, R_INTERNAL, True)


cdef void say_failure(loop* l, object error) noexcept with gil:
    try:
        (<object>l.app).failed(error)
    except BaseException:  # no memory even for the log: what failed has been dealt with, or will be by the caller
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Write: at once what the socket takes, the rest when it takes more
# ---------------------------------------------------------------------------------------------------------------------

cdef bint put(loop* l, conn* c, const uint8_t* p, size_t n) noexcept nogil:
    cdef ssize_t sent = 0
    cdef uint8_t* room
    if n == 0:
        return True
    if unsent(c) == 0:
        sent = send(c.fd, p, n, MSG_NOSIGNAL)
        if sent < 0:
            if errno != EAGAIN and errno != EINTR:
                return cannot_send(l, c)
            sent = 0
        if <size_t>sent == n:
            return True
        c.flags &= ~WRITABLE
    room = <uint8_t*>malloc(unsent(c) + n - sent)
    if room == NULL:
        return end(l, c, R_INTERNAL, True)
    if unsent(c):
        memcpy(room, c.output + c.output_sent, unsent(c))
    memcpy(room + unsent(c), p + sent, n - sent)
    c.output_size = unsent(c) + n - sent
    c.output_sent = 0
    free(c.output)
    c.output = room
    return True


cdef bint cannot_send(loop* l, conn* c) noexcept nogil:
    """Nothing more can be sent.  Where the peer has reset the connection, what he sent before that is judged first."""
    if errno == ENOBUFS or errno == ENOMEM:
        return end(l, c, R_INTERNAL, True)
    give_up_sending(l, c)
    return True


cdef void give_up_sending(loop* l, conn* c) noexcept nogil:
    release_output(c)
    release_more(c)
    c.flags |= READABLE | HUNG_UP | DEAF
    queue_ready(l, c)


cdef inline void release_output(conn* c) noexcept nogil:
    free(c.output)
    c.output = NULL
    c.output_size = c.output_sent = 0


cdef inline void release_more(conn* c) noexcept nogil:
    c.flags &= ~PARKED
    if c.more != NULL:
        with gil:
            Py_DECREF(<object>c.more)
        c.more = NULL


cdef bint write_turn(loop* l, conn* c) noexcept nogil:
    """What the socket did not take before, then the next parts of a long reply; who was finishing is now done."""
    if unsent(c):
        if not flush(l, c):
            return False
        if unsent(c):
            return True
    if c.more != NULL:
        queue_due(l, c, c.due)  # the peer has read, or did not have to: its time starts anew
        if not send_parts(l, c):
            return False
    if c.state == S_CLOSING and not is_sending(c):
        say_end(l, c)
    elif c.flags & READABLE and not c.flags & PARKED:
        queue_ready(l, c)
    return True


cdef bint flush(loop* l, conn* c) noexcept nogil:
    cdef ssize_t sent = send(c.fd, c.output + c.output_sent, unsent(c), MSG_NOSIGNAL)
    if sent < 0:
        if errno != EAGAIN and errno != EINTR:
            return cannot_send(l, c)
        sent = 0
    c.output_sent += sent
    if unsent(c):
        c.flags &= ~WRITABLE
    else:
        release_output(c)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Close: `finish` lets the peer have what was sent, `end` is at once
# ---------------------------------------------------------------------------------------------------------------------

cdef bint finish(loop* l, conn* c, tt_reason reason) noexcept nogil:
    """Ends a connection for a reason; gracefully where the reason allows it: flush, shut down, drain, close."""
    cdef uint8_t due
    if tt_reasons[<int>reason].times_out:
        return condemn(l, c, reason, NULL, 0)
    if c.state == S_CLOSING:
        return True
    if c.state == S_NEW and reason != R_BAD_VERSION:
        return end(l, c, reason, True)
    if reason == R_PEER_CLOSED and not is_sending(c):
        return end(l, c, reason, False)
    c.verdict = OPEN_VERDICT
    l.count.closed[<int>reason] += 1
    due = DUE_FRAME_GUEST if c.flags & GUEST else DUE_FRAME_USER  # a user's last reply gives way to nobody
    set_state(l, c, S_CLOSING)  # and a guest's counts as his connection until it has gone
    goodbye(l, c, reason)
    if c.state == S_FREE:  # the session timed out its own source
        return False
    release_held(c)
    if is_sending(c):
        queue_due(l, c, due)
    else:
        say_end(l, c)
    return True


cdef void say_end(loop* l, conn* c) noexcept nogil:
    """Everything is sent: our half ends, the peer has a moment to end his."""
    shutdown(c.fd, SHUT_WR)
    queue_due(l, c, DUE_CLOSING)
    c.flags |= READABLE  # he may have ended before, and then no edge will tell
    queue_ready(l, c)


cdef void drain(loop* l, conn* c) noexcept nogil:
    """Throws away what still arrives: closing with unread bytes would reset the connection and lose our last output."""
    cdef ssize_t n
    while c.flags & READABLE:
        n = recv(c.fd, l.buffer, l.limits.read, 0)
        if n < 0 and errno == EAGAIN:
            c.flags &= ~READABLE
            return
        if n > 0 and not is_sending(c):
            c.drained += <uint32_t>n
        if n <= 0 and not is_sending(c) or n < 0 and errno != EINTR or c.drained > l.limits.drain:
            end(l, c, R_PEER_CLOSED, False)
            return
        if n == 0:
            c.flags &= ~READABLE
            return


cdef bint end(loop* l, conn* c, tt_reason reason, bint reset) noexcept nogil:
    """Closes at once and frees the place; always False, for `return end(...)`."""
    cdef uint32_t i = <uint32_t>(c - l.conns)
    cdef bint first = c.state != S_CLOSING
    if reset and c.session != NULL and (first or is_sending(c)):
        set_linger(c.fd, True)  # else the kernel would go on sending, outside every budget
    leave_guests(l, c)
    if first:
        l.count.closed[<int>reason] += 1
        set_state(l, c, S_CLOSING)  # before the session is told: it may call back
        goodbye(l, c, reason)
    budget_release(&l.budgets, c.budget)
    release_objects(c)
    queue_due(l, c, DUE_NONE)
    unqueue_ready(l, c)
    leave_hellos(l, c)
    release_held(c)
    release_output(c)
    close(c.fd)
    set_state(l, c, S_FREE)
    l.open -= 1
    chain_append(&l.unused, &l.conns[0].links[LINK_READY], sizeof(conn), i)
    return False


cdef void goodbye(loop* l, conn* c, tt_reason reason) noexcept nogil:
    """Tells the session, once, why its connection ends."""
    if c.session != NULL:
        with gil:
            try:
                (<object>c.session).closed(tt_reasons[<int>reason].name.decode())
            except BaseException as error:
                say_failure(l, error)


cdef void release_objects(conn* c) noexcept nogil:
    release_more(c)
    if c.session != NULL:
        with gil:
            Py_DECREF(<object>c.session)
        c.session = NULL


# ---------------------------------------------------------------------------------------------------------------------
# Expire: deadlines of connections, ends of time-outs
# ---------------------------------------------------------------------------------------------------------------------

cdef void expire_turn(loop* l) noexcept nogil:
    cdef uint32_t left = EXPIRIES_PER_TURN
    cdef uint8_t due
    cdef conn* c
    for due in range(DUES):
        while left and l.due[due].head != NONE:
            c = &l.conns[l.due[due].head]
            if l.now - c.due_since < l.limits.due[due]:
                break
            left -= 1
            overdue(l, c)


cdef bint last_look(loop* l, conn* c) noexcept nogil:
    """Where the loop is late, the whole HELLO may lie in the socket: it is our delay, not the peer's."""
    unqueue_ready(l, c)
    return read_turn(l, c) and c.state == S_NEW


cdef void overdue(loop* l, conn* c) noexcept nogil:
    if c.flags & PARKED:
        queue_due(l, c, c.due)  # the peer waits for us
    elif c.state == S_CLOSING:
        end(l, c, R_SLOW_READER, True)
    elif c.state == S_WAITING:
        if l.now - c.since >= l.limits.due[DUE_HELLO]:
            end(l, c, R_TOO_MANY, True)
        else:
            ask_handshake(l, c)
    elif c.state == S_NEW and not last_look(l, c):
        return
    elif c.flags & HEADER_DUE and c.held_size:
        end(l, c, R_BAD_PROXY, True)
    elif c.state == S_NEW and c.held_size:
        condemn(l, c, R_STALLED, c.held, c.held_size)
    elif c.state == S_NEW:
        end(l, c, R_SILENT, True)  # silence is no evidence
    elif is_sending(c):
        end(l, c, R_SLOW_READER, True)
    else:
        finish(l, c, R_IDLE)


cdef void sweep_turn(loop* l) noexcept nogil:
    cdef int family
    for family in range(2):
        if table_next(&l.tables[family], l.now) <= l.now:
            l.ended_count += table_expire(&l.tables[family], l.now, &l.ended[l.ended_count], RECORDS - l.ended_count)


cdef void report(loop* l) noexcept with gil:
    """New and ended time-outs of the turn, to the application."""
    cdef uint32_t i, added_count = l.added_count, ended_count = l.ended_count
    l.added_count = l.ended_count = 0  # first: a failure below must not leave the records full
    try:
        added = [added_record(l, &l.added[i]) for i in range(added_count)]
        ended = [source_pack(l.ended[i]) for i in range(ended_count)]
        (<object>l.app).turn(added, ended)
    except BaseException as error:
        say_failure(l, error)


cdef object added_record(loop* l, record* r):
    return TimedOut(
        source_format(r.source, l.ipv6_prefix), source_pack(r.source), REASONS[r.reason][0], r.start, r.end,
        r.before, r.exempt, PyBytes_FromStringAndSize(<const char*>r.first, r.first_size), bool(r.proxied),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The turn
# ---------------------------------------------------------------------------------------------------------------------

cdef void turn(loop* l, epoll_event* events) noexcept nogil:
    cdef int i, n = epoll_wait(l.epoll, events, EVENTS_PER_TURN, milliseconds_to_wait(l))
    cdef uint32_t left
    l.now = monotonic_ns()
    for i in range(n):
        take_event(l, events[i].data.u64, events[i].events)
    left = l.ready_count  # who is queued anew meanwhile has his turn in the next one
    while left and l.ready.head != NONE:
        left -= 1
        serve(l, next_ready(l))
    if l.now >= l.accept_after:
        for i in range(<int>l.listener_count):
            if l.listeners[i].ready:
                accept_turn(l, &l.listeners[i])
    handshake_turn(l)
    expire_turn(l)
    sweep_turn(l)
    if l.added_count or l.ended_count:
        report(l)
    if l.now >= l.tick_at:
        l.tick_at = l.now + TICK
        tick(l)


cdef void take_event(loop* l, uint64_t data, uint32_t events) noexcept nogil:
    cdef uint32_t i = <uint32_t>data, generation = <uint32_t>(data >> 32)
    cdef conn* c
    if generation == LISTENER:
        l.listeners[i].ready = True
        return
    if generation == SIGNALS:
        take_signals(l, <int>i)
        return
    if generation == WATCHED:
        call_watcher(l, <int>i, events)
        return
    c = &l.conns[i]
    if c.generation != generation or c.state == S_FREE:
        return
    if events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        c.flags |= READABLE
    if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        c.flags |= HUNG_UP
    if events & (EPOLLHUP | EPOLLERR) and c.flags & PARKED:
        give_up_sending(l, c)  # nobody waits for that reply any more
    if events & EPOLLOUT:
        c.flags |= WRITABLE
    queue_ready(l, c)


cdef int milliseconds_to_wait(loop* l) noexcept nogil:
    cdef int64_t wake = l.tick_at, now
    cdef int i
    if l.ready.head != NONE or l.hellos.head != NONE:
        return 0
    for i in range(<int>l.listener_count):
        if l.listeners[i].ready:
            wake = min(wake, l.accept_after)
    for i in range(DUES):
        if l.due[i].head != NONE:
            wake = min(wake, l.conns[l.due[i].head].due_since + l.limits.due[i])
    for i in range(2):
        wake = min(wake, table_next(&l.tables[i], l.now))
    now = monotonic_ns()
    return 0 if wake <= now else <int>((wake - now + 999_999) // 1_000_000)


cdef void take_signals(loop* l, int fd) noexcept nogil:
    cdef signalfd_siginfo info
    while read(fd, &info, sizeof(info)) == sizeof(info):
        with gil:
            try:
                (<object>l.app).signal(<int>info.ssi_signo)
            except BaseException as error:
                say_failure(l, error)


cdef void call_watcher(loop* l, int fd, uint32_t events) noexcept with gil:
    try:
        watcher = (<Server>l.server).watchers.get(fd)
        if watcher is not None:  # else an earlier event of this turn took it away
            watcher(bool(events & ~<uint32_t>EPOLLOUT), bool(events & EPOLLOUT))
    except BaseException as error:
        say_failure(l, error)


cdef void tick(loop* l) noexcept with gil:
    try:
        (<object>l.app).tick()
    except BaseException as error:
        say_failure(l, error)


cdef void begin_stop(loop* l) noexcept nogil:
    """No new connections; what is in flight is finished."""
    cdef uint32_t i
    cdef conn* c
    l.stop_at = monotonic_ns() + STOP_DEADLINE
    for i in range(l.listener_count):
        close(l.listeners[i].fd)
    l.listener_count = 0
    for i in range(l.used):
        c = &l.conns[i]
        if c.state == S_NEW or c.state == S_WAITING:
            end(l, c, R_SHUTDOWN, True)
        elif c.state != S_FREE:
            finish(l, c, R_SHUTDOWN)


include "server.pxi"
