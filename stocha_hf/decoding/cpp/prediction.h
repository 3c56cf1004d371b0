// Which gates may be above the threshold, judged by a small copy of the gate; the others' rows are not read.
//
// In 8 bits, as gate_prediction.py makes it: an entry is off by at most half its row's scale, so a product by at most half
// the scale times |x|_1. In 2 bits, as thin_gate.py makes it: by a row's `slack` times |x|_2, with a probability. There x
// has 8 bits and one scale, so that a row's sums are of integers until its end: these products must take much less time
// than those of all bits.
#pragma once

#include "linear.h"

struct GateCopy {  // as structs.py has it
  const void* codes;   // int8 [rows, columns], or 2 bits [rows, columns / 4] with rows of whole kThin; null: none
  const float* scales;  // [rows]: gate is about scale * code
  const float* slack;   // [rows], of 2 bits; null: 8 bits
};

constexpr int kCoarseTokens = 2;  // with more, judging all rows takes longer than it saves below 95% zeros
constexpr int kThin = 64;         // weights in 16 bytes of 2-bit codes: byte j has those of j, 16 + j, 32 + j, 48 + j
constexpr float kMiddle = 1.5f;   // what codes 0 to 3 count from

// Adds to a list, from `begin` on, those of this thread's rows that for some token may be more than `least`; returns its
// end. most_of(first, here, values [R][T]) tells of rows from the first one on how much they may be.
template <int T, class Most>
int64_t rows_that_may(Part mine, int64_t tokens, float least, int64_t* list, Most most_of) {
  int64_t end = mine.begin;
  for (int64_t m = mine.begin; m < mine.end; m += kRows) {
    const int here = static_cast<int>(std::min<int64_t>(kRows, mine.end - m));
    float values[kRows][T];
    most_of(m, here, values);
    for (int r = 0; r < here; ++r) {
      bool any = false;
      for (int64_t t = 0; t < tokens; ++t) any |= values[r][t] > least;
      list[end] = m + r;
      end += any;
    }
  }
  return end;
}

template <int T>
int64_t candidates_by_8_bits(const GateCopy& copy, const Inputs& x, Part mine, float least, int64_t* list) {
  float slack[T] = {};
  for (int64_t t = 0; t < x.tokens; ++t)
    for (int64_t k = t * x.size; k < (t + 1) * x.size; ++k) slack[t] += 0.5f * std::abs(x.values[k]);
  return rows_that_may<T>(mine, x.tokens, least, list, [&](int64_t m, int here, float (&values)[kRows][T]) {
    const int8_t *rows[kRows], *next[kRows];
    for (int r = 0; r < kRows; ++r) {
      rows[r] = static_cast<const int8_t*>(copy.codes) + (m + std::min(r, here - 1)) * x.size;
      next[r] = rows[r] + kAhead;
    }
    dots<kRows, T>(rows, next, x.values.data(), x.size, values);
    for (int r = 0; r < here; ++r)
      for (int t = 0; t < T; ++t)  // sums differ in their last bits
        values[r][t] = copy.scales[m + r] * (values[r][t] * (values[r][t] > 0 ? 1.0001f : 0.9999f) + slack[t]);
  });
}

// x as 2-bit codes take it: for each vector of them, vectors for their lowest bits to their highest.
template <int T>
struct ThinX {
  std::vector<int8_t> codes;  // [T, vectors, 4, kBytes]
  float step[T] = {}, offset[T] = {}, length[T] = {};
  int64_t vectors;

  void set(const Inputs& x) {
    constexpr int units = kBytes / 16;
    vectors = (x.size + units * kThin - 1) / (units * kThin);
    codes.assign(T * vectors * 4 * kBytes, 0);
    for (int64_t t = 0; t < x.tokens; ++t) {
      Vector most = {}, squares = {};
      Integers total = {};
      const auto each = [&](auto f) {  // f(place, a vector of x)
        const float* row = &x.values[t * x.size];
        for (int64_t k = 0; k < x.size; k += kLanes) {
          float part[kLanes] = {};
          std::copy(row + k, row + std::min(k + kLanes, x.size), part);
          f(k, load(part));
        }
      };
      each([&](int64_t, Vector part) {
        most = maximum(most, magnitude(part));
        squares += part * part;
      });
      const float bound = largest(most), inverse = bound > 1e-30f ? 127 / bound : 0;
      each([&](int64_t k, Vector part) {
        const Integers near = nearest(part * inverse);
        const int64_t unit = k / kThin, at = (t * vectors + unit / units) * 4 + k % kThin / 16;
        store_bytes(near, &codes[at * kBytes + unit % units * 16 + k % 16]);
        total += near;
      });
      step[t] = bound / 127;
      offset[t] = kMiddle * sum(__builtin_convertvector(total, Vector));
      length[t] = std::sqrt(sum(squares));
    }
  }
};

template <int T>
inline void dots(const uint8_t* (&rows)[kRows], Fetch fetch, const ThinX<T>& x, Integers (&total)[kRows][T]) {
  for (int64_t v = 0; v < x.vectors; ++v) {
    fetch.lines(kRows * kBytes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Unsigned codes = load_codes(rows[r] + v * kBytes);
      const Words words = (Words)codes;
      const Unsigned a = codes & 3, b = (Unsigned)(words >> 2) & 3, c = (Unsigned)(words >> 4) & 3,
                     d = (Unsigned)(words >> 6) & 3;
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) {
        const int8_t* of_t = &x.codes[(t * x.vectors + v) * 4 * kBytes];
        total[r][t] += dot(a, load_codes(of_t), b, load_codes(of_t + kBytes)) +
                       dot(c, load_codes(of_t + 2 * kBytes), d, load_codes(of_t + 3 * kBytes));
      }
    }
  }
}

template <int T>
int64_t candidates_by_2_bits(const GateCopy& copy, const Inputs& given, Part mine, float least, int64_t* list) {
  static thread_local ThinX<T> x;
  x.set(given);
  const int64_t bytes = (given.size + kThin - 1) / kThin * 16;
  const auto* codes = static_cast<const uint8_t*>(copy.codes);
  return rows_that_may<T>(mine, given.tokens, least, list, [&](int64_t m, int here, float (&values)[kRows][T]) {
    const uint8_t* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = codes + (m + std::min(r, here - 1)) * bytes;
    const uint8_t *ahead = rows[0] + kAheadAlone, *end = codes + mine.end * bytes;
    Integers total[kRows][T] = {};
    dots<T>(rows, {std::min(ahead, end), end}, x, total);
    for (int r = 0; r < here; ++r)
      for (int t = 0; t < T; ++t) {
        const float product = x.step[t] * (sum(__builtin_convertvector(total[r][t], Vector)) - x.offset[t]);
        values[r][t] = copy.scales[m + r] * product + copy.slack[m + r] * x.length[t];
      }
  });
}

// Lists this thread's gate rows that may be above the threshold for some token; returns the end of the list.
inline int64_t candidates_of(const GateCopy& copy, float threshold, const Inputs& x, Part mine, int64_t* list) {
  // the exact gate is rounded before it is compared
  const float least = threshold - std::abs(threshold) / 128;
  const auto by = [&](auto T) {
    constexpr int tokens = decltype(T)::value;
    return copy.slack ? candidates_by_2_bits<tokens>(copy, x, mine, least, list)
                      : candidates_by_8_bits<tokens>(copy, x, mine, least, list);
  };
  return x.padded == 1 ? by(std::integral_constant<int, 1>()) : by(std::integral_constant<int, 2>());
}
