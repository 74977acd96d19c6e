// Attention of rows that choose blocks of keys one by one: all rows of a head that chose a block read it together, and what
// a row has read in its blocks is added up.
#pragma once

#include <atomic>
#include <vector>

#include "memory.h"
#include "reader.h"

namespace {

struct Routed {
  const uint8_t* chosen;  // [heads of all entries][blocks][rows], heads at a stride: 1 where a row reads a block, else 0
  int64_t head_stride, q_heads, kv_heads, rows, blocks;
  const int64_t* q_strides;
};

// The blocks of all KV heads as segments, in the order (entry, head, block).
class Blocks {
 public:
  Blocks(const Routed& routed, int64_t batch, int64_t keys, int64_t size, const int64_t* k_strides, const int64_t* v_strides) {
    for (int64_t head = 0; head < batch * routed.kv_heads; ++head)
      for (int64_t first = 0; first < keys; first += size) {
        const auto at = [&](const int64_t* strides) {
          return head / routed.kv_heads * strides[0] + head % routed.kv_heads * strides[1] + first * strides[2];
        };
        list_.push_back(int64_t(list_.size()));
        k_.push_back(at(k_strides)), v_.push_back(at(v_strides));
        lengths_.push_back(int32_t(std::min(size, keys - first)));
        low_.push_back(0), high_.push_back(lengths_.back() - 1);
      }
  }
  int64_t count() const { return int64_t(list_.size()); }
  void describe(Job& job) const {
    job.k_offset = k_.data(), job.v_offset = v_.data(), job.list = list_.data();
    job.seg_length = lengths_.data(), job.seg_low = low_.data(), job.seg_high = high_.data();
  }

 private:
  std::vector<int64_t> k_, v_, list_;
  std::vector<int32_t> lengths_, low_, high_;
};

// Numbers of the rows that chose a block, in order; `to` has room for `rows` + 1.
int64_t listed(const uint8_t* chosen, int64_t rows, int32_t* to) {
  int64_t count = 0, i = 0;
  const auto put = [&] { to[count] = int32_t(i), count += chosen[i], ++i; };
  while (i + 8 <= rows) {
    uint64_t eight;
    std::memcpy(&eight, chosen + i, 8);
    if (!eight)
      i += 8;
    else
      for (int n = 0; n < 8; ++n) put();
  }
  while (i < rows) put();
  return count;
}

// What the rows of a part have read: weighted sums, not yet divided by the total, relative to 2^top.
struct Sums {
  float *acc, *top, *total;  // [rows][value_dim], [rows], [rows]
};

// Adds the results of a strip, whose references began as those of its rows.
void merge(const Job& job, const int32_t* rows, const Strip& strip, Sums& sums) {
  alignas(64) float shrink[kStrip] = {};
  for (int r = 0; r < strip.rows; ++r) shrink[r] = sums.top[rows[r]];
  for (int n = 0; n < kVectors; ++n) {
    const Vec top = *(const Vec*)(strip.top + n * kLanes), before = *(const Vec*)(shrink + n * kLanes);
    *(Vec*)(shrink + n * kLanes) = exp2<6>(before - (top == splat(kNegInf) ? Vec{} : top));
  }
  for (int r = 0; r < strip.rows; ++r) {
    sums.top[rows[r]] = strip.top[r];
    sums.total[rows[r]] = sums.total[rows[r]] * shrink[r] + strip.total[r];
  }
  for (int first = 0; first < strip.rows; first += kLanes) {
    const int count = std::min(kLanes, strip.rows - first);
    int64_t d = 0;
    for (; d + kLanes <= job.value_dim; d += kLanes) {
      UVec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = (UVec)(*(const Vec*)(strip.sums + (d + i) * kStrip + first));
      transpose(block);
      for (int r = 0; r < count; ++r) {
        float* at = sums.acc + rows[first + r] * job.value_dim + d;
        store(at, load(at) * shrink[first + r] + (Vec)block[r]);
      }
    }
    for (; d < job.value_dim; ++d)
      for (int r = first; r < first + count; ++r) {
        float& at = sums.acc[rows[r] * job.value_dim + d];
        at = at * shrink[r] + strip.sums[d * kStrip + r];
      }
  }
}

// Results of `rows` rows, the first of which is row `number` of all.
void finish(const Job& job, const Sums& sums, int64_t rows, int64_t number) {
  for (int64_t i = 0; i < rows; ++i) {
    const float total = sums.total[i], share = total == 0.f ? 0.f : 1.f / total;
    job.lse[number + i] = total == 0.f ? kNegInf : (sums.top[i] + log2(splat(total))[0]) * kLn2;
    float* acc = sums.acc + i * job.value_dim;
    for (int64_t d = 0; d < job.value_dim; ++d) acc[d] *= share;
    if (job.type == kBFloat16) narrow(acc, static_cast<uint16_t*>(job.out) + (number + i) * job.value_dim, job.value_dim);
  }
}

// Some rows of a head: threads meet nowhere, and a row's result does not depend on the rows beside it.
class Part {
 public:
  Part(const Job& job, const Routed& routed, int64_t head, int64_t begin, int64_t end)
      : job_(job), routed_(routed), head_(head), begin_(begin), rows_(end - begin) {}

  Outcome run() {
    const auto size = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t number = head_ * routed_.rows + begin_, blocks = routed_.blocks;
    const bool apart = job_.type != kFloat;  // results in float are summed where they will be
    const size_t strips = size(size_t(job_.dim + job_.value_dim) * kRows * 4), reader = size(Reader::bytes(job_));
    const size_t list = size((rows_ + 1) * 4);
    char* memory = scratch.get(strips + reader + 3 * list + (apart ? rows_ * job_.value_dim * 4 : 0));
    if (!memory) return kNoMemory;
    strips_ = memory, reader_ = memory += strips;
    sums_.top = reinterpret_cast<float*>(memory += reader);
    sums_.total = reinterpret_cast<float*>(memory += list);
    int32_t* rows = reinterpret_cast<int32_t*>(memory += list);
    sums_.acc = apart ? reinterpret_cast<float*>(memory + list) : static_cast<float*>(job_.out) + number * job_.value_dim;
    std::fill(sums_.top, sums_.top + rows_, kNegInf);
    std::fill(sums_.total, sums_.total + rows_, 0.f);
    std::memset(sums_.acc, 0, rows_ * job_.value_dim * 4);
    const int64_t group = routed_.q_heads / routed_.kv_heads, kv_head = head_ / group;
    for (int64_t j = 0; j < blocks; ++j) {
      const uint8_t* chosen = routed_.chosen + head_ * routed_.head_stride + j * routed_.rows + begin_;
      const int64_t count = listed(chosen, rows_, rows);
      for (int64_t i = 0; i < count; i += kRows)
        attend(rows + i, int(std::min<int64_t>(kRows, count - i)), kv_head * blocks + j);
    }
    finish(job_, sums_, rows_, number);
    return kDone;
  }

 private:
  void attend(const int32_t* rows, int count, int64_t segment) {
    const int64_t* strides = routed_.q_strides;
    const int64_t base = head_ / routed_.q_heads * strides[0] + head_ % routed_.q_heads * strides[1] + begin_ * strides[2];
    int64_t offsets[kRows] = {};
    for (int i = 0; i < count; ++i) offsets[i] = base + rows[i] * strides[2];
    Strip strips[kRows / kStrip];
    const int used = set_up(job_, offsets, count, reinterpret_cast<float*>(strips_), strips);
    for (int i = 0; i < count; ++i) strips[i / kStrip].top[i % kStrip] = sums_.top[rows[i]];
    Reader reader(job_, strips, used, reader_);
    reader.read(segment);
    reader.finish();
    for (int s = 0; s < used; ++s) merge(job_, rows + s * kStrip, strips[s], sums_);
  }

  const Job& job_;
  const Routed& routed_;
  const int64_t head_, begin_, rows_;
  char *strips_, *reader_;
  Sums sums_;
};

// Rows of a part whose sums lie apart from the results, so that they stay in a second-level cache.
constexpr int64_t kPartRows = 4096;

// Parts of a head so that no thread is left without work for long.
int64_t parts_of(const Job& job, int64_t heads, int64_t rows, int64_t threads) {
  for (int64_t parts = job.type == kFloat ? 1 : (rows + kPartRows - 1) / kPartRows;; ++parts) {
    const int64_t tasks = heads * parts, rounds = (tasks + threads - 1) / threads;
    if (rounds * threads * 10 <= tasks * 11 || parts >= threads || (parts + 1) * kRows > rows) return parts;
  }
}

int run(Job& job, const Routed& routed, int64_t heads, int64_t segments, int threads) {
  std::vector<int64_t> at(segments);
  Memory memory(place(job, segments, segments, at.data()) + 64);
  if (!memory.get()) return kNoMemory;
  job.packed = memory.get(), job.packed_at = at.data();
  const int64_t parts = parts_of(job, heads, routed.rows, threads), rows = (routed.rows + parts - 1) / parts;
  std::atomic<int> outcome{kDone};
#pragma omp parallel num_threads(threads)
  {
    const AmxConfig config(job.amx);
    pack_all(job, segments, outcome);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < heads * parts; ++task) {
      const int64_t begin = std::min(task % parts * rows, routed.rows), end = std::min(begin + rows, routed.rows);
      if (end > begin) outcome |= Part(job, routed, task / parts, begin, end).run();
    }
  }
  return outcome;
}

}  // namespace
