// The thread team. Jobs run inside torch's OpenMP runtime where that is loaded; else, and in a forked child,
// on one process-wide set of workers that spin for a bounded time between jobs and then sleep on a futex.
//
// Rules that callers rely on:
// - parallel_for never changes results: what runs where depends on timing, what is computed does not.
// - A call from inside a job, or while another thread uses the team, runs inline on the calling thread.
// - The first exception that a task throws is rethrown to the caller after every worker has left the job.
// - A forked child starts with no workers and makes its own on first use.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

namespace tilewright {

// Threads that the next parallel_for of this thread may use, the calling one included.
int num_threads();
void set_num_threads(int n);  // for the calling thread; n >= 1
int usable_cpus();            // cores of the affinity mask, bounded by the cgroup's CPU quota; at least 1

namespace detail {
using Task = void (*)(void* context, int64_t begin, int64_t end);
void run(int64_t n, int64_t grain, bool dynamic, Task task, void* context);
}  // namespace detail

// Calls f(begin, end) over contiguous ranges that cover [0, n): one range a thread, each at least `grain`
// long but the last. For work of equal cost that wants to stream through memory.
template <class F>
void parallel_ranges(int64_t n, int64_t grain, F&& f) {
  using Fn = std::remove_reference_t<F>;
  detail::run(
      n, grain, false, [](void* c, int64_t begin, int64_t end) { (*static_cast<Fn*>(c))(begin, end); }, &f);
}

// Calls f(i) for each i in [0, n), handed out in ascending order to whoever is free. For uneven work:
// put the longest tasks first.
template <class F>
void parallel_tasks(int64_t n, F&& f) {
  using Fn = std::remove_reference_t<F>;
  detail::run(
      n, 1, true,
      [](void* c, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<Fn*>(c))(i);
      },
      const_cast<std::remove_const_t<Fn>*>(&f));
}

// Memory for free(), in huge pages where it is large and the system has them: packed operands are walked
// through again and again, and filling small pages takes as long as a product. Throws std::bad_alloc.
void* allocate(int64_t bytes);

// 64-byte aligned memory of this thread, kept for the next call with the same slot; contents undefined.
// Slots keep apart what one kernel needs at the same time.
enum class Scratch : int { operands, inner, panel, partial, count };
void* scratch(Scratch slot, int64_t bytes);

}  // namespace tilewright
