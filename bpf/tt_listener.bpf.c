/* A socket filter for a listening TCP socket (SO_ATTACH_BPF): drops the SYNs of timed-out sources, and counts them.
 *
 * Accepted sockets inherit it, so it passes all but a SYN without ACK before it looks anything up: whoever is connected
 * stays.  What it cannot read it passes.  It sees the packet from the TCP header on; the addresses lie before that, at
 * the network header.  One program serves IPv4, IPv6 and a socket that takes both.
 */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <stddef.h>

#include "tt_ban.h"

#define KEEP -1 /* the whole packet */
#define DROP 0

#define TCP_FLAGS 13 /* their byte in the TCP header (RFC 9293) */
#define SYN 0x02
#define ACK 0x10

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(key_size, 4);
	__uint(value_size, 8);
	__uint(max_entries, 1);
} dropped_syns SEC(".maps");

static __always_inline int is_timed_out(struct __sk_buff *skb)
{
	__be32 ipv6[4], ipv4;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes_relative(skb, offsetof(struct iphdr, saddr), &ipv4, sizeof(ipv4), BPF_HDR_START_NET))
			return 0;
		return is_timed_out_ipv4(ipv4);
	}
	if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		if (bpf_skb_load_bytes_relative(skb, offsetof(struct ipv6hdr, saddr), ipv6, sizeof(ipv6), BPF_HDR_START_NET))
			return 0;
		return has_embedded_ipv4(ipv6) ? is_timed_out_ipv4(ipv6[3]) : is_timed_out_ipv6(ipv6);
	}
	return 0;
}

SEC("socket")
int tt_listener(struct __sk_buff *skb)
{
	__u32 only = 0;
	__u64 *count;
	__u8 flags;

	if (bpf_skb_load_bytes(skb, TCP_FLAGS, &flags, sizeof(flags)) || (flags & (SYN | ACK)) != SYN)
		return KEEP;
	if (!is_timed_out(skb))
		return KEEP;
	count = bpf_map_lookup_elem(&dropped_syns, &only);
	if (count)
		*count += 1; /* this CPU's own: no other writes it */
	return DROP;
}
