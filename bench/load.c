/* load: one generator of clients for our server and for its peers, so that both sides of a comparison meet the same.
 *
 *   load WORK PROTOCOL ADDRESS PORT [NAME=VALUE...]      `load` alone lists the works and the names
 *
 * One thread, one edge-triggered epoll; a unit of work is a connection (drop, junk, handshake) or a reply (request).
 * junk says request=; of protocol tt a HELLO for key=, which need not be the server's; of protocol tls one ClientHello
 * again and again, and nothing after it.  SIGTERM ends a run as its time would.
 * Closed loop by default: `connections` at a time, each asked for the next as it is done.  With rate= it is an open
 * loop: latency then counts from when a unit was due, so that a server that stalls is not spared what it delayed.
 * With script= requests and what their answers must begin with come from a file; the first is what a connection begins
 * with (a login; empty: nothing), and none sends more before all have.  With turns=1 each line on stdin starts a run.
 * Rules: one line of JSON a run, and only when all went as it must; anything unexpected ends it with exit code 2.
 * The server's CPU time is that of all threads of process pid=, read from its clock as the counting begins and ends.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <malloc.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base.h"
#include "latency.h"
#include "noise.h"
#include "options.h"
#include "script.h"

enum phase { FREE, CONNECTING, GREETING, LOGGING_IN, SERVING, ENDING };
enum { EVENTS = 256, MOST_GREETED = 512 };

struct peer {
    int fd;
    enum phase phase;
    uint64_t begun;                     /* ns: when its connection was due */
    struct { uint64_t at; const struct exchange *what; } sent[MOST_OUTSTANDING]; /* a ring, oldest first; ns */
    uint32_t oldest, waiting;
    SSL *tls;
    struct tt_transport transport;
    size_t have; /* bytes in `in` */
    size_t part; /* bytes of the oldest answer that have come, where it comes in parts */
    struct peer *next_free, *older, *newer; /* among those in use, in the order of `begun` */
    uint8_t *in; /* kept from one connection to the next */
};

static struct peer peers[MOST_CONNECTIONS], *unused, *oldest, *newest;
static int epoll;
static SSL_CTX *tls_context;
static uint32_t next_exchange, in_use, ready, in_flight;
static bool asking, warming;
static volatile sig_atomic_t stopped;
static uint64_t opened, next_due, started, units, parts, server_cpu, own_cpu;
static clockid_t server_clock;
static struct { uint64_t resets, ends, unanswered; } ended;

/* ---- what is measured ------------------------------------------------------------------------------------------ */

static void begin_counting(void)
{
    units = parts = 0;
    memset(&ended, 0, sizeof ended);
    latency_clear();
    server_cpu = opt.pid ? clock_ns(server_clock) : 0;
    own_cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    started = now_ns();
}

static void print_result(void)
{
    double seconds = (double)(now_ns() - started) / (double)SECOND;
    double cpu = opt.pid ? (double)(clock_ns(server_clock) - server_cpu) : 0;
    double own = (double)(clock_ns(CLOCK_PROCESS_CPUTIME_ID) - own_cpu);
    double each = units ? (double)units : 1; /* the slow ones may not have ended yet */
    printf("{\"units\": %lu, \"seconds\": %.6f, \"rate\": %.1f, \"server_ns\": %.1f, \"server_busy\": %.3f, "
           "\"generator_ns\": %.1f, \"generator_busy\": %.3f, \"p50_ns\": %.0f, \"p90_ns\": %.0f, \"p99_ns\": %.0f, \"p999_ns\": %.0f, "
           "\"max_ns\": %lu, \"resets\": %lu, \"ends\": %lu, \"unanswered\": %lu, \"parts\": %lu}\n",
           units, seconds, (double)units / seconds, cpu / each, cpu / seconds / (double)SECOND,
           own / each, own / seconds / (double)SECOND, latency_percentile(.5, units), latency_percentile(.9, units),
           latency_percentile(.99, units), latency_percentile(.999, units), latency_most(),
           ended.resets, ended.ends, ended.unanswered, parts);
}

/* ---- a connection ---------------------------------------------------------------------------------------------- */

static void send_all(struct peer *p, const void *data, size_t size)
{
    ssize_t sent = p->tls ? SSL_write(p->tls, data, (int)size) : send(p->fd, data, size, MSG_NOSIGNAL);
    if (sent != (ssize_t)size)
        die("sent %zd of %zu bytes: %s", sent, size, strerror(errno));
}

/* The n-th source: an odd step through a power of two comes to each once, and neighbours in time are none in place. */
static uint32_t source_of(uint64_t n) { return opt.source_base + (uint32_t)(n * 40503u % opt.sources); }

static void open_peer(uint64_t due)
{
    struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(source_of(opened++))};
    struct peer *p = unused;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = p};
    int on = 1;
    unused = p->next_free;
    p->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    p->phase = CONNECTING;
    p->begun = due;
    p->have = p->part = p->oldest = p->waiting = 0;
    if (!p->in && !(p->in = malloc(IN)))
        die("no memory");
    p->older = newest;
    p->newer = NULL;
    *(newest ? &newest->newer : &oldest) = p;
    newest = p;
    in_use++;
    if (p->fd < 0 || setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0 ||
        setsockopt(p->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on) < 0 ||
        bind(p->fd, (struct sockaddr *)&source, sizeof source) < 0)
        die("a socket for %s: %s", inet_ntoa(source.sin_addr), strerror(errno));
    if (connect(p->fd, (struct sockaddr *)&opt.server, sizeof opt.server) < 0 && errno != EINPROGRESS)
        die("connect from %s: %s", inet_ntoa(source.sin_addr), strerror(errno));
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, p->fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

static void close_peer(struct peer *p)
{
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    *(p->older ? &p->older->newer : &oldest) = p->newer;
    *(p->newer ? &p->newer->older : &newest) = p->older;
    if (p->tls)
        SSL_free(p->tls);
    p->tls = NULL;
    tt_close(&p->transport);
    setsockopt(p->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset); /* no TIME_WAIT, whoever ended first */
    close(p->fd);
    p->phase = FREE;
    p->next_free = unused;
    unused = p;
    in_use--;
}

static void unit_done(uint64_t since, uint64_t now)
{
    units++;
    latency_note(now - since);
    if (warming && units == opt.warmup) {
        warming = false;
        begin_counting();
    }
}

static void peer_ended(struct peer *p, uint64_t now, bool was_reset)
{
    if (opt.work == REQUEST || (opt.work == HANDSHAKE && p->phase != ENDING))
        die("the server ended a connection in phase %d: %s", p->phase, was_reset ? "reset" : "end of stream");
    *(was_reset ? &ended.resets : &ended.ends) += 1;
    uint64_t since = p->begun;
    close_peer(p);
    unit_done(since, now);
}

/* ---- what it says ---------------------------------------------------------------------------------------------- */

static size_t put(struct peer *p, const struct exchange *e, uint8_t *out, uint64_t now)
{
    const uint32_t last = (p->oldest + p->waiting++) % MOST_OUTSTANDING;
    p->sent[last].at = now;
    p->sent[last].what = e;
    in_flight++;
    if (opt.protocol != TT) {
        memcpy(out, e->request, e->request_size);
        return e->request_size;
    }
    tt_seal(&p->transport, e->request, e->request_size, out);
    return e->request_size + TT_MORE;
}

static void ask(struct peer *p, uint32_t count, uint64_t now)
{
    static uint8_t out[MOST_OUTSTANDING * (MOST_REQUEST + TT_MORE)];
    size_t size = 0;
    for (uint32_t i = 0; i < count; i++, next_exchange = (next_exchange + 1) % opt.script_size)
        size += put(p, &opt.script[1 + next_exchange], out + size, now);
    send_all(p, out, size);
}

static void begin_asking(struct peer *p, uint64_t now)
{
    p->phase = SERVING;
    ready++;
    if (asking)
        ask(p, opt.outstanding, now);
}

static void greeted(struct peer *p, uint64_t now)
{
    uint8_t out[MOST_REQUEST + TT_MORE];
    p->have = 0;
    if (opt.work == HANDSHAKE) {
        p->phase = ENDING;
        shutdown(p->fd, SHUT_WR); /* the server has worked through all we said when its own end comes */
        return;
    }
    if (!opt.script[0].request_size) {
        begin_asking(p, now);
        return;
    }
    p->phase = LOGGING_IN;
    send_all(p, out, put(p, &opt.script[0], out, now));
}

/* What a TLS client says first, made once. */
static const uint8_t *client_hello(size_t *size)
{
    static BIO *said;
    char *data;
    if (!said) {
        SSL *tls = SSL_new(tls_context);
        said = BIO_new(BIO_s_mem());
        if (!tls || !said)
            die("no memory");
        SSL_set_bio(tls, BIO_new(BIO_s_mem()), said);
        SSL_connect(tls);
    }
    *size = (size_t)BIO_get_mem_data(said, &data);
    return (const uint8_t *)data;
}

static void say_junk(struct peer *p)
{
    size_t size = strlen(opt.request);
    const void *junk = opt.protocol == TT ? tt_hello(&size) : opt.protocol == TLS ? client_hello(&size) : (const uint8_t *)opt.request;
    /* A server that drops may have done so already. */
    if (send(p->fd, junk, size, MSG_NOSIGNAL) < 0 && errno != ECONNRESET && errno != EPIPE)
        die("send: %s", strerror(errno));
}

static void connected(struct peer *p)
{
    size_t size;
    if (opt.work == DROP || opt.work == JUNK) {
        p->phase = ENDING;
        if (opt.work == JUNK)
            say_junk(p);
        return;
    }
    p->phase = GREETING;
    if (opt.protocol == TLS) {
        p->tls = SSL_new(tls_context);
        if (!p->tls || !SSL_set_fd(p->tls, p->fd))
            die("SSL_new failed");
        SSL_set_connect_state(p->tls);
    } else {
        const uint8_t *hello = tt_hello(&size);
        send_all(p, hello, size);
    }
}

/* ---- what it hears --------------------------------------------------------------------------------------------- */

/* Whether these bytes are, or complete, the answer, which must be as it should.  Our server answers a packed request in
 * parts where it takes longer than others are to wait; compressed apart they are longer than the whole, which is how the
 * last of them is known, and nothing is compared. */
static bool completes(struct peer *p, const struct exchange *e, const uint8_t *said, size_t size)
{
    if (opt.each > 1 && (p->part || size < e->reply_size)) {
        parts++;
        p->part += size;
        if (p->part < e->reply_size)
            return false;
        p->part = 0;
        return true;
    }
    for (uint32_t i = 0; e->reply && i < e->reply_size; i++)
        if (said[i] != e->reply[i])
            die("byte %u of the reply to request %zu is %02x, not %02x", i, (size_t)(e - opt.script), said[i], e->reply[i]);
    return true;
}

/* The bytes of the first frame of an answer in `have` bytes; 0: it is not there yet. */
static size_t answer(struct peer *p, const struct exchange *e, const uint8_t *in, size_t have, bool *complete)
{
    static uint8_t plain[IN];
    const uint8_t *said = in;
    size_t size = e->reply_size;
    if (opt.protocol == TT) {
        if (have < TT_HEADER)
            return 0;
        size = TT_HEADER + ((size_t)in[4] << 24 | (size_t)in[5] << 16 | (size_t)in[6] << 8 | in[7]);
        if (memcmp(in, "TT\1\3", 4) != 0 || size < (opt.each > 1 ? 1 : e->reply_size) + TT_MORE || size > IN)
            die("a reply has the header %02x %02x %02x %02x and %zu bytes", in[0], in[1], in[2], in[3], size);
        if (have < size)
            return 0;
        if (!tt_open(&p->transport, in, size, plain))
            die("a reply is not authentic");
        said = plain;
    }
    if (have < size)
        return 0;
    *complete = completes(p, e, said, opt.protocol == TT ? size - TT_MORE : size);
    return size;
}

/* The answers that are complete are counted, and as many requests are sent again, in one write. */
static void replies(struct peer *p, uint64_t now)
{
    uint32_t count = 0;
    size_t taken = 0, size;
    bool complete;
    while (p->waiting && (size = answer(p, p->sent[p->oldest].what, p->in + taken, p->have - taken, &complete))) {
        taken += size;
        if (!complete)
            continue;
        count++;
        for (uint32_t i = 0; p->phase == SERVING && i < opt.each; i++)
            unit_done(p->sent[p->oldest].at, now);
        p->oldest = (p->oldest + 1) % MOST_OUTSTANDING;
        p->waiting--;
        in_flight--;
    }
    p->have -= taken;
    if (p->have && !p->waiting)
        die("%zu bytes that nobody asked for", p->have);
    memmove(p->in, p->in + taken, p->have);
    if (count && p->phase == LOGGING_IN)
        begin_asking(p, now);
    else if (count && asking)
        ask(p, count, now);
}

static void welcome(struct peer *p, uint64_t now)
{
    size_t size = p->have < TT_HEADER ? 0 : TT_HEADER + (size_t)(p->in[6] << 8 | p->in[7]);
    if (p->have < TT_HEADER || p->have < size)
        return;
    if (p->have != size || memcmp(p->in, "TT\1\2\0\0", 6) != 0 ||
        !tt_welcome(&p->transport, p->in + TT_HEADER, size - TT_HEADER))
        die("what came instead of a WELCOME begins with %02x %02x %02x %02x", p->in[0], p->in[1], p->in[2], p->in[3]);
    greeted(p, now);
}

/* False: nothing more to be read now, or the connection has ended. */
static bool read_tls(struct peer *p, uint64_t now)
{
    int n;
    if (p->phase == GREETING) {
        n = SSL_do_handshake(p->tls);
        if (n == 1)
            greeted(p, now);
    } else {
        n = SSL_read(p->tls, p->in + p->have, (int)(IN - p->have));
        if (n > 0 && p->phase != ENDING) {
            p->have += (size_t)n;
            replies(p, now);
        }
    }
    if (n > 0)
        return true;
    switch (SSL_get_error(p->tls, n)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE:
        return false;
    case SSL_ERROR_ZERO_RETURN:
        peer_ended(p, now, false);
        return false;
    default: /* after the handshake an end without close_notify is one too */
        if (p->phase == GREETING)
            die("TLS handshake: %s", ERR_reason_error_string(ERR_peek_error()));
        ERR_clear_error();
        peer_ended(p, now, errno == ECONNRESET);
        return false;
    }
}

static bool read_plain(struct peer *p, uint64_t now)
{
    ssize_t n = recv(p->fd, p->in + p->have, IN - p->have, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return errno == EINTR;
    if (n <= 0) {
        peer_ended(p, now, n < 0);
        return false;
    }
    size_t room = IN - p->have;
    p->have += (size_t)n;
    if (p->phase == GREETING)
        welcome(p, now);
    else if (p->phase == SERVING || p->phase == LOGGING_IN)
        replies(p, now);
    else
        p->have = 0;
    return (size_t)n == room; /* a short read: the socket is empty, and new bytes make a new edge */
}

static void take_event(struct peer *p, uint32_t events, uint64_t now)
{
    if (p->phase == FREE)
        return;
    if (p->phase == CONNECTING && events & (EPOLLOUT | EPOLLERR | EPOLLHUP))
        connected(p);
    if (p->tls && p->phase != FREE)
        while (p->phase != ENDING ? read_tls(p, now) : read_plain(p, now))
            ;
    else if (p->phase != CONNECTING && events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
        while (read_plain(p, now))
            ;
        if (p->phase != FREE && events & EPOLLRDHUP) /* its end lies behind the bytes of a short read */
            read_plain(p, now);
    }
}

/* ---- the loop -------------------------------------------------------------------------------------------------- */

static void open_due(uint64_t now)
{
    if (!opt.rate) {
        while (in_use < opt.connections)
            open_peer(now);
        return;
    }
    for (; next_due <= now && in_use < opt.connections; next_due += SECOND / opt.rate)
        open_peer(next_due);
}

static void give_up(uint64_t now)
{
    while (opt.give_up && oldest && now - oldest->begun >= opt.give_up) {
        ended.unanswered++;
        uint64_t since = oldest->begun;
        close_peer(oldest);
        unit_done(since, now);
    }
}

static uint64_t take_events(void)
{
    struct epoll_event events[EVENTS];
    int n = epoll_wait(epoll, events, EVENTS, opt.rate ? 1 : 1000);
    uint64_t now = now_ns();
    for (int i = 0; i < n; i++)
        take_event(events[i].data.ptr, events[i].events, now);
    give_up(now);
    return now;
}

static void stop(int signal) { stopped = signal; }

static void run(void)
{
    uint64_t now = now_ns();
    const uint64_t until = now + opt.deadline;
    next_due = now;
    warming = opt.warmup;
    begin_counting();
    while (!stopped && (warming || (opt.time ? now < started + opt.time : units < opt.count))) {
        open_due(now);
        now = take_events();
        if (now > until)
            die("only %lu of %lu units in %lu s%s", units, opt.count, opt.deadline / SECOND,
                warming ? ", and these were warming up" : "");
    }
    print_result();
}

/* Only some at a time are greeted: more would wait in the server longer than it waits for a HELLO. */
static void open_gently(void)
{
    while (in_use < opt.connections && in_use < ready + MOST_GREETED)
        open_peer(now_ns());
}

/* The connections stay from one run to the next: a login takes a server longer than many requests. */
static void take_turns(void)
{
    char line[16];
    const uint64_t until = now_ns() + opt.deadline;
    while (open_gently(), ready < opt.connections)
        if (take_events() > until)
            die("only %u of %u connections were ready in %lu s", ready, opt.connections, opt.deadline / SECOND);
    puts("{}");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        asking = true;
        for (struct peer *p = oldest; p; p = p->newer)
            ask(p, opt.outstanding, now_ns());
        run();
        fflush(stdout);
        asking = false;
        for (uint64_t patience = now_ns() + opt.deadline; in_flight;)
            if (take_events() > patience)
                die("%u requests were not answered in %lu s", in_flight, opt.deadline / SECOND);
    }
}

/* ---- start ----------------------------------------------------------------------------------------------------- */

static void prepare(void)
{
    if (opt.pid && clock_getcpuclockid(opt.pid, &server_clock) != 0)
        die("pid=%d: no such process", (int)opt.pid);
    tls_context = SSL_CTX_new(TLS_client_method());
    if (!tls_context || !SSL_CTX_set_min_proto_version(tls_context, TLS1_3_VERSION) ||
        !SSL_CTX_set1_groups_list(tls_context, "X25519") ||
        !SSL_CTX_set_ciphersuites(tls_context, "TLS_AES_256_GCM_SHA384"))
        die("TLS 1.3 with X25519 and AES-256-GCM: OpenSSL has it not");
    SSL_CTX_set_session_cache_mode(tls_context, SSL_SESS_CACHE_OFF); /* every handshake is a full one */
    epoll = epoll_create1(0);
    for (int i = MOST_CONNECTIONS - 1; i >= 0; i--) {
        peers[i].next_free = unused;
        unused = &peers[i];
    }
}

int main(int argc, char **argv)
{
    read_options(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    mallopt(M_MMAP_THRESHOLD, 1 << 28); /* the kernel maps fewer pieces than there may be connections */
    prepare();
    asking = !opt.turns;
    if (opt.turns) {
        take_turns();
    } else {
        signal(SIGTERM, stop);
        run();
    }
    return 0;
}
