// Rows of 8- and 4-bit weights: their dot products with an x in 8 bits.
//
// x is rounded to 255 steps in groups of 32, as weights are, so that products are of bytes; everything after that is
// float32.
#pragma once

#include "codes.h"

// x [tokens, size] in 8 bits: chunk after chunk, in the order in which codes of `bits` bits are loaded.
struct QuantizedX {
  int64_t chunks = 0;
  std::vector<int8_t> codes;          // [T, chunks, kChunk]
  std::vector<float> scales, totals;  // [T, chunks, kLanes]; totals are what an eighth of zero adds at scale 1

  void prepare(const float* x, int64_t tokens, int64_t padded_tokens, int64_t size, int bits) {
    chunks = (size + kChunk - 1) / kChunk;
    codes.resize(padded_tokens * chunks * kChunk);
    scales.resize(padded_tokens * chunks * kLanes);
    totals.resize(padded_tokens * chunks * kLanes);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* row = x + t * size;
      Vector zeros = {};
      int64_t i = 0;
      for (; i + kLanes <= size; i += kLanes) zeros += load(row + i) * 0.0f;
      float not_finite = sum(zeros);  // NaN where x is not finite: so are all products then
      for (; i < size; ++i) not_finite += row[i] * 0.0f;
      for (int64_t begin = 0; begin < chunks * kChunk; begin += kGroupSize) {
        float padded[kGroupSize] = {};
        const float* group = row + begin;
        if (begin + kGroupSize > size) {
          if (begin < size) std::copy(group, row + size, padded);
          group = padded;
        }
        prepare_group(group, not_finite, t * chunks + begin / kChunk, begin % kChunk / kGroupSize, bits);
      }
    }
    std::fill(codes.begin() + tokens * chunks * kChunk, codes.end(), 0);
    std::fill(scales.begin() + tokens * chunks * kLanes, scales.end(), 0.0f);
    std::fill(totals.begin() + tokens * chunks * kLanes, totals.end(), 0.0f);
  }

 private:
  void prepare_group(const float* x, float not_finite, int64_t chunk, int64_t group, int bits) {
    Vector most = {};
    for (int i = 0; i < kGroupSize; i += kLanes) most = maximum(most, magnitude(load(x + i)));
    const float bound = largest(most) + not_finite, inverse = bound > 1e-30f ? 127 / bound : 0;
    int8_t rounded[kGroupSize];
    Integers total = {};
    for (int i = 0; i < kGroupSize; i += kLanes) {
      const Integers near = nearest(load(x + i) * inverse);
      total += near;
      store_bytes(near, rounded + i);
    }
    const int64_t vector = group / kPer, place = group % kPer;  // 4 bits: low halves of kPer groups, then high ones
    int8_t* to = codes.data() + chunk * kChunk;
    if (bits == 4) {
      std::memcpy(to + vector * 2 * kBytes + place * 16, rounded, 16);
      std::memcpy(to + vector * 2 * kBytes + kBytes + place * 16, rounded + 16, 16);
    } else {
      std::memcpy(to + group * kGroupSize, rounded, kGroupSize);
    }
    const int64_t lane = chunk * kLanes + (bits == 4 ? place * 4 + vector : group);
    scales[lane] = bound / 127;
    totals[lane] = bound / -(127 * 8) * sum(__builtin_convertvector(total, Vector));
  }
};

// Rows that come later, fetched line by line in the order in which they lie in memory. Rows are read side by side, which
// alone would look to the hardware like several short streams: from memory that takes 1.7 times as long.
struct Fetch {
  const uint8_t *at, *end;         // of the row at hand, or of rows that lie together
  const uint8_t* const* rows = {};  // further ones
  int count = 0;
  int64_t bytes = 0;
  void line() {
    if (at >= end) {
      if (count == 0) return;
      at = *rows++;
      end = at + bytes;
      --count;
    }
    prefetch(at);
    at += kLine;
  }
  void lines(int64_t size) {
    if (end - at < size) {
      for (int64_t i = 0; i < size; i += kLine) line();
    } else {
#pragma GCC unroll 8
      for (int64_t i = 0; i < size; i += kLine) prefetch(at + i);
      at += size;
    }
  }
};

// R rows of codes. `readable`: behind each row are at least kLanes more groups; codes read from there meet zeros of x.
template <int R, class Code>
struct CodeRows {
  const Code* codes[R];
  const std::conditional_t<std::is_same_v<Code, int8_t>, fp16, uint16_t>* scales[R];  // or words
  int64_t groups;
  bool readable;
};

// Dot products of R rows with T tokens of x from the first one on; meanwhile fetches others. Sums are independent of R
// and T, so that a row gives a token the same number in any company; R * T of them keep the processor busy.
template <int R, int T>
inline void dots(const CodeRows<R, uint8_t>& rows, Fetch fetch, const QuantizedX& x, int64_t first, float (&out)[R][T]) {
  Vector total[R][T] = {};
  for (int64_t chunk = 0, g = 0; g < rows.groups; ++chunk, g += kLanes) {
    const int64_t here = rows.groups - g, at = first * x.chunks + chunk;
    Vector factor[R][T];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Levels levels(arranged(load_words(rows.scales[r] + g, here, rows.readable)));
      const Vector scale = levels.scale, offset = scale * levels.eighths;
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        factor[r][t] = scale * load(&x.scales[(t * x.chunks + at) * kLanes]);
        total[r][t] += offset * load(&x.totals[(t * x.chunks + at) * kLanes]);
      }
    }
    fetch.lines(R * kChunk / 2);
    const auto step = [&](auto i, bool whole) STOCHA_INLINED {
      const int8_t* part = &x.codes[at * kChunk + i * 2 * kBytes];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = rows.codes[r] + g * 16 + i * kBytes;
        const Unsigned codes = load_codes_part(p, (here - i * kPer) * 16, whole);
        const Unsigned low = low_halves(codes), high = high_halves(codes);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const int8_t* of_t = part + t * x.chunks * kChunk;
          const Integers products = dot(low, load_codes(of_t), high, load_codes(of_t + kBytes));
          total[r][t] += __builtin_convertvector(products, Vector) * spread<i>(factor[r][t]);
        }
      }
    };
    if (here >= kLanes)
      repeated<0, 4>([&](auto i) STOCHA_INLINED { step(i, true); });
    else
      repeated<0, 4>([&](auto i) STOCHA_INLINED {
        if (i * kPer < here) step(i, rows.readable);
      });
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) out[r][t] = sum(total[r][t]);
}

template <int R, int T>
inline void dots(const CodeRows<R, int8_t>& rows, Fetch fetch, const QuantizedX& x, int64_t first, float (&out)[R][T]) {
  Vector total[R][T] = {};
  for (int64_t chunk = 0, g = 0; g < rows.groups; ++chunk, g += kLanes) {
    const int64_t here = rows.groups - g, at = first * x.chunks + chunk;
    Vector factor[R][T];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vector scale = load_part(rows.scales[r] + g, here, rows.readable);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) factor[r][t] = scale * load(&x.scales[(t * x.chunks + at) * kLanes]);
    }
    fetch.lines(R * kChunk);
    const auto step = [&](auto i, bool whole) STOCHA_INLINED {
      const int8_t* part = &x.codes[at * kChunk + i * kBytes];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int8_t* p = rows.codes[r] + g * kGroupSize + i * kBytes;
        const Signed codes = load_codes_part(p, here * kGroupSize - i * kBytes, whole);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const Integers products = dot(codes, load_codes(part + t * x.chunks * kChunk));
          total[r][t] += __builtin_convertvector(products, Vector) * spread_8<i>(factor[r][t]);
        }
      }
    };
    if (here >= kLanes)
      repeated<0, 8>([&](auto i) STOCHA_INLINED { step(i, true); });
    else
      repeated<0, 8>([&](auto i) STOCHA_INLINED {
        if (i * kBytes < here * kGroupSize) step(i, rows.readable);
      });
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) out[r][t] = sum(total[r][t]);
}

// A row as float32, for embeddings and prefill.
inline void dequantize_row_8(const int8_t* codes, const fp16* scales, int64_t size, float* out) {
  int64_t begin = 0;
  for (; begin + kGroupSize <= size; begin += kGroupSize) {
    const float scale = to_float(*scales++);
    for (int64_t i = begin; i < begin + kGroupSize; i += kLanes) store(load(codes + i) * scale, out + i);
  }
  for (int64_t i = begin; i < size; ++i) out[i] = codes[i] * to_float(*scales);
}

inline void dequantize_row_4(const uint8_t* codes, const uint16_t* words, int64_t size, float* out) {
  for (int64_t begin = 0; begin < size; begin += kGroupSize, codes += kGroupSize / 2, ++words) {
    const float scale = Levels(Integers{*words}).scale[0], offset = (*words & 127) * -0.125f;
    float last[kGroupSize], *group = begin + kGroupSize <= size ? out + begin : last;
    for (int i = 0; i < kGroupSize / 2; i += kLanes) {
      const Integers both = load_integers(codes + i);
      store((__builtin_convertvector(both & 15, Vector) + offset) * scale, group + i);
      store((__builtin_convertvector(both >> 4, Vector) + offset) * scale, group + i + kGroupSize / 2);
    }
    if (group == last) std::copy(last, last + (size - begin), out + begin);
  }
}
