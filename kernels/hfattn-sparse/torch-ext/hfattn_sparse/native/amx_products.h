// Products in bfloat16 on AMX tiles; a strip is 32 rows there.
#pragma once

#include "job.h"

namespace {

#if HFA_AMX
struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// k [32 keys][dim] at a stride; query [dim / 32][2][16][16 pairs]; scores [32 keys][32].
inline void amx_scores(const uint16_t* k, int64_t stride, const uint16_t* q, int64_t dim, float* scores) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < dim; d += 32) {
    _tile_loadd(4, k + d, stride * 2);
    _tile_loadd(6, q + d * 32, 64);
    _tile_loadd(7, q + d * 32 + 512, 64);
    _tile_loadd(5, k + 16 * stride + d, stride * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 128);
  _tile_stored(1, scores + 16, 128);
  _tile_stored(2, scores + 16 * 32, 128);
  _tile_stored(3, scores + 16 * 32 + 16, 128);
}

// Adds to sums [32 of value_dim][32]: values of groups of keys, each [value_dim][32 keys], times their weights, pairs of
// keys in rows of 32 pairs: `p` of a group begins where its scores did.
inline void amx_sums(const uint16_t* const* v, const float* p, int groups, uint32_t seen, float* sums) {
  _tile_loadd(0, sums, 128);
  _tile_loadd(1, sums + 16, 128);
  _tile_loadd(2, sums + 16 * 32, 128);
  _tile_loadd(3, sums + 16 * 32 + 16, 128);
  for (int g = 0; g < groups; ++g) {
    if (!(seen >> g & 1)) continue;
    _tile_loadd(4, v[g], 64);
    _tile_loadd(6, p + g * 1024, 128);
    _tile_loadd(7, p + g * 1024 + 16, 128);
    _tile_loadd(5, v[g] + 512, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 16 * 32, 128);
  _tile_stored(3, sums + 16 * 32 + 16, 128);
}

bool amx_allowed() {
  // Linux hands the tile registers out on request, once a process.
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* TILEDATA */) == 0;
  return allowed;
}
#endif

// The configuration of a thread's tiles belongs to whoever set it: it comes back at the end. So does the rounding of
// denormal numbers, here to 0: weights that small do not matter, and each of them would cost a hundred cycles.
class AmxConfig {
 public:
  explicit AmxConfig(bool wanted) : wanted_(wanted) {
#if HFA_AMX
    if (!wanted_) return;
    _tile_storeconfig(&before_);
    alignas(64) TileConfig config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
    _mm_setcsr(modes_ | 0x8000);
#endif
  }
  ~AmxConfig() {
#if HFA_AMX
    if (!wanted_) return;
    _mm_setcsr(modes_);
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
#endif
  }
  AmxConfig(const AmxConfig&) = delete;

 private:
  bool wanted_;
#if HFA_AMX
  alignas(64) TileConfig before_;
  unsigned modes_ = _mm_getcsr();
#endif
};

bool use_amx([[maybe_unused]] Type type, [[maybe_unused]] int64_t dim, [[maybe_unused]] int64_t value_dim) {
#if HFA_AMX
  return type == kBFloat16 && dim % 32 == 0 && value_dim % 32 == 0 && amx_allowed();
#else
  return false;
#endif
}

#if HFA_AMX
// 2^x for weights in bfloat16, to 3e-6 (exact for whole x), in fewer steps: x less its floor as a polynomial, the
// floor as exponent.
inline Vec amx_exp2(Vec x) {
  const Vec fraction = (Vec)_mm512_reduce_ps((__m512)x, 0x01 | 0x08);
  Vec p = splat(0.0134266843f);
  p = p * fraction + 0.0522424742f;
  p = p * fraction + 0.241280205f;
  p = p * fraction + 0.693044845f;
  p = p * fraction + 1.f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#endif

}  // namespace
