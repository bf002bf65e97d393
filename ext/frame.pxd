"""The frame header: its layout, its limits in each state, and the verdict on the bytes that are there.

    offset  size  field
    0       2     magic, "TT"
    2       1     version, 1
    3       1     type: 1 HELLO, 2 WELCOME, 3 DATA, 4 REFUSE
    4       4     length of what follows, network byte order

The verdict depends on the bytes alone, never on how they were cut: it falls at the first byte that decides it, and
more bytes do not change it.  Lengths are unsigned and compared before they are narrowed.  Knows no socket and no clock.
"""

from libc.stdint cimport uint8_t, uint32_t

from names cimport R_BAD_VERSION, R_NOT_PROTOCOL, R_TOO_LONG, S_LOGGED_IN, S_NEW, tt_reason, tt_state

cdef enum:
    HEADER = 8
    PROTOCOL_VERSION = 1
    TAG = 16                        # what AES-GCM adds
    HELLO_LEAST = 32 + TAG          # an ephemeral public key and an empty payload's tag
    HELLO_MOST = HELLO_LEAST + 192  # with the longest payload
    DATA_LEAST = 1 + TAG            # the flags byte alone: a ping
    DATA_MOST_GUEST = 4096          # before login
    DATA_MOST = 65535

cdef enum frame_type:
    HELLO = 1
    WELCOME = 2
    DATA = 3
    REFUSE = 4

cdef enum:  # verdicts; a reason for ending the connection is its tt_reason, from 0 up
    FRAME_MORE = -1   # all fine so far: wait for more bytes
    FRAME_WHOLE = -2  # a whole frame is there


cdef inline int frame_verdict(const uint8_t* p, size_t n, tt_state state, uint32_t* total) noexcept nogil:
    """Judge the n bytes at p as the start of a frame from a client in `state` (S_NEW, S_OPEN or S_LOGGED_IN).

    FRAME_WHOLE sets *total to the bytes of the frame, its header counted in; FRAME_MORE sets it once the header is
    there, else to 0.
    """
    cdef bint first = state == S_NEW
    cdef uint32_t least = HELLO_LEAST if first else DATA_LEAST
    cdef uint32_t most = HELLO_MOST if first else (DATA_MOST if state == S_LOGGED_IN else DATA_MOST_GUEST)
    cdef uint32_t low = 0, high
    cdef unsigned int i, left

    total[0] = 0
    if n > 0 and p[0] != c"T" or n > 1 and p[1] != c"T":
        return R_NOT_PROTOCOL
    if n > 2 and p[2] != PROTOCOL_VERSION:
        # Before the HELLO an honest client of another time; after it nobody changes his version.
        return R_BAD_VERSION if first else R_NOT_PROTOCOL
    if n > 3 and p[3] != (HELLO if first else DATA):
        return R_NOT_PROTOCOL
    for i in range(4, HEADER):
        if n <= i:
            return FRAME_MORE
        left = 8 * (HEADER - 1 - i)
        low |= <uint32_t>p[i] << left
        high = low | ((<uint32_t>1 << left) - 1)
        if low > most:
            return R_NOT_PROTOCOL if first else R_TOO_LONG
        if high < least:
            return R_NOT_PROTOCOL
    total[0] = HEADER + low
    return FRAME_WHOLE if n >= total[0] else FRAME_MORE
