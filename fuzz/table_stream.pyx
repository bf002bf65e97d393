"""Fuzz target: the time-out table, ext/timeout_table.pxd, driven by a stream of operations.

Input: a byte that picks the capacity, then operations of 4 bytes: which one, which source, and by how much.  Properties
after each: every slot stands in one list and that list is whole, counts and bits agree with the lists, the index finds
what is known and nothing else, and no running time-out is lost before its end, none found after it.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.stdlib cimport abort
from libc.string cimport memset

from source cimport NO_SLOT, index_find, source_equal, source_from_v4, source_key
from timeout_table cimport (
    DAY, ENDED, FAR, FREE, LISTS, LONGEST, RING, SECOND, TICK, entry_is_sane, slot_save, table_add,
    table_expire, table_find, table_free, table_init, table_next, table_remove, table_restore, timeout_entry,
    timeout_slot, timeout_table,
)

cdef enum:
    SOURCES = 32
    ROOM = 8


cdef struct expectation:    # of one source, kept apart from the table
    int64_t end             # ns; 0: not timed out, or it gave way


cdef inline void must(bint holds) noexcept nogil:
    if not holds:
        abort()


cdef void check(timeout_table* t, expectation* sources, int64_t now) noexcept nogil:
    cdef uint32_t slot, ended = 0, free_ = 0, far = 0, i
    cdef timeout_slot* s
    cdef timeout_slot* found
    for slot in range(t.fresh):
        s = &t.slots[slot]
        must(s.in_list < LISTS)
        must(t.slots[s.next].prev == slot and t.slots[s.prev].next == slot)
        must(t.slots[s.next].in_list == s.in_list and t.heads[s.in_list] != NO_SLOT)
        must(t.slots[t.heads[s.in_list]].in_list == s.in_list)
        must(t.bits[s.in_list >> 6] >> (s.in_list & 63) & 1)
        ended += s.in_list == ENDED
        free_ += s.in_list == FREE
        far += s.in_list == FAR
        must((index_find(&t.index, t.index.keys[slot]) == slot) or s.in_list == FREE)
    must(t.remembered == ended and t.far_count == far and t.running == t.fresh - ended - free_)
    for i in range(SOURCES):
        found = table_find(t, source_from_v4(i), now)
        must((found != NULL) == (sources[i].end > now))
        must(found == NULL or found.end == sources[i].end)
    must(table_next(t, now) >= now)


cdef void check_heads(timeout_table* t) noexcept nogil:
    """Every list that has a head has its bit, and no other."""
    cdef uint32_t number
    for number in range(LISTS):
        must((t.heads[number] != NO_SLOT) == (t.bits[number >> 6] >> (number & 63) & 1))


cdef int64_t span_of(uint8_t how, uint8_t much) noexcept nogil:
    """A length of time: from below a tick to beyond the ring and the longest time-out."""
    cdef int64_t[8] units
    units[0], units[1], units[2], units[3] = 1, TICK // 2, TICK, SECOND // 3
    units[4], units[5], units[6], units[7] = SECOND, 300 * SECOND, RING * SECOND // 100, DAY // 5
    return units[how & 7] * much


cdef void expire(timeout_table* t, expectation* sources, int64_t now) noexcept nogil:
    """Sweeps until nothing is due: only what is over, each once."""
    cdef source_key[ROOM] out
    cdef uint32_t count, i
    cdef int calls = 64
    while calls:
        calls -= 1
        count = table_expire(t, now, out, ROOM)
        must(count <= ROOM)
        for i in range(count):
            must(sources[<uint32_t>out[i].lo & (SOURCES - 1)].end <= now)
        if count < ROOM and table_next(t, now) > now:
            return
    abort()     # 32 sources are swept in far fewer


cdef void restore(
    timeout_table* t, expectation* sources, int64_t now, uint32_t i, int64_t length, int64_t elapsed
) noexcept nogil:
    cdef timeout_entry entry
    cdef timeout_slot* found
    cdef source_key key = source_from_v4(i)
    memset(&entry, 0, sizeof(entry))
    entry.key = key
    entry.end = length - DAY
    entry.start = min(<int64_t>0, entry.end) - length // 2
    if not entry_is_sane(&entry) or t.running == t.capacity:    # else somebody gives way, and only table_add says who
        return
    table_restore(t, &entry, now, elapsed)
    found = table_find(t, key, now)
    sources[i].end = found.end if found != NULL else 0
    must(found == NULL or found.end >= now + entry.end - elapsed)


cdef public int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) noexcept nogil:
    cdef timeout_table t
    cdef expectation[SOURCES] sources
    cdef timeout_slot* s
    cdef timeout_entry entry
    cdef source_key evicted
    cdef bint gave_way
    cdef int64_t now = 1000 * SECOND, length, end
    cdef uint32_t i, other
    if size == 0:
        return 0
    memset(sources, 0, sizeof(sources))
    if table_init(&t, 1 + data[0] % SOURCES, 1, 2, now) != 0:
        return 0
    data += 1
    size = min(size - 1, <size_t>400)
    while size >= 4:
        i = data[1] % SOURCES
        length = span_of(data[2], data[3])
        if data[0] & 7 < 4:
            end = sources[i].end
            s = table_add(&t, source_from_v4(i), now, length, 0, False, data[0] & 1, span_of(data[2] >> 3, data[3]),
                          &evicted, &gave_way)
            if gave_way:
                other = <uint32_t>evicted.lo
                must(other < SOURCES and other != i and source_equal(evicted, source_from_v4(other)))
                sources[other].end = 0
            must(s.end >= end and s.end >= now + min(length, LONGEST))
            sources[i].end = s.end
            if s.end + DAY > now:
                slot_save(&t, <uint32_t>(s - t.slots), now, &entry)
                must(entry_is_sane(&entry))
        elif data[0] & 7 == 4:
            if table_remove(&t, source_from_v4(i)):
                sources[i].end = 0
            must(sources[i].end <= now)
        elif data[0] & 7 == 5:
            restore(&t, sources, now, i, length, span_of(data[0] >> 3, data[1]))
        else:
            now += length
            if data[0] & 7 == 6:
                expire(&t, sources, now)
        check(&t, sources, now)
        data += 4
        size -= 4
    check_heads(&t)
    table_free(&t)
    return 0
