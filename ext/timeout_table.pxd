"""The table of timed-out sources of one address family: add, look up, expire, evict.

A slot a source: found through the index, and standing in exactly one list. A running time-out stands in the list of
the second in which it ends (a ring of 32,768), of the 1/64 s when that second is under the hand (a fine wheel of 64),
or of all that end beyond the ring. Ended ones stand in the order of their ends for the 24 h of the repeat rule.
Rules: the clock is an argument (ns of CLOCK_MONOTONIC) and decides alone whether a time-out runs (now < end); the
sweep only tidies. No call does unbounded work, takes memory after table_init, or fails.
It must not know sockets, the log, the kernel map, wall-clock time, or what a reason means.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from source cimport (
    NO_SLOT, index_drop, index_find, index_free, index_init, index_put, source_index, source_key,
)

cdef extern from *:
    """
    #define TT_SECOND INT64_C(1000000000)
    #define TT_TICK (TT_SECOND / 64)
    #define TT_DAY (86400 * TT_SECOND)
    #define TT_LONGEST (30 * TT_DAY)
    #define TT_LAST_NOW (INT64_C(1) << 62)
    """
    const int64_t SECOND "TT_SECOND"
    const int64_t TICK "TT_TICK"
    const int64_t DAY "TT_DAY"              # how long an ended time-out counts for the repeat rule
    const int64_t LONGEST "TT_LONGEST"      # the longest time-out, also when doubled
    const int64_t LAST_NOW "TT_LAST_NOW"    # 146 years: `now` is held below, so that no sum of times overflows
    const int64_t NEVER "INT64_MAX"
    int lowest_bit "__builtin_ctzll"(unsigned long long) noexcept nogil

cdef enum:
    RING = 32768            # seconds in the ring
    TICKS = 64              # of the fine wheel, in one second
    FINE = RING             # list numbers: 0 .. RING - 1 the ring, FINE .. FINE + 63 the fine wheel, then three more
    FAR = FINE + TICKS      # ends beyond the ring, in no order
    ENDED = FAR + 1         # ended and remembered, longest ended first
    FREE = ENDED + 1
    LISTS = FREE + 1
    RING_WORDS = RING // 64
    WORDS = (LISTS + 63) // 64
    STEPS = 4096            # entries that one call moves between lists, or forgets, at most: about 0.1 ms


cdef struct timeout_slot:   # 40 bytes, 56 with its key: at most 64
    int64_t start           # ns; of the time-out that set the end. Negative when restored from before a reboot
    int64_t end             # ns; the first moment at which the source may come again
    uint32_t next           # the list it stands in: circular, doubly linked, so that it leaves any list at once
    uint32_t prev
    uint32_t dropped        # connections dropped during this time-out; counted by the caller
    uint16_t in_list
    uint16_t before         # time-outs of any kind before this one, each within 24 h of the last; 65,535 = or more
    uint8_t hard            # how many of them, this one included, were hard; 255 = or more
    uint8_t reason
    uint8_t spoke           # what the source's first bytes looked like; 0 = not known (yet)
    uint8_t proxied         # learnt behind a proxy: the kernel sees the proxy's address, not this one


cdef struct timeout_entry:  # a slot as saved: no links, times relative to the moment of saving
    source_key key
    int64_t start
    int64_t end
    uint32_t dropped
    uint16_t before
    uint8_t hard
    uint8_t reason
    uint8_t spoke
    uint8_t proxied
    uint8_t zero[6]


cdef struct timeout_table:
    source_index index
    timeout_slot* slots
    uint32_t capacity
    uint32_t fresh              # slots never used yet are fresh .. capacity - 1: their memory was never touched
    uint32_t running            # time-outs not swept yet
    uint32_t remembered         # ended ones
    uint32_t far_count          # entries in FAR
    uint32_t far_left           # of them, how many the examination under way has still to look at
    uint64_t evictions          # running time-outs that gave way because the table was full
    int64_t now                 # the latest seen, ns
    int64_t hand                # the second under the hand: all that ended in earlier ones has been swept
    int64_t far_next            # the second at which FAR is examined again
    uint32_t heads[LISTS]       # first slot of each list, or NO_SLOT
    uint64_t bits[WORDS]        # by list: not empty


# -------------------------------------------------------------------------------------------------------- the lists

cdef inline void list_append(timeout_table* t, uint32_t number, uint32_t slot) noexcept nogil:
    cdef timeout_slot* s = &t.slots[slot]
    cdef uint32_t head = t.heads[number]
    s.in_list = <uint16_t>number
    if number == FAR:
        t.far_count += 1
    if head == NO_SLOT:
        s.next = slot
        s.prev = slot
        t.heads[number] = slot
        t.bits[number >> 6] |= <uint64_t>1 << (number & 63)
        return
    s.next = head
    s.prev = t.slots[head].prev
    t.slots[s.prev].next = slot
    t.slots[head].prev = slot


cdef inline void list_take(timeout_table* t, uint32_t slot) noexcept nogil:
    cdef timeout_slot* s = &t.slots[slot]
    cdef uint32_t number = s.in_list
    if number == FAR:
        t.far_count -= 1
    if s.next == slot:
        t.heads[number] = NO_SLOT
        t.bits[number >> 6] &= ~(<uint64_t>1 << (number & 63))
        return
    t.slots[s.prev].next = s.next
    t.slots[s.next].prev = s.prev
    if t.heads[number] == slot:
        t.heads[number] = s.next


cdef inline void list_by_end(timeout_table* t, uint32_t slot) noexcept nogil:
    """Enters a slot that stands in no list where its end belongs, seen from the hand."""
    cdef int64_t end = t.slots[slot].end
    cdef int64_t second = end // SECOND
    if second <= t.hand:
        list_append(t, FINE + <uint32_t>(end % SECOND // TICK), slot)
    elif second - t.hand < RING:
        list_append(t, <uint32_t>(second % RING), slot)
    else:
        list_append(t, FAR, slot)


cdef inline int64_t next_second(const timeout_table* t) noexcept nogil:
    """The first second after the hand's in which a time-out of the ring ends, or NEVER."""
    cdef uint32_t start = <uint32_t>((t.hand + 1) % RING)
    cdef uint32_t word = start >> 6
    cdef uint64_t bits = t.bits[word] & (~<uint64_t>0 << (start & 63))
    cdef uint32_t words = RING_WORDS        # left to read; the first one a second time, for its part before `start`
    cdef int64_t bucket
    while bits == 0 and words != 0:
        word = (word + 1) % RING_WORDS
        bits = t.bits[word]
        words -= 1
    if bits == 0:
        return NEVER
    bucket = word * 64 + <uint32_t>lowest_bit(bits)
    return t.hand + 1 + (bucket - start + RING) % RING


# ------------------------------------------------------------------------------------------------ making and freeing

cdef inline void table_free(timeout_table* t) noexcept nogil:
    index_free(&t.index)
    free(t.slots)
    t.slots = NULL


cdef inline int64_t table_clock(timeout_table* t, int64_t now) noexcept nogil:
    """Notes the time. One earlier than the last seen counts as the last seen."""
    if now > LAST_NOW:
        now = LAST_NOW
    if now > t.now:
        t.now = now
    return t.now


cdef inline int table_init(
    timeout_table* t, uint32_t capacity, uint64_t k0, uint64_t k1, int64_t now
) noexcept nogil:
    """An empty table of `capacity` sources, hashed under k0, k1. -1: no memory, or a capacity outside 1..2^30."""
    memset(t, 0, sizeof(timeout_table))
    memset(t.heads, 0xFF, sizeof(t.heads))
    if index_init(&t.index, capacity, k0, k1) != 0:
        return -1
    t.slots = <timeout_slot*>calloc(capacity, sizeof(timeout_slot))
    if t.slots == NULL:
        table_free(t)
        return -1
    t.capacity = capacity
    t.hand = table_clock(t, now) // SECOND
    t.far_next = t.hand + RING // 2
    return 0


# ------------------------------------------------------------------------------------------------------- looking up

cdef inline timeout_slot* table_find(timeout_table* t, source_key key, int64_t now) noexcept nogil:
    """The running time-out of `key`, or NULL: none, or ended, swept or not. The caller counts `dropped`."""
    cdef uint32_t slot
    if t.running == 0:
        return NULL
    slot = index_find(&t.index, key)
    if slot == NO_SLOT or t.slots[slot].end <= (now if now > t.now else t.now):
        return NULL
    return &t.slots[slot]


# ------------------------------------------------------------------------------------------------ slots come and go

cdef inline void slot_leave(timeout_table* t, uint32_t slot) noexcept nogil:
    """Takes a slot out of its list and its count; the index is the caller's."""
    if t.slots[slot].in_list == ENDED:
        t.remembered -= 1
    else:
        t.running -= 1
    list_take(t, slot)


cdef inline void slot_end(timeout_table* t, uint32_t slot) noexcept nogil:
    slot_leave(t, slot)
    list_append(t, ENDED, slot)
    t.remembered += 1


cdef inline void slot_forget(timeout_table* t, uint32_t slot) noexcept nogil:
    index_drop(&t.index, slot)
    slot_leave(t, slot)
    list_append(t, FREE, slot)


cdef inline uint32_t slot_nearest_end(const timeout_table* t) noexcept nogil:
    """The first slot of the earliest list that is not empty. Only for a table in which something runs."""
    cdef uint64_t fine = t.bits[FINE >> 6]
    cdef uint32_t under_hand = t.heads[t.hand % RING]      # not spread over the fine wheel yet
    cdef int64_t second
    if fine != 0:
        return t.heads[FINE + lowest_bit(fine)]
    if under_hand != NO_SLOT:
        return under_hand
    second = next_second(t)
    return t.heads[FAR] if second == NEVER else t.heads[second % RING]


cdef inline uint32_t slot_claim(
    timeout_table* t, source_key key, int64_t now, source_key* evicted, bint* gave_way
) noexcept nogil:
    """A slot for a new `key`, in no list: a free one, else the longest ended, else the nearest to its end.

    The last is reported to the caller even when its time is already over: no sweep will name it any more.
    """
    cdef uint32_t slot = t.heads[FREE]
    if slot != NO_SLOT:
        list_take(t, slot)
    elif t.fresh < t.capacity:
        slot = t.fresh
        t.fresh += 1
    else:
        slot = t.heads[ENDED]
        if slot == NO_SLOT:
            slot = slot_nearest_end(t)
            evicted[0] = t.index.keys[slot]
            gave_way[0] = True
            t.evictions += t.slots[slot].end > now
        index_drop(&t.index, slot)
        slot_leave(t, slot)
    memset(&t.slots[slot], 0, sizeof(timeout_slot))
    index_put(&t.index, key, slot)
    return slot


# ----------------------------------------------------------------------------------------------- adding and removing

cdef inline int64_t doubled(int64_t length, uint32_t times, int64_t cap) noexcept nogil:
    """`length` doubled so many times, at most `cap`; but never less than `length` where that is longer than `cap`."""
    if length >= cap:
        return length
    if times >= 63 or length > cap >> times:
        return cap
    return length << times


cdef inline int64_t within(int64_t value, int64_t least, int64_t most) noexcept nogil:
    return least if value < least else most if value > most else value


cdef inline timeout_slot* table_add(
    timeout_table* t, source_key key, int64_t now, int64_t length, uint8_t reason, bint proxied, bint hard,
    int64_t hard_cap, source_key* evicted, bint* gave_way,
) noexcept nogil:
    """Starts or renews the time-out of `key`, for `length` ns (held within 0 and 30 days).

    A repeat, while a time-out runs or within 24 h of its end, counts up `before`; a hard one doubles `length` for each
    hard one before it, up to `hard_cap` ns. A running time-out is never shortened: one that ends sooner is counted, and
    the reason, start and `proxied` stay those of the one that holds. `*gave_way` tells whether another source gave its slot, and
    then `*evicted` which. The slot is valid until the next call that changes the table.
    """
    cdef uint32_t slot = index_find(&t.index, key)
    cdef timeout_slot* s
    gave_way[0] = False
    now = table_clock(t, now)
    if slot != NO_SLOT and t.slots[slot].end + DAY <= now:      # over by the clock, even if no sweep has forgotten it
        slot_forget(t, slot)
        slot = NO_SLOT
    if slot == NO_SLOT:
        slot = slot_claim(t, key, now, evicted, gave_way)
        s = &t.slots[slot]
        s.end = now
    else:
        slot_leave(t, slot)
        s = &t.slots[slot]
        s.before += s.before < 0xFFFF
    length = within(length, 0, LONGEST)
    if hard:
        length = doubled(length, s.hard, within(hard_cap, 0, LONGEST))
        s.hard += s.hard < 0xFF
    if s.end <= now:
        s.dropped = 0
    if now + length >= s.end:
        s.start = now
        s.end = now + length
        s.reason = reason
        s.spoke = 0
        s.proxied = proxied
    list_by_end(t, slot)
    t.running += 1
    return s


cdef inline bint table_remove(timeout_table* t, source_key key) noexcept nogil:
    """Forgets a source wholly, its repeats too. False: it was neither timed out nor remembered."""
    cdef uint32_t slot = index_find(&t.index, key)
    if slot == NO_SLOT:
        return False
    slot_forget(t, slot)
    return True


# --------------------------------------------------------------------------------------------------------- expiring

cdef inline uint32_t sweep_list(
    timeout_table* t, uint32_t number, source_key* out, uint32_t count, uint32_t room
) noexcept nogil:
    """Ends what stands in a list; returns `count` raised by their number, at most `room`."""
    cdef uint32_t slot = t.heads[number]
    while slot != NO_SLOT and count < room:
        out[count] = t.index.keys[slot]
        count += 1
        slot_end(t, slot)
        slot = t.heads[number]
    return count


cdef inline void spread(timeout_table* t) noexcept nogil:
    """Spreads the second under the hand over the fine wheel."""
    cdef uint32_t bucket = <uint32_t>(t.hand % RING)
    cdef uint32_t slot = t.heads[bucket]
    cdef int steps = STEPS
    while slot != NO_SLOT and steps != 0:
        list_take(t, slot)
        list_by_end(t, slot)
        slot = t.heads[bucket]
        steps -= 1


cdef inline uint32_t sweep_second(
    timeout_table* t, int64_t now, source_key* out, uint32_t count, uint32_t room
) noexcept nogil:
    """Ends what the second under the hand holds: all of it once it is over, else the ticks that are over."""
    cdef bint over = t.hand < now // SECOND
    cdef int ticks = TICKS if over else <int>(now % SECOND // TICK)
    if not over:
        spread(t)
    while count < room and t.bits[FINE >> 6] != 0 and lowest_bit(t.bits[FINE >> 6]) < ticks:
        count = sweep_list(t, FINE + lowest_bit(t.bits[FINE >> 6]), out, count, room)
    if over:
        count = sweep_list(t, <uint32_t>(t.hand % RING), out, count, room)
    return count


cdef inline uint32_t examine_far(
    timeout_table* t, int64_t now, source_key* out, uint32_t count, uint32_t room
) noexcept nogil:
    """Moves into the ring what has come within its reach, twice a turn, a part a call.

    What enters FAR ends a whole turn later, so half a turn is left to finish; only after a jump of the clock has some
    of it ended.
    """
    cdef uint32_t slot
    cdef int steps = STEPS
    if t.hand >= t.far_next:
        t.far_left = t.far_count
        t.far_next = t.hand + RING // 2
    t.far_left = min(t.far_left, t.far_count)       # some may have left since the last part: removed or evicted
    while t.far_left != 0 and steps != 0 and count < room:
        slot = t.heads[FAR]
        t.far_left -= 1
        steps -= 1
        if t.slots[slot].end // TICK < now // TICK:
            out[count] = t.index.keys[slot]
            count += 1
            slot_end(t, slot)
        else:
            list_take(t, slot)
            list_by_end(t, slot)
    return count


cdef inline uint32_t table_expire(timeout_table* t, int64_t now, source_key* out, uint32_t room) noexcept nogil:
    """Sweeps the time-outs whose 1/64 s is over; writes at most `room` sources to `out` and returns how many.

    As many as `room`: there may be more, call again. If fewer, and the call met its bound of 4,096 moves, table_next
    says `now`. Also forgets what ended 24 h ago, which nobody is told.
    """
    cdef uint32_t count = 0
    cdef int64_t second, following
    cdef uint32_t slot
    cdef int steps = STEPS
    now = table_clock(t, now)
    second = now // SECOND
    while True:
        count = sweep_second(t, now, out, count, room)
        if t.hand == second or count == room:
            break
        following = next_second(t)
        t.hand = following if following < second else second
    if t.hand == second:
        count = examine_far(t, now, out, count, room)
    slot = t.heads[ENDED]
    while slot != NO_SLOT and t.slots[slot].end + DAY <= now and steps != 0:
        slot_forget(t, slot)
        slot = t.heads[ENDED]
        steps -= 1
    return count


cdef inline int64_t table_next(const timeout_table* t, int64_t now) noexcept nogil:
    """When to call table_expire next, ns: `now` when that is due, NEVER when nothing runs."""
    cdef uint64_t fine = t.bits[FINE >> 6]
    cdef int64_t due = NEVER
    if t.running == 0:
        return NEVER
    if t.heads[t.hand % RING] != NO_SLOT or t.far_left != 0:
        return now
    if fine != 0:
        due = t.hand * SECOND + (lowest_bit(fine) + 1) * TICK
    else:
        due = next_second(t)
        if due != NEVER:
            due *= SECOND
    if t.far_count != 0 and t.far_next * SECOND < due:
        due = t.far_next * SECOND
    return due if due > now else now


# ----------------------------------------------------------------------------------------------- saving and restoring

cdef inline bint slot_is_known(const timeout_table* t, uint32_t slot, int64_t now) noexcept nogil:
    """Whether a slot below `fresh` holds a time-out that runs, or ended less than 24 h ago."""
    return t.slots[slot].in_list != FREE and t.slots[slot].end + DAY > now


cdef inline void slot_save(const timeout_table* t, uint32_t slot, int64_t now, timeout_entry* entry) noexcept nogil:
    """Fills `entry`, its times relative to `now`."""
    cdef const timeout_slot* s = &t.slots[slot]
    memset(entry, 0, sizeof(timeout_entry))
    entry.key = t.index.keys[slot]
    entry.start = s.start - now
    entry.end = s.end - now
    entry.dropped = s.dropped
    entry.before = s.before
    entry.hard = s.hard
    entry.reason = s.reason
    entry.spoke = s.spoke
    entry.proxied = s.proxied


cdef inline bint entry_is_sane(const timeout_entry* entry) noexcept nogil:
    """Whether slot_save can have written it: only such ones are within the bounds that table_restore relies on."""
    return (
        -DAY < entry.end <= LONGEST
        and entry.end - LONGEST <= entry.start <= entry.end
        and entry.start <= 0
    )


cdef inline bint table_restore(
    timeout_table* t, const timeout_entry* entry, int64_t now, int64_t elapsed
) noexcept nogil:
    """Enters a sane entry that was saved `elapsed` ns ago (0 .. 2^61); returns whether it is in the table now.

    A source that the table knows with a later end keeps that. Restored in the order of their ends, more entries than
    slots leave those that end last; a remembered one never costs a running one its slot.
    """
    cdef int64_t end
    cdef uint32_t slot = index_find(&t.index, entry.key)
    cdef source_key evicted
    cdef bint gave_way = False
    cdef timeout_slot* s
    now = table_clock(t, now)
    end = now + (entry.end - elapsed)
    if end + DAY <= now:
        return False
    if slot != NO_SLOT:
        if t.slots[slot].end >= end:
            return False
        slot_leave(t, slot)
    elif end <= now and t.running == t.capacity:
        return False
    else:
        slot = slot_claim(t, entry.key, now, &evicted, &gave_way)
    s = &t.slots[slot]
    s.start = end - (entry.end - entry.start)
    s.end = end
    s.dropped = entry.dropped
    s.before = entry.before
    s.hard = entry.hard
    s.reason = entry.reason
    s.spoke = entry.spoke
    s.proxied = entry.proxied != 0
    if end <= now:
        list_append(t, ENDED, slot)
        t.remembered += 1
    else:
        list_by_end(t, slot)
        t.running += 1
    return True
