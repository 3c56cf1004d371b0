// Sums of rows of 8- and 4-bit weights, acc[t] += sum over r of hidden[r][t] * row[r], in a range of groups.
//
// Of 4 bits, kBlock rows at a time: with each row's share of a group, hidden * scale, rounded to 255 steps of the
// block's largest, sums of products fit 16 bits, since zero being 8 bounds them by 8 * 127 * kBlock. Rows are unpacked
// once for two tokens, of which more would not fit the registers.
#pragma once

#include "quantized.h"

constexpr int kBlock = 32;
constexpr int kTokens = 8;  // of a step, at most

// Codes of two rows side by side, for elements 8k to 8k + 7 of each group of a vector, k = 0 to 3.
struct PairOf4 {
  Unsigned part[4];
  PairOf4(Unsigned a, Unsigned b) {
#if defined(STOCHA_AVX512)
    const auto low = (Unsigned)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b);
    const auto high = (Unsigned)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b);
    part[0] = low_halves(low), part[1] = low_halves(high), part[2] = high_halves(low), part[3] = high_halves(high);
#elif defined(STOCHA_AVX2)
    const auto low = (Unsigned)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
    const auto high = (Unsigned)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
    part[0] = low_halves(low), part[1] = low_halves(high), part[2] = high_halves(low), part[3] = high_halves(high);
#else  // each row by itself
    part[0] = low_halves(a), part[1] = low_halves(b), part[2] = high_halves(a), part[3] = high_halves(b);
#endif
  }

  // Adds the codes times two rows' factors: the bytes of each lane of `factors` are those of a, b, a, b.
  void add_to(Words (&sums)[4], Integers factors) const {
#if defined(STOCHA_AVX512)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      sums[k] += (Words)_mm512_maddubs_epi16((__m512i)part[k], (__m512i)factors);
#elif defined(STOCHA_AVX2)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      sums[k] += (Words)_mm256_maddubs_epi16((__m256i)part[k], (__m256i)factors);
#elif defined(STOCHA_NEON)
    const int8x8_t by_a = vdup_n_s8(static_cast<int8_t>(factors[0])), by_b = vdup_n_s8(static_cast<int8_t>(factors[0] >> 8));
    for (int k = 0; k < 4; ++k) {
      const auto a = (int8x16_t)part[k / 2 * 2], b = (int8x16_t)part[k / 2 * 2 + 1];
      const auto half = [&](int8x16_t codes) { return k % 2 ? vget_high_s8(codes) : vget_low_s8(codes); };
      sums[k] = (Words)vmlal_s8(vmlal_s8((int16x8_t)sums[k], half(a), by_a), half(b), by_b);
    }
#else
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < kBytes / 2; ++i) {
        const int from = i / 8 * 16 + k % 2 * 8 + i % 8, lane = factors[i / 2];
        sums[k][i] += part[k / 2 * 2][from] * static_cast<int8_t>(lane) +
                      part[k / 2 * 2 + 1][from] * static_cast<int8_t>(lane >> 8);
      }
#endif
  }
};

typedef float Eight __attribute__((vector_size(32)));
typedef float LooseEight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int16_t EightShorts __attribute__((vector_size(16), may_alias));

struct BlockOf4 {  // a block's rows, and what each is multiplied with
  const uint8_t* rows[kBlock];
  const uint8_t* next[kBlock];  // rows to fetch meanwhile
  const fp16 *scales[kBlock], *minimums[kBlock], *next_scales[kBlock];
  bool readable[kBlock];  // behind the row are at least kLanes more groups
  float hidden[kBlock][kTokens];
  float not_finite[kTokens];  // 0, or NaN for a token with hidden entries that are not finite
  int pairs, tokens;          // rows are an even number: the last may have hidden entries of 0
};

struct FactorsOf4 {  // a block's shares of a chunk's groups for one token, in 255 steps
  Integers pairs[kBlock / 2], start;
  float step[kLanes], offset[kLanes];
};

inline void set_factors(const BlockOf4& block, const Vector* scales, int64_t group, int64_t here, bool has_minimum, int t,
                        FactorsOf4& to) {
  const int rows = 2 * block.pairs;
  Vector most = {}, offset = {};
  for (int r = 0; r < rows; ++r) {
    most = maximum(most, magnitude(scales[r] * block.hidden[r][t]));
    if (has_minimum) offset += load_part(block.minimums[r] + group, here, block.readable[r]) * block.hidden[r][t];
  }
  const Vector inverse = most > 1e-30f ? 127.0f / most : Vector{};
  const Vector step = (most + block.not_finite[t]) * (1.0f / 127);
  Integers total = {};
  for (int p = 0; p < block.pairs; ++p) {
    const Integers a = nearest(scales[2 * p] * (inverse * block.hidden[2 * p][t]));
    const Integers b = nearest(scales[2 * p + 1] * (inverse * block.hidden[2 * p + 1][t]));
    total += a + b;
    const Integers both = (a & 0xff) | ((b & 0xff) << 8);
    to.pairs[p] = arranged(both | (both << 16));
  }
  const Integers zero = total * -8;
  to.start = arranged((zero & 0xffff) | (zero << 16));
  store(step, to.step);
  store(has_minimum ? offset + __builtin_convertvector(total, Vector) * step * 8.0f : offset, to.offset);
}

// acc[t * stride : t * stride + 32 * kPer] of vector i of a chunk, for T of the block's tokens.
template <int i, int T>
inline void add_vector_4(const BlockOf4& block, const FactorsOf4* factors, int64_t from, int64_t here, bool fetches, float* acc,
                         int64_t stride) {
  Words sums[T][4];  // which wrap around on the way to what fits
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t)
    for (Words& s : sums[t]) s = (Words)spread<i>(factors[t].start);
  const int64_t bytes = (here - i * kPer) * 16;
  const auto add = [&](int p, Unsigned a, Unsigned b) {
    const PairOf4 codes(a, b);
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) codes.add_to(sums[t], spread<i>(factors[t].pairs[p]));
  };
  if (here - i * kPer >= kPer) {
    for (int p = 0; p < block.pairs; ++p) {
      if (fetches) {
        prefetch(block.next[2 * p] + from);
        prefetch(block.next[2 * p + 1] + from);
      }
      add(p, load_codes(block.rows[2 * p] + from), load_codes(block.rows[2 * p + 1] + from));
    }
  } else {
    for (int p = 0; p < block.pairs; ++p)
      add(p, load_codes_part(block.rows[2 * p] + from, bytes, block.readable[2 * p]),
          load_codes_part(block.rows[2 * p + 1] + from, bytes, block.readable[2 * p + 1]));
  }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t)
    for (int q = 0; q < kPer && i * kPer + q < here; ++q) {
      const float step = factors[t].step[i * kPer + q], offset = factors[t].offset[i * kPer + q];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        EightShorts part;
        std::memcpy(&part, reinterpret_cast<const char*>(&sums[t][k]) + q * 16, 16);
        LooseEight& to = *reinterpret_cast<LooseEight*>(acc + t * stride + q * kGroupSize + k * 8);  // auto would align it
        to += __builtin_convertvector(part, Eight) * step + offset;
      }
    }
}

// acc[t * stride : t * stride + 32 * here], of one chunk's groups, here <= kLanes.
inline void add_block_4(const BlockOf4& block, int64_t group, int64_t here, bool has_minimum, float* acc, int64_t stride) {
  Vector scales[kBlock];
  for (int r = 0; r < 2 * block.pairs; ++r) {
    scales[r] = load_part(block.scales[r] + group, here, block.readable[r]);
    prefetch(block.next_scales[r] + group);
  }
  FactorsOf4 factors[kTokens];
  for (int t = 0; t < block.tokens; ++t) set_factors(block, scales, group, here, has_minimum, t, factors[t]);
  repeated<0, 4>([&](auto i) {
    if (i * kPer >= here) return;
    const int64_t from = group * 16 + i * kBytes;
    float* to = acc + i * kPer * kGroupSize;
    for (int t = 0; t < block.tokens; t += 2) {
      const bool fetches = t == 0 && i * kBytes % kLine == 0;
      if (t + 1 < block.tokens)
        add_vector_4<i, 2>(block, factors + t, from, here, fetches, to + t * stride, stride);
      else
        add_vector_4<i, 1>(block, factors + t, from, here, fetches, to + t * stride, stride);
    }
  });
}

// The same of 8 bits, in float32, for T tokens at once; acc's tokens are `stride` apart. G rows.
template <int G, int T>
inline void add_block_8(const int8_t* const* rows, const fp16* const* scales, const fp16* const* minimums,
                        const float* hidden, int64_t group, int64_t here, float* acc, int64_t stride) {
  float shares[G][T][kLanes], offsets[T][kLanes];
  for (int t = 0; t < T; ++t) {
    Vector offset = {};
    for (int r = 0; r < G; ++r) {
      store(load_part(scales[r] + group, here) * hidden[r * T + t], shares[r][t]);
      if (minimums[r]) offset += load_part(minimums[r] + group, here) * hidden[r * T + t];
    }
    store(offset, offsets[t]);
  }
  for (int64_t g = 0; g < here; ++g)
    for (int64_t k = g * kGroupSize; k < (g + 1) * kGroupSize; k += kLanes) {
      Vector total[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) total[t] = load(acc + t * stride + k) + offsets[t][g];
      for (int r = 0; r < G; ++r) {
        const Vector row = load(rows[r] + group * kGroupSize + k);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) total[t] += row * shares[r][t][g];
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) store(total[t], acc + t * stride + k);
    }
}
