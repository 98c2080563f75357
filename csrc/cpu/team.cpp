#include "cpu/team.h"

#include <dlfcn.h>
#include <link.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace tilewright {
namespace {

// Pauses before a worker sleeps: about 30 us, the gap between two ops of a Python decode loop. Longer
// spinning would steal the core from torch's own pool; see bench/NOTES.md.
constexpr int kSpin = 1200;

void pause() { __builtin_ia32_pause(); }

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}

struct Job {
  detail::Task task;
  void* context;
  int64_t n, chunk;  // dynamic: chunk == 1 and `next` counts tasks; static: part p covers [p*chunk, ...)
};

thread_local bool inside_job = false;
thread_local int wanted_threads = 0;

// One worker's doorbell, on its own cache line: members of a job are rung one by one, the others sleep on.
struct alignas(64) Bell {
  std::atomic<uint32_t> rung{0};
  std::atomic<uint32_t> asleep{0};
};

// torch's own OpenMP runtime, if it is loaded. Its workers spin for milliseconds after each of torch's ops,
// so a second pool would share their cores: a BERT-base lost 2 to 5% end to end. Running inside it costs 0.6
// us a job.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel find_gomp() {
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const std::string name = info->dlpi_name ? info->dlpi_name : "";
        if (name.find("libgomp") == std::string::npos) return 0;
        *static_cast<std::string*>(out) = name;
        return 1;
      },
      &path);
  if (path.empty()) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel")) : nullptr;
}

class Team {
 public:
  explicit Team(GompParallel gomp) : gomp_(gomp) {}

  void run(const Job& job, int members) {
    if (gomp_) {
      job_ = job;
      error_ = nullptr;
      next_.store(0, std::memory_order_relaxed);
      gomp_(
          [](void* team) {
            const bool before = std::exchange(inside_job, true);
            static_cast<Team*>(team)->work();
            inside_job = before;
          },
          this, static_cast<unsigned>(members), 0);
      if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
      return;
    }
    grow(members - 1);
    const int others = std::min(members - 1, static_cast<int>(bells_.size()));
    job_ = job;
    error_ = nullptr;
    next_.store(0, std::memory_order_relaxed);
    remaining_.store(static_cast<uint32_t>(others), std::memory_order_relaxed);
    for (int i = 0; i < others; ++i) {
      Bell& bell = *bells_[i];
      // Both sides are sequentially consistent: either the worker sees the new value before it sleeps, or
      // we see that it is asleep.
      bell.rung.fetch_add(1, std::memory_order_seq_cst);
      if (bell.asleep.load(std::memory_order_seq_cst)) futex_wake(bell.rung);
    }
    work();
    uint32_t left;
    for (int i = 0; (left = remaining_.load(std::memory_order_acquire)) != 0; ++i) {
      if (i < kSpin) {
        pause();
        continue;
      }
      caller_waits_.store(1, std::memory_order_seq_cst);
      left = remaining_.load(std::memory_order_seq_cst);
      if (left != 0) futex_wait(remaining_, left);
      caller_waits_.store(0, std::memory_order_relaxed);
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  std::mutex in_use;

 private:
  void grow(int wanted) {
    while (static_cast<int>(bells_.size()) < wanted) {
      auto bell = std::make_unique<Bell>();
      try {
        std::thread([this, own = bell.get()] { worker(*own); }).detach();
      } catch (const std::system_error&) {
        return;  // fewer threads than asked for, same results
      }
      bells_.push_back(std::move(bell));
    }
  }

  void worker(Bell& bell) {
    inside_job = true;
    for (uint32_t seen = 0;; ++seen) {
      for (int i = 0; i < kSpin && bell.rung.load(std::memory_order_acquire) == seen; ++i) pause();
      while (bell.rung.load(std::memory_order_acquire) == seen) {
        bell.asleep.store(1, std::memory_order_seq_cst);
        if (bell.rung.load(std::memory_order_seq_cst) == seen) futex_wait(bell.rung, seen);
        bell.asleep.store(0, std::memory_order_relaxed);
      }
      work();
      if (remaining_.fetch_sub(1, std::memory_order_seq_cst) == 1 &&
          caller_waits_.load(std::memory_order_seq_cst))
        futex_wake(remaining_);
    }
  }

  // Parts are claimed, not assigned: a worker that the operating system delays costs nothing as long as
  // the others can take its part. Which thread computes a part does not show in the result.
  void work() noexcept {
    const int64_t parts = (job_.n + job_.chunk - 1) / job_.chunk;
    for (;;) {
      const int64_t part = next_.fetch_add(1, std::memory_order_relaxed);
      if (part >= parts) return;
      try {
        job_.task(job_.context, part * job_.chunk, std::min(job_.n, (part + 1) * job_.chunk));
      } catch (...) {
        std::lock_guard<std::mutex> guard(error_mutex_);
        if (!error_) error_ = std::current_exception();
        next_.store(parts, std::memory_order_relaxed);
      }
    }
  }

  const GompParallel gomp_;
  alignas(64) std::atomic<uint32_t> remaining_{0};
  std::atomic<uint32_t> caller_waits_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  Job job_{};
  std::vector<std::unique_ptr<Bell>> bells_;
  std::exception_ptr error_;
  std::mutex error_mutex_;
};

// Never destroyed: workers may still spin while the process runs its exit handlers.
Team* team = nullptr;
std::once_flag made;

void make_team() {
  team = new Team(find_gomp());
  // Neither libgomp's pool nor workers survive a fork, and the mutex may be locked: the child starts over
  // with workers of its own. The parent's object is leaked there on purpose.
  pthread_atfork(nullptr, nullptr, [] { team = new Team(nullptr); });
}

// The whole file, "" if there is none: the kernel's small text files.
std::string read_text(const std::string& path) {
  std::FILE* f = std::fopen(path.c_str(), "re");
  if (!f) return {};
  std::string text(65536, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), f));
  std::fclose(f);
  return text;
}

// CPUs that "quota period" allows; 0: no limit ("max", or -1 in version 1).
int quota_cpus(const std::string& text) {
  long long quota = 0, period = 0;
  if (std::sscanf(text.c_str(), "%lld %lld", &quota, &period) != 2 || quota <= 0 || period <= 0) return 0;
  return static_cast<int>((quota + period - 1) / period);
}

// The CPU limit of this process's control group, version 2 or 1: the smallest on the way from its own group
// to the root of the hierarchy. 0: none. /proc/self/cgroup has lines "id:controllers:path", version 2's
// without controllers.
int cgroup_cpus() {
  const std::string groups = read_text("/proc/self/cgroup"), root = "/sys/fs/cgroup";
  int best = 0;
  for (size_t begin = 0, end; begin < groups.size(); begin = end + 1) {
    end = std::min(groups.find('\n', begin), groups.size());
    const std::string line = groups.substr(begin, end - begin);
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    const std::string mount = v2 ? root : root + "/" + controllers;
    std::string group = line.substr(second + 1);
    for (;;) {
      while (!group.empty() && group.back() == '/') group.pop_back();
      const std::string at = mount + group + "/cpu.";
      const int here =
          quota_cpus(v2 ? read_text(at + "max")
                        : read_text(at + "cfs_quota_us") + " " + read_text(at + "cfs_period_us"));
      if (here > 0 && (best == 0 || here < best)) best = here;
      if (group.empty()) break;
      group.resize(std::min(group.find_last_of('/'), group.size()));
    }
  }
  return best;
}

int count_cpus() {
  cpu_set_t set;
  int n = 0;
  if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
  if (n < 1) n = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const int quota = cgroup_cpus();
  return quota > 0 ? std::min(n, quota) : n;
}

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

int usable_cpus() {
  static const int n = count_cpus();
  return n;
}

int num_threads() { return wanted_threads > 0 ? wanted_threads : usable_cpus(); }
void set_num_threads(int n) { wanted_threads = std::max(1, n); }

void detail::run(int64_t n, int64_t grain, bool dynamic, Task task, void* context) {
  if (n <= 0) return;
  int64_t members = std::min<int64_t>(num_threads(), (n + grain - 1) / grain);
  if (members > 1 && !inside_job) {
    std::call_once(made, make_team);
    std::unique_lock<std::mutex> guard(team->in_use, std::try_to_lock);
    if (guard.owns_lock()) {
      const Job job{task, context, n, dynamic ? 1 : (n + members - 1) / members};
      inside_job = true;
      struct Leave {
        ~Leave() { inside_job = false; }
      } leave;
      team->run(job, static_cast<int>(members));
      return;
    }
  }
  task(context, 0, n);
}

void* allocate(int64_t bytes) {
  constexpr int64_t kHuge = 2 << 20;
  const int64_t unit = bytes < kHuge ? 4096 : kHuge, size = (bytes + unit - 1) / unit * unit;
  void* p = std::aligned_alloc(static_cast<size_t>(unit), static_cast<size_t>(size));
  if (!p) throw std::bad_alloc();
  if (unit == kHuge)
    madvise(p, static_cast<size_t>(size), MADV_HUGEPAGE);  // advice: its failure changes nothing
  return p;
}

void* scratch(Scratch slot, int64_t bytes) {
  thread_local Buffer buffers[static_cast<int>(Scratch::count)];
  Buffer& b = buffers[static_cast<int>(slot)];
  if (b.size < bytes) {
    std::free(b.data);
    b.size = 0;
    b.data = allocate(bytes);
    b.size = bytes;
  }
  return b.data;
}

}  // namespace tilewright
