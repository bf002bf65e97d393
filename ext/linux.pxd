"""Linux and libc as the loop needs them: epoll, sockets, signalfd, clock.  Declarations, and the helpers that hide their spelling."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<errno.h>" nogil:
    int errno
    enum:
        EAGAIN
        EINTR
        EMFILE
        ENFILE
        ENOBUFS
        ENOMEM

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    ssize_t read(int fd, void* buffer, size_t size)

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    enum:
        CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec* now)

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigemptyset(sigset_t* signals)
    int sigaddset(sigset_t* signals, int number)

cdef extern from "<sys/signalfd.h>" nogil:
    enum:
        SFD_NONBLOCK
        SFD_CLOEXEC
    int signalfd(int fd, const sigset_t* signals, int flags)
    struct signalfd_siginfo:
        uint32_t ssi_signo

cdef extern from "<sys/epoll.h>" nogil:
    union epoll_data:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data data
    enum:
        EPOLLIN
        EPOLLOUT
        EPOLLERR
        EPOLLHUP
        EPOLLRDHUP
        EPOLLET
        EPOLL_CTL_ADD
        EPOLL_CTL_MOD
        EPOLL_CTL_DEL
        EPOLL_CLOEXEC
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int epoll_wait(int epfd, epoll_event* events, int most, int timeout_ms)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    enum:
        POLLIN
    int poll(pollfd* descriptors, unsigned long count, int timeout_ms)

cdef extern from "<sys/socket.h>" nogil:
    ctypedef uint32_t socklen_t
    struct sockaddr:
        uint16_t sa_family
    struct sockaddr_storage:
        uint16_t ss_family
    struct linger:
        int l_onoff
        int l_linger
    enum:
        AF_INET
        AF_INET6
        SOCK_NONBLOCK
        SOCK_CLOEXEC
        SOL_SOCKET
        SO_LINGER
        MSG_NOSIGNAL
        SHUT_WR
    int accept4(int fd, sockaddr* address, socklen_t* size, int flags)
    int setsockopt(int fd, int level, int option, const void* value, socklen_t size)
    int shutdown(int fd, int how)
    ssize_t recv(int fd, void* buffer, size_t size, int flags)
    ssize_t send(int fd, const void* data, size_t size, int flags)

cdef extern from "<netinet/in.h>" nogil:
    struct in_addr:
        uint32_t s_addr
    struct in6_addr:
        uint8_t s6_addr[16]
    struct sockaddr_in:
        uint16_t sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        uint16_t sin6_port
        in6_addr sin6_addr
    uint32_t htonl(uint32_t value)
    uint32_t ntohl(uint32_t value)
    uint16_t ntohs(uint16_t value)

cdef extern from "<arpa/inet.h>" nogil:
    enum:
        INET6_ADDRSTRLEN
    const char* inet_ntop(int family, const void* address, char* text, socklen_t size)


cdef inline int64_t monotonic_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec * <int64_t>1_000_000_000 + t.tv_nsec


cdef inline bint is_readable(int fd) noexcept nogil:
    """At this moment; never waits."""
    cdef pollfd one
    one.fd = fd
    one.events = POLLIN
    return poll(&one, 1, 0) == 1


cdef inline void set_linger(int fd, bint reset) noexcept nogil:
    """reset: close() throws away what is unsent and sends RST; else close() lets the kernel finish the stream."""
    cdef linger value
    value.l_onoff = reset
    value.l_linger = 0
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &value, sizeof(value))
