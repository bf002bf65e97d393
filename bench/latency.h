/* Latencies of a run: how many were how long. */
#ifndef LATENCY_H
#define LATENCY_H
#include <stdint.h>

void latency_clear(void);
void latency_note(uint64_t ns);

/* The latency below which this part of `total` lies, ns: right within 1.6 %. */
double latency_percentile(double part, uint64_t total);
uint64_t latency_most(void);

#endif
