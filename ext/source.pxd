"""Sources: whom a time-out or a budget counts against, and the hash index that finds a source's slot.

A source is one 128-bit number: an IPv6 prefix, or an IPv4 address in its v4-mapped form, so that the family is part
of the key. The index maps a source to the number of its slot in the owner's own array; it stores keys, never values.
Rules: all is C without the GIL, no clock, no I/O; memory is taken in index_init alone, so nothing later can fail.
It must not know what a slot holds, nor what a time-out is.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cdef extern from *:
    """
    #define TT_NO_SLOT UINT32_MAX
    """
    const uint32_t NO_SLOT "TT_NO_SLOT"     # the answer of index_find for a source it does not hold

cdef enum:
    MAX_INDEX = 1 << 30     # sources an index can hold: slot + 1, and twice as many cells, fit 32 bits


# ---------------------------------------------------------------------------------------------------------- the key

cdef struct source_key:
    uint64_t hi     # first 8 bytes of the address, as an integer in host order
    uint64_t lo     # last 8 bytes


cdef inline bint source_is_v4(source_key key) noexcept nogil:
    return key.hi == 0 and key.lo >> 32 == 0xFFFF


cdef inline bint source_is_link_local(source_key key) noexcept nogil:
    """fe80::/10 (RFC 4291, 2.5.6): neighbours on one link, where a /64 would be everybody."""
    return key.hi >> 54 == 0xFE80 >> 6


cdef inline bint source_equal(source_key a, source_key b) noexcept nogil:
    return a.hi == b.hi and a.lo == b.lo


cdef inline source_key source_from_v4(uint32_t address) noexcept nogil:
    """The source of an IPv4 address, given in host order."""
    cdef source_key key
    key.hi = 0
    key.lo = <uint64_t>0xFFFF << 32 | address
    return key


cdef inline uint64_t read_big_endian(const uint8_t* bytes8) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(8):
        value = value << 8 | bytes8[i]
    return value


cdef inline source_key source_mask(source_key key, unsigned int prefix) noexcept nogil:
    """The bits that make the source: all of an IPv4 or link-local address, the first `prefix` of another."""
    cdef source_key mask
    mask.hi = mask.lo = ~<uint64_t>0
    if source_is_v4(key) or source_is_link_local(key) or prefix >= 128:
        return mask
    if prefix > 64:
        mask.lo <<= 128 - prefix
    else:
        mask.hi <<= 64 - prefix
        mask.lo = 0
    return mask


cdef inline source_key source_from_v6(const uint8_t* address, unsigned int prefix) noexcept nogil:
    """The source of a 16-byte IPv6 address in network order: its first `prefix` bits, 1..128.

    v4-mapped (RFC 4291, 2.5.5.2) and 64:ff9b::/96 (RFC 6052) addresses are their IPv4 address, whichever way the peer
    came in; link-local ones stay whole.
    """
    cdef source_key key, mask
    key.hi = read_big_endian(address)
    key.lo = read_big_endian(address + 8)
    if source_is_v4(key) or (key.hi == <uint64_t>0x0064FF9B << 32 and key.lo >> 32 == 0):
        return source_from_v4(<uint32_t>key.lo)
    mask = source_mask(key, prefix)
    key.hi &= mask.hi
    key.lo &= mask.lo
    return key


# --------------------------------------------------------------------------------------------------------- the hash

cdef inline uint64_t rotate_left(uint64_t value, unsigned int bits) noexcept nogil:
    return value << bits | value >> (64 - bits)


cdef inline void sip_round(uint64_t* v) noexcept nogil:
    v[0] += v[1]
    v[1] = rotate_left(v[1], 13) ^ v[0]
    v[0] = rotate_left(v[0], 32)
    v[2] += v[3]
    v[3] = rotate_left(v[3], 16) ^ v[2]
    v[0] += v[3]
    v[3] = rotate_left(v[3], 21) ^ v[0]
    v[2] += v[1]
    v[1] = rotate_left(v[1], 17) ^ v[2]
    v[2] = rotate_left(v[2], 32)


cdef inline uint64_t source_hash(source_key key, uint64_t k0, uint64_t k1) noexcept nogil:
    """SipHash-1-3 of the 16 bytes hi, lo (each little-endian) under the 128-bit seed k0, k1.

    Whoever owns an IPv6 /48 picks 65,536 sources at will; under a hash that he can compute he would pick those that
    fall into one cell and turn every look-up into a walk over all of them (HashDoS). A keyed hash with a secret random
    seed leaves him guessing; this one is what CPython and Rust chose for the same reason (Aumasson, Bernstein 2012).
    """
    cdef uint64_t v[4]
    cdef uint64_t length = <uint64_t>16 << 56     # SipHash's last block: the message's length in its top byte
    v[0] = k0 ^ <uint64_t>0x736F6D6570736575
    v[1] = k1 ^ <uint64_t>0x646F72616E646F6D
    v[2] = k0 ^ <uint64_t>0x6C7967656E657261
    v[3] = k1 ^ <uint64_t>0x7465646279746573
    v[3] ^= key.hi
    sip_round(v)
    v[0] ^= key.hi
    v[3] ^= key.lo
    sip_round(v)
    v[0] ^= key.lo
    v[3] ^= length
    sip_round(v)
    v[0] ^= length
    v[2] ^= 0xFF
    sip_round(v)
    sip_round(v)
    sip_round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


# -------------------------------------------------------------------------------------------------------- the index

cdef struct source_index:
    uint64_t k0             # the hash's seed
    uint64_t k1
    uint64_t* cells         # hash tag << 32 | slot + 1; 0 is an empty cell
    source_key* keys        # by slot: the only place where a slot's key is
    uint32_t mask           # cells - 1; a power of two of cells, at least twice the capacity, so chains stay short
    uint32_t capacity       # slots: 0 .. capacity - 1


cdef inline void index_free(source_index* ix) noexcept nogil:
    free(ix.cells)
    free(ix.keys)
    ix.cells = NULL
    ix.keys = NULL


cdef inline int index_init(source_index* ix, uint32_t capacity, uint64_t k0, uint64_t k1) noexcept nogil:
    """An empty index for the slots 0 .. capacity - 1. -1: no memory, or a capacity outside 1..2^30."""
    cdef uint32_t cells = 2
    ix.cells = NULL
    ix.keys = NULL
    if capacity == 0 or capacity > MAX_INDEX:
        return -1
    while cells < 2 * capacity:
        cells *= 2
    ix.k0 = k0
    ix.k1 = k1
    ix.mask = cells - 1
    ix.capacity = capacity
    ix.cells = <uint64_t*>calloc(cells, sizeof(uint64_t))
    ix.keys = <source_key*>calloc(capacity, sizeof(source_key))
    if ix.cells == NULL or ix.keys == NULL:
        index_free(ix)
        return -1
    return 0


cdef inline uint32_t index_find(const source_index* ix, source_key key) noexcept nogil:
    """The slot of `key`, or NO_SLOT."""
    cdef uint64_t tag = source_hash(key, ix.k0, ix.k1) >> 32
    cdef uint32_t at = <uint32_t>tag & ix.mask
    cdef uint64_t cell = ix.cells[at]
    cdef uint32_t slot
    while cell != 0:
        if cell >> 32 == tag:
            slot = <uint32_t>cell - 1
            if source_equal(ix.keys[slot], key):
                return slot
        at = (at + 1) & ix.mask
        cell = ix.cells[at]
    return NO_SLOT


cdef inline void index_put(source_index* ix, source_key key, uint32_t slot) noexcept nogil:
    """Enters `key` under `slot`. The caller knows that the key is not in yet and the slot not in use."""
    cdef uint64_t tag = source_hash(key, ix.k0, ix.k1) >> 32
    cdef uint32_t at = <uint32_t>tag & ix.mask
    while ix.cells[at] != 0:
        at = (at + 1) & ix.mask
    ix.cells[at] = tag << 32 | (slot + 1)
    ix.keys[slot] = key


cdef inline void index_drop(source_index* ix, uint32_t slot) noexcept nogil:
    """Takes out the key that was put under `slot`; nothing happens when there is none.

    Backward shift instead of a mark "deleted": marks pile up in a table that always renews itself, and every miss
    would walk over them. A cell's tag holds the low bits that chose its place, x
    """
    cdef uint64_t tag = source_hash(ix.keys[slot], ix.k0, ix.k1) >> 32
    cdef uint32_t hole = <uint32_t>tag & ix.mask
    cdef uint32_t at, home
    while <uint32_t>ix.cells[hole] != slot + 1:
        if ix.cells[hole] == 0:
            return
        hole = (hole + 1) & ix.mask
    at = (hole + 1) & ix.mask
    while ix.cells[at] != 0:
        home = <uint32_t>(ix.cells[at] >> 32) & ix.mask
        if ((at - home) & ix.mask) >= ((at - hole) & ix.mask):      # the hole lies on this cell's way from its home
            ix.cells[hole] = ix.cells[at]
            hole = at
        at = (at + 1) & ix.mask
    ix.cells[hole] = 0
