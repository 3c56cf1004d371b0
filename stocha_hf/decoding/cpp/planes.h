// Rows of 8-bit weights in two planes: dot products with an x in 8 bits by both planes, or about so by the high one.
//
// w = (16 * high + low - 128) * scale, high and low 0 to 15, each plane laid out as codes of 4 bits. The high plane alone
// takes low for its middle, 7.5: each weight is then off by at most 7.5 scales, with a variance of (16^2 - 1) / 12.
#pragma once

#include "quantized.h"

constexpr float kVarianceOfLow = 255.0f / 12;

// Each group's sum of the squares of x [tokens, size], of the token with most, in ChunkOf4's order: what an error in its
// weights counts at most.
inline void sum_squares(const float* x, int64_t tokens, int64_t size, int64_t chunks, std::vector<float>& out) {
  out.assign(chunks * kLanes, 0.0f);
  for (int64_t begin = 0; begin < size; begin += kGroupSize) {
    float& most = out[begin / kChunk * kLanes + lane_of_4(begin % kChunk / kGroupSize)];
    for (int64_t t = 0; t < tokens; ++t) {
      float total = 0;
      for (int64_t i = begin; i < std::min(begin + kGroupSize, size); ++i) total += x[t * size + i] * x[t * size + i];
      most = std::max(most, total);
    }
  }
}

// A chunk's scales of a row in planes, in ChunkOf4's order; see load_chunk for `whole`.
template <bool whole>
STOCHA_INLINED inline Vector load_scales(const fp16* scales, int64_t chunk, int64_t left) {
  scales += chunk * kLanes;
  fp16 part[kLanes] = {};
  if (!whole && left < kLanes) {
    std::memcpy(part, scales, left * sizeof *scales);
    scales = part;
  }
  return arranged(load(scales));
}

// Dot products of a row in planes with T tokens of x.
template <int T, bool whole>
STOCHA_INLINED inline void dots(const Row& row, const uint8_t* low, const fp16* scales, const TokensOfX<T>& x, float* out) {
  Vector total[T] = {};
  for_chunks(row, [&](int64_t chunk, int64_t left) STOCHA_INLINED {
    const Vector scale = load_scales<whole>(scales, chunk, left), offset = scale * (128.0f * 8);  // totals: of eighths
    Integers products[T];
    const ChunkOf4 high_codes = load_chunk<whole>(row.codes, chunk, left);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) products[t] = high_codes.dot(x.codes(chunk, t)) << 4;
    const ChunkOf4 low_codes = load_chunk<whole>(low, chunk, left);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Vector both = __builtin_convertvector(products[t] + low_codes.dot(x.codes(chunk, t)), Vector);
      total[t] = fused(both, scale * x.scales(chunk, t), fused(offset, x.totals(chunk, t), total[t]));
    }
  });
  sums(total, out);
}

// The same about so, of the high plane alone, with the variance of what is left out, given the squares of x: one for all
// tokens, of which it is the greatest.
template <int T, bool whole>
STOCHA_INLINED inline void dots_about(const Row& row, const fp16* scales, const TokensOfX<T>& x, const float* squares,
                                      float* out, float* variance) {
  Vector total[T] = {}, left_out = {};
  for_chunks(row, [&](int64_t chunk, int64_t left) STOCHA_INLINED {
    const Vector scale = load_scales<whole>(scales, chunk, left);
    const Vector offset = scale * (120.5f * 8), factor = scale * 16.0f;
    left_out = fused(scale * scale, load(squares + chunk * kLanes), left_out);
    const ChunkOf4 codes = load_chunk<whole>(row.codes, chunk, left);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Vector products = __builtin_convertvector(codes.dot(x.codes(chunk, t)), Vector);
      total[t] = fused(products, factor * x.scales(chunk, t), fused(offset, x.totals(chunk, t), total[t]));
    }
  });
  sums(total, out);
  *variance = sum(left_out) * kVarianceOfLow;
}

// The same of two rows that lie together.
template <int T>
STOCHA_INLINED inline void dots_about(const Row (&rows)[2], const fp16* scales, const TokensOfX<T>& x, const float* squares,
                                      float* out, float* variances) {
  Vector left_out[2] = {};
  dots_of_two<T, true>(rows, x, out, [&](int r, int64_t chunk, int64_t left) STOCHA_INLINED {
    const Vector scale = load_scales<true>(scales + r * rows[0].groups, chunk, left);
    left_out[r] = fused(scale * scale, load(squares + chunk * kLanes), left_out[r]);
    return Scaled{scale * 16.0f, scale * (120.5f * 8)};
  });
  for (int r = 0; r < 2; ++r) variances[r] = sum(left_out[r]) * kVarianceOfLow;
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
