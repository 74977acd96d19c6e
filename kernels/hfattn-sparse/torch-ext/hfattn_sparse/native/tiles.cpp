// Softmax attention of tiles of query rows over lists of key segments, on a CPU.
//
// A tile is a list of query rows (of any heads and positions); a segment is a run of consecutive keys with their values.
// Every row of a tile reads every segment of the tile's list, as far as positions allow. Rows are processed in strips of
// kStrip as the columns of S^T = K Q^T and O^T = V^T P^T: one row is one lane, so softmax statistics need no sums across
// lanes, and keys are read as they lie in memory. Scores, statistics and sums are float.
//
// Products run on AMX tiles for bfloat16 where the processor has them, else as vector code over float.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
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
// Keys whose scores are formed at one time: kChunk * kStrip floats stay in a first-level cache.
constexpr int kChunk = 128;
// Rows that one thread takes from a tile at a time.
constexpr int kRows = 4 * 32;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef float VecU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t UVecU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

enum Type { kFloat = 0, kBFloat16 = 1 };

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

struct Job {
  Type type;
  bool amx;
  const void *q, *k, *v;
  void* out;
  float* lse;
  int64_t dim, value_dim, k_stride, v_stride;
  float scale;
  // Runs of rows that lie at q_stride, are written one after the other and see one position more each; by tile.
  int64_t q_stride;
  const int64_t *run_ptr, *run_offset, *run_number;
  const int32_t *run_length, *run_position;
  const int64_t *k_offset, *v_offset;
  const int32_t *seg_length, *seg_low, *seg_high;
  const int32_t* seg_pool;  // tokens that one key of a segment stands for, or null: one
  const int32_t* seg_tokens;
  bool replicate;
  const int64_t* key_offset;  // of a segment in the two arrays below, or null
  const int32_t* key_position;
  const float* key_weight;
  const int64_t *list_ptr, *list;
  // Packed segments of half precision, by segment; null for the others.
  char* packed;
  const int64_t* packed_at;
};

// Keys and values of a segment as a thread reads them.
struct Keys {
  const void *k, *v;
  int64_t k_stride, v_stride;
};

// Keys whose scores begin at row `at` of a chunk; k and v are those of the first one.
struct Piece {
  Keys keys;
  int count, at;
  int32_t low, high;         // positions, which go up by one from `low` unless
  const int32_t* positions;  // there is one for each
  bool hidden;               // from all rows of the strip at hand
};

// The pieces whose scores are formed at one time.
struct Chunk {
  Piece pieces[kChunk];
  int count = 0, keys = 0;
};

struct Strip {
  int rows;  // < kStrip: the others are zeros
  int32_t lowest, highest;
  alignas(64) int32_t position[32];
  alignas(64) float top[32];
  alignas(64) float total[32];
  float* sums;  // [value_dim][kStrip]
  void* query;  // as the product wants it
};

struct Scratch {
  char* memory = nullptr;
  size_t size = 0;
  char* get(size_t wanted) {
    if (wanted > size) {
      std::free(memory);
      memory = static_cast<char*>(std::aligned_alloc(64, (wanted + 63) / 64 * 64));
      size = memory ? wanted : 0;
    }
    return memory;
  }
  ~Scratch() { std::free(memory); }
};
thread_local Scratch scratch;

// ---- float products ----

// scores[keys][kStrip] = keys x query, and the largest of every column into top.
template <int Count>
inline void scores_of(const float* k, int64_t stride, const float* q, int64_t dim, float* scores) {
  Vec acc[Count][kVectors] = {};
  for (int64_t d = 0; d < dim; ++d) {
    Vec x[kVectors];
    for (int n = 0; n < kVectors; ++n) x[n] = *(const Vec*)(q + d * kStrip + n * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {
      const Vec y = splat(k[i * stride + d]);
      for (int n = 0; n < kVectors; ++n) acc[i][n] += y * x[n];
    }
  }
  for (int i = 0; i < Count; ++i)
    for (int n = 0; n < kVectors; ++n) *(Vec*)(scores + i * kStrip + n * kLanes) = acc[i][n];
}

// Sums of a chunk are formed apart before they join the others: shorter chains of additions err less.
template <int Count>
inline void sums_of(const Chunk& chunk, int64_t d, const float* p, float* sums) {
  Vec acc[Count][kVectors] = {};
  for (int c = 0; c < chunk.count; ++c) {
    const Piece& piece = chunk.pieces[c];
    if (piece.hidden) continue;
    const int64_t stride = piece.keys.v_stride;
    const float* v = static_cast<const float*>(piece.keys.v) + d;
    const float* at = p + piece.at * kStrip;
    for (int j = 0; j < piece.count; ++j) {
      Vec x[kVectors];
      for (int n = 0; n < kVectors; ++n) x[n] = *(const Vec*)(at + j * kStrip + n * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < Count; ++i) {
        const Vec y = splat(v[j * stride + i]);
        for (int n = 0; n < kVectors; ++n) acc[i][n] += y * x[n];
      }
    }
  }
  for (int i = 0; i < Count; ++i)
    for (int n = 0; n < kVectors; ++n) *(Vec*)(sums + i * kStrip + n * kLanes) += acc[i][n];
}

void float_scores(const Piece& piece, const Strip& strip, int64_t dim, float* scores) {
  const int64_t stride = piece.keys.k_stride;
  const float* k = static_cast<const float*>(piece.keys.k);
  const float* q = static_cast<const float*>(strip.query);
  int j = 0;
  for (; j + kKeysAtOnce <= piece.count; j += kKeysAtOnce)
    scores_of<kKeysAtOnce>(k + j * stride, stride, q, dim, scores + j * kStrip);
  for (; j < piece.count; ++j) scores_of<1>(k + j * stride, stride, q, dim, scores + j * kStrip);
}

void float_sums(const Chunk& chunk, const Strip& strip, int64_t dim, const float* p) {
  int64_t d = 0;
  for (; d + kKeysAtOnce <= dim; d += kKeysAtOnce) sums_of<kKeysAtOnce>(chunk, d, p, strip.sums + d * kStrip);
  for (; d < dim; ++d) sums_of<1>(chunk, d, p, strip.sums + d * kStrip);
}

// ---- bfloat16 products on AMX tiles; kStrip is 32 ----

#if HFA_AMX
struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// k [32-padded keys][dim]; query [dim / 32][2][16][16 pairs]; scores [keys][32].
void amx_scores(const uint16_t* k, int count, const uint16_t* q, int64_t dim, float* scores) {
  for (int j = 0; j < count; j += 32) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < dim; d += 32) {
      _tile_loadd(4, k + j * dim + d, dim * 2);
      _tile_loadd(6, q + d * 32, 64);
      _tile_loadd(7, q + d * 32 + 512, 64);
      _tile_loadd(5, k + (j + 16) * dim + d, dim * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, scores + j * 32, 128);
    _tile_stored(1, scores + j * 32 + 16, 128);
    _tile_stored(2, scores + (j + 16) * 32, 128);
    _tile_stored(3, scores + (j + 16) * 32 + 16, 128);
  }
}

// Values [keys / 32][value_dim][32 keys]; p [keys / 32][2][16 pairs of keys][16 rows]; sums [value_dim][32] added to.
void amx_sums(const Chunk& chunk, const uint16_t* p, int64_t dim, float* sums) {
  for (int64_t d = 0; d < dim; d += 32) {
    _tile_loadd(0, sums + d * 32, 128);
    _tile_loadd(1, sums + d * 32 + 16, 128);
    _tile_loadd(2, sums + (d + 16) * 32, 128);
    _tile_loadd(3, sums + (d + 16) * 32 + 16, 128);
    for (int c = 0; c < chunk.count; ++c) {
      const Piece& piece = chunk.pieces[c];
      if (piece.hidden) continue;
      const uint16_t* v = static_cast<const uint16_t*>(piece.keys.v) + d * 32;
      const uint16_t* at = p + piece.at * 32;
      for (int j = 0; j < piece.count; j += 32) {
        _tile_loadd(4, v + j * dim, 64);
        _tile_loadd(6, at + j * 32, 64);
        _tile_loadd(7, at + j * 32 + 512, 64);
        _tile_loadd(5, v + j * dim + 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums + d * 32, 128);
    _tile_stored(1, sums + d * 32 + 16, 128);
    _tile_stored(2, sums + (d + 16) * 32, 128);
    _tile_stored(3, sums + (d + 16) * 32 + 16, 128);
  }
}

bool amx_allowed() {
  // Linux hands the tile registers out on request, once a process.
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* TILEDATA */) == 0;
  return allowed;
}
#endif

// The configuration of a thread's tiles belongs to whoever set it: it comes back at the end.
class AmxConfig {
 public:
  explicit AmxConfig(bool wanted) : wanted_(wanted) {
#if HFA_AMX
    if (!wanted_) return;
    _tile_storeconfig(&before_);
    alignas(64) TileConfig config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
#endif
  }
  ~AmxConfig() {
#if HFA_AMX
    if (!wanted_) return;
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
#endif
};

bool use_amx(Type type, int64_t dim, int64_t value_dim) {
#if HFA_AMX
  return type == kBFloat16 && dim % 32 == 0 && value_dim % 32 == 0 && amx_allowed();
#else
  return false;
#endif
}

// ---- packing ----

int64_t pool_of(const Job& job, int64_t segment) { return job.seg_pool ? job.seg_pool[segment] : 1; }

int64_t tokens_of(const Job& job, int64_t segment) {
  return job.seg_tokens ? job.seg_tokens[segment] : job.seg_length[segment];
}

// Whether a segment is read as it lies in memory.
bool in_place(const Job& job, int64_t segment) { return job.type == kFloat && pool_of(job, segment) == 1; }

int64_t packed_bytes(const Job& job, int64_t segment) {
  return padded_keys(job.seg_length[segment]) * (job.dim + job.value_dim) * (job.amx ? 2 : 4);
}

inline Vec widen(const float* x) { return load(x); }
inline Vec widen(const uint16_t* x) { return (Vec)(__builtin_convertvector(*(const HVec*)x, UVec) << 16); }
inline float widen_one(float x) { return x; }
inline float widen_one(uint16_t x) { return from_bf16(x); }

// to = factor times the sum of `count` rows, of which those past `last` repeat row `last`.
template <class T>
void sum_rows(const T* rows, int64_t stride, int64_t count, int64_t last, int64_t dim, float factor, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Vec sum = {};
    for (int64_t t = 0; t < count; ++t) sum += widen(rows + std::min(t, last) * stride + d);
    store(to + d, sum * factor);
  }
  for (; d < dim; ++d) {
    float sum = 0.f;
    for (int64_t t = 0; t < count; ++t) sum += widen_one(rows[std::min(t, last) * stride + d]);
    to[d] = sum * factor;
  }
}

// Key (mean) or value (sum) number j of a segment, over the tokens that it stands for. Tokens past the end of the
// segment repeat its last one, or do not count.
void pooled_row(const Job& job, int64_t segment, bool mean, int64_t j, float* to) {
  const int64_t pool = pool_of(job, segment), left = tokens_of(job, segment) - j * pool;
  const int64_t count = job.replicate ? pool : std::min(pool, left);
  const int64_t dim = mean ? job.dim : job.value_dim, stride = mean ? job.k_stride : job.v_stride;
  // A pool that lies past the end altogether reads the last token.
  const int64_t at = (mean ? job.k_offset : job.v_offset)[segment] + (left > 0 ? j * pool : j * pool + left - 1) * stride;
  const int64_t last = std::max<int64_t>(left - 1, 0);
  const float factor = mean ? 1.f / float(count) : 1.f;
  const void* base = mean ? job.k : job.v;
  if (job.type == kFloat)
    sum_rows(static_cast<const float*>(base) + at, stride, count, last, dim, factor, to);
  else
    sum_rows(static_cast<const uint16_t*>(base) + at, stride, count, last, dim, factor, to);
}

void narrow(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    *(HVec*)(to + i) = (HVec)__builtin_convertvector(round_to_bf16(load(from + i)) >> 16, HVec);
  for (; i < count; ++i) to[i] = uint16_t(round_to_bf16(splat(from[i]))[0] >> 16);
}

#if HFA_AMX
// Values of up to 32 keys as AMX wants them, [value_dim][32 keys], zeros behind the last one.
void turn(const uint16_t* rows, int64_t stride, int64_t count, int64_t dim, uint16_t* to) {
  for (int64_t d = 0; d < dim; d += 16) {
    UVec pairs[16];
    for (int r = 0; r < 16; ++r) {
      UVec low = {}, high = {};
      if (2 * r < count) low = __builtin_convertvector(*(const HVec*)(rows + 2 * r * stride + d), UVec);
      if (2 * r + 1 < count) high = __builtin_convertvector(*(const HVec*)(rows + (2 * r + 1) * stride + d), UVec);
      pairs[r] = low | (high << 16);
    }
    transpose(pairs);
    for (int r = 0; r < 16; ++r) *(UVecU*)(to + (d + r) * 32) = (UVecU)pairs[r];
  }
}
#endif

// Keys stay rows, [keys][dim]; values become [keys / 32][value_dim][32 keys], what is left behind the last 32 stays rows.
bool pack_amx(const Job& job, int64_t segment, char* to) {
#if HFA_AMX
  const int64_t length = job.seg_length[segment], wide = std::max(job.dim, job.value_dim);
  const bool pooled = pool_of(job, segment) > 1;
  char* memory = pooled ? scratch.get((4 + 32 * 2) * wide) : nullptr;
  if (pooled && !memory) return false;
  float* row = reinterpret_cast<float*>(memory);
  uint16_t* block = reinterpret_cast<uint16_t*>(memory + 4 * wide);
  const uint16_t* k = static_cast<const uint16_t*>(job.k) + job.k_offset[segment];
  const uint16_t* v = static_cast<const uint16_t*>(job.v) + job.v_offset[segment];
  uint16_t* keys = reinterpret_cast<uint16_t*>(to);
  uint16_t* values = keys + padded_keys(length) * job.dim;
  for (int64_t j = 0; j < length; ++j) {
    if (pooled) {
      pooled_row(job, segment, true, j, row);
      narrow(row, keys + j * job.dim, job.dim);
    } else {
      std::memcpy(keys + j * job.dim, k + j * job.k_stride, job.dim * 2);
    }
  }
  for (int64_t j = 0; j < length; j += 32) {
    const int64_t count = std::min<int64_t>(32, length - j);
    uint16_t* target = values + j * job.value_dim;
    const uint16_t* source = v + j * job.v_stride;
    int64_t stride = job.v_stride;
    if (pooled) {
      uint16_t* rows = count == 32 ? block : target;
      for (int64_t i = 0; i < count; ++i) {
        pooled_row(job, segment, false, j + i, row);
        narrow(row, rows + i * job.value_dim, job.value_dim);
      }
      source = block, stride = job.value_dim;
    } else if (count < 32) {
      for (int64_t i = 0; i < count; ++i) std::memcpy(target + i * job.value_dim, source + i * stride, job.value_dim * 2);
    }
    if (count == 32) turn(source, stride, count, job.value_dim, target);
  }
#endif
  return true;
}

void pack_float(const Job& job, int64_t segment, char* to) {
  const int64_t length = job.seg_length[segment];
  float* keys = reinterpret_cast<float*>(to);
  float* values = keys + padded_keys(length) * job.dim;
  for (int64_t j = 0; j < length; ++j) {
    pooled_row(job, segment, true, j, keys + j * job.dim);
    pooled_row(job, segment, false, j, values + j * job.value_dim);
  }
}

bool pack(const Job& job, int64_t segment) {
  char* to = job.packed + job.packed_at[segment];
  if (job.amx) return pack_amx(job, segment, to);
  pack_float(job, segment, to);
  return true;
}

Keys keys_of(const Job& job, int64_t segment) {
  if (in_place(job, segment))
    return {static_cast<const float*>(job.k) + job.k_offset[segment],
            static_cast<const float*>(job.v) + job.v_offset[segment], job.k_stride, job.v_stride};
  const char* at = job.packed + job.packed_at[segment];
  return {at, at + padded_keys(job.seg_length[segment]) * job.dim * (job.amx ? 2 : 4), job.dim, job.value_dim};
}

// ---- one strip ----

// Queries of a strip as [dim][kStrip] floats times scale log2(e), or as AMX wants them, unscaled.
void load_queries(const Job& job, const int64_t* offsets, Strip& strip) {
  if (job.amx) {
#if HFA_AMX
    uint16_t* to = static_cast<uint16_t*>(strip.query);
    const uint16_t* q = static_cast<const uint16_t*>(job.q);
    for (int half = 0; half < 2; ++half)
      for (int64_t d = 0; d < job.dim; d += 32) {
        UVec rows[16] = {};
        for (int r = 0; r < 16; ++r)
          if (half * 16 + r < strip.rows) rows[r] = (UVec)(*(const UVecU*)(q + offsets[half * 16 + r] + d));
        transpose(rows);
        for (int r = 0; r < 16; ++r) *(UVecU*)(to + d * 32 + half * 512 + r * 32) = (UVecU)rows[r];
      }
#endif
    return;
  }
  float* to = static_cast<float*>(strip.query);
  const float factor = job.scale * kLog2e;
  for (int n = 0; n < kVectors; ++n) {
    int64_t d = 0;
    for (; d + kLanes <= job.dim; d += kLanes) {
      UVec rows[kLanes] = {};
      for (int r = 0; r < kLanes; ++r) {
        const int row = n * kLanes + r;
        if (row >= strip.rows) continue;
        if (job.type == kFloat)
          rows[r] = (UVec)load(static_cast<const float*>(job.q) + offsets[row] + d);
        else
          rows[r] = __builtin_convertvector(*(const HVec*)(static_cast<const uint16_t*>(job.q) + offsets[row] + d), UVec) << 16;
      }
      transpose(rows);
      for (int r = 0; r < kLanes; ++r) *(Vec*)(to + (d + r) * kStrip + n * kLanes) = (Vec)rows[r] * factor;
    }
    for (; d < job.dim; ++d)
      for (int r = 0; r < kLanes; ++r) {
        const int row = n * kLanes + r;
        float x = 0.f;
        if (row < strip.rows)
          x = job.type == kFloat ? static_cast<const float*>(job.q)[offsets[row] + d]
                                 : from_bf16(static_cast<const uint16_t*>(job.q)[offsets[row] + d]);
        to[d * kStrip + row] = x * factor;
      }
  }
}

void fill(float* scores, int first, int end) {
  for (int j = first; j < end; ++j)
    for (int n = 0; n < kVectors; ++n) *(Vec*)(scores + j * kStrip + n * kLanes) = splat(kNegInf);
}

// Scores of hidden keys become -inf.
void hide(const Piece& piece, const Strip& strip, float* scores) {
  for (int j = 0; j < piece.count; ++j) {
    const IVec key = IVec{} + (piece.positions ? piece.positions[j] : piece.low + j);
    for (int n = 0; n < kVectors; ++n) {
      Vec* at = (Vec*)(scores + j * kStrip + n * kLanes);
      const IVec seen = *(const IVec*)(strip.position + n * kLanes) >= key;
      *at = seen ? *at : splat(kNegInf);
    }
  }
}

// A reference may lag behind the largest score by this much: weights stay below 2^kSlack, and sums seldom shrink.
constexpr float kSlack = 8.f;

// The largest score of every column.
inline void largest(const float* scores, int count, Vec* top) {
  // Several chains, for a comparison takes cycles.
  constexpr int kChains = 4;
  Vec best[kChains][kVectors];
  for (int c = 0; c < kChains; ++c)
    for (int n = 0; n < kVectors; ++n) best[c][n] = splat(kNegInf);
  int j = 0;
  for (; j + kChains <= count; j += kChains)
    for (int c = 0; c < kChains; ++c)
      for (int n = 0; n < kVectors; ++n)
        best[c][n] = max(best[c][n], *(const Vec*)(scores + (j + c) * kStrip + n * kLanes));
  for (; j < count; ++j)
    for (int n = 0; n < kVectors; ++n) best[0][n] = max(best[0][n], *(const Vec*)(scores + j * kStrip + n * kLanes));
  for (int n = 0; n < kVectors; ++n) top[n] = max(max(best[0][n], best[1][n]), max(best[2][n], best[3][n]));
}

// Raises the references of a strip to the scores of a chunk; what has been summed shrinks accordingly.
inline void raise(const Job& job, const float* scores, int count, float factor, Strip& strip, Vec* base) {
  Vec top[kVectors], shrink[kVectors];
  largest(scores, count, top);
  IVec changed = {};
  for (int n = 0; n < kVectors; ++n) {
    const Vec before = *(Vec*)(strip.top + n * kLanes), now = top[n] * factor;
    const IVec higher = now > before + kSlack;
    const Vec after = higher ? now : before;
    changed |= higher;
    *(Vec*)(strip.top + n * kLanes) = after;
    base[n] = after == splat(kNegInf) ? Vec{} : after;
    shrink[n] = exp2<6>(before - base[n]);
  }
  if (!any(changed)) return;
  for (int n = 0; n < kVectors; ++n) *(Vec*)(strip.total + n * kLanes) *= shrink[n];
  for (int64_t d = 0; d < job.value_dim; ++d)
    for (int n = 0; n < kVectors; ++n) *(Vec*)(strip.sums + d * kStrip + n * kLanes) *= shrink[n];
}

// exp2(score - base) in place; the sums of columns join total, weighted where keys have weights.
template <bool Weighted>
void float_weights(float* scores, const Chunk& chunk, const float* weight, const Vec* base, Strip& strip) {
  Vec total[kVectors] = {};
  for (int j = 0; j < chunk.keys; ++j)
    for (int n = 0; n < kVectors; ++n) {
      Vec* at = (Vec*)(scores + j * kStrip + n * kLanes);
      *at = exp2<6>(*at - base[n]);
      total[n] += Weighted ? *at * weight[j] : *at;
    }
  for (int n = 0; n < kVectors; ++n) *(Vec*)(strip.total + n * kLanes) += total[n];
}

// The same of scores times factor as pairs of bfloat16, [keys / 32][2][16 pairs][16 rows].
template <bool Weighted>
void amx_weights(const float* scores, const Chunk& chunk, const float* weight, float factor, const Vec* base,
                 Strip& strip, uint16_t* p) {
  Vec total[kVectors] = {};
  for (int j = 0; j < chunk.keys; j += 2)
    for (int n = 0; n < kVectors; ++n) {
      const float* at = scores + j * kStrip + n * kLanes;
      const Vec even = exp2<4>(*(const Vec*)at * factor - base[n]);
      const Vec odd = exp2<4>(*(const Vec*)(at + kStrip) * factor - base[n]);
      total[n] += Weighted ? even * weight[j] + odd * weight[j + 1] : even + odd;
      const UVec pair = (((UVec)even + 0x8000u) >> 16) | (((UVec)odd + 0x8000u) & 0xffff0000u);
      *(UVecU*)(p + (j / 32) * 1024 + n * 512 + (j % 32) / 2 * 32) = (UVecU)pair;
    }
  for (int n = 0; n < kVectors; ++n) *(Vec*)(strip.total + n * kLanes) += total[n];
}

void process(const Job& job, Chunk& chunk, Strip& strip, float* scores, const float* weight, uint16_t* p) {
  bool any = false;
  for (int c = 0; c < chunk.count; ++c) {
    Piece& piece = chunk.pieces[c];
    piece.hidden = piece.low > strip.highest;
    any |= !piece.hidden;
  }
  if (!any) return;
  for (int c = 0; c < chunk.count; ++c) {
    const Piece& piece = chunk.pieces[c];
    float* at = scores + piece.at * kStrip;
    const int end = job.amx ? int(padded_keys(piece.count)) : piece.count;
    if (piece.hidden) {
      fill(at, 0, end);
      continue;
    }
#if HFA_AMX
    if (job.amx)
      amx_scores(static_cast<const uint16_t*>(piece.keys.k), end, static_cast<const uint16_t*>(strip.query), job.dim, at);
    else
#endif
      float_scores(piece, strip, job.dim, at);
    if (piece.high > strip.lowest) hide(piece, strip, at);
    fill(at, piece.count, end);
  }
  Vec base[kVectors];
  raise(job, scores, chunk.keys, job.amx ? job.scale * kLog2e : 1.f, strip, base);
#if HFA_AMX
  if (job.amx) {
    if (weight)
      amx_weights<true>(scores, chunk, weight, job.scale * kLog2e, base, strip, p);
    else
      amx_weights<false>(scores, chunk, nullptr, job.scale * kLog2e, base, strip, p);
    amx_sums(chunk, p, job.value_dim, strip.sums);
    return;
  }
#endif
  if (weight)
    float_weights<true>(scores, chunk, weight, base, strip);
  else
    float_weights<false>(scores, chunk, nullptr, base, strip);
  float_sums(chunk, strip, job.value_dim, scores);
}

// Returns whether all results are finite.
bool write(const Job& job, const int64_t* rows, const Strip& strip) {
  Vec zero = {};  // or NaN, when it has met anything that is not finite
  alignas(64) float share[32], log[32];
  for (int n = 0; n < kVectors; ++n) {
    const Vec total = *(const Vec*)(strip.total + n * kLanes), top = *(const Vec*)(strip.top + n * kLanes);
    *(Vec*)(share + n * kLanes) = total == 0.f ? Vec{} : 1.f / total;
    *(Vec*)(log + n * kLanes) = total == 0.f ? splat(kNegInf) : (top + log2(total)) * kLn2;
  }
  for (int r = 0; r < strip.rows; ++r) job.lse[rows[r]] = log[r];
  for (int n = 0; n < kVectors; ++n) {
    const Vec factor = *(const Vec*)(share + n * kLanes);
    int64_t d = 0;
    for (; d + kLanes <= job.value_dim; d += kLanes) {
      UVec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const Vec x = *(const Vec*)(strip.sums + (d + i) * kStrip + n * kLanes) * factor;
        zero += x * 0.f;
        block[i] = (UVec)x;
      }
      transpose(block);
      for (int r = 0; r < kLanes && n * kLanes + r < strip.rows; ++r) {
        const int64_t at = rows[n * kLanes + r] * job.value_dim + d;
        if (job.type == kFloat)
          store(static_cast<float*>(job.out) + at, (Vec)block[r]);
        else
          *(HVec*)(static_cast<uint16_t*>(job.out) + at) = (HVec)__builtin_convertvector(round_to_bf16((Vec)block[r]) >> 16, HVec);
      }
    }
    for (; d < job.value_dim; ++d)
      for (int r = 0; r < kLanes && n * kLanes + r < strip.rows; ++r) {
        const float x = strip.sums[d * kStrip + n * kLanes + r] * factor[r];
        zero += x * 0.f;
        const int64_t at = rows[n * kLanes + r] * job.value_dim + d;
        if (job.type == kFloat)
          static_cast<float*>(job.out)[at] = x;
        else
          static_cast<uint16_t*>(job.out)[at] = uint16_t(round_to_bf16(splat(x))[0] >> 16);
      }
  }
  float sum = 0.f;
  for (int l = 0; l < kLanes; ++l) sum += zero[l];
  return sum == 0.f;
}

// Fills chunks with the keys of a tile's list and processes them.
class Reader {
 public:
  Reader(const Job& job, Strip* strips, int count, char* memory) : job_(job), strips_(strips), count_(count) {
    const auto take = [&](size_t bytes) {
      char* at = memory;
      memory += (bytes + 63) / 64 * 64;
      return at;
    };
    scores_ = reinterpret_cast<float*>(take(size_t(kChunk) * kStrip * 4));
    weights_ = reinterpret_cast<float*>(take(kChunk * 4));
    if (!job.amx) return;
    p_ = reinterpret_cast<uint16_t*>(take(size_t(kChunk) * kStrip * 2));
    for (Group& group : groups_) {
      group.keys = reinterpret_cast<uint16_t*>(take(job.dim * 64));
      group.rows = reinterpret_cast<uint16_t*>(take(job.value_dim * 64));
      group.values = reinterpret_cast<uint16_t*>(take(job.value_dim * 64));
    }
  }

  static size_t bytes(const Job& job) {
    const size_t groups = job.amx ? kGroups * size_t(job.dim + 2 * job.value_dim + 3) * 64 : 0;
    return size_t(kChunk) * (kStrip * 6 + 4) + groups + 256;
  }

  void read(int64_t segment) {
    const int length = job_.seg_length[segment], whole = job_.amx ? length / 32 * 32 : length;
    const Keys keys = keys_of(job_, segment);
    const int64_t offset = job_.key_offset ? job_.key_offset[segment] : 0;
    const int64_t size = job_.amx ? 2 : 4;
    for (int first = 0; first < whole;) {
      if (chunk_.keys == kChunk) flush();
      const int count = std::min(kChunk - chunk_.keys, whole - first);
      Piece piece = {keys, count, chunk_.keys, job_.seg_low[segment], job_.seg_high[segment], nullptr, false};
      piece.keys.k = static_cast<const char*>(keys.k) + first * keys.k_stride * size;
      piece.keys.v = static_cast<const char*>(keys.v) + first * keys.v_stride * size;
      if (job_.key_position)
        piece.positions = job_.key_position + offset + first;
      else
        piece.low += first, piece.high = piece.low + count - 1;
      push(piece, job_.key_weight ? job_.key_weight + offset + first : nullptr);
      first += count;
    }
    for (int j = whole; j < length; ++j) gather(segment, keys, j, offset);
  }

  void finish() {
    if (job_.amx) close();
    flush();
  }

 private:
  // Single keys, put together for a tile of 32.
  struct Group {
    uint16_t *keys, *rows, *values;
    int count = 0;
    int32_t positions[32];
    float weights[32];
  };
  // As many as a chunk holds, and the one that is being filled.
  static constexpr int kGroups = kChunk / 32 + 1;

  void push(const Piece& piece, const float* weight) {
    const int end = job_.amx ? int(padded_keys(piece.count)) : piece.count;
    if (weight) {
      std::memcpy(weights_ + piece.at, weight, piece.count * sizeof(float));
      std::fill(weights_ + piece.at + piece.count, weights_ + piece.at + end, 0.f);
    }
    chunk_.pieces[chunk_.count++] = piece;
    chunk_.keys += end;
  }

  void gather(int64_t segment, const Keys& keys, int j, int64_t offset) {
    Group& group = groups_[open_];
    const int at = group.count++;
    std::memcpy(group.keys + at * job_.dim, static_cast<const uint16_t*>(keys.k) + j * job_.dim, job_.dim * 2);
    // A tile of 32 turned values is as large as 32 rows.
    const uint16_t* row = static_cast<const uint16_t*>(keys.v) + j * job_.value_dim;
    std::memcpy(group.rows + at * job_.value_dim, row, job_.value_dim * 2);
    group.positions[at] = job_.key_position ? job_.key_position[offset + j] : job_.seg_low[segment] + j;
    if (job_.key_weight) group.weights[at] = job_.key_weight[offset + j];
    if (group.count == 32) close();
  }

  // The group that is being filled joins the chunk.
  void close() {
#if HFA_AMX
    Group& group = groups_[open_];
    if (!group.count) return;
    if (chunk_.keys == kChunk) flush();
    std::memset(group.keys + group.count * job_.dim, 0, (32 - group.count) * job_.dim * 2);
    turn(group.rows, job_.value_dim, group.count, job_.value_dim, group.values);
    const auto [low, high] = std::minmax_element(group.positions, group.positions + group.count);
    push({{group.keys, group.values, job_.dim, job_.value_dim}, group.count, chunk_.keys, *low, *high, group.positions, false},
         job_.key_weight ? group.weights : nullptr);
    open_ = (open_ + 1) % kGroups;
    groups_[open_].count = 0;
#endif
  }

  void flush() {
    if (!chunk_.keys) return;
    for (int s = 0; s < count_; ++s) process(job_, chunk_, strips_[s], scores_, job_.key_weight ? weights_ : nullptr, p_);
    chunk_.count = chunk_.keys = 0;
  }

  const Job& job_;
  Strip* strips_;
  int count_;
  Chunk chunk_;
  float *scores_, *weights_;
  uint16_t* p_ = nullptr;
  Group groups_[kGroups];
  int open_ = 0;
};

enum Outcome { kDone = 0, kNoMemory = 1, kNotFinite = 2 };

// The rows of a task, one by one.
struct Rows {
  int count = 0;
  int64_t offsets[kRows], numbers[kRows];
  int32_t positions[kRows];

  Rows(const Job& job, int64_t tile, int64_t begin) {
    int64_t before = 0;
    for (int64_t run = job.run_ptr[tile]; run < job.run_ptr[tile + 1] && count < kRows; ++run) {
      const int64_t length = job.run_length[run];
      for (int64_t i = std::max<int64_t>(begin - before, 0); i < length && count < kRows; ++i, ++count) {
        offsets[count] = job.run_offset[run] + i * job.q_stride;
        numbers[count] = job.run_number[run] + i;
        positions[count] = job.run_position ? job.run_position[run] + int32_t(i) : std::numeric_limits<int32_t>::max();
      }
      before += length;
    }
  }
};

// Up to kRows rows of a tile, from row `begin` of it on.
Outcome attend(const Job& job, int64_t tile, int64_t begin) {
  const size_t own = size_t(job.dim + job.value_dim) * kRows * 4;
  char* memory = scratch.get(own + Reader::bytes(job));
  if (!memory) return kNoMemory;
  float* next = reinterpret_cast<float*>(memory);
  const Rows rows(job, tile, begin);
  Strip strips[kRows / kStrip];
  int count = 0;
  for (int first = 0; first < rows.count; first += kStrip) {
    Strip& strip = strips[count++];
    strip.rows = std::min(kStrip, rows.count - first);
    strip.query = next, next += job.dim * kStrip;
    strip.sums = next, next += job.value_dim * kStrip;
    std::memset(strip.sums, 0, job.value_dim * kStrip * 4);
    for (int r = 0; r < kStrip; ++r) {
      strip.position[r] = rows.positions[first + std::min(r, strip.rows - 1)];
      strip.top[r] = kNegInf, strip.total[r] = 0.f;
    }
    const auto [low, high] = std::minmax_element(strip.position, strip.position + kStrip);
    strip.lowest = *low, strip.highest = *high;
    load_queries(job, rows.offsets + first, strip);
  }
  Reader reader(job, strips, count, memory + own);
  for (int64_t i = job.list_ptr[tile]; i < job.list_ptr[tile + 1]; ++i) reader.read(job.list[i]);
  reader.finish();
  bool finite = true;
  for (int s = 0; s < count; ++s) finite &= write(job, rows.numbers + s * kStrip, strips[s]);
  return finite ? kDone : kNotFinite;
}

int64_t rows_of(const Job& job, int64_t tile) {
  int64_t rows = 0;
  for (int64_t run = job.run_ptr[tile]; run < job.run_ptr[tile + 1]; ++run) rows += job.run_length[run];
  return rows;
}

// ---- memory of a call ----

// Fresh memory costs a page fault every 4 KiB, so a call leaves what it had, up to kKept, to the next one.
constexpr size_t kKept = size_t(64) << 20;
std::mutex kept_lock;
Scratch kept;

class Memory {
 public:
  explicit Memory(size_t size) : own_(size > kKept || !kept_lock.try_lock()) {
    at_ = own_ ? static_cast<char*>(std::aligned_alloc(64, (size + 63) / 64 * 64)) : kept.get(size);
  }
  ~Memory() {
    if (own_)
      std::free(at_);
    else
      kept_lock.unlock();
  }
  char* get() const { return at_; }

 private:
  bool own_;
  char* at_;
};

// Places of the segments that have to be packed, -1 for the others, and bytes of them all.
size_t place(const Job& job, int64_t segments, int64_t listed, int64_t* at) {
  size_t size = 0;
  std::fill(at, at + segments, -1);
  for (int64_t i = 0; i < listed; ++i) {
    const int64_t segment = job.list[i];
    if (at[segment] >= 0 || in_place(job, segment)) continue;
    at[segment] = int64_t(size);
    size += (packed_bytes(job, segment) + 63) / 64 * 64;
  }
  return size;
}

int run(Job& job, int64_t tiles, int64_t segments, int threads) {
  std::vector<int64_t> at(segments), first(tiles + 1);
  Memory memory(place(job, segments, job.list_ptr[tiles], at.data()) + 64);
  if (!memory.get()) return kNoMemory;
  job.packed = memory.get(), job.packed_at = at.data();
  // Parts of tiles as one list of tasks.
  for (int64_t t = 0; t < tiles; ++t) first[t + 1] = first[t] + (rows_of(job, t) + kRows - 1) / kRows;
  std::atomic<int> outcome{kDone};
#pragma omp parallel num_threads(threads)
  {
    const AmxConfig config(job.amx);
#pragma omp for schedule(dynamic, 4)
    for (int64_t s = 0; s < segments; ++s)
      if (at[s] >= 0 && !pack(job, s)) outcome |= kNoMemory;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < first[tiles]; ++task) {
      const int64_t tile = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
      outcome |= attend(job, tile, (task - first[tile]) * kRows);
    }
  }
  return outcome;
}

// ---- sampled importance of blocks ----

struct Samples {
  const int64_t *q_rows, *k_rows;  // elements of sampled rows in memory, [heads][blocks * samples]
  int64_t q_blocks, q_samples, k_blocks, k_samples;
  int64_t keys() const { return k_blocks * k_samples; }
  int64_t rows() const { return q_blocks * q_samples; }
  // Whole blocks of keys whose scores are formed at one time.
  int64_t chunk() const { return std::min(kChunk / k_samples, k_blocks) * k_samples; }
};

int64_t sampled_bytes(const Job& job, const Samples& samples) {
  return (samples.keys() + 32) * job.dim * (job.amx ? 2 : 4);
}

void gather_keys(const Job& job, const Samples& samples, int64_t head, char* to) {
  const int64_t width = job.dim * (job.amx ? 2 : 4);
  const int64_t* rows = samples.k_rows + head * samples.keys();
  std::memset(to, 0, sampled_bytes(job, samples));
  for (int64_t j = 0; j < samples.keys(); ++j) {
    if (job.amx)
      std::memcpy(to + j * width, static_cast<const uint16_t*>(job.k) + rows[j], width);
    else if (job.type == kFloat)
      std::memcpy(to + j * width, static_cast<const float*>(job.k) + rows[j], width);
    else
      sum_rows(static_cast<const uint16_t*>(job.k) + rows[j], 0, 1, 0, job.dim, 1.f, reinterpret_cast<float*>(to + j * width));
  }
}

// One strip of sampled rows: for all blocks of keys the largest weight of each row, reduced to the blocks of queries.
// best: [k_blocks][kStrip]; result [q_blocks][k_blocks] of the head.
void weigh(const Job& job, const Samples& samples, const char* keys, int64_t first, Strip& strip, float* scores, float* best,
           float* result) {
  const float factor = job.amx ? job.scale * kLog2e : 1.f;
  Vec top[kVectors], total[kVectors] = {};
  for (int n = 0; n < kVectors; ++n) top[n] = splat(kNegInf);
  for (int64_t j = 0; j < samples.keys(); j += samples.chunk()) {
    const int count = int(std::min(samples.chunk(), samples.keys() - j));
#if HFA_AMX
    if (job.amx)
      amx_scores(reinterpret_cast<const uint16_t*>(keys) + j * job.dim, int(padded_keys(count)),
                 static_cast<const uint16_t*>(strip.query), job.dim, scores);
    else
#endif
      float_scores({{reinterpret_cast<const float*>(keys) + j * job.dim, nullptr, job.dim, 0}, count, 0, 0, 0, nullptr, false},
                   strip, job.dim, scores);
    Vec raised[kVectors];
    for (int n = 0; n < kVectors; ++n) raised[n] = top[n];
    for (int block = 0; block * samples.k_samples < count; ++block) {
      Vec most[kVectors];
      for (int n = 0; n < kVectors; ++n) most[n] = splat(kNegInf);
      for (int64_t i = block * samples.k_samples; i < (block + 1) * samples.k_samples; ++i)
        for (int n = 0; n < kVectors; ++n) most[n] = max(most[n], *(const Vec*)(scores + i * kStrip + n * kLanes));
      for (int n = 0; n < kVectors; ++n) {
        most[n] *= factor;
        *(Vec*)(best + (j / samples.k_samples + block) * kStrip + n * kLanes) = most[n];
        raised[n] = max(raised[n], most[n]);
      }
    }
    for (int n = 0; n < kVectors; ++n) {
      Vec sum = {};
      for (int i = 0; i < count; ++i) sum += exp2<4>(*(const Vec*)(scores + i * kStrip + n * kLanes) * factor - raised[n]);
      total[n] = total[n] * exp2<4>(top[n] - raised[n]) + sum;
      top[n] = raised[n];
    }
  }
  for (int64_t block = 0; block < samples.k_blocks; ++block) {
    float share[kStrip];
    for (int n = 0; n < kVectors; ++n)
      store(share + n * kLanes, exp2<6>(*(const Vec*)(best + block * kStrip + n * kLanes) - top[n]) / total[n]);
    for (int r = 0; r < strip.rows; ++r) {
      float& into = result[(first + r) / samples.q_samples * samples.k_blocks + block];
      into = share[r] > into || share[r] != share[r] ? share[r] : into;
    }
  }
}

// The rows of one query block start a task, so that no two tasks write the same results.
bool weigh_block(const Job& job, const Samples& samples, const char* keys, int64_t head, int64_t block, float* result) {
  const size_t query = size_t(job.dim) * kStrip * 4, scores = size_t(kChunk + 32) * kStrip * 4;
  char* memory = scratch.get(query + scores + size_t(samples.k_blocks) * kStrip * 4);
  if (!memory) return false;
  std::fill(result + block * samples.k_blocks, result + (block + 1) * samples.k_blocks, 0.f);
  Strip strip;
  strip.query = memory;
  const int64_t end = (block + 1) * samples.q_samples;
  for (int64_t row = block * samples.q_samples; row < end; row += kStrip) {
    strip.rows = int(std::min<int64_t>(kStrip, end - row));
    load_queries(job, samples.q_rows + head * samples.rows() + row, strip);
    weigh(job, samples, keys, row, strip, reinterpret_cast<float*>(memory + query),
          reinterpret_cast<float*>(memory + query + scores), result);
  }
  return true;
}

}  // namespace

extern "C" {

// What this build can do on this processor: 1 float, 2 bfloat16 on AMX tiles.
int hfa_abilities() {
#if HFA_AMX
  return 1 | (amx_allowed() ? 2 : 0);
#else
  return 1;
#endif
}

int hfa_lanes() { return kLanes; }

// Returns 0, or the sum of 1 (memory ran out, the results are incomplete) and 2 (some result is not finite).
int hfa_attend(int type, const void* q, const void* k, const void* v, void* out, float* lse, int64_t dim,
               int64_t value_dim, int64_t q_stride, int64_t k_stride, int64_t v_stride, float scale, int64_t tiles,
               const int64_t* run_ptr, const int64_t* run_offset, const int64_t* run_number, const int32_t* run_length,
               const int32_t* run_position, int64_t segments, const int64_t* k_offset, const int64_t* v_offset,
               const int32_t* seg_length, const int32_t* seg_low, const int32_t* seg_high, const int32_t* seg_pool,
               const int32_t* seg_tokens, int replicate, const int64_t* key_offset, const int32_t* key_position,
               const float* key_weight, const int64_t* list_ptr, const int64_t* list, int threads) try {
  Job job{};
  job.type = Type(type), job.amx = use_amx(job.type, dim, value_dim), job.scale = scale;
  job.q = q, job.k = k, job.v = v, job.out = out, job.lse = lse;
  job.dim = dim, job.value_dim = value_dim, job.q_stride = q_stride, job.k_stride = k_stride, job.v_stride = v_stride;
  job.run_ptr = run_ptr, job.run_offset = run_offset, job.run_number = run_number, job.run_length = run_length;
  job.run_position = run_position;
  job.k_offset = k_offset, job.v_offset = v_offset, job.seg_length = seg_length, job.seg_low = seg_low;
  job.seg_high = seg_high, job.seg_pool = seg_pool, job.seg_tokens = seg_tokens, job.replicate = replicate != 0;
  job.key_offset = key_offset, job.key_position = key_position, job.key_weight = key_weight;
  job.list_ptr = list_ptr, job.list = list;
  return run(job, tiles, segments, threads);
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

// result [heads][q_blocks][k_blocks]: the largest softmax weight, over all sampled keys, that a sampled row of a query
// block gives to a sampled key of a key block. k_samples <= 128. Returns 0, or 1 when memory ran out.
int hfa_importance(int type, const void* q, const void* k, float* result, int64_t dim, float scale, int64_t heads,
                   int64_t q_blocks, int64_t q_samples, int64_t k_blocks, int64_t k_samples, const int64_t* q_rows,
                   const int64_t* k_rows, int threads) {
  Job job{};
  job.type = Type(type), job.amx = use_amx(job.type, dim, 32);
  job.q = q, job.k = k, job.dim = dim, job.scale = scale;
  const Samples samples{q_rows, k_rows, q_blocks, q_samples, k_blocks, k_samples};
  const int64_t size = (sampled_bytes(job, samples) + 63) / 64 * 64;
  Memory memory(heads * size);
  char* keys = memory.get();
  if (!keys) return kNoMemory;
  std::atomic<int> outcome{kDone};
#pragma omp parallel num_threads(threads)
  {
    const AmxConfig config(job.amx);
#pragma omp for schedule(dynamic, 1)
    for (int64_t head = 0; head < heads; ++head) gather_keys(job, samples, head, keys + head * size);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < heads * q_blocks; ++task) {
      const int64_t head = task / q_blocks;
      if (!weigh_block(job, samples, keys + head * size, head, task % q_blocks, result + head * q_blocks * k_blocks))
        outcome |= kNoMemory;
    }
  }
  return outcome;
}
}
