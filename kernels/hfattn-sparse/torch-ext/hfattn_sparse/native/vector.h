// Vectors of floats, one lane a query row, and what is computed on them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__linux__)
#define HFA_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HFA_AMX 0
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kKeysAtOnce = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8, kKeysAtOnce = 4;
#else
constexpr int kLanes = 4, kKeysAtOnce = 4;
#endif
constexpr int kVectors = 2, kStrip = kLanes * kVectors;
// Keys whose scores are formed at one time: kChunk * kStrip floats stay in a first-level cache; on AMX three strips are
// under way together.
constexpr int kChunk = 128, kAmxChunk = 128;
// Rows that one thread takes from a tile at a time.
constexpr int kRows = 4 * 32;
// Elements from key to key up to which AMX reads keys where they are.
constexpr int64_t kNearKeys = 256;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef float VecU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t UVecU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));


// Minus zero changes no number, not even -0, so compilers leave the broadcast alone.
inline Vec splat(float x) { return x - Vec{}; }
inline Vec load(const float* p) { return (Vec)(*(const VecU*)p); }
inline void store(float* p, Vec x) { *(VecU*)p = (VecU)x; }
inline bool any(IVec x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#else
  int32_t found = 0;
  for (int l = 0; l < kLanes; ++l) found |= x[l];
  return found != 0;
#endif
}
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x for x <= 0 or a little more; exactly 0 below 2^-126, NaN for NaN.
template <int Degree>
inline Vec exp2(Vec x) {
  // The sum rounds x to an integer and leaves integer + 127 in the low bits, so that a shift makes it an exponent.
  const Vec shifted = x + (12582912.f + 127.f);
  const Vec fraction = x - (shifted - (12582912.f + 127.f));
  Vec p;
  if (Degree >= 6) {
    p = splat(1.53535569e-4f);
    p = p * fraction + 1.33988754e-3f;
    p = p * fraction + 9.61843664e-3f;
    p = p * fraction + 5.55033247e-2f;
    p = p * fraction + 2.40226479e-1f;
    p = p * fraction + 6.93147203e-1f;
    p = p * fraction + 1.f;
  } else {
    p = splat(9.58300155e-3f);
    p = p * fraction + 5.59064433e-2f;
    p = p * fraction + 2.40240954e-1f;
    p = p * fraction + 6.9312419e-1f;
    p = p * fraction + 1.f;
  }
  const Vec power = (Vec)(((IVec)shifted) << 23);
  const Vec result = p * power;
  return x < -126.f ? Vec{} : result;
}

// log2 of positive numbers, to about 1e-7; -inf for 0.
inline Vec log2(Vec x) {
  const IVec bits = (IVec)x;
  Vec mantissa = (Vec)((bits & 0x007fffff) | 0x3f800000);
  Vec exponent = __builtin_convertvector((bits >> 23) - 127, Vec);
  const IVec large = mantissa > 1.41421356f;
  mantissa = large ? mantissa * 0.5f : mantissa;
  exponent = large ? exponent + 1.f : exponent;
  const Vec s = (mantissa - 1.f) / (mantissa + 1.f), t = s * s;
  const Vec series = 2.88539008f + t * (0.961796694f + t * (0.577078016f + t * (0.412198583f + t * 0.320598898f)));
  return x == 0.f ? splat(kNegInf) : x == x ? exponent + s * series : x;
}

// In place, rows of kLanes values of 32 bits.
inline void transpose(UVec* r) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 8
  for (int h = 1; h < kLanes; h *= 2) {
    UVec low, high;
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      low[l] = (l & h) ? kLanes + l - h : l;
      high[l] = (l & h) ? kLanes + l : l + h;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & h) continue;
      const UVec a = r[i], b = r[i + h];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + h] = __builtin_shuffle(a, b, high);
    }
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const uint32_t a = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = a;
    }
#endif
}

inline UVec round_to_bf16(Vec x) {  // in the high halves
  const UVec bits = (UVec)x;
  const UVec rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
  return x == x ? rounded : bits;
}

inline int64_t padded_keys(int64_t length) { return (length + 31) / 32 * 32; }

inline float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

}  // namespace
