"""tt._core: the event loop, compiled.  It reads like the life of a connection:

    accept -> gate -> read -> frame -> dispatch -> write -> close -> expire        class Server last

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
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
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
    DUE_RETRY, DUES, EVENTS_PER_TURN, EXPIRIES_PER_TURN, FIRST_BYTES, GUEST, HUNG_UP, LINK_GUEST, LINK_READY,
    LISTENER, ON_TIME, OPEN_VERDICT, PARKED, READABLE, RECORDS, REFUSE_INTERVAL, SIGNALS, SOURCES_LEAST,
    STOP_DEADLINE, TICK, TURN_SHARE, VERSION_WINDOW, WATCHED, WRITABLE, conn, limits, listener, loop, network, record, span,
)
from names cimport (
    R_ADOPTED, R_BAD_HELLO, R_BAD_VERSION, R_IDLE, R_INTERNAL, R_NOT_PROTOCOL, R_OPERATOR, R_PEER_CLOSED,
    R_SHUTDOWN, R_SILENT, R_SLOW_READER, R_STALLED, R_TIMED_OUT, R_TOO_MANY, REASONS_COUNT, S_CLOSING, S_FREE,
    S_LOGGED_IN, S_NEW, S_OPEN, S_WAITING, STATES_COUNT, tt_reason, tt_reasons, tt_state, tt_states,
)
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
    cdef timeout_slot* slot = table_find(table_of(l, source), source, l.now)
    cdef uint32_t place
    if slot != NULL:
        slot.dropped += 1
        turn_away(l, fd, R_TIMED_OUT)
        return
    # The source's share before the room for it: who is over his share must not cost another one his place.
    place = budget_claim(&l.budgets, source)
    if place == NONE:
        turn_away(l, fd, R_TOO_MANY)
        return
    if l.budgets.slots[place].guest_count >= l.limits.guests or l.open >= l.limits.connections and not make_room(l):
        budget_release(&l.budgets, place)
        turn_away(l, fd, R_TOO_MANY)
        return
    admit(l, fd, address, source, place)


cdef void admit(loop* l, int fd, sockaddr_storage* address, source_key source, uint32_t place) noexcept nogil:
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
    join_guests(l, c)
    queue_due(l, c, DUE_HELLO)
    c.flags |= READABLE
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
        return HEADER + HELLO_MOST - c.held_size
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
    cdef bint vouched, exempt = is_touched(source, l.ipv6_prefix, l.exempt, l.exempt_count)
    if exempt or l.limits.observe:
        r = new_record(l, source, reason)
        r.exempt = exempt
    else:
        vouched = reason == R_NOT_PROTOCOL and is_vouched_for(l, source)
        r = time_out(l, source, reason, l.limits.vouched if vouched else l.limits.length[<int>reason],
                     l.limits.hard[<int>reason] and not vouched)
    r.first_size = <uint8_t>min(n, <size_t>FIRST_BYTES)
    if n:
        memcpy(r.first, p, r.first_size)
    end(l, c, reason, True)
    if r.end:
        reset_guests(l, source)
    return False


cdef inline bint is_vouched_for(loop* l, source_key source) noexcept nogil:
    """A good login came from there: a link that is clicked in an office does not cut the office off."""
    return l.vouched != NULL and l.limits.vouched and table_find(&l.vouched[not source_is_v4(source)], source, l.now) != NULL


cdef record* time_out(loop* l, source_key source, tt_reason reason, int64_t length, bint hard) noexcept nogil:
    """Into the table; the record goes to the application at the end of the turn."""
    cdef record* r = new_record(l, source, reason)
    cdef source_key evicted
    cdef bint gave_way
    cdef timeout_slot* slot = table_add(
        table_of(l, source), source, l.now, length, <uint8_t>reason, hard, l.limits.longest, &evicted, &gave_way)
    r.start, r.end, r.before = slot.start, slot.end, slot.before
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
        r.before, r.exempt, PyBytes_FromStringAndSize(<const char*>r.first, r.first_size),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The turn, and the class that Python sees
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


@cython.final
cdef class Connection:
    """What a session knows of its connection.  Outlives it harmlessly: on an ended connection every call does nothing."""

    cdef Server server
    cdef uint32_t place, generation
    cdef readonly str source    # what is timed out: "192.0.2.1", "2001:db8::/64"
    cdef readonly str address   # the peer's own
    cdef readonly int port

    cdef void bind(self, loop* l, conn* c):
        self.server = <Server>l.server
        self.place = <uint32_t>(c - l.conns)
        self.generation = c.generation
        self.source = source_format(c.source, l.ipv6_prefix)
        self.address = source_format(source_from_v6(c.address, 128), 128)
        self.port = c.port

    cdef conn* find(self) noexcept:
        cdef conn* c = &self.server.l.conns[self.place]
        return c if c.generation == self.generation and c.state != S_FREE else NULL

    def close(self, str reason not None):
        """End it for a reason of REASONS, once the reply that is being made is sent; a reason that times out ends it now."""
        cdef conn* c = self.find()
        cdef int code = REASON_CODES[reason]
        if c != NULL and c.state != S_CLOSING and c.verdict == OPEN_VERDICT:
            c.verdict = <uint8_t>code
            queue_ready(&self.server.l, c)

    def resume(self):
        """What the parts of its reply waited for has come."""
        cdef conn* c = self.find()
        if c != NULL and c.flags & PARKED:
            c.flags &= ~PARKED
            queue_ready(&self.server.l, c)

    def log_in(self):
        """A user has logged in: longer frames, more time, and no part in what happens to strangers of the same source."""
        cdef conn* c = self.find()
        if c != NULL and c.state == S_OPEN:
            leave_guests(&self.server.l, c)
            set_state(&self.server.l, c, S_LOGGED_IN)
            if c.due == DUE_IDLE_GUEST or c.due == DUE_FRAME_GUEST:
                queue_due(&self.server.l, c, DUE_IDLE_USER if c.due == DUE_IDLE_GUEST else DUE_FRAME_USER)


@cython.final
cdef class Server:
    """The loop with its listeners.

    `listeners` are descriptors that the server owns from here on: non-blocking, listening, with SO_LINGER 0 and
    TCP_NODELAY (both are inherited by what they accept).  At most `places` connections are held at a time.  `signals`
    are blocked by the caller and come to app.signal(number).  The application:

        app.hello(connection, hello: bytes) -> (session, welcome: bytes) | None     None: it did not authenticate
        session.receive(frames: list[bytes]) -> bytes | iterator of bytes | None    whole frames, whole frames back
        session.closed(reason: str)
        app.turn(added: list[TimedOut], ended: list[bytes])                         once a turn; packed sources
        app.tick()                                                                  about once a second
        app.signal(number: int), app.failed(error: BaseException)

    An iterator goes out part by part, as the peer reads; where it gives None, Connection.resume() asks for the next one.
    `vouched`: sources whose `not_protocol` is short and not doubled, since somebody there has logged in.
    """

    cdef loop l
    cdef TimeoutTable table, vouched
    cdef object app
    cdef dict watchers
    cdef Networks exempt
    cdef int signal_fd

    def __cinit__(self):
        self.l.epoll = self.signal_fd = -1

    def __init__(
        self, listeners, uint32_t places, TimeoutTable table not None, app, config, *,
        exempt=(), signals=(), TimeoutTable vouched=None,
    ):
        cdef loop* l = &self.l
        cdef uint64_t k[2]
        cdef uint32_t i
        if l.epoll >= 0:
            raise RuntimeError("a Server is made once")
        self.table, self.app, self.watchers = table, app, {}
        l.app, l.server, l.tables, l.ipv6_prefix = <PyObject*>app, <PyObject*>self, table.families, table.ipv6_prefix
        if vouched is not None:
            self.vouched, l.vouched = vouched, vouched.families
        l.places = places
        l.count.states[<int>S_FREE] = places
        self.configure(config, exempt)
        for chain_number in range(DUES):
            chain_clear(&l.due[chain_number])
        chain_clear(&l.ready)
        chain_clear(&l.hellos)
        chain_clear(&l.unused)
        seed = os.urandom(16)
        memcpy(k, PyBytes_AS_STRING(seed), 16)
        l.conns = <conn*>calloc(l.places, sizeof(conn))
        l.listeners = <listener*>calloc(len(listeners), sizeof(listener))
        l.added = <record*>calloc(RECORDS, sizeof(record))
        l.ended = <source_key*>calloc(RECORDS, sizeof(source_key))
        if (budgets_init(&l.budgets, max(2 * l.places, SOURCES_LEAST), k[0], k[1]) < 0
                or not (l.conns and l.listeners and l.added and l.ended)):
            raise MemoryError
        l.epoll = epoll_create1(EPOLL_CLOEXEC)
        if l.epoll < 0:
            raise OSError(errno, "epoll_create1 failed")
        for i, fd in enumerate(listeners):
            l.listeners[i].fd = fd
            l.listener_count += 1
            self.register(EPOLL_CTL_ADD, fd, EPOLLIN | EPOLLET, <uint64_t>LISTENER << 32 | i)
        if signals:
            self.open_signals(signals)

    cdef int register(self, int operation, int fd, uint32_t events, uint64_t data) except -1:
        cdef epoll_event event
        event.events = events
        event.data.u64 = data
        if epoll_ctl(self.l.epoll, operation, fd, &event) < 0:
            raise OSError(errno, f"descriptor {fd} cannot be watched")
        return 0

    def watch(self, int fd, watcher, *, bint reading=True, bint writing=False):
        """Calls watcher(readable, writable) whenever the descriptor is so, in every turn (level-triggered)."""
        cdef uint32_t events = (EPOLLIN if reading else 0) | (EPOLLOUT if writing else 0)
        self.register(EPOLL_CTL_MOD if fd in self.watchers else EPOLL_CTL_ADD, fd, events, <uint64_t>WATCHED << 32 | <uint32_t>fd)
        self.watchers[fd] = watcher

    def unwatch(self, int fd):
        """Ends what watch began; before the descriptor is closed."""
        if self.watchers.pop(fd, None) is not None:
            self.register(EPOLL_CTL_DEL, fd, 0, 0)

    def time_out(self, str source not None, int64_t length_ns):
        """Times out a source by hand, as its TimeoutRecord; its connections without a login are reset."""
        cdef source_key key = source_parse(source, self.l.ipv6_prefix)
        if not 0 < length_ns <= LONGEST:
            raise ValueError(f"a time-out of {length_ns} ns: it must be 1 ns .. 30 days")
        self.l.now = monotonic_ns()
        time_out(&self.l, key, R_OPERATOR, length_ns, False)
        reset_guests(&self.l, key)
        return self.table.find(source, self.l.now)

    def lift(self, str source not None):
        """Ends and forgets a time-out, repeats too.  False: there was none, running or remembered."""
        cdef source_key key = source_parse(source, self.l.ipv6_prefix)
        if self.l.ended_count == RECORDS:
            report(&self.l)
        if not table_remove(table_of(&self.l, key), key):
            return False
        self.l.ended[self.l.ended_count] = key
        self.l.ended_count += 1
        return True

    cdef int open_signals(self, signals) except -1:
        cdef sigset_t wanted
        sigemptyset(&wanted)
        for number in signals:
            sigaddset(&wanted, number)
        self.signal_fd = signalfd(-1, &wanted, SFD_NONBLOCK | SFD_CLOEXEC)
        if self.signal_fd < 0:
            raise OSError(errno, "signalfd failed")
        return self.register(
            EPOLL_CTL_ADD, self.signal_fd, EPOLLIN | EPOLLET, <uint64_t>SIGNALS << 32 | <uint32_t>self.signal_fd)

    def __dealloc__(self):
        cdef loop* l = &self.l
        cdef uint32_t i
        for i in range(l.used):
            if l.conns[i].state != S_FREE:
                release_objects(&l.conns[i])
                release_held(&l.conns[i])
                release_output(&l.conns[i])
                close(l.conns[i].fd)
        for i in range(l.listener_count):
            close(l.listeners[i].fd)
        if self.signal_fd >= 0:
            close(self.signal_fd)
        if l.epoll >= 0:
            close(l.epoll)
        budgets_free(&l.budgets)
        free(l.conns)
        free(l.listeners)
        free(l.buffer)
        free(l.spans)
        free(l.added)
        free(l.ended)

    def configure(self, config, exempt=()):
        """Takes the limits of a tt.config.Config (max_connections only at the start) and the exempt networks.

        Not from session.receive(): the buffer that it makes anew is being read then.
        """
        cdef loop* l = &self.l
        cdef limits new = limits_of(config, l.places)
        networks = Networks(exempt, l.ipv6_prefix)
        self.size_buffer(new.read)
        l.limits = new  # at once with the buffer that it bounds
        self.exempt = networks
        l.exempt, l.exempt_count = self.exempt.items, self.exempt.count

    cdef int size_buffer(self, uint32_t read) except -1:
        """A partial frame and one turn's bytes fit; so do the spans of the shortest frames."""
        cdef size_t size = HEADER + DATA_MOST + <size_t>max(read, HEADER + HELLO_MOST)
        buffer = <uint8_t*>malloc(size)
        spans = <span*>malloc((size // (HEADER + DATA_LEAST) + 1) * sizeof(span))
        if buffer == NULL or spans == NULL:
            free(buffer)
            free(spans)
            raise MemoryError
        free(self.l.buffer)
        free(self.l.spans)
        self.l.buffer, self.l.spans = buffer, spans
        return 0

    def run(self):
        """Serves until stop(); then what is in flight is finished, for at most 3 s."""
        cdef loop* l = &self.l
        cdef epoll_event events[EVENTS_PER_TURN]
        cdef bint stopping = False
        l.now = monotonic_ns()
        l.tick_at = l.now + TICK
        with nogil:
            while not (stopping and (l.open == 0 or l.now >= l.stop_at)):
                turn(l, events)
                if l.stopping and not stopping:
                    stopping = True
                    begin_stop(l)

    def stop(self):
        """run() returns soon.  For the loop's own thread: from app.signal() and the like."""
        self.l.stopping = True

    def counters(self):
        """Everything that is counted: since the start, but `connections` and `waiting`, which are now."""
        cdef loop* l = &self.l
        cdef int i
        return {
            "accepted": l.count.accepted,
            "accept_failures": l.count.accept_failures,
            "handshakes": l.count.handshakes,
            "frames": l.count.frames,
            "closed": {tt_reasons[i].name.decode(): l.count.closed[i] for i in range(REASONS_COUNT)},
            "connections": {tt_states[i].name.decode(): l.count.states[i] for i in range(S_FREE + 1, STATES_COUNT)},
            "waiting": self.waiting(),
        }

    def waiting(self):
        """Entries in the loop's own queues, by name; all are 0 when nobody is connected."""
        cdef loop* l = &self.l
        cdef int due
        cdef uint32_t i, deadlines = 0, held = 0, unsent_ = 0, sources = 0
        for i in range(l.used):
            held += l.conns[i].state != S_FREE and l.conns[i].held_size > 0
            unsent_ += l.conns[i].state != S_FREE and unsent(&l.conns[i]) > 0
            deadlines += l.conns[i].state != S_FREE and l.conns[i].due != DUE_NONE
        for i in range(l.budgets.used):
            sources += l.budgets.slots[i].connections > 0
        return {"ready": l.ready_count, "partial_frames": held, "unsent": unsent_, "deadlines": deadlines, "sources": sources}
