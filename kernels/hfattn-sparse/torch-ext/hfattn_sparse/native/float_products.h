// Products in float, for every processor.
#pragma once

#include "job.h"

namespace {

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
  for (; j + 4 <= piece.count; j += 4) scores_of<4>(k + j * stride, stride, q, dim, scores + j * kStrip);
  for (; j + 2 <= piece.count; j += 2) scores_of<2>(k + j * stride, stride, q, dim, scores + j * kStrip);
  for (; j < piece.count; ++j) scores_of<1>(k + j * stride, stride, q, dim, scores + j * kStrip);
}

void float_sums(const Chunk& chunk, const Strip& strip, int64_t dim, const float* p) {
  int64_t d = 0;
  for (; d + kKeysAtOnce <= dim; d += kKeysAtOnce) sums_of<kKeysAtOnce>(chunk, d, p, strip.sums + d * kStrip);
  for (; d < dim; ++d) sums_of<1>(chunk, d, p, strip.sums + d * kStrip);
}

}  // namespace
