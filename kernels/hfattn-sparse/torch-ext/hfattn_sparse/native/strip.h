// The rows of a strip: loading them, their softmax statistics, writing their results.
#pragma once

#include "job.h"

namespace {

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

// Strips of `rows` <= kRows rows that have read nothing and see everything, in (dim + value_dim) * kRows floats; how many.
int set_up(const Job& job, const int64_t* offsets, int rows, float* memory, Strip* strips) {
  int count = 0;
  for (int first = 0; first < rows; first += kStrip) {
    Strip& strip = strips[count++];
    strip.rows = std::min(kStrip, rows - first);
    strip.query = memory, memory += job.dim * kStrip;
    strip.sums = memory, memory += job.value_dim * kStrip;
    std::memset(strip.sums, 0, job.value_dim * kStrip * 4);
    strip.lowest = strip.highest = std::numeric_limits<int32_t>::max();
    std::fill(strip.position, strip.position + kStrip, strip.highest);
    std::fill(strip.top, strip.top + kStrip, kNegInf);
    std::fill(strip.total, strip.total + kStrip, 0.f);
    load_queries(job, offsets + first, strip);
  }
  return count;
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

// Raises top to the largest score of every column.
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
  for (int n = 0; n < kVectors; ++n)
    top[n] = max(top[n], max(max(best[0][n], best[1][n]), max(best[2][n], best[3][n])));
}

// Raises the references of a strip to the scores of a chunk; what has been summed shrinks accordingly.
inline void raise(const Job& job, const Vec* top, float factor, Strip& strip, Vec* base) {
  Vec shrink[kVectors];
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

// Writes the rows whose number is not negative, and returns whether all results are finite.
bool write(const Job& job, const int64_t* rows, const Strip& strip) {
  Vec zero = {};  // or NaN, when it has met anything that is not finite
  alignas(64) float share[32], log[32];
  for (int n = 0; n < kVectors; ++n) {
    const Vec total = *(const Vec*)(strip.total + n * kLanes), top = *(const Vec*)(strip.top + n * kLanes);
    *(Vec*)(share + n * kLanes) = total == 0.f ? Vec{} : 1.f / total;
    *(Vec*)(log + n * kLanes) = total == 0.f ? splat(kNegInf) : (top + log2(total)) * kLn2;
  }
  for (int r = 0; r < strip.rows; ++r)
    if (rows[r] >= 0) job.lse[rows[r]] = log[r];
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
        if (at < 0) continue;
        if (job.type == kFloat)
          store(static_cast<float*>(job.out) + at, (Vec)block[r]);
        else
          *(HVec*)(static_cast<uint16_t*>(job.out) + at) = (HVec)__builtin_convertvector(round_to_bf16((Vec)block[r]) >> 16, HVec);
      }
    }
    for (; d < job.value_dim; ++d)
      for (int r = 0; r < kLanes && n * kLanes + r < strip.rows; ++r) {
        const float x = strip.sums[d * kStrip + n * kLanes + r] * factor[r];
        const int64_t at = rows[n * kLanes + r] * job.value_dim + d;
        zero += x * 0.f;
        if (at < 0) continue;
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

}  // namespace
