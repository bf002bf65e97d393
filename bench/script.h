/* Requests and their answers from a file, for load's option script=. */
#ifndef SCRIPT_H
#define SCRIPT_H
#include <stdint.h>

enum { MOST_REQUEST = 1024 }; /* bytes */

/* A request, and what its answer begins with; in TT's case the plaintexts of DATA frames.  Elsewhere the answer is as
 * long as `reply`, which need not be known (NULL). */
struct exchange {
    const uint8_t *request, *reply;
    uint32_t request_size, reply_size;
};

/* All exchanges of a file, at least two, and how many.  In the file stand sizes (4 bytes, this machine's order), each
 * before its bytes: request, reply, request, reply...  Anything wrong ends the program. */
struct exchange *read_script(const char *name, uint32_t *size);

#endif
