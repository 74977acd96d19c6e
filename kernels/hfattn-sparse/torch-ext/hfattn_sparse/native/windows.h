// Attention of tiles of queries to lists of single keys, with a table of biases: neighborhoods.
#pragma once

#include "chunk.h"

namespace {

// All tiles have `size` rows and `keys` keys, and serve every head. Tables: [strips][keys][kStrip] floats that are added
// to scores times log2(e), -inf where a row does not see a key.
struct Windows {
  const int64_t *q_offset, *k_offset, *v_offset, *number;  // of each head
  const int64_t *q_place, *k_place, *v_place, *row;        // [tiles][size | keys]; row -1: padding, not written
  const float* tables;
  const int64_t* table_of;  // [heads][tiles], -1 for none
  int64_t heads, tiles, size, keys, row_step;  // a row's result is at number + row * row_step
};

// Keys and values of one tile as pieces that fill chunks of at most kChunk keys one after the other.
struct Halo {
  Piece* pieces;
  int64_t count;
};

void copy_row(const Job& job, const void* base, int64_t at, int64_t dim, char* to) {
  if (job.type == kFloat)
    std::memcpy(to, static_cast<const float*>(base) + at, dim * 4);
  else if (job.amx)
    std::memcpy(to, static_cast<const uint16_t*>(base) + at, dim * 2);
  else
    sum_rows(static_cast<const uint16_t*>(base) + at, 0, 1, 0, dim, 1.f, reinterpret_cast<float*>(to));
}

// Runs of keys and values that lie at constant strides, where they are.
void find_runs(const Job& job, const Windows& windows, int64_t head, int64_t tile, Halo& halo) {
  const int64_t *k_place = windows.k_place + tile * windows.keys, *v_place = windows.v_place + tile * windows.keys;
  const float* k = static_cast<const float*>(job.k) + windows.k_offset[head];
  const float* v = static_cast<const float*>(job.v) + windows.v_offset[head];
  halo.count = 0;
  for (int64_t j = 0; j < windows.keys;) {
    const int64_t k_step = j + 1 < windows.keys ? k_place[j + 1] - k_place[j] : 0;
    const int64_t v_step = j + 1 < windows.keys ? v_place[j + 1] - v_place[j] : 0;
    const int64_t most = std::min<int64_t>(windows.keys, (j / kChunk + 1) * kChunk);
    int64_t end = j + 1;
    while (end < most && k_place[end] - k_place[end - 1] == k_step && v_place[end] - v_place[end - 1] == v_step) ++end;
    const Keys keys = {k + k_place[j], v + v_place[j], k_step, v_step};
    halo.pieces[halo.count++] = {keys, int(end - j), int(j % kChunk), 0, 0, nullptr, false};
    j = end;
  }
}

// Copies of keys and values, side by side, on AMX as its tiles want them; `spare`: room for 32 rows of values.
void gather(const Job& job, const Windows& windows, int64_t head, int64_t tile, char* k, char* v, char* spare,
            Halo& halo) {
  const int64_t size = job.amx ? 2 : 4, rows = padded_keys(windows.keys);
  const int64_t *k_place = windows.k_place + tile * windows.keys, *v_place = windows.v_place + tile * windows.keys;
  for (int64_t j = 0; j < windows.keys; ++j)
    copy_row(job, job.k, windows.k_offset[head] + k_place[j], job.dim, k + j * job.dim * size);
  std::memset(k + windows.keys * job.dim * size, 0, (rows - windows.keys) * job.dim * size);
  for (int64_t j = 0; j < windows.keys; ++j) {
    char* to = job.amx ? spare + j % 32 * job.value_dim * size : v + j * job.value_dim * size;
    copy_row(job, job.v, windows.v_offset[head] + v_place[j], job.value_dim, to);
#if HFA_AMX
    if (job.amx && (j % 32 == 31 || j + 1 == windows.keys))
      turn(reinterpret_cast<const uint16_t*>(spare), job.value_dim, j % 32 + 1, job.value_dim,
           reinterpret_cast<uint16_t*>(v) + j / 32 * 32 * job.value_dim);
#endif
  }
  halo.count = 0;
  for (int64_t j = 0; j < windows.keys; j += kChunk) {
    const Keys keys = {k + j * job.dim * size, v + j * job.value_dim * size, job.dim, job.value_dim};
    halo.pieces[halo.count++] = {keys, int(std::min<int64_t>(kChunk, windows.keys - j)), 0, 0, 0, nullptr, false};
  }
}

// scores * factor + table; rows of keys past the last become -inf.
void add_table(float* scores, const float* table, int count, int end, float factor) {
  for (int j = 0; j < count; ++j)
    for (int n = 0; n < kVectors; ++n) {
      Vec* at = (Vec*)(scores + j * kStrip + n * kLanes);
      *at = *at * factor + (table ? load(table + j * kStrip + n * kLanes) : Vec{});
    }
  fill(scores, count, end);
}

// Some pieces of a halo, `keys` keys in all, for one strip; scores: kChunk rows.
void window_chunk(const Job& job, const Piece* pieces, int count, int keys, const float* table, Strip& strip,
                  float* scores) {
  Vec top[kVectors], base[kVectors];
  for (int n = 0; n < kVectors; ++n) top[n] = splat(kNegInf);
#if HFA_AMX
  if (job.amx) {
    Vec total[kVectors] = {};
    const int end = int(padded_keys(keys)), groups = end / 32;
    const uint16_t* k = static_cast<const uint16_t*>(pieces->keys.k);
    for (int j = 0; j < end; j += 32)
      amx_scores(k + j * job.dim, job.dim, static_cast<const uint16_t*>(strip.query), job.dim, scores + j * kStrip);
    add_table(scores, table, keys, end, job.scale * kLog2e);
    largest(scores, end, top);
    raise(job, top, 1.f, strip, base);
    for (int g = 0; g < groups; ++g) amx_weights<false>(scores + g * 1024, nullptr, 1.f, base, total);
    const uint16_t* values[kAmxChunk / 32];
    for (int64_t d = 0; d < job.value_dim; d += 32) {
      for (int g = 0; g < groups; ++g)
        values[g] = static_cast<const uint16_t*>(pieces->keys.v) + g * 32 * job.value_dim + d * 32;
      amx_sums(values, scores, groups, ~0u, strip.sums + d * kStrip);
    }
    for (int n = 0; n < kVectors; ++n) *(Vec*)(strip.total + n * kLanes) += total[n];
    return;
  }
#endif
  Chunk chunk;
  std::copy(pieces, pieces + count, chunk.pieces);
  chunk.count = count, chunk.keys = keys;
  for (int c = 0; c < count; ++c) float_scores(pieces[c], strip, job.dim, scores + pieces[c].at * kStrip);
  if (table) add_table(scores, table, keys, keys, 1.f);
  largest(scores, keys, top);
  raise(job, top, 1.f, strip, base);
  float_weights<false>(scores, chunk, nullptr, base, strip);
  float_sums(chunk, strip, job.value_dim, scores);
}

void window_strip(const Job& job, const Halo& halo, const float* table, Strip& strip,
                  float* scores) {
  for (int64_t piece = 0, first = 0; piece < halo.count;) {
    int64_t end = piece;
    int keys = 0;
    for (; end < halo.count && (end == piece || halo.pieces[end].at > 0); ++end) keys += halo.pieces[end].count;
    window_chunk(job, halo.pieces + piece, int(end - piece), keys, table ? table + first * kStrip : nullptr, strip,
                 scores);
    piece = end, first += keys;
  }
}

// One tile of one head. 0, or 1 without memory, or 2 where a result is not finite.
int window_tile(const Job& job, const Windows& windows, int64_t head, int64_t tile) {
  const size_t width = job.amx ? 2 : 4, rows = job.type == kFloat ? 0 : padded_keys(windows.keys);
  const size_t pieces = (windows.keys * sizeof(Piece) + 63) / 64 * 64;
  const size_t k_bytes = (rows * job.dim * width + 63) / 64 * 64, v_bytes = (rows * job.value_dim * width + 63) / 64 * 64;
  const size_t spare = size_t(job.value_dim) * 64, query = size_t(job.dim) * kStrip * 4;
  const size_t sums = size_t(job.value_dim) * kStrip * 4, scores = size_t(kChunk) * kStrip * 4;
  char* memory = scratch.get(pieces + k_bytes + v_bytes + spare + query + sums + scores);
  if (!memory) return 1;
  char* k = memory + pieces;
  char* next = k + k_bytes + v_bytes;
  Halo halo{reinterpret_cast<Piece*>(memory), 0};
  if (job.type == kFloat)
    find_runs(job, windows, head, tile, halo);
  else
    gather(job, windows, head, tile, k, k + k_bytes, next, halo);
  Strip strip;
  strip.query = next + spare, strip.sums = reinterpret_cast<float*>(next + spare + query);
  float* own_scores = reinterpret_cast<float*>(next + spare + query + sums);
  const int64_t at = windows.table_of[head * windows.tiles + tile], strips = (windows.size + kStrip - 1) / kStrip;
  bool finite = true;
  for (int64_t s = 0; s < strips; ++s) {
    int64_t offsets[kStrip], numbers[kStrip];
    strip.rows = int(std::min<int64_t>(kStrip, windows.size - s * kStrip));
    for (int r = 0; r < kStrip; ++r) {
      const int64_t i = tile * windows.size + s * kStrip + std::min(r, strip.rows - 1);
      offsets[r] = windows.q_offset[head] + windows.q_place[i];
      numbers[r] = windows.row[i] < 0 ? -1 : windows.number[head] + windows.row[i] * windows.row_step;
      strip.top[r] = kNegInf, strip.total[r] = 0.f;
    }
    std::memset(strip.sums, 0, sums);
    load_queries(job, offsets, strip);
    const float* table = at < 0 ? nullptr : windows.tables + (at * strips + s) * windows.keys * kStrip;
    window_strip(job, halo, table, strip, own_scores);
    finite &= write(job, numbers, strip);
  }
  return finite ? 0 : 2;
}

}  // namespace
