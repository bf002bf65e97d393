"""Intrusive doubly linked lists over the elements of an array, by index: no allocation, everything in constant time.

An element is in a list through a `link` member; `base` is the address of that member in element 0 and `stride` the size
of an element, so that one element can be in several lists through several links.
"""

from libc.stdint cimport uint32_t

cdef enum:
    NONE = 0xFFFFFFFF  # no element

cdef struct link:
    uint32_t next, prev

cdef struct chain:
    uint32_t head, tail


cdef inline void chain_clear(chain* c) noexcept nogil:
    c.head = c.tail = NONE


cdef inline link* link_of(void* base, size_t stride, uint32_t i) noexcept nogil:
    return <link*>(<char*>base + stride * i)


cdef inline void chain_append(chain* c, void* base, size_t stride, uint32_t i) noexcept nogil:
    cdef link* own = link_of(base, stride, i)
    own.next = NONE
    own.prev = c.tail
    if c.tail == NONE:
        c.head = i
    else:
        link_of(base, stride, c.tail).next = i
    c.tail = i


cdef inline void chain_remove(chain* c, void* base, size_t stride, uint32_t i) noexcept nogil:
    """Takes out element i, which must be in this list."""
    cdef link* own = link_of(base, stride, i)
    if own.prev == NONE:
        c.head = own.next
    else:
        link_of(base, stride, own.prev).next = own.next
    if own.next == NONE:
        c.tail = own.prev
    else:
        link_of(base, stride, own.next).prev = own.prev
