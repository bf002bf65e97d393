/* The client's side of our protocol, version 1, written from docs/protocol.md alone: HELLO, WELCOME, DATA.
 *
 * Rules: no I/O and no allocation but OpenSSL's own; every length is the caller's to check against the frame header.
 * One ephemeral key serves all handshakes of a run: the server cannot tell, and has all its own work, while the
 * generator computes one Diffie-Hellman result a handshake and not three.  Nothing but a load generator may do that.
 */
#ifndef TT_BENCH_NOISE_H
#define TT_BENCH_NOISE_H

#include <openssl/evp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    TT_HEADER = 8,   /* bytes: "TT", version, type, length in network byte order */
    TT_KEY = 32,     /* bytes of a public key, a cipher key, a hash */
    TT_TAG = 16,     /* bytes that AES-GCM adds */
    TT_MORE = TT_HEADER + TT_TAG, /* by so much a DATA frame is longer than its plaintext */
    TT_HELLO_MOST = TT_HEADER + TT_KEY + TT_TAG + 192,
    TT_WELCOME = 2,  /* types of frames */
    TT_DATA = 3,
};

struct tt_transport {
    EVP_CIPHER_CTX *sealer, *opener;
    uint8_t seal_key[TT_KEY], open_key[TT_KEY];
    uint64_t sealed, opened; /* messages so far: the next nonces */
};

/* Makes the HELLO that all handshakes of this run send; dies where the key is not one. */
void tt_prepare(const uint8_t server_public[TT_KEY]);
const uint8_t *tt_hello(size_t *size);

/* The transport of a connection from the body of its WELCOME (what follows the header).  False: not authentic. */
bool tt_welcome(struct tt_transport *t, const uint8_t *body, size_t size);
void tt_close(struct tt_transport *t);

/* The next DATA frame to the server, of size + TT_MORE bytes. */
void tt_seal(struct tt_transport *t, const uint8_t *plain, size_t size, uint8_t *frame);
/* The plaintext, size - TT_MORE bytes, of a whole DATA frame of `size` bytes.  False: not authentic. */
bool tt_open(struct tt_transport *t, const uint8_t *frame, size_t size, uint8_t *plain);

#endif
