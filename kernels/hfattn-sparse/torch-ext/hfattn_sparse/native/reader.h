// The keys of a tile, chunk by chunk.
#pragma once

#include "chunk.h"

namespace {

// Fills chunks with the keys of a tile's list and processes them.
class Reader {
 public:
  Reader(const Job& job, Strip* strips, int count, char* memory) : job_(job), strips_(strips), count_(count) {
    const auto take = [&](size_t bytes) {
      char* at = memory;
      memory += (bytes + 63) / 64 * 64;
      return at;
    };
    scores_ = reinterpret_cast<float*>(take(scores_bytes()));
    weights_ = reinterpret_cast<float*>(take(kChunk * 4));
    if (!job.amx) return;
    for (Group& group : groups_) {
      group.keys = reinterpret_cast<uint16_t*>(take(job.dim * 64));
      group.rows = reinterpret_cast<uint16_t*>(take(job.value_dim * 64));
      group.values = reinterpret_cast<uint16_t*>(take(job.value_dim * 64));
    }
  }

  static constexpr size_t scores_bytes() { return size_t(std::max(kChunk, 3 * kAmxChunk)) * kStrip * 4; }

  static size_t bytes(const Job& job) {
    const size_t groups = job.amx ? kGroups * size_t(job.dim + 2 * job.value_dim + 3) * 64 : 0;
    return scores_bytes() + kChunk * 4 + groups + 256;
  }

  void read(int64_t segment) {
    const int length = job_.seg_length[segment], whole = job_.amx ? length / 32 * 32 : length;
    const Keys keys = keys_of(job_, segment);
    const int64_t offset = job_.key_offset ? job_.key_offset[segment] : 0;
    const int64_t size = job_.amx ? 2 : 4;
    for (int first = 0; first < whole;) {
      if (chunk_.keys == most()) flush();
      const int count = std::min(most() - chunk_.keys, whole - first);
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
  static constexpr int kGroups = kAmxChunk / 32 + 1;

  int most() const { return job_.amx ? kAmxChunk : kChunk; }

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
    std::memcpy(group.keys + at * job_.dim, static_cast<const uint16_t*>(keys.k) + j * keys.k_stride, job_.dim * 2);
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
    if (chunk_.keys == most()) flush();
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
    const float* weights = job_.key_weight ? weights_ : nullptr;
#if HFA_AMX
    if (job_.amx)
      AmxChunk(job_, chunk_, strips_, count_, scores_, weights).run();
    else
#endif
      for (int s = 0; s < count_; ++s) float_process(job_, chunk_, strips_[s], scores_, weights);
    chunk_.count = chunk_.keys = 0;
  }

  const Job& job_;
  Strip* strips_;
  int count_;
  Chunk chunk_;
  float *scores_, *weights_;
  Group groups_[kGroups];
  int open_ = 0;
};

}  // namespace
