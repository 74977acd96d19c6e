// Sampled importance of blocks of keys for blocks of queries.
#pragma once

#include "chunk.h"
#include "memory.h"

namespace {

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
      for (int i = 0; i < count; i += 32)
        amx_scores(reinterpret_cast<const uint16_t*>(keys) + (j + i) * job.dim, job.dim,
                   static_cast<const uint16_t*>(strip.query), job.dim, scores + i * kStrip);
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
