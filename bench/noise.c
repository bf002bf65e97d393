/* Noise_NK_25519_AESGCM_SHA256 as a client (Noise Protocol Framework, revision 34), for the load generator.
 *
 * The names are the specification's: h the handshake hash, ck the chaining key, e the ephemeral key, n the nonce.
 */
#include "noise.h"

#include <openssl/hmac.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char NAME[] = "Noise_NK_25519_AESGCM_SHA256", PROLOGUE[] = "tapetrack/1";
static const uint8_t PAYLOAD[] = "\x82\xa4name\xa4load\xa7version\xa1" "1"; /* a MessagePack map */
enum { REKEY_INTERVAL = 1 << 20 }; /* messages under one transport key */

static EVP_PKEY *ephemeral;
static uint8_t hello[TT_HELLO_MOST];
static size_t hello_size;
static uint8_t hello_h[TT_KEY], hello_ck[TT_KEY];

static void need(bool done, const char *what)
{
    if (!done) {
        fprintf(stderr, "load: OpenSSL: %s failed\n", what);
        exit(2);
    }
}

static void mix_hash(uint8_t h[TT_KEY], const uint8_t *data, size_t size)
{
    uint8_t joined[TT_KEY + 512];
    need(size <= 512, "mix_hash");
    memcpy(joined, h, TT_KEY);
    memcpy(joined + TT_KEY, data, size);
    SHA256(joined, TT_KEY + size, h);
}

/* Section 4.3, two outputs: the first may be ck itself. */
static void hkdf(const uint8_t ck[TT_KEY], const uint8_t *material, size_t size, uint8_t first[TT_KEY],
                 uint8_t second[TT_KEY])
{
    uint8_t key[TT_KEY], block[TT_KEY + 1];
    HMAC(EVP_sha256(), ck, TT_KEY, material, size, key, NULL);
    HMAC(EVP_sha256(), key, TT_KEY, (const uint8_t *)"\x01", 1, first, NULL);
    memcpy(block, first, TT_KEY);
    block[TT_KEY] = 2;
    HMAC(EVP_sha256(), key, TT_KEY, block, sizeof block, second, NULL);
}

static void exchange(const uint8_t public[TT_KEY], uint8_t secret[TT_KEY])
{
    size_t size = TT_KEY;
    EVP_PKEY *peer = EVP_PKEY_new_raw_public_key(EVP_PKEY_X25519, NULL, public, TT_KEY);
    EVP_PKEY_CTX *ctx = EVP_PKEY_CTX_new(ephemeral, NULL);
    need(peer && ctx && EVP_PKEY_derive_init(ctx) > 0 && EVP_PKEY_derive_set_peer(ctx, peer) > 0 &&
             EVP_PKEY_derive(ctx, secret, &size) > 0,
         "X25519");
    EVP_PKEY_CTX_free(ctx);
    EVP_PKEY_free(peer);
}

static EVP_CIPHER_CTX *cipher(const uint8_t key[TT_KEY], int encrypt)
{
    EVP_CIPHER_CTX *ctx = EVP_CIPHER_CTX_new();
    need(ctx && EVP_CipherInit_ex(ctx, EVP_aes_256_gcm(), NULL, key, NULL, encrypt), "AES-256-GCM");
    return ctx;
}

static void set_nonce(EVP_CIPHER_CTX *ctx, uint64_t n)
{
    uint8_t nonce[12] = {0};
    for (int i = 0; i < 8; i++)
        nonce[11 - i] = (uint8_t)(n >> 8 * i);
    need(EVP_CipherInit_ex(ctx, NULL, NULL, NULL, nonce, -1), "AES-256-GCM nonce");
}

/* `out` has room for size + TT_TAG. */
static void seal(EVP_CIPHER_CTX *ctx, uint64_t n, const uint8_t *ad, int ad_size, const uint8_t *plain, int size,
                 uint8_t *out)
{
    int done;
    set_nonce(ctx, n);
    need(EVP_EncryptUpdate(ctx, NULL, &done, ad, ad_size) && EVP_EncryptUpdate(ctx, out, &done, plain, size) &&
             EVP_EncryptFinal_ex(ctx, out + done, &done) &&
             EVP_CIPHER_CTX_ctrl(ctx, EVP_CTRL_AEAD_GET_TAG, TT_TAG, out + size),
         "seal");
}

/* `size` without the tag that follows it. */
static bool open_sealed(EVP_CIPHER_CTX *ctx, uint64_t n, const uint8_t *ad, int ad_size, const uint8_t *sealed,
                        int size, uint8_t *out)
{
    int done;
    set_nonce(ctx, n);
    return EVP_DecryptUpdate(ctx, NULL, &done, ad, ad_size) && EVP_DecryptUpdate(ctx, out, &done, sealed, size) &&
           EVP_CIPHER_CTX_ctrl(ctx, EVP_CTRL_AEAD_SET_TAG, TT_TAG, (void *)(sealed + size)) &&
           EVP_DecryptFinal_ex(ctx, out + done, &done) > 0;
}

void tt_prepare(const uint8_t server_public[TT_KEY])
{
    uint8_t secret[TT_KEY], key[TT_KEY], *body = hello + TT_HEADER;
    const int size = sizeof PAYLOAD - 1;
    size_t key_size = TT_KEY;
    memset(hello_ck, 0, TT_KEY);
    memcpy(hello_ck, NAME, sizeof NAME - 1); /* section 5.2: a name of at most 32 bytes is padded, not hashed */
    memcpy(hello_h, hello_ck, TT_KEY);
    mix_hash(hello_h, (const uint8_t *)PROLOGUE, sizeof PROLOGUE - 1);
    mix_hash(hello_h, server_public, TT_KEY);
    ephemeral = EVP_PKEY_Q_keygen(NULL, NULL, "X25519");
    need(ephemeral && EVP_PKEY_get_raw_public_key(ephemeral, body, &key_size), "X25519 key");
    mix_hash(hello_h, body, TT_KEY);
    exchange(server_public, secret);
    hkdf(hello_ck, secret, TT_KEY, hello_ck, key);
    EVP_CIPHER_CTX *ctx = cipher(key, 1);
    seal(ctx, 0, hello_h, TT_KEY, PAYLOAD, size, body + TT_KEY);
    EVP_CIPHER_CTX_free(ctx);
    mix_hash(hello_h, body + TT_KEY, size + TT_TAG);
    memcpy(hello, "TT\1\1\0\0\0", TT_HEADER - 1);
    hello[TT_HEADER - 1] = (uint8_t)(TT_KEY + size + TT_TAG);
    hello_size = TT_HEADER + TT_KEY + size + TT_TAG;
}

const uint8_t *tt_hello(size_t *size)
{
    *size = hello_size;
    return hello;
}

bool tt_welcome(struct tt_transport *t, const uint8_t *body, size_t size)
{
    uint8_t h[TT_KEY], ck[TT_KEY], key[TT_KEY], secret[TT_KEY], payload[512];
    if (size < TT_KEY + TT_TAG || size > sizeof payload)
        return false;
    memcpy(h, hello_h, TT_KEY);
    mix_hash(h, body, TT_KEY);
    exchange(body, secret);
    hkdf(hello_ck, secret, TT_KEY, ck, key);
    EVP_CIPHER_CTX *ctx = cipher(key, 0);
    bool authentic = open_sealed(ctx, 0, h, TT_KEY, body + TT_KEY, (int)(size - TT_KEY - TT_TAG), payload);
    EVP_CIPHER_CTX_free(ctx);
    if (!authentic)
        return false;
    hkdf(ck, NULL, 0, t->seal_key, t->open_key);
    t->sealer = cipher(t->seal_key, 1);
    t->opener = cipher(t->open_key, 0);
    t->sealed = t->opened = 0;
    return true;
}

void tt_close(struct tt_transport *t)
{
    EVP_CIPHER_CTX_free(t->sealer);
    EVP_CIPHER_CTX_free(t->opener);
    t->sealer = t->opener = NULL;
}

/* REKEY of section 4.2, before every nonce n > 0 with n % 2^20 = 0. */
static void renew(EVP_CIPHER_CTX **ctx, uint8_t key[TT_KEY], int encrypt)
{
    static const uint8_t zeros[TT_KEY];
    uint8_t out[TT_KEY + TT_TAG];
    EVP_CIPHER_CTX *old = cipher(key, 1);
    seal(old, UINT64_MAX, NULL, 0, zeros, TT_KEY, out);
    EVP_CIPHER_CTX_free(old);
    memcpy(key, out, TT_KEY);
    EVP_CIPHER_CTX_free(*ctx);
    *ctx = cipher(key, encrypt);
}

void tt_seal(struct tt_transport *t, const uint8_t *plain, size_t size, uint8_t *frame)
{
    const uint32_t length = (uint32_t)size + TT_TAG;
    if (t->sealed && t->sealed % REKEY_INTERVAL == 0)
        renew(&t->sealer, t->seal_key, 1);
    memcpy(frame, "TT\1", 3);
    frame[3] = TT_DATA;
    for (int i = 0; i < 4; i++)
        frame[7 - i] = (uint8_t)(length >> 8 * i);
    seal(t->sealer, t->sealed++, frame, TT_HEADER, plain, (int)size, frame + TT_HEADER);
}

bool tt_open(struct tt_transport *t, const uint8_t *frame, size_t size, uint8_t *plain)
{
    if (t->opened && t->opened % REKEY_INTERVAL == 0)
        renew(&t->opener, t->open_key, 0);
    return open_sealed(t->opener, t->opened++, frame, TT_HEADER, frame + TT_HEADER, (int)(size - TT_MORE), plain);
}
