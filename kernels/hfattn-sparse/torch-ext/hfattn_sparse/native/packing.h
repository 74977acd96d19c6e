// Keys and values in the form in which products read them.
#pragma once

#include <atomic>

#include "amx_products.h"

namespace {

int64_t pool_of(const Job& job, int64_t segment) { return job.seg_pool ? job.seg_pool[segment] : 1; }

int64_t tokens_of(const Job& job, int64_t segment) {
  return job.seg_tokens ? job.seg_tokens[segment] : job.seg_length[segment];
}

// Whether a segment is read as it lies in memory.
bool in_place(const Job& job, int64_t segment) { return job.type == kFloat && pool_of(job, segment) == 1; }

// AMX reads keys as they lie in memory, too, unless that is a line here and a line there.
bool keys_in_place(const Job& job, int64_t segment) {
  return in_place(job, segment) || (job.amx && pool_of(job, segment) == 1 && job.k_stride <= kNearKeys);
}

int64_t packed_keys_bytes(const Job& job, int64_t segment) {
  return keys_in_place(job, segment) ? 0 : padded_keys(job.seg_length[segment]) * job.dim * (job.amx ? 2 : 4);
}

int64_t packed_bytes(const Job& job, int64_t segment) {
  const int64_t values = padded_keys(job.seg_length[segment]) * job.value_dim * (job.amx ? 2 : 4);
  return packed_keys_bytes(job, segment) + values;
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

// Keys stay rows, [keys][dim]; values become [keys / 32][value_dim][32 keys], what is left behind the last 32 stays rows.
bool pack_amx(const Job& job, int64_t segment, char* to) {
  const int64_t length = job.seg_length[segment], wide = std::max(job.dim, job.value_dim);
  const bool pooled = pool_of(job, segment) > 1;
  char* memory = pooled ? scratch.get((4 + 32 * 2) * wide) : nullptr;
  if (pooled && !memory) return false;
  float* row = reinterpret_cast<float*>(memory);
  uint16_t* block = reinterpret_cast<uint16_t*>(memory + 4 * wide);
  const uint16_t* k = static_cast<const uint16_t*>(job.k) + job.k_offset[segment];
  const uint16_t* v = static_cast<const uint16_t*>(job.v) + job.v_offset[segment];
  uint16_t* keys = reinterpret_cast<uint16_t*>(to);
  uint16_t* values = reinterpret_cast<uint16_t*>(to + packed_keys_bytes(job, segment));
  for (int64_t j = 0; j < length && !keys_in_place(job, segment); ++j) {
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
  return true;
}
#endif

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
#if HFA_AMX
  if (job.amx) return pack_amx(job, segment, to);
#endif
  pack_float(job, segment, to);
  return true;
}

// All segments that have a place, shared among the threads of a parallel region, each of which calls this.
void pack_all(const Job& job, int64_t segments, std::atomic<int>& outcome) {
#pragma omp for schedule(dynamic, 4)
  for (int64_t s = 0; s < segments; ++s)
    if (job.packed_at[s] >= 0 && !pack(job, s)) outcome |= kNoMemory;
}

Keys keys_of(const Job& job, int64_t segment) {
  const int64_t size = job.type == kFloat ? 4 : 2;
  const char* k = static_cast<const char*>(job.k) + job.k_offset[segment] * size;
  const char* v = static_cast<const char*>(job.v) + job.v_offset[segment] * size;
  if (in_place(job, segment)) return {k, v, job.k_stride, job.v_stride};
  const char* packed = job.packed + job.packed_at[segment];
  const char* values = packed + packed_keys_bytes(job, segment);
  if (keys_in_place(job, segment)) return {k, values, job.k_stride, job.value_dim};
  return {packed, values, job.dim, job.value_dim};
}

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

}  // namespace
