"""The loop as Python sees it: a Connection for a session, and the Server that owns the loop.

Included by _core.pyx behind the loop itself.  What happens to a connection is decided there; here it is asked for.
"""

@cython.final
cdef class Connection:
    """What a session knows of its connection.  Outlives it harmlessly: on an ended connection every call does nothing."""

    cdef Server server
    cdef uint32_t place, generation
    cdef readonly str source    # what is timed out: "192.0.2.1", "2001:db8::/64"
    cdef readonly str address   # the peer's own; behind a proxy the client's
    cdef readonly int port
    cdef readonly bint proxied  # a proxy said who the peer is

    cdef void bind(self, loop* l, conn* c):
        self.server = <Server>l.server
        self.place = <uint32_t>(c - l.conns)
        self.generation = c.generation
        self.source = source_format(c.source, l.ipv6_prefix)
        self.address = source_format(source_from_v6(c.address, 128), 128)
        self.port = c.port
        self.proxied = c.flags & PROXIED != 0

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
    cdef Networks exempt, proxies
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
        time_out(&self.l, key, R_OPERATOR, length_ns, False, False)
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
        networks, proxies = Networks(exempt, l.ipv6_prefix), Networks(config.proxy_from, l.ipv6_prefix)
        self.size_buffer(new.read)
        l.limits = new  # at once with the buffer that it bounds
        self.exempt, self.proxies = networks, proxies
        l.exempt, l.exempt_count = self.exempt.items, self.exempt.count
        l.proxies, l.proxy_count = self.proxies.items, self.proxies.count

    cdef int size_buffer(self, uint32_t read) except -1:
        """A partial frame and one turn's bytes fit; so do the spans of the shortest frames."""
        cdef size_t size = HEADER + DATA_MOST + <size_t>max(read, <uint32_t>(PROXY_MOST + HEADER + HELLO_MOST))
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
