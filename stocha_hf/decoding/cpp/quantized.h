// Rows of 8- and 4-bit weights: dot products with an x in 8 bits, and sums of rows.
//
// Weights come in groups of 32 along a row. 8 bits: w = code * scale, of int8 and float16. 4 bits: w = (code - zero) *
// scale, where byte j of a group's 16 holds element j in its low half and element j + 16 in its high half, and a word of
// 16 bits holds zero, in eighths, in its low 7 bits, and above them the scale's exponent, from 2^-24 on, and 4 bits of
// mantissa. x is rounded to 255 steps in groups of 32 too, so that products are of bytes; everything after that is
// float32. `kLanes` groups make a chunk: as many as a Vector holds scales.
#pragma once

#include <vector>

#include "floats.h"

constexpr int kGroupSize = 32;
constexpr int kBytes = 4 * kLanes;  // of a vector
constexpr int kPer = kLanes / 4;    // groups of 4 bits in a vector
constexpr int kChunk = kLanes * kGroupSize;

typedef int8_t Signed __attribute__((vector_size(kBytes)));
typedef uint8_t Unsigned __attribute__((vector_size(kBytes)));
typedef int16_t Shorts __attribute__((vector_size(kBytes)));
typedef uint16_t Words __attribute__((vector_size(kBytes)));
typedef Unsigned LooseUnsigned __attribute__((aligned(1), may_alias));
typedef Signed LooseSigned __attribute__((aligned(1), may_alias));

inline Unsigned load_codes(const uint8_t* p) { return *reinterpret_cast<const LooseUnsigned*>(p); }
inline Signed load_codes(const int8_t* p) { return *reinterpret_cast<const LooseSigned*>(p); }
inline Unsigned low_halves(Unsigned codes) { return codes & 15; }
inline Unsigned high_halves(Unsigned codes) { return (Unsigned)((Words)codes >> 4) & 15; }

// Each lane's sum of four products, of codes 0 to 15 in two vectors, and of signed ones from -127 to 127.
inline Integers dot(Unsigned low, Signed x_low, Unsigned high, Signed x_high) {
#if defined(__AVX512VNNI__) && defined(STOCHA_AVX512)
  return (Integers)_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)low, (__m512i)x_low),
                                       (__m512i)high, (__m512i)x_high);
#elif defined(STOCHA_AVX512)
  const __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)low, (__m512i)x_low),
                                         _mm512_maddubs_epi16((__m512i)high, (__m512i)x_high));
  return (Integers)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVXVNNI__) && defined(STOCHA_AVX2)
  return (Integers)_mm256_dpbusd_avx_epi32(
      _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), (__m256i)low, (__m256i)x_low), (__m256i)high, (__m256i)x_high);
#elif defined(STOCHA_AVX2)
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)low, (__m256i)x_low),
                                         _mm256_maddubs_epi16((__m256i)high, (__m256i)x_high));
  return (Integers)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(STOCHA_NEON)
  return (Integers)vdotq_s32(vdotq_s32(vdupq_n_s32(0), (int8x16_t)low, (int8x16_t)x_low), (int8x16_t)high,
                             (int8x16_t)x_high);
#else
  Integers total = {};
  for (int i = 0; i < kBytes; ++i) total[i / 4] += low[i] * x_low[i] + high[i] * x_high[i];
  return total;
#endif
}

inline Integers dot(Signed w, Signed x) {
#if defined(STOCHA_AVX512)
  const __m512i size = _mm512_abs_epi8((__m512i)w);
  const __m512i turned = _mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)w), _mm512_setzero_si512(), (__m512i)x);
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpbusd_epi32(_mm512_setzero_si512(), size, turned);
#else
  return (Integers)_mm512_madd_epi16(_mm512_maddubs_epi16(size, turned), _mm512_set1_epi16(1));
#endif
#elif defined(STOCHA_AVX2)
  const __m256i size = _mm256_sign_epi8((__m256i)w, (__m256i)w), turned = _mm256_sign_epi8((__m256i)x, (__m256i)w);
#if defined(__AVXVNNI__)
  return (Integers)_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), size, turned);
#else
  return (Integers)_mm256_madd_epi16(_mm256_maddubs_epi16(size, turned), _mm256_set1_epi16(1));
#endif
#elif defined(STOCHA_NEON)
  return (Integers)vdotq_s32(vdupq_n_s32(0), (int8x16_t)w, (int8x16_t)x);
#else
  Integers total = {};
  for (int i = 0; i < kBytes; ++i) total[i / 4] += w[i] * x[i];
  return total;
#endif
}

// A chunk's numbers, one a group, in the order that `spread` wants: of each 128 bits' lanes, lane i is for vector i.
template <class V>
inline V arranged(V v) {
  Integers order;
  for (int i = 0; i < kLanes; ++i) order[i] = i % 4 * kPer + i / 4;
  return __builtin_shuffle(v, order);
}

// Each group's number in the four lanes of its sums in vector i of a chunk.
template <int i, class V>
inline V spread(V arranged) {
  Integers order;
  for (int lane = 0; lane < kLanes; ++lane) order[lane] = lane / 4 * 4 + i;
  return __builtin_shuffle(arranged, order);
}

// The same in a chunk of 8-bit codes, of eight vectors.
template <int i, class V>
inline V spread_8(V v) {
  Integers order;
  for (int lane = 0; lane < kLanes; ++lane) order[lane] = (i * kLanes + lane) / 8;
  return __builtin_shuffle(v, order);
}

template <int i, int n, class F>
inline void repeated(F f) {  // f with a constant 0 to n - 1
  if constexpr (i < n) {
    f(std::integral_constant<int, i>());
    repeated<i + 1, n>(f);
  }
}

// The first `count` of kLanes numbers, then zeros. `readable`: there are kLanes of whatever kind.
inline Vector load_part(const fp16* p, int64_t count, bool readable = false) {
  if (count >= kLanes) return load(p);
  if (readable) {
    Integers lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    return (Vector)((Integers)load(p) & (lanes < static_cast<int>(count)));
  }
  fp16 part[kLanes] = {};
  std::memcpy(part, p, count * sizeof *p);
  return load(part);
}

// The same of 4-bit groups' words.
inline Integers load_words(const uint16_t* p, int64_t count, bool readable = false) {
  uint16_t part[kLanes] = {};
  if (count < kLanes && !readable) {
    std::memcpy(part, p, count * sizeof *p);
    p = part;
  }
  return __builtin_convertvector(*reinterpret_cast<const LooseHalf*>(p), Integers);
}

struct Levels {  // scales, and zeros in eighths
  Vector scale, eighths;
  explicit Levels(Integers words)
      : scale((Vector)(((words >> 7) + (103 << 4)) << 19)), eighths(__builtin_convertvector(words & 127, Vector)) {}
};

template <class Code>
inline auto load_codes_part(const Code* p, int64_t bytes, bool readable = false) {
  if (bytes >= kBytes || readable) return load_codes(p);
  Code part[kBytes] = {};
  std::memcpy(part, p, bytes);
  return load_codes(part);
}

inline void store_bytes(Integers x, int8_t* p) {  // x from -128 to 127
#if defined(STOCHA_AVX2)
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storeu_si64(p, _mm_packs_epi16(shorts, shorts));
#else
  *reinterpret_cast<LooseBytes*>(p) = __builtin_convertvector(x, LooseBytes);
#endif
}

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

// A row's dot products with T tokens. Meanwhile the row at `next` is fetched. `readable`: behind the row are at least
// kLanes more groups; codes read from there meet zeros of x.
template <int T>
inline void dots_4(const uint8_t* codes, const uint16_t* words, int64_t groups, const QuantizedX& x, bool readable,
                   const uint8_t* next, float (&out)[T]) {
  Vector total[T] = {};
  const int64_t stride = x.chunks;
  for (int64_t chunk = 0, g = 0; g < groups; ++chunk, g += kLanes) {
    const int64_t here = groups - g;
    const Levels levels(arranged(load_words(words + g, here, readable)));
    const Vector scale = levels.scale, offset = scale * levels.eighths;
    Vector factor[T];
    for (int t = 0; t < T; ++t) {
      factor[t] = scale * load(&x.scales[(t * stride + chunk) * kLanes]);
      total[t] += offset * load(&x.totals[(t * stride + chunk) * kLanes]);
    }
    const uint8_t* p = codes + g * 16;
    for (int64_t i = 0; i < kChunk / 2; i += kLine) prefetch(next + g * 16 + i);
    const auto step = [&](auto i, Unsigned loaded) {
      const Unsigned low = low_halves(loaded), high = high_halves(loaded);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const int8_t* part = &x.codes[(t * stride + chunk) * kChunk + i * 2 * kBytes];
        const Integers products = dot(low, load_codes(part), high, load_codes(part + kBytes));
        total[t] += __builtin_convertvector(products, Vector) * spread<i>(factor[t]);
      }
    };
    if (here >= kLanes)
      repeated<0, 4>([&](auto i) { step(i, load_codes(p + i * kBytes)); });
    else
      repeated<0, 4>([&](auto i) {
        if (i * kPer < here) step(i, load_codes_part(p + i * kBytes, (here - i * kPer) * 16, readable));
      });
  }
  for (int t = 0; t < T; ++t) out[t] = sum(total[t]);
}

template <int T>
inline void dots_8(const int8_t* codes, const fp16* scales, int64_t groups, const QuantizedX& x, bool readable,
                   const int8_t* next, float (&out)[T]) {
  Vector total[T] = {};
  const int64_t stride = x.chunks;
  for (int64_t chunk = 0, g = 0; g < groups; ++chunk, g += kLanes) {
    const int64_t here = groups - g;
    const Vector scale = load_part(scales + g, here, readable);
    Vector factor[T];
    for (int t = 0; t < T; ++t) factor[t] = scale * load(&x.scales[(t * stride + chunk) * kLanes]);
    const int8_t* p = codes + g * kGroupSize;
    for (int64_t i = 0; i < kChunk; i += kLine) prefetch(next + g * kGroupSize + i);
    const auto step = [&](auto i, Signed loaded) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const int8_t* part = &x.codes[(t * stride + chunk) * kChunk + i * kBytes];
        total[t] += __builtin_convertvector(dot(loaded, load_codes(part)), Vector) * spread_8<i>(factor[t]);
      }
    };
    if (here >= kLanes)
      repeated<0, 8>([&](auto i) { step(i, load_codes(p + i * kBytes)); });
    else
      repeated<0, 8>([&](auto i) {
        if (i * kBytes < here * kGroupSize)
          step(i, load_codes_part(p + i * kBytes, here * kGroupSize - i * kBytes, readable));
      });
  }
  for (int t = 0; t < T; ++t) out[t] = sum(total[t]);
}

// Sums of rows, acc[t] += sum over r of hidden[r][t] * row[r], in a range of groups. Of 4 bits, kBlock rows at a time:
// with each row's share of a group, hidden * scale, rounded to 255 steps of the block's largest, sums of products fit
// 16 bits, since code - zero bounds them by 16 * 127 * kBlock.
constexpr int kBlock = 16;

// Adds to the sums of elements 8k to 8k + 7 of each group of a vector, k = 0 to 3, those of two rows' codes times the
// bytes of `pair`.
inline void add_pair(Shorts (&sums)[4], Unsigned a, Unsigned b, Integers pair) {
#if defined(STOCHA_AVX512)
  const __m512i low_a = (__m512i)low_halves(a), low_b = (__m512i)low_halves(b);
  const __m512i high_a = (__m512i)high_halves(a), high_b = (__m512i)high_halves(b);
  const auto add = [&](int k, __m512i codes) {
    sums[k] = (Shorts)_mm512_add_epi16((__m512i)sums[k], _mm512_maddubs_epi16(codes, (__m512i)pair));
  };
  add(0, _mm512_unpacklo_epi8(low_a, low_b));
  add(1, _mm512_unpackhi_epi8(low_a, low_b));
  add(2, _mm512_unpacklo_epi8(high_a, high_b));
  add(3, _mm512_unpackhi_epi8(high_a, high_b));
#elif defined(STOCHA_AVX2)
  const __m256i low_a = (__m256i)low_halves(a), low_b = (__m256i)low_halves(b);
  const __m256i high_a = (__m256i)high_halves(a), high_b = (__m256i)high_halves(b);
  const auto add = [&](int k, __m256i codes) {
    sums[k] = (Shorts)_mm256_add_epi16((__m256i)sums[k], _mm256_maddubs_epi16(codes, (__m256i)pair));
  };
  add(0, _mm256_unpacklo_epi8(low_a, low_b));
  add(1, _mm256_unpackhi_epi8(low_a, low_b));
  add(2, _mm256_unpacklo_epi8(high_a, high_b));
  add(3, _mm256_unpackhi_epi8(high_a, high_b));
#elif defined(STOCHA_NEON)
  const int8x16_t low_a = (int8x16_t)low_halves(a), low_b = (int8x16_t)low_halves(b);
  const int8x16_t high_a = (int8x16_t)high_halves(a), high_b = (int8x16_t)high_halves(b);
  const int8x8_t by_a = vdup_n_s8(static_cast<int8_t>(pair[0])), by_b = vdup_n_s8(static_cast<int8_t>(pair[0] >> 8));
  sums[0] = (Shorts)vmlal_s8(vmlal_s8((int16x8_t)sums[0], vget_low_s8(low_a), by_a), vget_low_s8(low_b), by_b);
  sums[1] = (Shorts)vmlal_s8(vmlal_s8((int16x8_t)sums[1], vget_high_s8(low_a), by_a), vget_high_s8(low_b), by_b);
  sums[2] = (Shorts)vmlal_s8(vmlal_s8((int16x8_t)sums[2], vget_low_s8(high_a), by_a), vget_low_s8(high_b), by_b);
  sums[3] = (Shorts)vmlal_s8(vmlal_s8((int16x8_t)sums[3], vget_high_s8(high_a), by_a), vget_high_s8(high_b), by_b);
#else
  const Unsigned low_a = low_halves(a), low_b = low_halves(b), high_a = high_halves(a), high_b = high_halves(b);
  for (int i = 0; i < kBytes / 2; ++i) {
    const int from = i / 8 * 16 + i % 8, by_a = static_cast<int8_t>(pair[i / 2]), by_b = static_cast<int8_t>(pair[i / 2] >> 8);
    sums[0][i] += low_a[from] * by_a + low_b[from] * by_b;
    sums[1][i] += low_a[from + 8] * by_a + low_b[from + 8] * by_b;
    sums[2][i] += high_a[from] * by_a + high_b[from] * by_b;
    sums[3][i] += high_a[from + 8] * by_a + high_b[from + 8] * by_b;
  }
#endif
}

typedef float Eight __attribute__((vector_size(32)));
typedef float LooseEight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int16_t EightShorts __attribute__((vector_size(16), may_alias));

struct BlockOf4 {  // a block's rows from one chunk on, and their weights for one token
  const uint8_t* rows[kBlock];
  const uint16_t* words[kBlock];
  float hidden[kBlock];
};

// acc[0 : 32 * here], of one chunk's groups, here <= kLanes.
inline void add_block_4(const BlockOf4& block, int64_t group, int64_t here, float* acc) {
  Vector shares[kBlock], eighths[kBlock], most = {}, zeros = {};
  for (int r = 0; r < kBlock; ++r) {
    const Levels levels(load_words(block.words[r] + group, here));
    shares[r] = levels.scale * block.hidden[r];
    eighths[r] = levels.eighths;
    most = maximum(most, magnitude(shares[r]));
  }
  const Vector inverse = most > 1e-30f ? 127.0f / most : Vector{}, step = most * (1.0f / 127);
  Integers pairs[kBlock / 2];
  for (int p = 0; p < kBlock / 2; ++p) {
    const Integers a = nearest(shares[2 * p] * inverse), b = nearest(shares[2 * p + 1] * inverse);
    zeros += __builtin_convertvector(a, Vector) * eighths[2 * p];  // exact
    zeros += __builtin_convertvector(b, Vector) * eighths[2 * p + 1];
    const Integers both = (a & 0xff) | ((b & 0xff) << 8);
    pairs[p] = arranged(both | (both << 16));
  }
  const Integers zero = nearest(zeros * -0.125f);
  const Integers start = arranged((zero & 0xffff) | (zero << 16));
  repeated<0, 4>([&](auto i) {
    if (i * kPer >= here) return;
    const int64_t bytes = (here - i * kPer) * 16, from = group * 16 + i * kBytes;
    Shorts sums[4];
    for (Shorts& s : sums) s = (Shorts)spread<i>(start);
    for (int p = 0; p < kBlock / 2; ++p)
      add_pair(sums, load_codes_part(block.rows[2 * p] + from, bytes), load_codes_part(block.rows[2 * p + 1] + from, bytes),
               spread<i>(pairs[p]));
    for (int q = 0; q < kPer && i * kPer + q < here; ++q)
      for (int k = 0; k < 4; ++k) {
        EightShorts part;
        std::memcpy(&part, reinterpret_cast<const char*>(&sums[k]) + q * 16, 16);
        LooseEight& to = *reinterpret_cast<LooseEight*>(acc + (i * kPer + q) * kGroupSize + k * 8);  // auto would align it
        to += __builtin_convertvector(part, Eight) * step[i * kPer + q];
      }
  });
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

// A row as float32, for embeddings and prefill.
inline void dequantize_row_8(const int8_t* codes, const fp16* scales, int64_t size, float* out) {
  for (int64_t begin = 0; begin < size; begin += kGroupSize) {
    const float scale = to_float(*scales++);
    for (int64_t i = begin; i < std::min(begin + kGroupSize, size); ++i) out[i] = codes[i] * scale;
  }
}

inline void dequantize_row_4(const uint8_t* codes, const uint16_t* words, int64_t size, float* out) {
  for (int64_t begin = 0; begin < size; begin += kGroupSize, codes += kGroupSize / 2, ++words) {
    const float scale = Levels(Integers{*words}).scale[0], zero = (*words & 127) * 0.125f;
    float last[kGroupSize], *group = begin + kGroupSize <= size ? out + begin : last;
    for (int i = 0; i < kGroupSize / 2; ++i) {
      group[i] = (static_cast<float>(codes[i] & 15) - zero) * scale;
      group[i + kGroupSize / 2] = (static_cast<float>(codes[i] >> 4) - zero) * scale;
    }
    if (group == last) std::copy(last, last + (size - begin), out + begin);
  }
}
