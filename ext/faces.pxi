# The Python faces of what the loop is made of: the lists of names, the limits, the frame verdict, the source index, the
# time-out table. Included by _core.pyx, so that there is one extension module. It must not know the loop.

cdef tuple reason_row(int i):
    return tt_reasons[i].name.decode(), bool(tt_reasons[i].times_out), tt_reasons[i].meaning.decode()


cdef tuple state_row(int i):
    return tt_states[i].name.decode(), tt_states[i].meaning.decode()


REASONS = tuple([reason_row(i) for i in range(REASONS_COUNT)])
STATES = tuple([state_row(i) for i in range(STATES_COUNT)])
REASON_CODES = {name: code for code, (name, _, _) in enumerate(REASONS)}
STATE_CODES = {name: code for code, (name, _) in enumerate(STATES)}
HARD_REASONS = frozenset({"not_protocol", "tampered"})     # whose repeat doubles the time-out
PROTOCOL = MappingProxyType({   # the numbers of docs/protocol.md
    "HEADER": HEADER, "VERSION": PROTOCOL_VERSION, "TAG": TAG,
    "HELLO": HELLO, "WELCOME": WELCOME, "DATA": DATA, "REFUSE": REFUSE,
    "HELLO_LEAST": HELLO_LEAST, "HELLO_MOST": HELLO_MOST,
    "DATA_LEAST": DATA_LEAST, "DATA_MOST_GUEST": DATA_MOST_GUEST, "DATA_MOST": DATA_MOST,
})


cdef limits limits_of(object config, uint32_t places) except *:
    """What a tt.config.Config allows, in the loop's units; `places` are the connections in all."""
    cdef limits new
    memset(&new, 0, sizeof(new))
    new.connections = places
    new.guests = config.connections_per_source
    new.accepts = config.accepts_per_turn
    new.handshakes = config.handshakes_per_turn
    new.read = config.read_per_turn
    new.output = config.output_limit
    new.output_guest = config.output_limit_before_login
    new.drain = config.drain_limit
    new.versions = config.bad_version_limit
    new.hello_interval = int(1e9 / config.hello_rate)
    new.hello_burst = config.hello_burst
    for due, seconds in (
        (DUE_CLOSING, config.drain_deadline), (DUE_HELLO, config.hello_deadline), (DUE_RETRY, 1 / config.hello_rate),
        (DUE_FRAME_GUEST, config.frame_deadline), (DUE_FRAME_USER, config.frame_deadline),
        (DUE_IDLE_GUEST, config.idle_before_login), (DUE_IDLE_USER, config.idle_after_login),
    ):
        new.due[<int>due] = int(seconds * 1e9)
    for name, code in REASON_CODES.items():
        new.hard[<int>code] = config.escalate and name in HARD_REASONS
        new.length[<int>code] = int(getattr(config, f"timeout_{name}", config.timeout) * 1e9)
    new.longest = int(config.timeout_max * 1e9)
    new.vouched = int(config.timeout_vouched * 1e9) if config.vouching else 0
    new.observe = config.observe
    return new


def judge_frame(bytes data not None, str state not None):
    """The verdict on the bytes with which a frame begins, in a state ("new", "open" or "logged_in").

    ("more", n), ("whole", n) or (a reason, 0); n is the frame's size once its header is there, else 0.
    """
    cdef uint32_t total
    cdef int verdict = frame_verdict(
        <const uint8_t*>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), <tt_state><int>STATE_CODES[state], &total)
    if verdict == FRAME_MORE:
        return "more", total
    if verdict == FRAME_WHOLE:
        return "whole", total
    return REASONS[verdict][0], 0


def judge_proxy_header(bytes data not None):
    """The verdict on the bytes with which a proxy begins a connection.

    ("more", 0, "", 0), ("whole", n, address, port) or (a reason, 0, "", 0); n is the header's size, and the address ""
    where the proxy speaks for itself.
    """
    cdef uint32_t total = 0
    cdef proxied client
    cdef int verdict = proxy_verdict(<const uint8_t*>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), &total, &client)
    if verdict == FRAME_MORE:
        return "more", 0, "", 0
    if verdict != FRAME_WHOLE:
        return REASONS[verdict][0], 0, "", 0
    return "whole", total, source_format(source_from_v6(client.address, 128), 128) if client.told else "", client.port


cdef uint64_t read_key(const uint8_t* data) noexcept nogil:
    cdef uint64_t value = 0
    memcpy(&value, data, sizeof(value))
    return value


cdef source_key source_parse(str text, unsigned int ipv6_prefix) except *:
    """The source that an address, or a source's own text, stands for."""
    cdef source_key key, mask
    cdef bytes packed
    cdef str address, slash, prefix
    address, slash, prefix = text.partition("/")
    try:
        packed = ip_address(address).packed
    except ValueError:
        raise ValueError(f"{text!r} is no source: it must be an address, like 192.0.2.1 or 2001:db8::1") from None
    if len(packed) == 4:
        key = source_from_v4(int.from_bytes(packed, "big"))
    elif slash and ipv6_prefix < 96 and not ip_address(address).ipv4_mapped:  # 64:ff9b::/64 is no IPv4 address
        key.hi = read_big_endian(<const uint8_t*>PyBytes_AS_STRING(packed))
        key.lo = read_big_endian(<const uint8_t*>PyBytes_AS_STRING(packed) + 8)
        mask = source_mask(key, ipv6_prefix)
        key.hi &= mask.hi
        key.lo &= mask.lo
    else:
        key = source_from_v6(<const uint8_t*>PyBytes_AS_STRING(packed), ipv6_prefix)
    if slash and (source_is_v4(key) or source_is_link_local(key) or prefix != str(ipv6_prefix)):
        raise ValueError(f"{text!r} is no source: a prefix must be IPv6's /{ipv6_prefix} here; give the address alone")
    return key


cdef str source_format(source_key key, unsigned int ipv6_prefix):
    """The canonical text of a source: 192.0.2.1, 2001:db8::/64, fe80::1."""
    cdef char text[INET6_ADDRSTRLEN]
    cdef int family = AF_INET if source_is_v4(key) else AF_INET6
    cdef str address = inet_ntop(family, PyBytes_AS_STRING(source_pack(key)), text, sizeof(text)).decode("ascii")
    return address if family == AF_INET or ipv6_prefix == 128 or source_is_link_local(key) else f"{address}/{ipv6_prefix}"


cdef bytes source_pack(source_key key):
    """The address in network order: 4 bytes of IPv4, 16 of IPv6 with the bits behind its prefix 0."""
    cdef uint32_t address = htonl(<uint32_t>key.lo)
    if source_is_v4(key):
        return PyBytes_FromStringAndSize(<const char*>&address, sizeof(address))
    return (int(key.hi) << 64 | int(key.lo)).to_bytes(16, "big")


cdef source_key source_given(object source, unsigned int ipv6_prefix) except *:
    """A source as text, or packed as source_pack does it."""
    cdef const uint8_t* p
    cdef source_key key
    if not isinstance(source, bytes):
        return source_parse(source, ipv6_prefix)
    p = <const uint8_t*>PyBytes_AS_STRING(source)
    if len(<bytes>source) == 4:
        return source_from_v4(<uint32_t>p[0] << 24 | <uint32_t>p[1] << 16 | <uint32_t>p[2] << 8 | p[3])
    if len(<bytes>source) != 16:
        raise ValueError(f"{len(<bytes>source)} bytes are no packed source: it must be 4 or 16")
    key.hi, key.lo = read_big_endian(p), read_big_endian(p + 8)
    return key


def source_text(str address, unsigned int ipv6_prefix=64):
    """The source that `address` counts as, in canonical text. ValueError: it is no address."""
    check_prefix(ipv6_prefix)
    return source_format(source_parse(address, ipv6_prefix), ipv6_prefix)


cdef int check_prefix(unsigned int ipv6_prefix) except -1:
    if not 1 <= ipv6_prefix <= 128:
        raise ValueError(f"the IPv6 prefix of a source is {ipv6_prefix}: it must be 1..128")
    return 0


cdef bytes seed_of(object seed):
    cdef bytes key = os.urandom(16) if seed is None else bytes(seed)
    if len(key) != 16:
        raise ValueError(f"the seed of a source hash has {len(key)} bytes: it must have 16")
    return key


@cython.final
cdef class SourceIndex:
    """Sources to slot numbers: the index of source.pxd alone, with its preconditions checked."""

    cdef source_index index

    def __cinit__(self, uint32_t capacity, seed=None):
        cdef bytes key = seed_of(seed)
        cdef const uint8_t* k = <const uint8_t*>PyBytes_AS_STRING(key)
        if index_init(&self.index, capacity, read_key(k), read_key(k + 8)) != 0:
            raise MemoryError(f"no memory for an index of {capacity} sources")

    def __dealloc__(self):
        index_free(&self.index)

    def hash(self, str source):
        """SipHash-1-3 of the source under the seed."""
        return source_hash(source_parse(source, 128), self.index.k0, self.index.k1)

    def put(self, str source, uint32_t slot):
        """Enters a source that is not in yet, under a slot that is not in use. ValueError: the slot is too high."""
        if slot >= self.index.capacity:
            raise ValueError(f"slot {slot}: it must be below the capacity, {self.index.capacity}")
        index_put(&self.index, source_parse(source, 128), slot)

    def find(self, str source):
        """The slot of a source, or None."""
        cdef uint32_t slot = index_find(&self.index, source_parse(source, 128))
        return None if slot == NO_SLOT else slot

    def drop(self, uint32_t slot):
        """Takes out the source under a slot, if there is one."""
        if slot < self.index.capacity:
            index_drop(&self.index, slot)


cdef bint is_touched(source_key source, unsigned int ipv6_prefix, const network* items, uint32_t count) noexcept nogil:
    """Whether one of the networks and the source have an address in common."""
    cdef source_key all_of_it = source_mask(source, ipv6_prefix)
    cdef uint32_t i
    for i in range(count):
        if (items[i].is_v4 == source_is_v4(source)
                and (source.hi ^ items[i].address.hi) & items[i].mask.hi & all_of_it.hi == 0
                and (source.lo ^ items[i].address.lo) & items[i].mask.lo & all_of_it.lo == 0):
            return True
    return False


@cython.final
cdef class Networks:
    """IP networks (of the module ipaddress), to ask quickly whether one of them touches a source."""

    cdef network* items
    cdef uint32_t count
    cdef unsigned int ipv6_prefix

    def __cinit__(self, networks=(), unsigned int ipv6_prefix=64):
        cdef uint32_t i
        self.ipv6_prefix = ipv6_prefix
        self.items = <network*>calloc(len(networks) + 1, sizeof(network))
        if self.items == NULL:
            raise MemoryError(f"no memory for {len(networks)} networks")
        for i, item in enumerate(networks):
            shift, high = (96, 0xFFFF << 32) if item.version == 4 else (0, 0)
            address = int(item.network_address) | high
            mask = (1 << 128) - (1 << (128 - item.prefixlen - shift))
            self.items[i].address.hi, self.items[i].address.lo = address >> 64, address & 0xFFFFFFFFFFFFFFFF
            self.items[i].mask.hi, self.items[i].mask.lo = mask >> 64, mask & 0xFFFFFFFFFFFFFFFF
            self.items[i].is_v4 = item.version == 4
            self.count += 1

    def __dealloc__(self):
        free(self.items)

    def touches(self, source):
        """Whether one of them and the source, given as any of its addresses or packed, have an address in common."""
        return bool(is_touched(source_given(source, self.ipv6_prefix), self.ipv6_prefix, self.items, self.count))


class TimeoutRecord(NamedTuple):
    """One source of the table. Times are ns of CLOCK_MONOTONIC; negative ones lie before the last reboot."""

    source: str         # canonical text
    start: int
    end: int            # the first moment at which the source may come again
    reason: int
    spoke: int          # what its first bytes looked like; 0 = not known
    before: int         # time-outs of any kind before this one, each within 24 h of the one before
    hard: int           # how many of these, this one included, were hard
    dropped: int        # connections dropped during this time-out
    proxied: bool       # learnt behind a proxy: no entry of the kernel's could drop it


cdef struct dump_header:    # host byte order: a dump stays on its host
    uint32_t layout         # DUMP_LAYOUT; another one, or another byte order, is refused
    uint32_t ipv6_prefix
    uint64_t count          # entries that follow

cdef enum:
    DUMP_LAYOUT = 0x01006C74
    BATCH = 256             # sources that one call of table_expire hands out here


cdef int by_end(const void* a, const void* b) noexcept nogil:
    cdef int64_t x = (<const timeout_entry*>a).end
    cdef int64_t y = (<const timeout_entry*>b).end
    return (x > y) - (x < y)


# A new time-out, as the application is told: its source as text and as packed bytes, its reason, start and end (ns of
# CLOCK_MONOTONIC; both 0 where nobody was timed out, because the source is exempt or the server only observes), how
# often before, whether exempt, up to 32 of its first bytes, and whether it was learnt behind a proxy.
TimedOut = namedtuple("TimedOut", "source key reason start end before exempt first proxied", defaults=(False,))


@cython.final
cdef class TimeoutTable:
    """The timed-out sources, IPv4 and IPv6 apart.

    `capacity` is 1..2^20 sources a family, `ipv6_prefix` how many bits make an IPv6 source, `seed` 16 bytes (random
    when None). Times and lengths are integer ns; `now` is CLOCK_MONOTONIC, and one earlier than the last seen counts
    as the last seen. Any address of a source may be given for it, as text, or the source packed, as TimedOut has it:
    find is then 5 times as fast, and 14 where there is nothing to find. Not for two threads at once.
    """

    cdef timeout_table families[2]              # IPv4, IPv6
    cdef readonly unsigned int ipv6_prefix
    cdef readonly str gave_way                  # the source whose slot the last add took although it was not swept

    def __cinit__(self, uint32_t capacity=65536, *, unsigned int ipv6_prefix=64, int64_t now=0, seed=None):
        cdef bytes key = seed_of(seed)
        cdef const uint8_t* k = <const uint8_t*>PyBytes_AS_STRING(key)
        cdef int i
        check_prefix(ipv6_prefix)
        self.ipv6_prefix = ipv6_prefix
        if not 1 <= capacity <= 1 << 20:
            raise ValueError(f"the table size is {capacity}: it must be 1..{1 << 20} sources a family")
        for i in range(2):
            if table_init(&self.families[i], capacity, read_key(k), read_key(k + 8), now) != 0:
                raise MemoryError(f"no memory for a table of {capacity} sources: make the table smaller")

    def __dealloc__(self):
        table_free(&self.families[0])
        table_free(&self.families[1])

    cdef timeout_table* family(self, source_key key) noexcept nogil:
        return &self.families[0 if source_is_v4(key) else 1]

    cdef object record(self, const timeout_table* t, uint32_t slot):
        cdef const timeout_slot* s = &t.slots[slot]
        return TimeoutRecord(
            source_format(t.index.keys[slot], self.ipv6_prefix),
            s.start, s.end, s.reason, s.spoke, s.before, s.hard, s.dropped, bool(s.proxied),
        )

    @property
    def running(self):
        """Time-outs that were not swept yet."""
        return self.families[0].running + self.families[1].running

    @property
    def remembered(self):
        """Ended time-outs kept for the repeat rule."""
        return self.families[0].remembered + self.families[1].remembered

    @property
    def evictions(self):
        """Running time-outs that gave way because the table was full."""
        return self.families[0].evictions + self.families[1].evictions

    def add(
        self, str source, uint8_t reason, int64_t length_ns, int64_t now, *, bint proxied=False, bint hard=False,
        int64_t cap_ns=21_600_000_000_000,
    ):
        """Starts or renews a time-out as table_add does; returns its TimeoutRecord.

        Afterwards `gave_way` names the source that lost its slot, or is None. ValueError: no source, or a length or cap
        outside 1 ns .. 30 days.
        """
        cdef source_key key = source_parse(source, self.ipv6_prefix)
        cdef timeout_table* t = self.family(key)
        cdef timeout_slot* s
        cdef source_key evicted
        cdef bint gave_way = False
        if not (0 < length_ns <= LONGEST and 0 < cap_ns <= LONGEST):
            raise ValueError(f"a time-out of {length_ns} ns, at most {cap_ns} ns: both must be 1 ns .. 30 days")
        s = table_add(t, key, now, length_ns, reason, proxied, hard, cap_ns, &evicted, &gave_way)
        self.gave_way = source_format(evicted, self.ipv6_prefix) if gave_way else None
        return self.record(t, <uint32_t>(s - t.slots))

    def find(self, source, int64_t now):
        """The running time-out of a source as a TimeoutRecord, or None."""
        cdef source_key key = source_given(source, self.ipv6_prefix)
        cdef timeout_table* t = self.family(key)
        cdef timeout_slot* s = table_find(t, key, now)
        return None if s == NULL else self.record(t, <uint32_t>(s - t.slots))

    def dropped(self, source):
        """Connections dropped during the time-out of a source; None where it neither runs nor ended within 24 h."""
        cdef source_key key = source_given(source, self.ipv6_prefix)
        cdef timeout_table* t = self.family(key)
        cdef uint32_t slot = index_find(&t.index, key)
        return None if slot == NO_SLOT else t.slots[slot].dropped

    def set_spoke(self, source, uint8_t spoke, int64_t now):
        """Notes what the first bytes of a source looked like; nothing happens when it is not timed out."""
        cdef source_key key = source_given(source, self.ipv6_prefix)
        cdef timeout_slot* s = table_find(self.family(key), key, now)
        if s != NULL:
            s.spoke = spoke

    def remove(self, str source):
        """Forgets a source, its repeats too. False: it was neither timed out nor remembered."""
        cdef source_key key = source_parse(source, self.ipv6_prefix)
        return bool(table_remove(self.family(key), key))

    def expire(self, int64_t now, uint32_t limit=4096):
        """Sweeps what has ended, 1/64 s late at most; the sources, at most `limit`. As many as `limit`: call again."""
        cdef source_key out[BATCH]
        cdef uint32_t i, k, room, count
        cdef list ended = []
        for i in range(2):
            while True:
                room = min(<uint32_t>BATCH, limit - <uint32_t>len(ended))
                count = table_expire(&self.families[i], now, out, room)
                for k in range(count):
                    ended.append(source_format(out[k], self.ipv6_prefix))
                if count < room or room == 0:
                    break
        return ended

    def next(self, int64_t now):
        """When to call expire next, ns: `now` when that is due, None when nothing runs."""
        cdef int64_t due = min(table_next(&self.families[0], now), table_next(&self.families[1], now))
        return None if due == NEVER else due

    def page(self, uint64_t start, uint32_t places, int64_t now):
        """The running time-outs in `places` places of the table from place `start` on, in no order.

        (records, where to go on); the last page goes on at None.  Between pages the table may change: what runs all the
        while is in exactly one page.
        """
        cdef list records = []
        cdef timeout_table* t
        cdef uint64_t place
        cdef uint32_t slot
        now = max(now, self.families[0].now, self.families[1].now)
        for place in range(start, start + places):
            t = &self.families[0]
            if place >= t.fresh:
                place -= t.fresh
                t = &self.families[1]
                if place >= t.fresh:
                    return records, None
            slot = <uint32_t>place
            if slot_is_known(t, slot, now) and t.slots[slot].end > now:
                records.append(self.record(t, slot))
        return records, start + places

    def within(self, Networks networks not None, int64_t now):
        """The sources with a running time-out that the networks touch, as text; looked for in C."""
        cdef list found = []
        cdef timeout_table* t
        cdef uint32_t slot
        cdef int i
        for i in range(2):
            t = &self.families[i]
            for slot in range(t.fresh):
                if (slot_is_known(t, slot, now) and t.slots[slot].end > now
                        and is_touched(t.index.keys[slot], self.ipv6_prefix, networks.items, networks.count)):
                    found.append(source_format(t.index.keys[slot], self.ipv6_prefix))
        return found

    def entries(self, int64_t now, *, bint remembered=False):
        """The running time-outs as TimeoutRecords, in no order; with `remembered` also those ended in the last 24 h."""
        cdef list records = []
        cdef timeout_table* t
        cdef uint32_t slot
        cdef int i
        for i in range(2):
            t = &self.families[i]
            now = max(now, t.now)
            for slot in range(t.fresh):
                if slot_is_known(t, slot, now) and (remembered or t.slots[slot].end > now):
                    records.append(self.record(t, slot))
        return records

    def dump(self, int64_t now):
        """All that is known, as bytes for `load`: a copy made in C, fast enough for the loop's thread.

        A header (layout, IPv6 prefix, count) and 48 bytes a source; the times are relative to `now`.
        """
        cdef dump_header header
        cdef timeout_table* t
        cdef uint32_t slot
        cdef uint64_t count = 0
        cdef bytes data
        cdef char* at
        cdef timeout_entry entry
        cdef int i
        now = max(table_clock(&self.families[0], now), table_clock(&self.families[1], now))
        for i in range(2):
            t = &self.families[i]
            for slot in range(t.fresh):
                count += slot_is_known(t, slot, now)
        header.layout, header.ipv6_prefix, header.count = DUMP_LAYOUT, self.ipv6_prefix, count
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(sizeof(header) + count * sizeof(entry)))
        at = PyBytes_AS_STRING(data)
        memcpy(at, &header, sizeof(header))
        at += sizeof(header)
        for i in range(2):
            t = &self.families[i]
            for slot in range(t.fresh):
                if slot_is_known(t, slot, now):
                    slot_save(t, slot, now, &entry)
                    memcpy(at, &entry, sizeof(entry))
                    at += sizeof(entry)
        return data

    def load(self, bytes data, int64_t now, int64_t elapsed=0, *, bint same_names=True):
        """Enters what a dump holds, made `elapsed` ns ago (0 or more); returns how many sources that were.

        What ended more than 24 h ago is left out, and so are the IPv6 sources of a dump made with another prefix. A
        source that is known with a later end keeps that. Without `same_names` the numbers of reasons and of what was spoken
        mean something else by now, and are forgotten. ValueError, and nothing entered: the bytes are no dump.
        """
        cdef dump_header header
        cdef uint64_t i, count = 0
        cdef timeout_entry* saved
        if elapsed < 0:
            raise ValueError(f"elapsed is {elapsed} ns: it must be 0 or more")
        elapsed = min(elapsed, <int64_t>1 << 61)
        if len(data) < <Py_ssize_t>sizeof(header):
            raise ValueError(f"{len(data)} bytes are no dump of a time-out table: too short")
        memcpy(&header, PyBytes_AS_STRING(data), sizeof(header))
        if header.layout != DUMP_LAYOUT:
            raise ValueError("no dump of a time-out table, or one of another version or byte order")
        if header.count > 1 << 21 or <uint64_t>len(data) != sizeof(header) + header.count * sizeof(timeout_entry):
            raise ValueError(f"a dump of {len(data)} bytes does not hold the {header.count} sources that it names")
        if header.count == 0:
            return 0
        saved = <timeout_entry*>malloc(header.count * sizeof(timeout_entry))
        if saved == NULL:
            raise MemoryError(f"no memory to restore {header.count} sources")
        try:
            memcpy(saved, PyBytes_AS_STRING(data) + sizeof(header), header.count * sizeof(timeout_entry))
            for i in range(header.count):
                if not entry_is_sane(&saved[i]):
                    raise ValueError(f"source {i + 1} of the dump has times that no time-out has")
                if not same_names:
                    saved[i].reason, saved[i].spoke = <uint8_t>R_ADOPTED, 0
            qsort(saved, header.count, sizeof(timeout_entry), by_end)
            for i in range(header.count):
                if header.ipv6_prefix == self.ipv6_prefix or source_is_v4(saved[i].key):
                    count += table_restore(self.family(saved[i].key), &saved[i], now, elapsed)
        finally:
            free(saved)
        return count
