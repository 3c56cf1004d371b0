// Codes of 8 and 4 bits in vectors: loading and unpacking them, and sums of products of bytes.
//
// Weights come in groups of 32 along a row. 8 bits: w = code * scale, of int8 and float16. 4 bits: w = (code - zero) *
// scale, where byte j of a group's 16 holds element j in its low half and element j + 16 in its high half, and a word of
// 16 bits holds zero, in eighths, in its low 7 bits, and above them the scale's exponent, from 2^-24 on, and 4 bits of
// mantissa. `kLanes` groups make a chunk: as many as a Vector holds scales.
#pragma once

#include <new>
#include <vector>

#include "floats.h"

constexpr int kGroupSize = 32;
constexpr int kBytes = 4 * kLanes;  // of a vector
constexpr int kPer = kLanes / 4;    // groups of 4 bits in a vector
constexpr int kChunk = kLanes * kGroupSize;

// Memory that begins with a line of the cache: half of what is loaded would lie on two, and take twice as long.
template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kAt{kLine};
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kAt)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kAt); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
template <class T>
using AlignedVector = std::vector<T, Aligned<T>>;

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

inline Integers load_integers(const uint8_t* p) {  // kLanes of them
#if defined(STOCHA_AVX2)
  return (Integers)_mm256_cvtepu8_epi32(_mm_loadu_si64(p));
#else
  return __builtin_convertvector(*reinterpret_cast<const LooseBytes*>(p), Integers) & 255;
#endif
}

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

// For x within 2^15, the nearest integers in the low 16 bits of each lane.
inline Integers near_bits(Vector x) { return (Integers)(x + 12582912.0f); }

// Two integers a lane: the low 16 bits of a, then of b.
inline Integers shorts_of(Integers a, Integers b) { return (a & 0xffff) | (b << 16); }

// Each lane's sum of both products of two integers of 16 bits.
inline Integers products_of_shorts(Integers a, Integers b) {
#if defined(STOCHA_AVX512)
  return (Integers)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(STOCHA_AVX2)
  return (Integers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Sums of two products of bytes side by side, unsigned ones and signed ones, which fit 16 bits.
#if defined(STOCHA_AVX512)
inline Shorts products_of_bytes(Unsigned a, Signed b) { return (Shorts)_mm512_maddubs_epi16((__m512i)a, (__m512i)b); }
#elif defined(STOCHA_AVX2)
inline Shorts products_of_bytes(Unsigned a, Signed b) { return (Shorts)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
#endif

// The low bytes a, b of two such integers as bytes a, b, a, b.
inline Integers bytes_of(Integers pair) {
#if defined(STOCHA_AVX2)
  const int64_t low = 0x0604060402000200, high = 0x0e0c0e0c0a080a08;
  const __m256i order = _mm256_set_epi64x(high, low, high, low);
  return (Integers)_mm256_shuffle_epi8((__m256i)pair, order);
#else
  const Integers both = (pair & 0xff) | (pair >> 8 & 0xff00);
  return both | (both << 16);
#endif
}

// Where ChunkOf4 has a group of a chunk.
inline int64_t lane_of_4(int64_t group) { return group % kPer * 4 + group / kPer; }

// Of what a loop of products is made: a call in it would keep its sums in memory.
#define STOCHA_INLINED __attribute__((always_inline))

// A chunk of 4-bit codes, each lane its own group: part j holds elements 4j to 4j + 3 of all groups, in low halves of codes
// and in high ones. So a lane sums all of a group's products, and no sum has to be spread or put together.
struct ChunkOf4 {
  Unsigned low[4], high[4];
  STOCHA_INLINED explicit ChunkOf4(const Unsigned (&codes)[4]) {  // as they lie: kPer groups a vector
    const auto both = [](Integers a, Integers b, bool first, bool pairs) STOCHA_INLINED {  // of each 128 bits' lanes
      Integers order;
      for (int i = 0; i < kLanes; ++i) {
        const int lane = i % 4, from = pairs ? lane % 2 + 2 * !first : lane / 2 + 2 * !first;
        order[i] = i / 4 * 4 + from + ((pairs ? lane / 2 : lane % 2) ? kLanes : 0);
      }
      return __builtin_shuffle(a, b, order);
    };
    const auto a = (Integers)codes[0], b = (Integers)codes[1], c = (Integers)codes[2], d = (Integers)codes[3];
    const Integers ab = both(a, b, true, false), cd = both(c, d, true, false);
    const Integers ab_2 = both(a, b, false, false), cd_2 = both(c, d, false, false);
    const Integers parts[4] = {both(ab, cd, true, true), both(ab, cd, false, true), both(ab_2, cd_2, true, true),
                               both(ab_2, cd_2, false, true)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      low[j] = low_halves((Unsigned)parts[j]);
      high[j] = high_halves((Unsigned)parts[j]);
    }
  }

  // Each group's sum of products with x, signed ones from -127 to 127 in the same order: low, high, the next part's.
  STOCHA_INLINED Integers dot(const int8_t* x) const {
    const auto x_low = [&](int j) STOCHA_INLINED { return load_codes(x + 2 * j * kBytes); };
    const auto x_high = [&](int j) STOCHA_INLINED { return load_codes(x + (2 * j + 1) * kBytes); };
#if defined(__AVX512VNNI__) && defined(STOCHA_AVX512)
    Integers total = {};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      total = (Integers)_mm512_dpbusd_epi32((__m512i)total, (__m512i)low[j], (__m512i)x_low(j));
      total = (Integers)_mm512_dpbusd_epi32((__m512i)total, (__m512i)high[j], (__m512i)x_high(j));
    }
    return total;
#elif defined(__AVXVNNI__) && defined(STOCHA_AVX2)
    Integers total = {};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      total = (Integers)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)low[j], (__m256i)x_low(j));
      total = (Integers)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)high[j], (__m256i)x_high(j));
    }
    return total;
#elif defined(STOCHA_AVX512) || defined(STOCHA_AVX2)
    Shorts pairs[4];  // 16 products of at most 15 * 127 fit 16 bits
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) pairs[j] = products_of_bytes(low[j], x_low(j)) + products_of_bytes(high[j], x_high(j));
    const Shorts all = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
    return products_of_shorts((Integers)all, Integers{} + 0x10001);
#elif defined(STOCHA_NEON)
    int32x4_t total = vdupq_n_s32(0);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      total = vdotq_s32(vdotq_s32(total, (int8x16_t)low[j], (int8x16_t)x_low(j)), (int8x16_t)high[j], (int8x16_t)x_high(j));
    return (Integers)total;
#else
    Integers total = {};
    for (int j = 0; j < 4; ++j) {
      const Signed a = x_low(j), b = x_high(j);
      for (int i = 0; i < kBytes; ++i) total[i / 4] += low[j][i] * a[i] + high[j][i] * b[i];
    }
    return total;
#endif
  }
};

// Whether two rows are multiplied with four tokens at a time, as was measured to be faster. With more tokens sums do not
// fit the registers; AVX-512 has enough loads a cycle.
#if defined(STOCHA_AVX2)
constexpr bool kSharesX = true;
#else
constexpr bool kSharesX = false;
#endif

// A sum of products part after part, where several rows share what is loaded of x: the sum that ChunkOf4::dot gives.
struct DotOf4 {
#if defined(STOCHA_AVX2) && !defined(__AVXVNNI__) || defined(STOCHA_AVX512) && !defined(__AVX512VNNI__)
  Shorts total = {};  // 16 products of at most 15 * 127 fit 16 bits
  STOCHA_INLINED void add(Unsigned low, Signed x_low, Unsigned high, Signed x_high) {
    total += products_of_bytes(low, x_low) + products_of_bytes(high, x_high);
    asm("" : "+v"(total));  // or a compiler makes all products first, and keeps them in memory
  }
  STOCHA_INLINED Integers sum() const { return products_of_shorts((Integers)total, Integers{} + 0x10001); }
#else
  Integers total = {};
  STOCHA_INLINED void add(Unsigned low, Signed x_low, Unsigned high, Signed x_high) {
#if defined(STOCHA_AVX512)
    total = (Integers)_mm512_dpbusd_epi32((__m512i)total, (__m512i)low, (__m512i)x_low);
    total = (Integers)_mm512_dpbusd_epi32((__m512i)total, (__m512i)high, (__m512i)x_high);
#elif defined(STOCHA_AVX2)
    total = (Integers)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)low, (__m256i)x_low);
    total = (Integers)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)high, (__m256i)x_high);
#else
    total += ::dot(low, x_low, high, x_high);
#endif
  }
  STOCHA_INLINED Integers sum() const { return total; }
#endif
};

// products[r][t] of two rows' chunks with T tokens of x, the codes of which lie kChunk apart.
template <int T>
STOCHA_INLINED inline void dots_of_two(const ChunkOf4 (&rows)[2], const int8_t* x, Integers (&products)[2][T]) {
  DotOf4 sums[2][T];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const int8_t* own = x + t * kChunk + 2 * j * kBytes;
      const Signed x_low = load_codes(own), x_high = load_codes(own + kBytes);
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) sums[r][t].add(rows[r].low[j], x_low, rows[r].high[j], x_high);
    }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) products[r][t] = sums[r][t].sum();
}

template <int i, int n, class F>
STOCHA_INLINED inline void repeated(F f) {  // f with a constant 0 to n - 1
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

inline Integers load_words(const uint16_t* p) {
#if defined(STOCHA_AVX512)
  return (Integers)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(STOCHA_AVX2)
  return (Integers)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const LooseHalf*>(p), Integers);
#endif
}

struct Levels {  // scales, and zeros in eighths
  Vector scale, eighths;
  Levels() = default;
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

