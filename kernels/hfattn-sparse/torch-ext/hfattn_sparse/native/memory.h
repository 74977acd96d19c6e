// Memory of a call.
#pragma once

#include <mutex>
#include "job.h"

namespace {

// Fresh memory costs a page fault every 4 KiB, so a call leaves what it had, up to kKept, to the next one.
constexpr size_t kKept = size_t(64) << 20;
std::mutex kept_lock;
Scratch kept;

class Memory {
 public:
  explicit Memory(size_t size) : own_(size > kKept || !kept_lock.try_lock()) {
    at_ = own_ ? static_cast<char*>(std::aligned_alloc(64, (size + 63) / 64 * 64)) : kept.get(size);
  }
  ~Memory() {
    if (own_)
      std::free(at_);
    else
      kept_lock.unlock();
  }
  char* get() const { return at_; }

 private:
  bool own_;
  char* at_;
};

// Results that are fresh memory are written for the first time here: large pages spare most of the faults.
void advise(void* begin, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = uintptr_t(2) << 20;
  const uintptr_t first = (uintptr_t(begin) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t last = (uintptr_t(begin) + bytes) / kLarge * kLarge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
