# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The time-out table alone, as the loop calls it: what a look-up costs, and what a source takes.

Compiled by `make bench` against ext/, never shipped.
"""

from libc.stdint cimport int64_t, uint32_t

from linux cimport monotonic_ns
from source cimport source_from_v4, source_key
from timeout_table cimport DAY, table_add, table_find, table_free, table_init, timeout_slot, timeout_table

cdef enum:
    FIRST = 0x0A000000      # 10.0.0.0
    STEP = 40503            # odd: n * STEP modulo a power of two comes to each once, neighbours in time far apart


def slot_bytes():
    """Bytes of a source in the table, with its key; its part of the index, which has two cells a source, comes to it."""
    return sizeof(timeout_slot) + sizeof(source_key)


def look_ups(uint32_t sources, uint32_t among, uint32_t count):
    """ns of a look-up of one of `among` sources, in a table that is full with `sources`; powers of two."""
    cdef timeout_table t
    cdef source_key evicted
    cdef bint gave_way
    cdef uint32_t n, missed = 0
    cdef int64_t begun, ended, now = monotonic_ns()
    if table_init(&t, sources, 1, 2, now) != 0:
        raise MemoryError
    with nogil:
        for n in range(sources):
            table_add(&t, source_from_v4(FIRST + n), now, DAY, 0, False, False, DAY, &evicted, &gave_way)
        for n in range(among):  # what can be cached is
            missed += table_find(&t, source_from_v4(FIRST + n * STEP % among), now) == NULL
        begun = monotonic_ns()
        for n in range(count):
            missed += table_find(&t, source_from_v4(FIRST + n * STEP % among), now) == NULL
        ended = monotonic_ns()
    table_free(&t)
    if missed:
        raise RuntimeError(f"{missed} sources were not found")
    return <double>(ended - begun) / count
