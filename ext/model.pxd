"""What the loop is made of: its bounds, the classes of deadlines, a connection, the records it hands on, its counters.

Data only; what happens to it stands in _core.pyx.  Times are ns of CLOCK_MONOTONIC; places are indexes into loop.conns.
"""

from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from budget cimport budget_table
from chain cimport chain, link
from names cimport REASONS_COUNT, STATES_COUNT
from source cimport source_key
from timeout_table cimport timeout_table

cdef enum:
    EVENTS_PER_TURN = 512
    EXPIRIES_PER_TURN = 256     # deadlines that may close connections in one turn
    SOURCES_LEAST = 65536       # whose budgets are remembered
    RECORDS = 1024              # new or ended time-outs that wait for the end of the turn
    FIRST_BYTES = 32            # how many of a stranger's bytes the log may show
    ACCEPT_PAUSE = 100_000_000  # ns without accept() when descriptors or memory ran out and nobody could be closed
    VERSION_WINDOW = 60_000_000_000
    REFUSE_INTERVAL = 1_000_000_000
    TICK = 1_000_000_000
    TURN_SHARE = 1_000_000      # ns that the parts of one long reply may take in a turn
    STOP_DEADLINE = 3_000_000_000
    LISTENER = 0xFFFFFFFF       # as a generation in epoll's data: not a connection
    SIGNALS = 0xFFFFFFFE
    WATCHED = 0xFFFFFFFD        # a descriptor that Python serves
    OPEN_VERDICT = 0xFF         # conn.verdict: none

cdef enum:  # conn.flags
    READABLE = 1                # the socket may have bytes
    WRITABLE = 2                # the socket may take bytes
    HUNG_UP = 4                 # the peer closed its side: a short read does not mean that nothing follows
    QUEUED = 8                  # in loop.ready
    ON_TIME = 16                # in loop.hellos
    GUEST = 64                  # counts against its source's share: not logged in
    DEAF = 32                   # the peer takes nothing any more: it ends once all that he sent is judged
    PARKED = 128                # the application waits for something before the next part of `more`: Connection.resume
    HEADER_DUE = 256            # the peer is a proxy, and has not said yet for whom it speaks
    PROXIED = 512               # source, address and port are those of a proxy's client

cdef enum:  # the links of a connection
    LINK_DUE                    # one of loop.due
    LINK_READY                  # loop.ready, or loop.hellos while it waits for its handshake
    LINK_GUEST                  # the connections of one source that are not logged in
    LINKS

cdef enum:  # the classes of deadlines; in each all have one length, so that its queue is in order by itself
    DUE_CLOSING                 # in the order in which they give way when the server is full
    DUE_HELLO
    DUE_RETRY                   # a HELLO over its source's rate tries again
    DUE_FRAME_GUEST
    DUE_IDLE_GUEST
    DUE_FRAME_USER              # from here on never: they are logged in
    DUE_IDLE_USER
    DUES
    DUE_NONE = 0xFF

cdef struct conn:
    int fd
    uint32_t generation         # counts the uses of this place: an event for an earlier one is stale
    source_key source
    uint8_t address[16]         # the peer's own address, IPv4 as v4-mapped
    uint16_t port
    uint16_t flags
    uint8_t state               # tt_state
    uint8_t due                 # its class of deadline
    uint8_t verdict             # OPEN_VERDICT, or the tt_reason with which it is to end
    uint32_t budget             # its source's slot
    int64_t since               # accepted at, ns
    int64_t due_since           # when it entered its class of deadline, ns
    link links[LINKS]
    uint8_t* held               # a partial frame; while waiting for the handshake the HELLO and what follows
    uint32_t held_size
    uint32_t drained            # bytes thrown away while closing
    uint8_t* output             # what the socket did not take
    uint64_t output_size
    uint64_t output_sent
    PyObject* session           # the application's, from the handshake on
    PyObject* more              # an iterator: the rest of a long reply

cdef struct span:
    uint32_t at
    uint32_t size

cdef struct listener:
    int fd
    bint ready

cdef struct network:            # exempt, or a proxy's
    source_key address
    source_key mask
    bint is_v4                  # ::/0 covers the v4-mapped form of every IPv4 address, and means none

cdef struct record:             # of a new time-out, for the application
    source_key source
    int64_t start               # ns
    int64_t end                 # ns; 0: nobody was timed out
    uint16_t before
    uint8_t reason
    bint exempt
    bint proxied
    uint8_t first_size
    uint8_t first[FIRST_BYTES]

cdef struct limits:
    uint32_t connections        # in all
    uint32_t guests             # of one source, not logged in
    uint32_t accepts            # a turn and listener
    uint32_t handshakes         # a turn
    uint32_t read               # bytes a turn and connection
    uint64_t output             # unsent bytes beyond which a connection is not read
    uint64_t output_guest       # the same before login
    uint32_t drain              # bytes
    uint16_t versions           # unknown ones of a source in a minute: the one that times out
    int64_t hello_interval      # ns
    int64_t hello_burst
    int64_t due[DUES]           # ns
    int64_t length[REASONS_COUNT]     # of the time-out, ns
    bint hard[REASONS_COUNT]          # a repeat doubles
    int64_t longest             # to which doubling goes, ns
    int64_t vouched             # not_protocol of a source that is vouched for, ns; 0: as of any other
    bint observe                # say who would be timed out, time out nobody

cdef struct counters:
    uint64_t accepted
    uint64_t accept_failures
    uint64_t handshakes
    uint64_t frames
    uint64_t closed[REASONS_COUNT]
    uint64_t states[STATES_COUNT]     # connections now

cdef struct loop:
    int epoll
    int64_t now                 # CLOCK_MONOTONIC at the start of the turn
    limits limits
    counters count
    timeout_table* tables       # [0] IPv4, [1] IPv6: the TimeoutTable's own
    timeout_table* vouched      # the same of the sources that are vouched for, or NULL
    unsigned int ipv6_prefix
    budget_table budgets
    conn* conns
    uint32_t places             # how many conns there are
    uint32_t used               # conns [0, used) have been used at least once
    chain unused                # places that are free again, through LINK_READY
    uint32_t open               # connections now
    chain due[DUES]
    chain ready
    uint32_t ready_count
    chain hellos                # on time, wait for their handshake
    listener* listeners
    uint32_t listener_count
    int64_t accept_after        # no accept() before
    network* exempt
    uint32_t exempt_count
    network* proxies            # whose connections begin with a PROXY protocol header
    uint32_t proxy_count
    uint8_t* buffer             # the one receive buffer: a partial frame is put before what arrives
    span* spans                 # the whole frames in it
    record* added
    uint32_t added_count
    source_key* ended
    uint32_t ended_count
    int64_t tick_at
    bint stopping
    int64_t stop_at
    PyObject* app               # borrowed from the Server, as is `server`
    PyObject* server
