/* The two lists that everything else is made from: the states of a connection, and the reasons for its end.
 * The enums below, the counters, the log words, `tt status` and the table in docs/protocol.md all come from here. */
#ifndef TT_NAMES_H
#define TT_NAMES_H

/* X(name, meaning) */
#define TT_STATES(X) \
    X(free, "no connection: the place is unused") \
    X(new, "accepted, no complete HELLO yet") \
    X(waiting, "a complete HELLO waits for its handshake") \
    X(open, "the handshake is done, nobody has logged in") \
    X(logged_in, "a user has logged in") \
    X(closing, "the last output is sent, what still arrives is thrown away")

/* X(name, times out?, meaning).  Only evidence times a source out: a byte that cannot be ours, or what follows from one. */
#define TT_REASONS(X) \
    X(not_protocol, 1, "wrong magic, frame type for the state, or length; or the fifth unknown version of a source in a minute") \
    X(tampered, 1, "after the handshake, a frame that fails its authentication, its decompression bound or its decoding") \
    X(bad_hello, 1, "a well-formed HELLO that does not authenticate (perhaps made for an old server key)") \
    X(stalled, 1, "at least one byte, but no complete HELLO in time") \
    X(login_failed, 1, "too many failed logins from one source, with no good one between") \
    X(operator, 1, "timed out by hand") \
    X(adopted, 1, "taken over at the start, from the kernel map or from the file of another version") \
    X(timed_out, 0, "closed at once: the time-out of its source is running") \
    X(silent, 0, "no byte in time") \
    X(peer_closed, 0, "the peer closed or reset the connection") \
    X(bad_version, 0, "right magic, a version that is not spoken here: answered with REFUSE") \
    X(bad_proxy, 0, "a proxy of `proxy_from` sent no PROXY protocol v2 header, or a broken one") \
    X(too_long, 0, "after the handshake, a frame longer than the state allows") \
    X(too_many, 0, "over a budget: connections in all, connections or HELLOs of one source") \
    X(idle, 0, "nothing asked for too long, or a frame begun and not ended in time") \
    X(slow_reader, 0, "replies were not read in time") \
    X(logged_out, 0, "the session was ended: by its user, by an administrator, or with its account") \
    X(shutdown, 0, "the server is stopping") \
    X(internal, 0, "a failure of our own, such as no memory: never the peer's fault")

#define TT_ENUM(name, ...) TT_S_##name,
typedef enum { TT_STATES(TT_ENUM) TT_STATES_COUNT } tt_state;
#undef TT_ENUM
#define TT_ENUM(name, ...) TT_R_##name,
typedef enum { TT_REASONS(TT_ENUM) TT_REASONS_COUNT } tt_reason;
#undef TT_ENUM

struct tt_state_row { const char *name, *meaning; };
struct tt_reason_row { const char *name; int times_out; const char *meaning; };

#define TT_ROW(name, meaning) { #name, meaning },
static const struct tt_state_row tt_states[] = { TT_STATES(TT_ROW) };
#undef TT_ROW
#define TT_ROW(name, times_out, meaning) { #name, times_out, meaning },
static const struct tt_reason_row tt_reasons[] = { TT_REASONS(TT_ROW) };
#undef TT_ROW

#endif
