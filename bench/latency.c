#include "latency.h"

#include <string.h>

/* 64 buckets to each power of two. */
enum { SUB = 64, BUCKETS = 60 * SUB };
static uint64_t buckets[BUCKETS], most;

void latency_clear(void)
{
    most = 0;
    memset(buckets, 0, sizeof buckets);
}

void latency_note(uint64_t ns)
{
    int shift = ns < SUB ? 0 : 63 - __builtin_clzll(ns) - 6;
    buckets[ns < SUB ? ns : (uint64_t)(shift + 1) * SUB + (ns >> shift) - SUB]++;
    if (ns > most)
        most = ns;
}

double latency_percentile(double part, uint64_t total)
{
    uint64_t seen = 0, wanted = (uint64_t)(part * (double)total);
    for (uint64_t i = 0; i < BUCKETS; i++) {
        seen += buckets[i];
        if (seen > wanted)
            return i < SUB ? (double)i : (double)((i % SUB + SUB) << (i / SUB - 1));
    }
    return (double)most;
}

uint64_t latency_most(void) { return most; }
