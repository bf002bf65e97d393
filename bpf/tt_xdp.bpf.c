/* An XDP program (the frame as the driver has it, before the kernel's stack sees it): drops what timed-out sources send
 * to our TCP ports, and counts.
 *
 * Dropped is a SYN without ACK from a source whose time-out runs; with all_packets, every TCP packet of such a source.
 * It fails open: what it cannot read passes, and so does all that is not TCP to one of our ports: ARP, neighbour
 * discovery, ICMP, UDP, fragments, more than two VLAN tags, IPv6 behind more than MAX_EXTENSIONS extension headers.
 * Nothing is changed, sent or redirected.
 *
 * Compiled as it stands it is for port 5000 and hashes with values of 4 bytes: bpftool alone can load that.
 */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>

#include "tt_ban.h"

#define MAX_VLAN_TAGS 2
#define MAX_EXTENSIONS 6
#define MAX_PORTS 16

#define IPV4_FRAGMENT 0x3fff /* more fragments, or an offset (RFC 791) */
#define IPV4_WORDS 5	     /* of 4 bytes: a header without options */

const volatile __u16 ports[MAX_PORTS] = {5000}; /* ours; the first 0 ends them */
const volatile __u32 all_packets = 0;		/* 0: SYNs alone, so that whoever is connected stays */

struct vlan_tag { /* IEEE 802.1Q, behind the type that announces it */
	__be16 control;
	__be16 type; /* of what follows */
};

struct counts {
	__u64 passed_packets;
	__u64 passed_bytes; /* of a frame over a page: those in its first buffer */
	__u64 dropped_packets;
	__u64 dropped_bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(key_size, 4);
	__uint(value_size, sizeof(struct counts));
	__uint(max_entries, 1);
} counters SEC(".maps");

/* The loaded array is frozen, so the verifier cuts this off behind the last port. */
static __always_inline int is_our_port(__u16 port)
{
#pragma unroll
	for (int i = 0; i < MAX_PORTS; i++) {
		const __u16 ours = ports[i];

		if (!ours)
			return 0;
		if (ours == port)
			return 1;
	}
	return 0;
}

static __always_inline int is_for_us(const void *at, const void *end)
{
	const struct tcphdr *tcp = at;

	if ((void *)(tcp + 1) > end || !is_our_port(bpf_ntohs(tcp->dest)))
		return 0;
	return all_packets || (tcp->syn && !tcp->ack);
}

static __always_inline int is_dropped_ipv4(const void *at, const void *end)
{
	const struct iphdr *ip = at;

	if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl < IPV4_WORDS || ip->protocol != IPPROTO_TCP)
		return 0;
	if (ip->frag_off & bpf_htons(IPV4_FRAGMENT))
		return 0;
	return is_for_us(at + ip->ihl * 4, end) && is_timed_out_ipv4(ip->saddr);
}

static __always_inline int is_extension(__u8 header)
{
	return header == IPPROTO_HOPOPTS || header == IPPROTO_ROUTING || header == IPPROTO_DSTOPTS;
}

static __always_inline int is_dropped_ipv6(const void *at, const void *end)
{
	const struct ipv6hdr *ip = at;
	__be32 source[4];
	__u8 next;

	if ((void *)(ip + 1) > end || ip->version != 6)
		return 0;
	next = ip->nexthdr;
	at = ip + 1;
	for (int i = 0; i < MAX_EXTENSIONS && is_extension(next); i++) {
		const struct ipv6_opt_hdr *extension = at;

		if ((void *)(extension + 1) > end)
			return 0;
		next = extension->nexthdr;
		at += (extension->hdrlen + 1) * 8; /* the length leaves the first 8 bytes out (RFC 8200) */
	}
	if (next != IPPROTO_TCP || !is_for_us(at, end))
		return 0;
	for (int i = 0; i < 4; i++)
		source[i] = ip->saddr.in6_u.u6_addr32[i];
	return has_embedded_ipv4(source) ? is_timed_out_ipv4(source[3]) : is_timed_out_ipv6(source);
}

static __always_inline int is_dropped(const void *at, const void *end)
{
	const struct ethhdr *ethernet = at;
	__be16 type;

	if ((void *)(ethernet + 1) > end)
		return 0;
	type = ethernet->h_proto;
	at = ethernet + 1;
	for (int i = 0; i < MAX_VLAN_TAGS && (type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD)); i++) {
		const struct vlan_tag *tag = at;

		if ((void *)(tag + 1) > end)
			return 0;
		type = tag->type;
		at = tag + 1;
	}
	if (type == bpf_htons(ETH_P_IP))
		return is_dropped_ipv4(at, end);
	if (type == bpf_htons(ETH_P_IPV6))
		return is_dropped_ipv6(at, end);
	return 0;
}

/* frags: it reads headers alone, so it may serve where a frame takes several buffers (an MTU over a page). */
SEC("xdp.frags")
int tt_xdp(struct xdp_md *frame)
{
	const void *at = (void *)(long)frame->data, *end = (void *)(long)frame->data_end;
	__u32 only = 0;
	struct counts *counts = bpf_map_lookup_elem(&counters, &only);

	if (is_dropped(at, end)) {
		if (counts) { /* this CPU's own: no other writes them */
			counts->dropped_packets += 1;
			counts->dropped_bytes += end - at;
		}
		return XDP_DROP;
	}
	if (counts) {
		counts->passed_packets += 1;
		counts->passed_bytes += end - at;
	}
	return XDP_PASS;
}
