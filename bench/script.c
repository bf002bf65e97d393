#include "script.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"

static uint32_t take_bytes(FILE *file, const char *name, const uint8_t **bytes)
{
    uint32_t size;
    uint8_t *data;
    if (fread(&size, sizeof size, 1, file) != 1)
        die("script=%s: it ends too early", name);
    if (!(data = malloc(size + 1)) || fread(data, 1, size, file) != size)
        die("script=%s: it ends too early, or there is no memory", name);
    *bytes = data;
    return size;
}

struct exchange *read_script(const char *name, uint32_t *size)
{
    struct exchange *script = NULL;
    FILE *file = fopen(name, "rb");
    int next;
    if (!file)
        die("script=%s: %s", name, strerror(errno));
    for (*size = 0; (next = getc(file)) != EOF; ++*size) {
        ungetc(next, file);
        if (!(*size & (*size - 1)) && !(script = realloc(script, (2 * *size + 1) * sizeof *script)))
            die("no memory");
        struct exchange *e = &script[*size];
        e->request_size = take_bytes(file, name, &e->request);
        e->reply_size = take_bytes(file, name, &e->reply);
        if (e->request_size > MOST_REQUEST)
            die("script=%s: a request of %u bytes, but %d is the most", name, e->request_size, MOST_REQUEST);
    }
    fclose(file);
    if (*size < 2)
        die("script=%s: it needs what a connection begins with, and a request", name);
    return script;
}
