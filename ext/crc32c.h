/* CRC-32C (Castagnoli, reflected polynomial 0x82f63b78): hardware where there is any, slice-by-8 otherwise.
   crc32c(crc32c(0, a), b) == crc32c(0, ab), as with zlib.crc32. */
#ifndef LOGKV_CRC32C_H
#define LOGKV_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static uint32_t crc32c_table[8][256];
static uint32_t crc32c_powers[2][512];         /* of x, for as many bytes, and for as many times 512 */

static inline uint64_t crc32c_word(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

/* Slicing-by-8: Kounavis and Berry, "A Systematic Approach to Building High Performance, Software-based, CRC
   Generators", 2005. */
static uint32_t crc32c_software(uint32_t crc, const void *data, size_t length) {
    const uint8_t *p = (const uint8_t *)data;
    uint64_t word;
    crc = ~crc;
    for (; length >= 8; length -= 8, p += 8) {
        memcpy(&word, p, 8);
        word ^= crc;
        crc = crc32c_table[7][word & 0xff] ^ crc32c_table[6][(word >> 8) & 0xff]
            ^ crc32c_table[5][(word >> 16) & 0xff] ^ crc32c_table[4][(word >> 24) & 0xff]
            ^ crc32c_table[3][(word >> 32) & 0xff] ^ crc32c_table[2][(word >> 40) & 0xff]
            ^ crc32c_table[1][(word >> 48) & 0xff] ^ crc32c_table[0][word >> 56];
    }
    for (; length; length--, p++) crc = crc32c_table[0][(crc ^ *p) & 0xff] ^ (crc >> 8);
    return ~crc;
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <nmmintrin.h>
__attribute__((target("sse4.2")))
static uint32_t crc32c_hardware(uint32_t crc, const void *data, size_t length) {
    const uint8_t *p = (const uint8_t *)data;
    uint64_t state = (uint32_t)~crc;
    for (; length >= 32; length -= 32, p += 32) {
        state = _mm_crc32_u64(state, crc32c_word(p));
        state = _mm_crc32_u64(state, crc32c_word(p + 8));
        state = _mm_crc32_u64(state, crc32c_word(p + 16));
        state = _mm_crc32_u64(state, crc32c_word(p + 24));
    }
    for (; length >= 8; length -= 8, p += 8) state = _mm_crc32_u64(state, crc32c_word(p));
    if (length & 4) {
        uint32_t half;
        memcpy(&half, p, 4);
        state = _mm_crc32_u32((uint32_t)state, half);
        p += 4;
    }
    for (length &= 3; length; length--) state = _mm_crc32_u8((uint32_t)state, *p++);
    return ~(uint32_t)state;
}
static int crc32c_has_hardware(void) { __builtin_cpu_init(); return __builtin_cpu_supports("sse4.2"); }

#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
static uint32_t crc32c_hardware(uint32_t crc, const void *data, size_t length) {
    const uint8_t *p = (const uint8_t *)data;
    uint64_t word;
    crc = ~crc;
    for (; length >= 8; length -= 8, p += 8) {
        memcpy(&word, p, 8);
        crc = __crc32cd(crc, word);
    }
    for (; length; length--) crc = __crc32cb(crc, *p++);
    return ~crc;
}
static int crc32c_has_hardware(void) { return 1; }

#elif defined(__aarch64__) && defined(__linux__) && defined(__GNUC__)
#include <sys/auxv.h>
#include <asm/hwcap.h>
__attribute__((target("+crc")))
static uint32_t crc32c_hardware(uint32_t crc, const void *data, size_t length) {
    const uint8_t *p = (const uint8_t *)data;
    uint64_t word;
    crc = ~crc;
    for (; length >= 8; length -= 8, p += 8) {
        memcpy(&word, p, 8);
        crc = __builtin_aarch64_crc32cx(crc, word);
    }
    for (; length; length--) crc = __builtin_aarch64_crc32cb(crc, *p++);
    return ~crc;
}
static int crc32c_has_hardware(void) { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }

#else
#define crc32c_hardware crc32c_software
static int crc32c_has_hardware(void) { return 0; }
#endif

static uint32_t (*crc32c)(uint32_t crc, const void *data, size_t length) = crc32c_software;

/* The product of two polynomials; their highest bit is that of 1. */
static inline uint32_t crc32c_product(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (; a; a <<= 1, b = (b >> 1) ^ (0x82f63b78u & (0u - (b & 1)))) product ^= b & (0u - (a >> 31));
    return product;
}

/* What `crc` adds to a checksum that goes on with it, `length` bytes later:
   crc32c(crc, data, length) == (crc32c_shift(crc, length) ^ crc32c(0, data, length)), for lengths below 256 KiB. */
static inline uint32_t crc32c_shift(uint32_t crc, uint64_t length) {
    return crc32c_product(crc32c_product(crc, crc32c_powers[0][length & 511]), crc32c_powers[1][length >> 9 & 511]);
}

/* Once, when the module is loaded, before any checksum. */
static void crc32c_setup(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (0x82f63b78u & (0u - (crc & 1)));
        crc32c_table[0][i] = crc;
    }
    for (int slice = 1; slice < 8; slice++)
        for (int i = 0; i < 256; i++)
            crc32c_table[slice][i] = (crc32c_table[slice - 1][i] >> 8) ^ crc32c_table[0][crc32c_table[slice - 1][i] & 0xff];
    crc32c_powers[0][0] = crc32c_powers[1][0] = 0x80000000u;
    for (int i = 1; i < 512; i++) crc32c_powers[0][i] = crc32c_product(crc32c_powers[0][i - 1], 0x00800000u);
    for (int i = 1; i < 512; i++)
        crc32c_powers[1][i] = crc32c_product(crc32c_powers[1][i - 1], crc32c_product(crc32c_powers[0][511], 0x00800000u));
    if (crc32c_has_hardware()) crc32c = crc32c_hardware;
}

#endif
