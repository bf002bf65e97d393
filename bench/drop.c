/* drop ADDRESS PORT: accepts every connection and closes it with a reset, and does nothing else.
 *
 * The floor for accept-and-drop: no server that refuses a connection after accept() can use less.  It waits as our
 * server does (edge-triggered epoll, at most 256 accepts a turn, the same backlog), so that the difference between
 * the two is what judging a source costs.  Prints "ready" once it listens; ends by a signal.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ACCEPTS_PER_TURN = 256, BACKLOG = 4096, EVENTS = 256 };

static void need(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(2);
    }
}

static int listen_on(const char *address, const char *port)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    need(fd, "socket");
    need(inet_pton(AF_INET, address, &name.sin_addr) == 1 ? 0 : -1, "address");
    need(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on), "SO_REUSEADDR");
    need(setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset), "SO_LINGER"); /* what is accepted inherits it */
    need(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), "TCP_NODELAY");
    need(bind(fd, (struct sockaddr *)&name, sizeof name), "bind");
    need(listen(fd, BACKLOG), "listen");
    return fd;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fputs("usage: drop ADDRESS PORT\n", stderr);
        return 2;
    }
    int listener = listen_on(argv[1], argv[2]), epoll = epoll_create1(0), more = 0;
    struct epoll_event event = {.events = EPOLLIN | EPOLLET}, events[EVENTS];
    need(epoll, "epoll_create1");
    need(epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event), "epoll_ctl");
    puts("ready");
    fflush(stdout);
    for (;;) {
        epoll_wait(epoll, events, EVENTS, more ? 0 : -1);
        more = 1;
        for (int i = 0; i < ACCEPTS_PER_TURN && more; i++) {
            struct sockaddr_storage address;
            socklen_t size = sizeof address;
            int fd = accept4(listener, (struct sockaddr *)&address, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (fd >= 0)
                close(fd);
            else
                more = errno != EAGAIN;
        }
    }
}
