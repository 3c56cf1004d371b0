// The machine's vectors of float32, element types in and out of them, sums and exponentials.
//
// Plain loops over GCC's vector extensions, which become AVX-512, AVX2, SSE or NEON by -march. Instructions are named
// only where GCC does not find them. STOCHA_LANES may be set to 4 or 16 on a machine with 8, so that tests run the
// other layouts.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// GCC takes wider vectors than the machine's apart badly.
#if defined(STOCHA_LANES)
constexpr int kLanes = STOCHA_LANES;
#define STOCHA_PLAIN
#elif defined(__AVX512BW__)  // of bytes, which the first processors with AVX-512 lack
constexpr int kLanes = 16;
#define STOCHA_AVX512
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#define STOCHA_AVX2
#else
constexpr int kLanes = 4;
#if defined(__ARM_FEATURE_DOTPROD)
#define STOCHA_NEON
#else
#define STOCHA_PLAIN
#endif
#endif
constexpr int kSums = kLanes == 16 ? 16 : 8;  // so many of them fit the registers beside the operands
constexpr int kLine = 64;  // bytes of a cache line

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef float LooseVector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t LooseHalf __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef _Float16 LooseFp16 __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef int8_t LooseBytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

struct bf16 {
  uint16_t bits;
};
using fp16 = _Float16;

// kLanes elements to float32 and back, one element to float32 and back.

inline Vector load(const float* p) { return *reinterpret_cast<const LooseVector*>(p); }
inline Vector load(const bf16* p) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const LooseHalf*>(p), Bits) << 16);
}
inline Vector load(const fp16* p) {
#if defined(STOCHA_AVX512)
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(STOCHA_AVX2) && defined(__F16C__)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const LooseFp16*>(p), Vector);
#endif
}
inline Vector load(const int8_t* p) {
#if defined(STOCHA_AVX512)
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(STOCHA_AVX2)
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(p)));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const LooseBytes*>(p), Integers), Vector);
#endif
}

inline float to_float(int8_t x) { return x; }
inline float to_float(float x) { return x; }
inline float to_float(fp16 x) { return static_cast<float>(x); }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float x, float* p) { *p = x; }
inline void store(float x, fp16* p) { *p = static_cast<fp16>(x); }
inline void store(float x, bf16* p) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  p->bits = std::isnan(x) ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline void store(Vector x, float* p) { *reinterpret_cast<LooseVector*>(p) = x; }
inline void store(Vector x, fp16* p) {
#if defined(STOCHA_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, 0));
#elif defined(STOCHA_AVX2) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, 0));
#else
  *reinterpret_cast<LooseFp16*>(p) = __builtin_convertvector(x, LooseFp16);
#endif
}
inline void store(Vector x, bf16* p) {
  const Bits bits = (Bits)x, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *reinterpret_cast<LooseHalf*>(p) = __builtin_convertvector(x != x ? Bits{} + 0x7fc0 : nearest, LooseHalf);
}

// By quarters of 512 bits: adding lane by lane takes longer than a short row's products.
inline float sum(const Vector& v) {
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter quarters[kLanes / 4];
  std::memcpy(quarters, &v, sizeof v);
  Quarter total = quarters[0];
  for (int i = 1; i < kLanes / 4; ++i) total += quarters[i];
  return (total[0] + total[2]) + (total[1] + total[3]);
}

// The same of T vectors, in the same order: two of them share their shuffles.
template <int T>
inline void sums(const Vector (&v)[T], float* out) {
  typedef float Quarter __attribute__((vector_size(16)));
  typedef int32_t Order __attribute__((vector_size(16)));
  const auto quarter = [&](int t) {
    Quarter quarters[kLanes / 4];
    std::memcpy(quarters, &v[t], sizeof v[t]);
    Quarter total = quarters[0];
    for (int i = 1; i < kLanes / 4; ++i) total += quarters[i];
    return total;
  };
  if constexpr (T == 1) {
    out[0] = sum(v[0]);
  } else {
#pragma GCC unroll 4
    for (int t = 0; t < T; t += 2) {
      const Quarter a = quarter(t), b = quarter(t + 1);
      const Quarter both = __builtin_shuffle(a, b, Order{0, 4, 1, 5}) + __builtin_shuffle(a, b, Order{2, 6, 3, 7});
      const Quarter total = both + __builtin_shuffle(both, Order{2, 3, 2, 3});
      std::memcpy(out + t, &total, 2 * sizeof *out);
    }
  }
}

// a * b + c in one rounding where the machine can, wherever this stands: the compiler's own choice differs with the
// number of tokens, and a token's numbers with it.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline Vector fused(Vector a, Vector b, Vector c) {
#if defined(STOCHA_AVX512)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(STOCHA_AVX2) && defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA) && !defined(STOCHA_LANES)
  return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  for (int i = 0; i < kLanes; ++i) c[i] = fused(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
inline Vector magnitude(Vector x) { return (Vector)((Bits)x & 0x7fffffffu); }
inline float largest(const Vector& v) {
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter quarters[kLanes / 4];
  std::memcpy(quarters, &v, sizeof v);
  Quarter found = quarters[0];
  for (int i = 1; i < kLanes / 4; ++i) found = quarters[i] > found ? quarters[i] : found;
  return std::max(std::max(found[0], found[1]), std::max(found[2], found[3]));
}

inline Vector root(Vector x) {
#if defined(STOCHA_AVX512)
  return (Vector)_mm512_sqrt_ps((__m512)x);
#elif defined(STOCHA_AVX2)
  return (Vector)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// To the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves it in the mantissa.
inline Integers nearest(Vector x) { return (Integers)(x + 12582912.0f) - 0x4b400000; }

// e^x within 2 units of the last place (Cephes' polynomial); 0 below -87, NaN for NaN.
inline Vector exponential(Vector x) {
  const Vector bounded = x > 88.0f ? Vector{} + 88.0f : x;
  const Integers power = nearest((x < -87.0f ? Vector{} : bounded) * 1.44269504f);
  const Vector n = __builtin_convertvector(power, Vector);
  const Vector r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vector value = (p * r * r + r + 1.0f) * (Vector)((power + 127) << 23);
  return x < -87.0f ? Vector{} : value;
}

// Element types by number, as ops.py has them, and rounding to one of them.
enum Type { kBf16, kFp16, kFloat };

template <class E>
float rounded(float x) {
  E value;
  store(x, &value);
  return to_float(value);
}
inline float rounded(int type, float x) {
  if (type == kBf16) return rounded<bf16>(x);
  return type == kFp16 ? rounded<fp16>(x) : x;
}

template <class E>
void round_row(float* x, int64_t size) {
  E part[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    store(load(x + i), part);
    store(load(part), x + i);
  }
  for (; i < size; ++i) x[i] = rounded<E>(x[i]);
}
inline void round_row(int type, float* x, int64_t size) {
  if (type == kBf16) round_row<bf16>(x, size);
  if (type == kFp16) round_row<fp16>(x, size);
}

// Calls f with a null pointer of the element type.
template <class F>
void with_type(int type, F f) {
  if (type == kBf16) return f(static_cast<const bf16*>(nullptr));
  if (type == kFp16) return f(static_cast<const fp16*>(nullptr));
  f(static_cast<const float*>(nullptr));
}

// A row of any type to float32 and back.
inline void widen(int type, const void* from, int64_t size, float* to) {
  with_type(type, [&](auto* element) {
    const auto* x = static_cast<decltype(element)>(from);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(load(x + i), to + i);
    for (; i < size; ++i) to[i] = to_float(x[i]);
  });
}
inline void narrow(int type, const float* from, int64_t size, void* to) {
  with_type(type, [&](auto* element) {
    using E = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
    auto* x = static_cast<E*>(to);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(load(from + i), x + i);
    for (; i < size; ++i) store(from[i], x + i);
  });
}
