/* What load's command line asks for. */
#ifndef OPTIONS_H
#define OPTIONS_H
#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "script.h"

enum work { DROP, JUNK, HANDSHAKE, REQUEST };
enum protocol { PLAIN, TT, TLS };
enum { IN = 1 << 17, MOST_OUTSTANDING = 64, MOST_CONNECTIONS = 1 << 17 };

extern struct options {
    enum work work;
    enum protocol protocol;
    struct sockaddr_in server;
    uint32_t connections, outstanding, sources, source_base;
    uint32_t each;                /* units in an answer */
    bool turns;
    uint64_t count, warmup, rate; /* units, units, a second */
    uint64_t time, give_up, deadline; /* ns */
    pid_t pid;
    char request[MOST_REQUEST];
    size_t reply_size; /* bytes */
    struct exchange *script;
    uint32_t script_size; /* without the first exchange */
} opt;

/* WORK PROTOCOL ADDRESS PORT [NAME=VALUE...].  Anything wrong ends the program; so does a line that is too short, with help. */
void read_options(int argc, char **argv);

#endif
