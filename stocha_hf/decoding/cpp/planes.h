// Rows of 8-bit weights in two planes: dot products with an x in 8 bits by both planes, or about so by the high one.
//
// w = (16 * high + low - 128) * scale, high and low 0 to 15, each plane laid out as codes of 4 bits. The high plane alone
// takes low for its middle, 7.5: each weight is then off by at most 7.5 scales, with a variance of (16^2 - 1) / 12.
#pragma once

#include "quantized.h"

constexpr float kVarianceOfLow = 255.0f / 12;

struct High {};  // what a product reads
struct Both {};

template <class Code>
constexpr bool kInPlanes = std::is_same_v<Code, High> || std::is_same_v<Code, Both>;

template <int R, class Code>
struct PlaneRows {
  const uint8_t *codes[R], *low[R];
  const fp16* scales[R];
  int64_t groups;
  bool readable;
};
template <int R>
struct CodeRows<R, High> : PlaneRows<R, High> {};
template <int R>
struct CodeRows<R, Both> : PlaneRows<R, Both> {};

// Each group's sum of the squares of x [tokens, size], [tokens, chunks * kLanes]: what an error in its weights counts.
inline void sum_squares(const float* x, int64_t tokens, int64_t size, int64_t chunks, std::vector<float>& out) {
  out.assign(tokens * chunks * kLanes, 0.0f);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < size; ++i) out[t * chunks * kLanes + i / kGroupSize] += x[t * size + i] * x[t * size + i];
}

// Dot products of R rows with T tokens of x from the first one on; meanwhile fetches others. Of the high plane alone
// with the variances of what they leave out, given the squares of x.
template <int R, int T, class Code>
inline void dots(const PlaneRows<R, Code>& rows, Fetch fetch, const QuantizedX& x, const float* squares, int64_t first,
                 float (&out)[R][T], float (&variances)[R][T]) {
  constexpr bool both = std::is_same_v<Code, Both>;
  Vector total[R][T] = {};
  for (int64_t chunk = 0, g = 0; g < rows.groups; ++chunk, g += kLanes) {
    const int64_t here = rows.groups - g, at = first * x.chunks + chunk;
    Vector factor[R][T];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vector scale = arranged(load_part(rows.scales[r] + g, here, rows.readable));
      const Vector offset = scale * (both ? 128.0f * 8 : 120.5f * 8);  // x.totals are of eighths
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const int64_t lanes = (t * x.chunks + at) * kLanes;
        factor[r][t] = scale * load(&x.scales[lanes]);
        total[r][t] += offset * load(&x.totals[lanes]);
        if constexpr (!both) factor[r][t] *= 16.0f;
      }
    }
    fetch.lines((both ? 2 : 1) * R * kChunk / 2);
    const auto step = [&](auto i, bool whole) STOCHA_INLINED {
      const int8_t* part = &x.codes[at * kChunk + i * 2 * kBytes];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t from = g * 16 + i * kBytes, bytes = (here - i * kPer) * 16;
        const Unsigned high = load_codes_part(rows.codes[r] + from, bytes, whole);
        Unsigned low = {};
        if constexpr (both) low = load_codes_part(rows.low[r] + from, bytes, whole);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const Signed a = load_codes(part + t * x.chunks * kChunk), b = load_codes(part + t * x.chunks * kChunk + kBytes);
          Integers products = dot(low_halves(high), a, high_halves(high), b);
          if constexpr (both) products = (products << 4) + dot(low_halves(low), a, high_halves(low), b);
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
    for (int t = 0; t < T; ++t) {
      out[r][t] = sum(total[r][t]);
    }
  if constexpr (!both) {  // by itself, for the registers are full
    Vector variance[R][T] = {};
    for (int64_t chunk = 0, g = 0; g < rows.groups; ++chunk, g += kLanes)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vector scale = load_part(rows.scales[r] + g, rows.groups - g, rows.readable);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
          variance[r][t] += scale * scale * load(squares + ((first + t) * x.chunks + chunk) * kLanes);
      }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) variances[r][t] = sum(variance[r][t]) * kVarianceOfLow;
  }
}

// A row as float32, for embeddings and prefill.
inline void dequantize_planes(const uint8_t* high, const uint8_t* low, const fp16* scales, int64_t size, float* out) {
  int8_t codes[kGroupSize];
  for (int64_t begin = 0; begin < size; begin += kGroupSize, high += kGroupSize / 2, low += kGroupSize / 2, ++scales) {
    for (int i = 0; i < kGroupSize / 2; ++i) {
      codes[i] = static_cast<int8_t>((high[i] << 4 | (low[i] & 15)) - 128);
      codes[i + kGroupSize / 2] = static_cast<int8_t>(((high[i] & 240) | low[i] >> 4) - 128);
    }
    dequantize_row_8(codes, scales, std::min<int64_t>(kGroupSize, size - begin), out + begin);
  }
}
