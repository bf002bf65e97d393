/* faults.c: makes calls of the server fail, its wall clock step and its disk slow while it runs; preloaded (LD_PRELOAD) by
 * tests/faults.py, which writes into the file that the variable FAULTS names: `struct faults`, shared memory.
 * A fault hits every n-th call of its kind; memory fails for one caller alone, the extension or the interpreter,
 * since a library that ends the process when it gets none (Rust's do) would hide what ours does.
 * The system calls are made directly: what else is preloaded, a sanitizer, then stands before us and still works. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum kind { EXTENSION_MALLOC, INTERPRETER_MALLOC, ACCEPT, EPOLL_CTL, SEND, RECV, THREAD, KINDS };

struct faults {
    uint64_t every[KINDS];  /* 0: never */
    uint64_t failed[KINDS]; /* how many did */
    int64_t step;           /* of CLOCK_REALTIME, ns */
    int64_t sync;           /* that fsync and fdatasync take longer, ns */
};

struct range {
    uintptr_t start, end;
};

static struct faults *faults;
static uint64_t calls[KINDS];
static struct range owners[2]; /* the code of the extension, and of the interpreter */

__attribute__((constructor)) static void open_faults(void)
{
    const char *path = getenv("FAULTS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *shared = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof(*faults), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared != MAP_FAILED)
        faults = shared;
    if (fd >= 0)
        close(fd);
}

static int is_due(enum kind kind)
{
    uint64_t every = faults ? __atomic_load_n(&faults->every[kind], __ATOMIC_RELAXED) : 0;
    if (!every || __atomic_add_fetch(&calls[kind], 1, __ATOMIC_RELAXED) % every)
        return 0;
    __atomic_add_fetch(&faults->failed[kind], 1, __ATOMIC_RELAXED);
    return 1;
}

static int note_owner(struct dl_phdr_info *info, size_t size, void *unused)
{
    int kind = strstr(info->dlpi_name, "/tt/_core.")                               ? EXTENSION_MALLOC
               : !info->dlpi_name[0] || strstr(info->dlpi_name, "/libpython3") ? INTERPRETER_MALLOC
                                                                                   : -1;
    for (int i = 0; kind >= 0 && i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_LOAD && info->dlpi_phdr[i].p_flags & PF_X) {
            owners[kind].start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            owners[kind].end = owners[kind].start + info->dlpi_phdr[i].p_memsz;
        }
    (void)size, (void)unused;
    return 0;
}

static int has_no_memory(uintptr_t caller)
{
    for (int kind = EXTENSION_MALLOC; faults && kind <= INTERPRETER_MALLOC; kind++) {
        if (!faults->every[kind])
            continue;
        if (!owners[EXTENSION_MALLOC].end)
            dl_iterate_phdr(note_owner, NULL);
        if (owners[kind].start <= caller && caller < owners[kind].end && is_due(kind)) {
            errno = ENOMEM;
            return 1;
        }
    }
    return 0;
}

void *__libc_malloc(size_t size);
void *__libc_realloc(void *old, size_t size);

void *malloc(size_t size)
{
    return has_no_memory((uintptr_t)__builtin_return_address(0)) ? NULL : __libc_malloc(size);
}

void *realloc(void *old, size_t size)
{
    return has_no_memory((uintptr_t)__builtin_return_address(0)) ? NULL : __libc_realloc(old, size);
}

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags)
{
    static unsigned int turn;
    static const int errors[] = {ENOMEM, ENOBUFS, EMFILE, ENFILE, ECONNABORTED, EPROTO};
    if (is_due(ACCEPT)) {
        errno = errors[turn++ % (sizeof(errors) / sizeof(*errors))];
        return -1;
    }
    return (int)syscall(SYS_accept4, fd, address, size, flags);
}

int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
    if (operation == EPOLL_CTL_ADD && is_due(EPOLL_CTL)) {
        errno = ENOMEM;
        return -1;
    }
    return (int)syscall(SYS_epoll_ctl, epoll, operation, fd, event);
}

ssize_t send(int fd, const void *data, size_t size, int flags)
{
    if (is_due(SEND)) {
        errno = ENOBUFS;
        return -1;
    }
    return syscall(SYS_sendto, fd, data, size, flags, NULL, 0);
}

ssize_t recv(int fd, void *buffer, size_t size, int flags)
{
    if (is_due(RECV)) {
        errno = ENOMEM;
        return -1;
    }
    return syscall(SYS_recvfrom, fd, buffer, size, flags, NULL, NULL);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
    int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    *(void **)&create = dlsym(RTLD_NEXT, "pthread_create");
    return is_due(THREAD) ? EAGAIN : create(thread, attributes, run, argument);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (!result && faults && clock == CLOCK_REALTIME) {
        int64_t ns = now->tv_nsec + faults->step % 1000000000;
        now->tv_sec += faults->step / 1000000000 + (ns >= 1000000000) - (ns < 0);
        now->tv_nsec = ns + (ns < 0 ? 1000000000 : 0) - (ns >= 1000000000 ? 1000000000 : 0);
    }
    return result;
}

static int slowly(long call, int fd)
{
    struct timespec longer = {0};
    if (faults && faults->sync) {
        longer.tv_sec = faults->sync / 1000000000;
        longer.tv_nsec = faults->sync % 1000000000;
        nanosleep(&longer, NULL);
    }
    return (int)syscall(call, fd);
}

int fsync(int fd)
{
    return slowly(SYS_fsync, fd);
}

int fdatasync(int fd)
{
    return slowly(SYS_fdatasync, fd);
}
