// Softmax attention of tiles of query rows over lists of key segments, on a CPU.
//
// A tile is a list of query rows (of any heads and positions); a segment is a run of consecutive keys with their values.
// Every row of a tile reads every segment of the tile's list, as far as positions allow. Rows are processed in strips of
// kStrip as the columns of S^T = K Q^T and O^T = V^T P^T: one row is one lane, so softmax statistics need no sums across
// lanes, and keys are read as they lie in memory. Scores, statistics and sums are float.
//
// Products run on AMX tiles for bfloat16 where the processor has them, else as vector code over float.

#include <atomic>
#include <new>
#include <vector>

#include "importance.h"
#include "memory.h"
#include "reader.h"
#include "routed.h"
#include "windows.h"

namespace {

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
        if (job.run_position) positions[count] = job.run_position[run] + int32_t(i);
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
  const Rows rows(job, tile, begin);
  Strip strips[kRows / kStrip];
  const int count = set_up(job, rows.offsets, rows.count, reinterpret_cast<float*>(memory), strips);
  for (int s = 0; job.run_position && s < count; ++s) {
    Strip& strip = strips[s];
    for (int r = 0; r < kStrip; ++r) strip.position[r] = rows.positions[s * kStrip + std::min(r, strip.rows - 1)];
    const auto [low, high] = std::minmax_element(strip.position, strip.position + kStrip);
    strip.lowest = *low, strip.highest = *high;
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
    pack_all(job, segments, outcome);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < first[tiles]; ++task) {
      const int64_t tile = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
      outcome |= attend(job, tile, (task - first[tile]) * kRows);
    }
  }
  return outcome;
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
               const float* key_weight, const int64_t* list_ptr, const int64_t* list, int64_t out_rows,
               int threads) try {
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
  advise(out, size_t(out_rows * value_dim) * (job.type == kFloat ? 4 : 2));
  return run(job, tiles, segments, threads);
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

// Attention of [batch][q_heads][rows] over keys [batch][kv_heads][keys], in blocks of block_size keys: a row reads block j
// where chosen [batch][q_heads][blocks][rows] is 1 and not 0; its heads lie head_stride apart. Elements from entry to
// entry, from head to head and from token to token are in q_strides, k_strides, v_strides; out and lse are contiguous.
// Returns 0, or 1 when memory ran out.
int hfa_attend_routed(int type, const void* q, const void* k, const void* v, void* out, float* lse, int64_t dim,
                      int64_t value_dim, const int64_t* q_strides, const int64_t* k_strides, const int64_t* v_strides,
                      float scale, int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t rows, int64_t keys,
                      int64_t block_size, const uint8_t* chosen, int64_t head_stride, int threads) try {
  Job job{};
  job.type = Type(type), job.amx = use_amx(job.type, dim, value_dim), job.scale = scale;
  job.q = q, job.k = k, job.v = v, job.out = out, job.lse = lse, job.dim = dim, job.value_dim = value_dim;
  job.q_stride = q_strides[2], job.k_stride = k_strides[2], job.v_stride = v_strides[2];
  const int64_t blocks = (keys + block_size - 1) / block_size;
  const Routed routed{chosen, head_stride, q_heads, kv_heads, rows, blocks, q_strides};
  const Blocks segments(routed, batch, keys, block_size, k_strides, v_strides);
  segments.describe(job);
  advise(out, size_t(batch * q_heads * rows * value_dim) * (job.type == kFloat ? 4 : 2));
  return run(job, routed, batch * q_heads, segments.count(), threads);
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

// Neighborhoods; see windows.h. Returns as hfa_attend.
int hfa_windows(int type, const void* q, const void* k, const void* v, void* out, float* lse, int64_t dim,
                int64_t value_dim, float scale, int64_t heads, int64_t tiles, int64_t size, int64_t keys,
                int64_t row_step, const int64_t* q_offset, const int64_t* k_offset, const int64_t* v_offset,
                const int64_t* number, const int64_t* q_place, const int64_t* k_place, const int64_t* v_place,
                const int64_t* row, const float* tables, const int64_t* table_of, int64_t out_rows, int threads) {
  Job job{};
  job.type = Type(type), job.amx = use_amx(job.type, dim, value_dim), job.scale = scale;
  job.q = q, job.k = k, job.v = v, job.out = out, job.lse = lse;
  job.dim = dim, job.value_dim = value_dim;
  const Windows windows{q_offset, k_offset, v_offset, number, q_place, k_place, v_place,
                        row,      tables,   table_of, heads,  tiles,   size,    keys,    row_step};
  advise(out, size_t(out_rows * value_dim) * (job.type == kFloat ? 4 : 2));
  std::atomic<int> outcome{kDone};
#pragma omp parallel num_threads(threads)
  {
    const AmxConfig config(job.amx);
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < heads * tiles; ++task) outcome |= window_tile(job, windows, task / tiles, task % tiles);
  }
  return outcome;
}
}
