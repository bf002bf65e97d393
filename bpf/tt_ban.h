/* The maps of timed-out sources, as every kernel program of ours reads them: forms, value rule, look-up.
 *
 * key    in network byte order.  Hash: the IPv4 address (4 bytes); the IPv6 address with all behind its prefix (/64)
 *        zero (16 bytes).  LPM trie: the prefix length, 4 bytes in host order, then the address (8 or 20 bytes).
 *        64:ff9b::/96 (RFC 6052) is looked up as the IPv4 address in its last 4 bytes.
 * value  in host byte order, the end of the time-out on CLOCK_MONOTONIC: 4 bytes, whole seconds; 8 bytes, nanoseconds.
 *        Timed out while floor(now) < value.  0, or an end more than 30 days ahead, is for ever: the second of the two
 *        needs no code here, since such an end is ahead of now.
 *
 * Our loader sets every constant and binds each map; a name without a map gets any with keys of 4 and values of 8 bytes.
 * The values here are for hashes with values of 4 bytes: what another loader gets that sets none.
 * Every branch must pass the verifier whatever the constants are: for a loader with CAP_BPF alone, kernels before 6.17
 * also check those that the constants exclude, as the processor may enter them by speculation.
 */
#ifndef TT_BAN_H
#define TT_BAN_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define SECOND 1000000000ULL /* ns */

/* `volatile`, or the compiler would put these values in the place of the loader's. */
const volatile __u32 ipv4_key_size = 4;	  /* bytes: 4 hash, 8 LPM trie */
const volatile __u32 ipv4_value_size = 4; /* bytes: 4 or 8; 0: there is no map for IPv4 */
const volatile __u32 ipv6_key_size = 16;  /* bytes: 16 hash, 20 LPM trie */
const volatile __u32 ipv6_value_size = 4; /* bytes: 4 or 8; 0: there is no map for IPv6 */
const volatile __u32 ipv6_mask[4] = {~0U, ~0U}; /* of a hash's keys, network byte order: ones over the prefix */

/* A name for each form of value, so that no branch reads more than its map holds. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(key_size, 4);
	__uint(value_size, 4);
	__uint(max_entries, 1024);
} ipv4_seconds SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(key_size, 4);
	__uint(value_size, 8);
	__uint(max_entries, 1024);
} ipv4_ns SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(key_size, 16);
	__uint(value_size, 4);
	__uint(max_entries, 1024);
} ipv6_seconds SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(key_size, 16);
	__uint(value_size, 8);
	__uint(max_entries, 1024);
} ipv6_ns SEC(".maps");

/* A hash is asked with what begins at the address.  `tail` keeps the longer key of a trie readable from there, too. */
struct ipv4_key {
	__u32 prefix; /* bits */
	__be32 address;
	__u32 tail;
};

struct ipv6_key {
	__u32 prefix; /* bits */
	__be32 address[4];
	__u32 tail;
};

/* The time of the last tick: never ahead, at most 10 ms behind, for less than half the price of the exact time.  Linux
 * 5.10 lacks this helper; there the loader puts bpf_ktime_get_ns in its place. */
static __always_inline __u64 monotonic_ns(void)
{
	return bpf_ktime_get_coarse_ns();
}

static __always_inline int is_running(__u64 end)
{
	return end == 0 || monotonic_ns() < end;
}

/* now is not divided down to seconds: the end multiplied up gives the same answer, and fits 64 bits. */
static __always_inline int is_running_seconds(const __u32 *end)
{
	return end && is_running(*end * SECOND);
}

static __always_inline int is_running_ns(const __u64 *end)
{
	return end && is_running(*end);
}

static __always_inline int is_timed_out_ipv4(__be32 address)
{
	struct ipv4_key key = {.prefix = 32, .address = address};
	const __u32 value_size = ipv4_value_size;
	const void *asked = &key.address;

	if (ipv4_key_size == sizeof(key.prefix) + sizeof(key.address))
		asked = &key;
	if (value_size == sizeof(__u32))
		return is_running_seconds(bpf_map_lookup_elem(&ipv4_seconds, asked));
	if (value_size == sizeof(__u64))
		return is_running_ns(bpf_map_lookup_elem(&ipv4_ns, asked));
	return 0;
}

static __always_inline int has_embedded_ipv4(const __be32 address[4])
{
	return address[0] == bpf_htonl(0x0064ff9b) && !address[1] && !address[2];
}

static __always_inline int is_timed_out_ipv6(const __be32 address[4])
{
	const __u32 value_size = ipv6_value_size;
	struct ipv6_key key;
	const void *asked = &key;

	key.prefix = 128; /* one by one: the compiler would copy an initializer from among the constants */
	key.tail = 0;
	if (ipv6_key_size == sizeof(key.prefix) + sizeof(key.address)) {
		for (int i = 0; i < 4; i++)
			key.address[i] = address[i];
	} else {
		for (int i = 0; i < 4; i++)
			key.address[i] = address[i] & ipv6_mask[i];
		asked = key.address;
	}
	if (value_size == sizeof(__u32))
		return is_running_seconds(bpf_map_lookup_elem(&ipv6_seconds, asked));
	if (value_size == sizeof(__u64))
		return is_running_ns(bpf_map_lookup_elem(&ipv6_ns, asked));
	return 0;
}

#endif
