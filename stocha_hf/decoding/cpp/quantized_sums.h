// Sums of rows of 8- and 4-bit weights, acc[t] += sum over r of hidden[r][t] * row[r], in a range of groups.
//
// Of 4 bits, kBlock rows at a time: with each row's share of a group, hidden * scale, rounded to 255 steps of the
// block's largest, sums of products with code - 8 fit 16 bits, being at most 8 * 127 * kBlock; what zeros differ from 8 by
// is added in float32. Rows are unpacked once for two tokens, of which more would not fit the registers.
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
  const uint8_t* rows[kBlock];  // from the first group that is summed on
  const uint16_t* words[kBlock];
  float hidden[kTokens][kBlock];
  float not_finite[kTokens];    // 0, or NaN where one of a token's hidden entries is not finite
  int pairs;                    // rows are an even number: the last may have hidden entries of 0
  bool readable;                // behind each row are at least kLanes more groups
};

struct FactorsOf4 {  // a block's shares of a chunk's groups for one token, in 255 steps
  Integers pairs[kBlock / 2], start;
  float step[kLanes], offset[kLanes];
};

typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Integers integers_of(Halves words) { return __builtin_convertvector(words, Integers); }

// A chunk's words of a row, of which `here` are the row's.
template <bool whole>
inline Halves words_of(const uint16_t* p, int64_t here) {
  Halves words = {};
  std::memcpy(&words, p, whole ? sizeof words : here * sizeof *p);
  return words;
}

// Factors of T tokens from the first one on. Meanwhile fetches the next block's words.
template <int T, bool whole>
inline void set_factors(const BlockOf4& block, const BlockOf4& next, int64_t group, int64_t here, int first, FactorsOf4* to) {
  Vector products[T][kBlock], most[T] = {}, inverse[T];
  for (int r = 0; r < 2 * block.pairs; ++r) {
    const Vector scale = Levels(integers_of(words_of<whole>(block.words[r] + group, here))).scale;
    prefetch(next.words[r] + group);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      products[t][r] = scale * block.hidden[first + t][r];
      most[t] = maximum(most[t], magnitude(products[t][r]));
    }
  }
  for (int t = 0; t < T; ++t) inverse[t] = most[t] > 1e-30f ? 127.0f / most[t] : Vector{};
  Integers total[T] = {}, zeros[T] = {};
  for (int p = 0; p < block.pairs; ++p) {
    const Integers a = integers_of(words_of<whole>(block.words[2 * p] + group, here));
    const Integers b = integers_of(words_of<whole>(block.words[2 * p + 1] + group, here));
    const Integers eighths = (a | (b << 16)) & 0x7f007f;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const Integers pair =
          shorts_of(near_bits(products[t][2 * p] * inverse[t]), near_bits(products[t][2 * p + 1] * inverse[t]));
      total[t] = (Integers)((Words)total[t] + (Words)pair);
      zeros[t] += products_of_shorts(pair, eighths);
      to[t].pairs[p] = arranged(bytes_of(pair));
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const Integers sum = products_of_shorts(total[t], Integers{} + 0x10001), start = sum * -8;
    const Vector step = (most[t] + block.not_finite[first + t]) * (1.0f / 127);
    to[t].start = arranged((start & 0xffff) | (start << 16));
    store(step, to[t].step);
    store(__builtin_convertvector(sum * 64 - zeros[t], Vector) * 0.125f * step, to[t].offset);
  }
}

// Adds the sums of vector i of a chunk to the chunk's floats.
template <int i>
inline void add_sums(const Words (&sums)[4], const FactorsOf4& factors, int64_t here, float* chunk) {
  float* acc = chunk + i * kPer * kGroupSize;
  for (int q = 0; q < kPer && i * kPer + q < here; ++q) {
    const float step = factors.step[i * kPer + q], offset = factors.offset[i * kPer + q];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      EightShorts part;
      std::memcpy(&part, reinterpret_cast<const char*>(&sums[k]) + q * 16, 16);
      LooseEight& to = *reinterpret_cast<LooseEight*>(acc + q * kGroupSize + k * 8);  // auto would align it
      to += __builtin_convertvector(part, Eight) * step + offset;
    }
  }
}

// acc[t * stride + ...] of V vectors from i on of a chunk, for T tokens; V * T <= 2. Meanwhile fetches the next block.
template <int i, int V, int T, bool whole>
inline void add_vectors(const BlockOf4& block, Fetch& fetched, bool fetches, const FactorsOf4* factors, int64_t group,
                        int64_t here, float* acc, int64_t stride) {
  const int64_t from = group * 16 + i * kBytes;
  Fetch fetch = fetched;  // a copy stays in registers
  Words sums[V][T][4];    // which wrap around on the way to what fits
  repeated<0, V>([&](auto v) {
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t)
      for (Words& s : sums[v][t]) s = (Words)spread<i + v>(factors[t].start);
  });
  for (int p = 0; p < block.pairs; ++p) {
    const uint8_t *a = block.rows[2 * p] + from, *b = block.rows[2 * p + 1] + from;
    if (fetches) fetch.lines(2 * std::max<int64_t>(V * kBytes, kLine));
    repeated<0, V>([&](auto v) {
      const int64_t bytes = (here - (i + v) * kPer) * 16;
      const PairOf4 codes(load_codes_part(a + v * kBytes, bytes, whole), load_codes_part(b + v * kBytes, bytes, whole));
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) codes.add_to(sums[v][t], spread<i + v>(factors[t].pairs[p]));
    });
  }
  fetched = fetch;
  repeated<0, V>([&](auto v) {
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) add_sums<i + v>(sums[v][t], factors[t], here, acc + t * stride);
  });
}

// acc[t * stride : t * stride + 32 * here], of one chunk's groups, here <= kLanes; `whole`: so many may be read.
template <bool whole>
inline void add_chunk_4(const BlockOf4& block, const BlockOf4& next, Fetch& fetch, int tokens, int64_t group, int64_t here,
                        float* acc, int64_t stride) {
  FactorsOf4 factors[kTokens];
  int first = 0;
  for (; first + 4 <= tokens; first += 4) set_factors<4, whole>(block, next, group, here, first, factors + first);
  for (; first + 2 <= tokens; first += 2) set_factors<2, whole>(block, next, group, here, first, factors + first);
  if (first < tokens) set_factors<1, whole>(block, next, group, here, first, factors + first);
  repeated<0, 4>([&](auto i) {
    if (i * kPer >= here) return;
    for (int t = 0; t < tokens; t += 2) {
      const bool fetches = t == 0 && i * kBytes % kLine == 0;
      float* to = acc + t * stride;
      if (t + 1 < tokens)
        add_vectors<i, 1, 2, whole>(block, fetch, fetches, factors + t, group, here, to, stride);
      else if (i % 2 == 0 && here > (i + 1) * kPer)
        add_vectors<i, i % 2 ? 1 : 2, 1, whole>(block, fetch, fetches, factors + t, group, here, to, stride);
      else if (i % 2 == 0)
        add_vectors<i, 1, 1, whole>(block, fetch, fetches, factors + t, group, here, to, stride);
    }
  });
}

inline void add_block_4(const BlockOf4& block, const BlockOf4& next, Fetch& fetch, int tokens, int64_t group, int64_t here,
                        float* acc, int64_t stride) {
  if (block.readable || here == kLanes)
    add_chunk_4<true>(block, next, fetch, tokens, group, here, acc, stride);
  else
    add_chunk_4<false>(block, next, fetch, tokens, group, here, acc, stride);
}

// The same of 8 bits, in float32, for T tokens at once; acc's tokens are `stride` apart. G rows.
template <int G, int T>
inline void add_block_8(const int8_t* const* rows, const fp16* const* scales, const float* hidden, int64_t group,
                        int64_t here, float* acc, int64_t stride) {
  float shares[G][T][kLanes];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < G; ++r) store(load_part(scales[r] + group, here) * hidden[r * T + t], shares[r][t]);
  for (int64_t g = 0; g < here; ++g)
    for (int64_t k = g * kGroupSize; k < (g + 1) * kGroupSize; k += kLanes) {
      Vector total[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) total[t] = load(acc + t * stride + k);
      for (int r = 0; r < G; ++r) {
        const Vector row = load(rows[r] + group * kGroupSize + k);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) total[t] += row * shares[r][t][g];
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) store(total[t], acc + t * stride + k);
    }
}
