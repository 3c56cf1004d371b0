// A team of threads: OpenMP starts it, from the pool that torch uses, and between the phases of a call it spins.
//
// OpenMP's own barrier may put threads to sleep, and takes several times as long as a small matrix does.
#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

struct Barrier {
  std::atomic<int> arrived{0}, phase{0};
};

struct Team {
  int thread, threads;
  Barrier* barrier;

  void wait() const {
    constexpr int kSpins = 4096;  // then another process may have the core of the thread that is waited for
    if (threads == 1) return;
    const int now = barrier->phase.load(std::memory_order_relaxed);
    if (barrier->arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      barrier->arrived.store(0, std::memory_order_relaxed);
      barrier->phase.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; barrier->phase.load(std::memory_order_acquire) == now; ++spins) {
      if (spins > kSpins) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  }
};

// Calls f(team) on each of `threads` threads.
template <class F>
void with_team(int threads, F f) {
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  f(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
}

// A thread's part of `count` items, in whole multiples of `unit`.
struct Part {
  int64_t begin = 0, end = 0;
  Part() = default;
  Part(int64_t from, int64_t to) : begin(from), end(to) {}
  Part(int64_t count, int64_t unit, Team team) {
    const int64_t units = (count + unit - 1) / unit;
    begin = std::min(units * team.thread / team.threads * unit, count);
    end = std::min(units * (team.thread + 1) / team.threads * unit, count);
  }
};
