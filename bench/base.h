/* What the programs of the bench share: an error that ends them, and the clocks. */
#ifndef BASE_H
#define BASE_H
#include <stdint.h>
#include <time.h>

#define SECOND UINT64_C(1000000000) /* ns */

/* One line on stderr, after the program's name; exit code 2. */
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* ns; ends the program where the clock, of another process, is gone. */
uint64_t clock_ns(clockid_t clock);
uint64_t now_ns(void); /* CLOCK_MONOTONIC */

#endif
