// Sums of rows of 8- and 4-bit weights, acc[t] += sum over r of hidden[r][t] * row[r], in a range of groups.
//
// Of 4 bits, kBlock rows at a time: with each row's share of a group, hidden * scale, rounded to 255 steps of the
// block's largest, sums of products with code - 8 fit 16 bits, being at most 8 * 127 * kBlock; what zeros differ from 8 by
// is added in float32. Four rows at a time are read along, while sums stay in the first-level cache: rows read side by
// side in short pieces come from memory more slowly, and take as long to sum.
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

// A pass of a block: some groups of its rows, so few that their factors and sums stay in the first-level cache.
constexpr int kChunksOfPass = 160 / kLanes;  // times tokens
struct PassOf4 {
  const BlockOf4& block;
  int tokens;
  int64_t group, groups;                 // the first of them, and how many
  FactorsOf4 factors[kChunksOfPass];     // [chunks, tokens]
  Words sums[kChunksOfPass * 16];        // [chunks, 4 vectors, tokens, 4], which wrap around on the way to what fits

  static int64_t most_groups(int tokens) { return std::max(kChunksOfPass / tokens, 1) * kLanes; }

  // f(chunk, vector i as a constant, groups from this vector's first on, its sums)
  template <class F>
  STOCHA_INLINED void for_vectors(F f) {
    Words* of_vector = sums;
    for (int64_t g = 0, chunk = 0; g < groups; g += kLanes, ++chunk)
      repeated<0, 4>([&](auto i) STOCHA_INLINED {
        if (g + i * kPer < groups) f(chunk, i, groups - g - i * kPer, of_vector);
        of_vector += 4 * tokens;
      });
  }

  template <bool whole>
  void set_all_factors(const BlockOf4& next) {
    FactorsOf4* to = factors;
    for (int64_t g = 0; g < groups; g += kLanes, to += tokens) {
      const int64_t here = std::min<int64_t>(kLanes, groups - g);
      int t = 0;
      for (; t + 4 <= tokens; t += 4) set_factors<4, whole>(block, next, group + g, here, t, to + t);
      for (; t + 2 <= tokens; t += 2) set_factors<2, whole>(block, next, group + g, here, t, to + t);
      if (t < tokens) set_factors<1, whole>(block, next, group + g, here, t, to + t);
    }
    for_vectors([&](int64_t chunk, auto i, int64_t, Words* own) STOCHA_INLINED {
      for (int t = 0; t < tokens; ++t)
        for (int k = 0; k < 4; ++k) own[4 * t + k] = (Words)spread<i>(factors[chunk * tokens + t].start);
    });
  }

  // Adds P pairs of rows from the p-th on, along the rows, as memory is read fastest. Meanwhile fetches others.
  template <int P, bool whole>
  void add_pairs(int p, Fetch& fetched) {
    Fetch fetch = fetched;  // a copy stays in registers
    const uint8_t* rows[2 * P];
    for (int r = 0; r < 2 * P; ++r) rows[r] = block.rows[2 * p + r] + group * 16;
    for_vectors([&](int64_t chunk, auto i, int64_t left, Words* own) STOCHA_INLINED {
      const int64_t from = chunk * kLanes * 16 + i * kBytes;
      const auto load = [&](int r) STOCHA_INLINED { return load_codes_part(rows[r] + from, left * 16, whole); };
      const PairOf4 a(load(0), load(1)), b(load(2 * P - 2), load(2 * P - 1));
      fetch.lines(std::max(2 * P * kBytes, kLine));
      for (int t = 0; t < tokens; ++t) {
        const Integers* by = factors[chunk * tokens + t].pairs + p;
        Words total[4];
        for (int k = 0; k < 4; ++k) total[k] = own[4 * t + k];
        a.add_to(total, spread<i>(by[0]));
        if (P == 2) b.add_to(total, spread<i>(by[1]));
        for (int k = 0; k < 4; ++k) own[4 * t + k] = total[k];
      }
    });
    fetched = fetch;
  }

  // Adds the sums to acc[t * stride : t * stride + 32 * groups].
  void add_sums(float* acc, int64_t stride) {
    for_vectors([&](int64_t chunk, auto i, int64_t left, Words* own) STOCHA_INLINED {
      for (int t = 0; t < tokens; ++t, own += 4) {
        const FactorsOf4& of_t = factors[chunk * tokens + t];
        float* to = acc + t * stride + (chunk * kLanes + i * kPer) * kGroupSize;
        for (int q = 0; q < kPer && q < left; ++q) {
          const float step = of_t.step[i * kPer + q], offset = of_t.offset[i * kPer + q];
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) {
            EightShorts part;
            std::memcpy(&part, reinterpret_cast<const char*>(own + k) + q * 16, 16);
            LooseEight& eight = *reinterpret_cast<LooseEight*>(to + q * kGroupSize + k * 8);  // auto would align it
            eight += __builtin_convertvector(part, Eight) * step + offset;
          }
        }
      }
    });
  }

  template <bool whole>  // so much may be read
  void run(const BlockOf4& next, Fetch& fetch, float* acc, int64_t stride) {
    set_all_factors<whole>(next);
    int p = 0;
    for (; p + 2 <= block.pairs; p += 2) add_pairs<2, whole>(p, fetch);
    if (p < block.pairs) add_pairs<1, whole>(p, fetch);
    add_sums(acc, stride);
  }
};

// acc[t * stride : t * stride + 32 * groups] of a block. Meanwhile fetches the next one.
inline void add_block_4(const BlockOf4& block, const BlockOf4& next, Fetch& fetch, int tokens, int64_t groups, float* acc,
                        int64_t stride) {
  const int64_t most = PassOf4::most_groups(tokens);
  for (int64_t g = 0; g < groups; g += most) {
    PassOf4 pass{block, tokens, g, std::min(most, groups - g)};
    if (block.readable || groups % kLanes == 0)
      pass.run<true>(next, fetch, acc + g * kGroupSize, stride);
    else
      pass.run<false>(next, fetch, acc + g * kGroupSize, stride);
  }
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
