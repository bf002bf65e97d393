/* offend ADDRESS PORT PINNED_MAP COUNT RATE FIRST_SOURCE: how long from a hostile byte to its sender's entry in the map.
 *
 * RATE times a second a new source connects and sends an HTTP request; then the map is looked up without a pause until
 * it holds that source.  The time counts from just before send(2) to the return of the look-up that succeeds: delivery
 * by the kernel, waking the server, its verdict, its write to the map and up to one look-up (about 0.5 us) are in it.
 * The same clock and the same core take both ends, so nothing has to be subtracted.
 * Prints one line of JSON, times in ns; an entry that is not there after 10 s ends it with exit code 2.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/bpf.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base.h"

static const char REQUEST[] = "GET / HTTP/1.1\r\nHost: tape\r\n\r\n";

static int open_map(const char *path)
{
    union bpf_attr attr = {.pathname = (uint64_t)(uintptr_t)path};
    int fd = (int)syscall(SYS_bpf, BPF_OBJ_GET, &attr, sizeof attr);
    if (fd < 0)
        die("map %s: %s", path, strerror(errno));
    return fd;
}

static int is_in_map(int map, uint32_t source)
{
    uint64_t value;
    union bpf_attr attr = {.map_fd = (uint32_t)map, .key = (uint64_t)(uintptr_t)&source,
                           .value = (uint64_t)(uintptr_t)&value};
    return syscall(SYS_bpf, BPF_MAP_LOOKUP_ELEM, &attr, sizeof attr) == 0;
}

static uint64_t offend(const struct sockaddr_in *server, int map, uint32_t source)
{
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = source};
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0 ||
        bind(fd, (struct sockaddr *)&own, sizeof own) < 0 ||
        connect(fd, (const struct sockaddr *)server, sizeof *server) < 0)
        die("connect from %s: %s", inet_ntoa(own.sin_addr), strerror(errno));
    uint64_t begun = now_ns();
    if (send(fd, REQUEST, sizeof REQUEST - 1, MSG_NOSIGNAL) < 0)
        die("send from %s: %s", inet_ntoa(own.sin_addr), strerror(errno));
    while (!is_in_map(map, source))
        if (now_ns() - begun > 10 * SECOND)
            die("%s is not in the map after 10 s", inet_ntoa(own.sin_addr));
    uint64_t took = now_ns() - begun;
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    close(fd);
    return took;
}

static int ascending(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    struct sockaddr_in server = {.sin_family = AF_INET};
    struct in_addr first;
    if (argc != 7 || inet_pton(AF_INET, argv[1], &server.sin_addr) != 1 || inet_pton(AF_INET, argv[6], &first) != 1 ||
        atoi(argv[4]) < 1 || atoi(argv[5]) < 1)
        die("usage: offend ADDRESS PORT PINNED_MAP COUNT RATE FIRST_SOURCE");
    const int map = open_map(argv[3]), count = atoi(argv[4]);
    const uint64_t interval = SECOND / (uint64_t)atoi(argv[5]);
    uint64_t *took = calloc((size_t)count, sizeof *took), due = now_ns(), begun = due;
    server.sin_port = htons((uint16_t)atoi(argv[2]));
    if (!took)
        die("no memory for %d times", count);
    for (int i = 0; i < count; i++, due += interval) {
        struct timespec until = {.tv_sec = (time_t)(due / SECOND), .tv_nsec = (long)(due % SECOND)};
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
            ;
        took[i] = offend(&server, map, htonl(ntohl(first.s_addr) + (uint32_t)i));
    }
    double seconds = (double)(now_ns() - begun) / (double)SECOND;
    qsort(took, (size_t)count, sizeof *took, ascending);
    printf("{\"units\": %d, \"rate\": %.1f, \"p50_ns\": %lu, \"p99_ns\": %lu, \"max_ns\": %lu}\n", count,
           (double)count / seconds, took[count / 2], took[(size_t)count * 99 / 100], took[count - 1]);
    return 0;
}
