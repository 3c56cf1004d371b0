// Rows of bfloat16, float16, float32 or 8-bit weights without scales: dot products with x, and sums of rows.
#pragma once

#include "vectors.h"

// Multiply-accumulate of a step of a weight row, a cache line, with as much of x. x is kept in the type X.
template <class E>
struct Step {
  using X = float;
  static constexpr int size = kLine / sizeof(E);
  static Vector mac(Vector total, const E* w, const X* x) {
    for (int i = 0; i < size; i += kLanes) total = fused(load(w + i), load(x + i), total);
    return total;
  }
};

#if defined(__AVX512BF16__) && defined(STOCHA_AVX512)
#define STOCHA_BF16_X
template <>
struct Step<bf16> {
  using X = bf16;
  static constexpr int size = kLine / sizeof(bf16);
  static Vector mac(Vector total, const bf16* w, const bf16* x) {
    return (Vector)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_loadu_si512(x));
  }
};
#endif

// Weight rows are fetched into the cache while the rows before them are used: the hardware cannot guess which neurons
// are active, it stops at the end of a page, and rows read side by side look to it like short streams.
constexpr int64_t kAhead = 16384;  // bytes, of rows side by side
constexpr int64_t kAheadAlone = 4096;  // bytes, of rows one after the other
constexpr int64_t kAheadListed = 8192;  // bytes, of rows here and there, whose addresses take longer to find

// Always inlined: a call of it would count as one without effect, and be left out.
__attribute__((always_inline)) inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Dot products of R weight rows with the x of T tokens [T, size]. Meanwhile the rows at `next` are fetched.
template <int R, int T, class E, class X>
inline void dots(const E* const* rows, const E* const* next, const X* x, int64_t size, float (&out)[R][T]) {
  if constexpr (R * T > kSums) {
    constexpr int part = kSums / R;
    float sums[R][part];
    for (int begin = 0; begin < T; begin += part) {
      dots<R, part>(rows, begin ? rows : next, x + begin * size, size, sums);
      for (int r = 0; r < R; ++r) std::copy(sums[r], sums[r] + part, out[r] + begin);
    }
    return;
  }
  Vector total[R][T] = {};
  int64_t k = 0;
  for (; k + Step<E>::size <= size; k += Step<E>::size)
    for (int r = 0; r < R; ++r) {
      prefetch(next[r] + k);
      for (int t = 0; t < T; ++t) total[r][t] = Step<E>::mac(total[r][t], rows[r] + k, x + t * size + k);
    }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      out[r][t] = sum(total[r][t]);
      for (int64_t i = k; i < size; ++i) out[r][t] = fused(to_float(rows[r][i]), to_float(x[t * size + i]), out[r][t]);
    }
}

// acc[t][begin:end] += sum over G rows of hidden[g][t] * rows[g][begin:end]; meanwhile fetches the rows at `next`.
template <int G, int T, class E>
inline void add_rows(const E* const* rows, const E* const* next, const float* hidden, float* acc, int64_t size,
                     int64_t begin, int64_t end) {
  constexpr int64_t line = kLine / sizeof(E);
  int64_t c = begin;
  for (; c + line <= end; c += line) {
    for (int g = 0; g < G; ++g) prefetch(next[g] + c);
    for (int64_t k = c; k < c + line; k += kLanes) {
      Vector total[T];
#pragma GCC unroll 8  // or the sums would be kept in memory
      for (int t = 0; t < T; ++t) total[t] = load(acc + t * size + k);
      for (int g = 0; g < G; ++g) {
        const Vector row = load(rows[g] + k);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) total[t] = fused(hidden[g * T + t] - Vector{}, row, total[t]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) store(total[t], acc + t * size + k);
    }
  }
  for (; c < end; ++c)
    for (int t = 0; t < T; ++t)
      for (int g = 0; g < G; ++g) acc[t * size + c] = fused(hidden[g * T + t], to_float(rows[g][c]), acc[t * size + c]);
}
