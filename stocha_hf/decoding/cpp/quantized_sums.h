// Sums of rows of 8- and 4-bit weights, acc[t] += sum over r of hidden[r][t] * row[r], in a range of groups.
//
// Of 4 bits, kBlock rows at a time: with each row's share of a group, hidden * scale, rounded to 255 steps of the
// block's largest, sums of products with code - 8 fit 16 bits, being at most 8 * 127 * kBlock; what zeros differ from 8 by
// is added in float32. Four rows at a time are read along, while sums stay in the first-level cache: rows read side by
// side in short pieces come from memory more slowly, and take as long to sum.
#pragma once

#include "quantized.h"

constexpr int kBlock = 32;

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

// A chunk's words of a row, of which `here` are the row's.
template <bool whole>
STOCHA_INLINED inline Integers words_of(const uint16_t* p, int64_t here) {
  if (whole) return load_words(p);
  uint16_t part[kLanes] = {};
  std::memcpy(part, p, here * sizeof *p);
  return load_words(part);
}

// Factors of T tokens from the first one on. Meanwhile fetches half of the next block, of which add_pairs fetches the other
// half: memory is to have no pauses.
template <int T, bool whole>
inline void set_factors(const BlockOf4& block, Fetch& fetched, int64_t group, int64_t here, int first, FactorsOf4* to) {
  Vector products[T][kBlock], most[T] = {}, inverse[T];
  Fetch fetch = fetched;  // a copy stays in registers
#pragma GCC unroll 2
  for (int r = 0; r < 2 * block.pairs; ++r) {
    const Vector scale = Levels(words_of<whole>(block.words[r] + group, here)).scale;
    if (first == 0) fetch.line();
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      products[t][r] = scale * block.hidden[first + t][r];
      most[t] = maximum(most[t], magnitude(products[t][r]));
    }
  }
  fetched = fetch;
  for (int t = 0; t < T; ++t) inverse[t] = most[t] > 1e-30f ? 127.0f / most[t] : Vector{};
  Integers total[T] = {}, zeros[T] = {};
  for (int p = 0; p < block.pairs; ++p) {
    const Integers a = words_of<whole>(block.words[2 * p] + group, here);
    const Integers b = words_of<whole>(block.words[2 * p + 1] + group, here);
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

// A pass of a block for T tokens: some groups of its rows, so few that their factors and sums stay in the first-level cache.
template <int T>
struct PassOf4 {
  static constexpr int kChunks = std::max(160 / kLanes / T, 1);
  const BlockOf4& block;
  const int64_t group, groups;   // the first of them, and how many
  FactorsOf4 factors[kChunks][T];
  Words sums[kChunks][4][T][4];  // which wrap around on the way to what fits

  // The arrays are not filled with zeros, which would take as long as a quarter of the sums.
  PassOf4(const BlockOf4& of, int64_t first, int64_t count) : block(of), group(first), groups(count) {}

  // f(chunk, vector i as a constant, groups from this vector's first on)
  template <class F>
  STOCHA_INLINED void for_vectors(F f) {
    int64_t chunk = 0, left = groups;
    for (; left >= kLanes; left -= kLanes, ++chunk)
      repeated<0, 4>([&](auto i) STOCHA_INLINED { f(chunk, i, left - i * kPer); });
    repeated<0, 4>([&](auto i) STOCHA_INLINED {
      if (i * kPer < left) f(chunk, i, left - i * kPer);
    });
  }

  template <bool whole>
  void set_all_factors(Fetch& fetch) {
    constexpr int kAtOnce = std::min(T, 4);
    for (int64_t g = 0, chunk = 0; g < groups; g += kLanes, ++chunk)
      for (int t = 0; t < T; t += kAtOnce)
        set_factors<kAtOnce, whole>(block, fetch, group + g, std::min<int64_t>(kLanes, groups - g), t, &factors[chunk][t]);
    for_vectors([&](int64_t chunk, auto i, int64_t) STOCHA_INLINED {
      for (int t = 0; t < T; ++t)
        for (int k = 0; k < 4; ++k) sums[chunk][i][t][k] = (Words)spread<i>(factors[chunk][t].start);
    });
  }

  // Adds P pairs of rows from the p-th on, along the rows, as memory is read fastest. Meanwhile fetches others.
  template <int P, bool whole>
  void add_pairs(int p, Fetch& fetched) {
    Fetch fetch = fetched;  // a copy stays in registers
    const uint8_t* rows[2 * P];
    for (int r = 0; r < 2 * P; ++r) rows[r] = block.rows[2 * p + r] + group * 16;
    for_vectors([&](int64_t chunk, auto i, int64_t left) STOCHA_INLINED {
      const int64_t from = chunk * kLanes * 16 + i * kBytes;
      const auto pair = [&](int q) STOCHA_INLINED {
        return PairOf4(load_codes_part(rows[2 * q] + from, left * 16, whole),
                       load_codes_part(rows[2 * q + 1] + from, left * 16, whole));
      };
      fetch.lines(std::max(P * kBytes, kLine));
      const PairOf4 a = pair(0), b = pair(P - 1);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        Words(&own)[4] = sums[chunk][i][t];
        Words total[4] = {own[0], own[1], own[2], own[3]};
        a.add_to(total, spread<i>(factors[chunk][t].pairs[p]));
        if (P == 2) b.add_to(total, spread<i>(factors[chunk][t].pairs[p + 1]));
        for (int k = 0; k < 4; ++k) own[k] = total[k];
      }
    });
    fetched = fetch;
  }

  // Adds the sums to acc[t * stride : t * stride + 32 * groups].
  void add_sums(float* acc, int64_t stride) {
    for_vectors([&](int64_t chunk, auto i, int64_t left) STOCHA_INLINED {
      for (int t = 0; t < T; ++t) {
        const FactorsOf4& of_t = factors[chunk][t];
        const Words* own = sums[chunk][i][t];
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
  void run(Fetch& fetch, float* acc, int64_t stride) {
    set_all_factors<whole>(fetch);
    int p = 0;
    for (; p + 2 <= block.pairs; p += 2) add_pairs<2, whole>(p, fetch);
    if (p < block.pairs) add_pairs<1, whole>(p, fetch);
    add_sums(acc, stride);
  }
};

// acc[t * stride : t * stride + 32 * groups] of a block, T tokens. Meanwhile fetches the next one.
template <int T>
void add_block_4(const BlockOf4& block, Fetch& fetch, int64_t groups, float* acc, int64_t stride) {
  constexpr int64_t most = PassOf4<T>::kChunks * kLanes;
  for (int64_t g = 0; g < groups; g += most) {
    PassOf4<T> pass(block, g, std::min(most, groups - g));
    if (block.readable || groups % kLanes == 0)
      pass.template run<true>(fetch, acc + g * kGroupSize, stride);
    else
      pass.template run<false>(fetch, acc + g * kGroupSize, stride);
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
