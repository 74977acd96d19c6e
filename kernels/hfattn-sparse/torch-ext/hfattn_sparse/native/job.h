// What a call is given, and what its threads hold.
#pragma once

#include <cstdlib>
#include "vector.h"

namespace {

enum Type { kFloat = 0, kBFloat16 = 1 };
enum Outcome { kDone = 0, kNoMemory = 1, kNotFinite = 2 };

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

}  // namespace
