# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What ext/ inlines into its callers, called alone, so that its instructions can be counted.

Compiled by bench/counts/__init__.py with the flags of the release build, never shipped.  Run under callgrind, which each
function tells where its work begins and ends: it writes one dump a call.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t

from frame cimport frame_verdict
from names cimport S_LOGGED_IN, S_NEW, S_OPEN, tt_state
from source cimport source_from_v4, source_key
from timeout_table cimport DAY, table_add, table_find, table_free, table_init, timeout_table

cdef extern from *:
    """
    #include <valgrind/callgrind.h>
    #define begin_counting() do { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; } while (0)
    #define end_counting() do { CALLGRIND_DUMP_STATS; CALLGRIND_STOP_INSTRUMENTATION; } while (0)
    """
    void begin_counting() nogil
    void end_counting() nogil

cdef enum:
    SOURCES = 4096          # in the table; as many others are looked up in vain
    FIRST = 0x0A000000      # 10.0.0.0
    LOOK_UPS = 2 * SOURCES  # a round
    VERDICTS = 5            # a round


def look_ups(uint32_t rounds):
    """How many look-ups were done: of each source of a full table, and of as many that are not in it."""
    cdef timeout_table t
    cdef source_key evicted
    cdef bint gave_way
    cdef uint32_t n, found = 0
    if table_init(&t, SOURCES, 1, 2, 0) != 0:
        raise MemoryError
    for n in range(SOURCES):
        table_add(&t, source_from_v4(FIRST + n), 0, DAY, 0, False, False, DAY, &evicted, &gave_way)
    begin_counting()
    for n in range(rounds * LOOK_UPS):
        found += table_find(&t, source_from_v4(FIRST + n % LOOK_UPS), 1) != NULL
    end_counting()
    table_free(&t)
    if found != rounds * SOURCES:
        raise RuntimeError(f"{found} of {rounds * SOURCES} sources were found")
    return rounds * LOOK_UPS


def verdicts(uint32_t rounds):
    """How many verdicts were given: on a HELLO, a ping, a user's frame, half a header, and a browser."""
    cdef bytes hello = b"TT\x01\x01" + (96).to_bytes(4, "big") + bytes(96)
    cdef bytes ping = b"TT\x01\x03" + (17).to_bytes(4, "big") + bytes(17)
    cdef bytes frame = b"TT\x01\x03" + (300).to_bytes(4, "big") + bytes(300)
    cdef bytes half = b"TT\x01\x03\x00"
    cdef bytes browser = b"GET / HTTP/1.1\r\n\r\n"
    cdef const uint8_t* p[VERDICTS]
    cdef size_t size[VERDICTS]
    cdef tt_state state[VERDICTS]
    cdef uint32_t n, i, total
    cdef int64_t sum_of_all = 0
    for i, (data, of_state) in enumerate(
        ((hello, S_NEW), (ping, S_OPEN), (frame, S_LOGGED_IN), (half, S_LOGGED_IN), (browser, S_NEW))
    ):
        p[i], size[i], state[i] = <const uint8_t*><bytes>data, len(data), of_state
    begin_counting()
    for n in range(rounds):
        for i in range(VERDICTS):
            sum_of_all += frame_verdict(p[i], size[i], state[i], &total)
    end_counting()
    return rounds * VERDICTS if sum_of_all else 0
