// One chunk of keys for the strips of a task.
#pragma once

#include "float_products.h"
#include "amx_products.h"
#include "packing.h"
#include "strip.h"

namespace {

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

void float_process(const Job& job, Chunk& chunk, Strip& strip, float* scores, const float* weight) {
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
    if (piece.hidden) {
      fill(at, 0, piece.count);
      continue;
    }
    float_scores(piece, strip, job.dim, at);
    if (piece.high > strip.lowest) hide(piece, strip, at);
  }
  Vec top[kVectors], base[kVectors];
  for (int n = 0; n < kVectors; ++n) top[n] = splat(kNegInf);
  largest(scores, chunk.keys, top);
  raise(job, top, 1.f, strip, base);
  if (weight)
    float_weights<true>(scores, chunk, weight, base, strip);
  else
    float_weights<false>(scores, chunk, nullptr, base, strip);
  float_sums(chunk, strip, job.value_dim, scores);
}

#if HFA_AMX
// exp2(score * factor - base) of 32 keys, in place as pairs of bfloat16 in the rows of the even keys' scores: row r of
// 32 pairs lies at 64 * r.. of the 128 * r.. that it came from. Sums of columns join total.
template <bool Weighted>
inline void amx_weights(float* scores, const float* weight, float factor, const Vec* base, Vec* total) {
  for (int r = 0; r < 16; ++r)
    for (int n = 0; n < kVectors; ++n) {
      const float* at = scores + 2 * r * kStrip + n * kLanes;
      const Vec even = amx_exp2(*(const Vec*)at * factor - base[n]);
      const Vec odd = amx_exp2(*(const Vec*)(at + kStrip) * factor - base[n]);
      total[n] += Weighted ? even * weight[2 * r] + odd * weight[2 * r + 1] : even + odd;
      const UVec pair = (((UVec)even + 0x8000u) >> 16) | (((UVec)odd + 0x8000u) & 0xffff0000u);
      *(UVecU*)(scores + r * kStrip + n * kLanes) = (UVecU)pair;
    }
}

// A chunk on AMX tiles, strip by strip, with the products of the next and of the last strip between the exponentials of
// this one: the tile unit and the vector units then work at the same time.
class AmxChunk {
 public:
  AmxChunk(const Job& job, Chunk& chunk, Strip* strips, int count, float* scores, const float* weight)
      : job_(job), chunk_(chunk), scores_(scores), weight_(weight), groups_(chunk.keys / 32) {
    for (int c = 0; c < chunk.count; ++c)
      for (int j = 0; j < chunk.pieces[c].count; j += 32) {
        const int g = chunk.pieces[c].at / 32 + j / 32;
        strides_[g] = chunk.pieces[c].keys.k_stride;
        keys_[g] = static_cast<const uint16_t*>(chunk.pieces[c].keys.k) + j * strides_[g];
        values_[g] = static_cast<const uint16_t*>(chunk.pieces[c].keys.v) + j * job.value_dim;
        pieces_[g] = c;
      }
    for (int s = 0; s < count; ++s) {
      uint32_t seen = 0;
      for (int g = 0; g < groups_; ++g) seen |= uint32_t(chunk.pieces[pieces_[g]].low <= strips[s].highest) << g;
      if (seen) strips_[active_] = &strips[s], seen_[active_++] = seen;
    }
  }

  void run() {
    if (!active_) return;
    for (int g = 0; g < groups_; ++g) scores_of(0, g);
    const int blocks = int(job_.value_dim / 32);
    for (int s = 0; s < active_; ++s) {
      Vec base[kVectors], total[kVectors] = {};
      prepare(s, base);
      for (int g = 0; g < groups_; ++g) {
        if (s + 1 < active_) scores_of(s + 1, g);
        weights_of(s, g, base, total);
        if (s)
          for (int d = g * blocks / groups_; d < (g + 1) * blocks / groups_; ++d) sums_of(s - 1, d);
      }
      for (int n = 0; n < kVectors; ++n) *(Vec*)(strips_[s]->total + n * kLanes) += total[n];
    }
    for (int d = 0; d < blocks; ++d) sums_of(active_ - 1, d);
  }

 private:
  float* buffer(int s) { return scores_ + s % 3 * (kAmxChunk * kStrip); }

  void scores_of(int s, int g) {
    if (seen_[s] >> g & 1)
      amx_scores(keys_[g], strides_[g], static_cast<const uint16_t*>(strips_[s]->query), job_.dim, buffer(s) + g * 1024);
  }

  // Masks, and references of the exponentials.
  void prepare(int s, Vec* base) {
    Strip& strip = *strips_[s];
    for (int c = 0; c < chunk_.count; ++c) {
      const Piece& piece = chunk_.pieces[c];
      if (piece.low > strip.highest) continue;
      float* at = buffer(s) + piece.at * kStrip;
      if (piece.high > strip.lowest) hide(piece, strip, at);
      fill(at, piece.count, int(padded_keys(piece.count)));
    }
    Vec top[kVectors];
    for (int n = 0; n < kVectors; ++n) top[n] = splat(kNegInf);
    for (int g = 0; g < groups_; ++g)
      if (seen_[s] >> g & 1) largest(buffer(s) + g * 1024, 32, top);
    raise(job_, top, job_.scale * kLog2e, strip, base);
  }

  void weights_of(int s, int g, const Vec* base, Vec* total) {
    if (!(seen_[s] >> g & 1)) return;
    float* at = buffer(s) + g * 1024;
    if (weight_)
      amx_weights<true>(at, weight_ + g * 32, job_.scale * kLog2e, base, total);
    else
      amx_weights<false>(at, nullptr, job_.scale * kLog2e, base, total);
  }

  void sums_of(int s, int d) {
    const uint16_t* values[kAmxChunk / 32];
    for (int g = 0; g < groups_; ++g) values[g] = values_[g] + d * 1024;
    amx_sums(values, buffer(s), groups_, seen_[s], strips_[s]->sums + d * 1024);
  }

  const Job& job_;
  Chunk& chunk_;
  float* scores_;
  const float* weight_;
  int groups_, active_ = 0;
  const uint16_t *keys_[kAmxChunk / 32], *values_[kAmxChunk / 32];
  int64_t strides_[kAmxChunk / 32];
  int pieces_[kAmxChunk / 32];
  Strip* strips_[kRows / kStrip];
  uint32_t seen_[kRows / kStrip];
};
#endif

}  // namespace
