/* SipHash-1-3 (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012): a keyed hash, so that nobody
   without the store's seed can choose keys that collide. */
#ifndef LOGKV_SIPHASH_H
#define LOGKV_SIPHASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SIP_ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define SIP_ROUND                                                            \
    do {                                                                     \
        v0 += v1; v1 = SIP_ROTL(v1, 13); v1 ^= v0; v0 = SIP_ROTL(v0, 32);    \
        v2 += v3; v3 = SIP_ROTL(v3, 16); v3 ^= v2;                           \
        v0 += v3; v3 = SIP_ROTL(v3, 21); v3 ^= v0;                           \
        v2 += v1; v1 = SIP_ROTL(v1, 17); v1 ^= v2; v2 = SIP_ROTL(v2, 32);    \
    } while (0)

static inline uint64_t siphash13(const uint64_t seed[2], const void *data, size_t length) {
    const uint8_t *p = (const uint8_t *)data;
    uint64_t v0 = seed[0] ^ 0x736f6d6570736575u, v1 = seed[1] ^ 0x646f72616e646f6du;
    uint64_t v2 = seed[0] ^ 0x6c7967656e657261u, v3 = seed[1] ^ 0x7465646279746573u;
    uint64_t word, last = (uint64_t)length << 56;

    for (; length >= 8; length -= 8, p += 8) {
        memcpy(&word, p, 8);
        v3 ^= word;
        SIP_ROUND;
        v0 ^= word;
    }
    for (size_t i = 0; i < length; i++) last |= (uint64_t)p[i] << (8 * i);
    v3 ^= last;
    SIP_ROUND;
    v0 ^= last;
    v2 ^= 0xff;
    SIP_ROUND;
    SIP_ROUND;
    SIP_ROUND;
    return v0 ^ v1 ^ v2 ^ v3;
}

#endif
