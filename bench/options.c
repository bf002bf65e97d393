/* What load's command line asks for: read once, and wrong words end the program. */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "noise.h"
#include "options.h"

static const char *const WORKS[] = {"drop", "junk", "handshake", "request"};
static const char *const PROTOCOLS[] = {"plain", "tt", "tls"};

struct options opt = {.connections = 50, .outstanding = 1, .each = 1, .sources = 1, .source_base = 0x7f010000, .count = 10000,
         .deadline = 600000000000u, .request = "GET / HTTP/1.1\r\nHost: tape\r\n\r\n"};

static int choose(const char *word, const char *const *words, int count)
{
    for (int i = 0; i < count; i++)
        if (strcmp(word, words[i]) == 0)
            return i;
    die("%s: no such word here; `load` alone lists them", word);
    return -1;
}

static void take_key(const char *hex)
{
    uint8_t key[TT_KEY];
    for (int i = 0; i < TT_KEY; i++)
        if (sscanf(hex + 2 * i, "%2hhx", &key[i]) != 1)
            die("key=%s: a public key has %d hexadecimal digits", hex, 2 * TT_KEY);
    tt_prepare(key);
}

/* Without a script: nothing to begin with; a ping, or request= and reply=. */
static void make_script(void)
{
    static struct exchange one[2];
    static const uint8_t ping[1];
    if (opt.protocol == TT)
        one[1] = (struct exchange){ping, ping, 1, 1};
    else
        one[1] = (struct exchange){.request = (uint8_t *)opt.request, .request_size = (uint32_t)strlen(opt.request),
                                   .reply_size = (uint32_t)opt.reply_size};
    opt.script = one;
    opt.script_size = 1;
}

static void take_option(char *option)
{
    char *value = strchr(option, '=');
    if (!value)
        die("%s: options are NAME=VALUE", option);
    *value++ = 0;
    const uint64_t number = strtoull(value, NULL, 10);
    struct in_addr address;
    if (strcmp(option, "connections") == 0 && number >= 1 && number <= MOST_CONNECTIONS)
        opt.connections = (uint32_t)number;
    else if (strcmp(option, "outstanding") == 0 && number >= 1 && number <= MOST_OUTSTANDING)
        opt.outstanding = (uint32_t)number;
    else if (strcmp(option, "count") == 0 && number >= 1)
        opt.count = number;
    else if (strcmp(option, "seconds") == 0 && strtod(value, NULL) > 0)
        opt.time = (uint64_t)(strtod(value, NULL) * (double)SECOND);
    else if (strcmp(option, "warmup") == 0)
        opt.warmup = number;
    else if (strcmp(option, "rate") == 0 && number >= 1 && number <= SECOND)
        opt.rate = number;
    else if (strcmp(option, "sources") == 0 && number >= 1 && number <= 1 << 22)
        opt.sources = (uint32_t)number;
    else if (strcmp(option, "from") == 0 && inet_pton(AF_INET, value, &address) == 1)
        opt.source_base = ntohl(address.s_addr);
    else if (strcmp(option, "give_up") == 0)
        opt.give_up = number * 1000000u;
    else if (strcmp(option, "deadline") == 0 && number >= 1)
        opt.deadline = number * SECOND;
    else if (strcmp(option, "pid") == 0 && number >= 1)
        opt.pid = (pid_t)number;
    else if (strcmp(option, "reply") == 0 && number >= 1 && number < IN)
        opt.reply_size = number;
    else if (strcmp(option, "request") == 0 && strlen(value) < MOST_REQUEST)
        strcpy(opt.request, value);
    else if (strcmp(option, "each") == 0 && number >= 1 && number <= 1 << 20)
        opt.each = (uint32_t)number;
    else if (strcmp(option, "turns") == 0)
        opt.turns = number;
    else if (strcmp(option, "script") == 0) {
        opt.script = read_script(value, &opt.script_size);
        opt.script_size--;
    }
    else if (strcmp(option, "key") == 0)
        take_key(value);
    else
        die("%s=%s: no such option, or its value is out of range", option, value);
}

void read_options(int argc, char **argv)
{
    if (argc < 5) {
        fputs("usage: load drop|junk|handshake|request plain|tt|tls ADDRESS PORT [NAME=VALUE...]\n"
              "  connections= outstanding= count= or seconds= warmup= (units) rate= (a second) sources= from= (first IPv4 source)\n"
              "  give_up= (ms) deadline= (s) pid= (of the server) request= reply= (bytes of one) key= (hex)\n"
              "  script= (file) each= (units in an answer) turns=1 (a line on stdin is a run; {} says that it is ready)\n", stderr);
        exit(2);
    }
    opt.work = (enum work)choose(argv[1], WORKS, sizeof WORKS / sizeof *WORKS);
    opt.protocol = (enum protocol)choose(argv[2], PROTOCOLS, sizeof PROTOCOLS / sizeof *PROTOCOLS);
    opt.server.sin_family = AF_INET;
    opt.server.sin_port = htons((uint16_t)atoi(argv[4]));
    if (inet_pton(AF_INET, argv[3], &opt.server.sin_addr) != 1)
        die("%s: not an IPv4 address", argv[3]);
    for (char **option = argv + 5; *option; option++)
        take_option(*option);
    if (!opt.script)
        make_script();
    if (opt.work == REQUEST && !opt.script[1].reply_size)
        die("request %s needs reply=: the bytes of a reply", argv[2]);
}
