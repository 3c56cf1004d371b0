// Decode kernels for the CPU: a gated FFN that reads only active neurons, and a Linear layer, for 1 to 8 tokens.
//
// At decode every weight is read once per step, so time is bytes over memory bandwidth. The FFN computes all gate
// rows, keeps the neurons whose activation is not zero, and reads only their rows of the up projection and of the down
// projection, which is kept transposed (a row a neuron). Both kernels are plain loops over GCC's vector extensions,
// which become AVX-512, AVX2, SSE or NEON by -march; only bfloat16's dot-product instruction is named.
//
// Rounding follows PyTorch's dense path: gate, up, activation and hidden are rounded to the weights' type, sums are
// float32. Results do not depend on the number of threads: a sum is never split between threads. OpenMP comes from
// the libgomp that torch has loaded, so that both share one pool of threads.
//
// Built, cached and loaded by build.py; the functions at the end are called through ctypes by ops.py.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

struct Team {
  int thread, threads;
  static Team here() { return {omp_get_thread_num(), omp_get_num_threads()}; }
};

// The machine's vectors: GCC takes wider ones apart badly. kSums of them fit the registers beside the operands.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kSums = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kSums = 8;
#else
constexpr int kLanes = 4, kSums = 8;
#endif
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

// Element types: kLanes elements to float32 and back, one element to float32 and back.

inline Vector load(const float* p) { return *reinterpret_cast<const LooseVector*>(p); }
inline Vector load(const bf16* p) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const LooseHalf*>(p), Bits) << 16);
}

// By name where there is an instruction: GCC converts these one by one.
inline Vector load(const fp16* p) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const LooseFp16*>(p), Vector);
#endif
}
inline Vector load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
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
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, 0));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, 0));
#else
  *reinterpret_cast<LooseFp16*>(p) = __builtin_convertvector(x, LooseFp16);
#endif
}
inline void store(Vector x, bf16* p) {
  const Bits bits = (Bits)x, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *reinterpret_cast<LooseHalf*>(p) = __builtin_convertvector(x != x ? Bits{} + 0x7fc0 : nearest, LooseHalf);
}

template <class E>
float rounded(float x) {
  E value;
  store(x, &value);
  return to_float(value);
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

// Multiply-accumulate of a step of a weight row, a cache line, with as much of x. x is kept in the type X.

template <class E>
struct Step {
  using X = float;
  static constexpr int size = kLine / sizeof(E);
  static Vector mac(Vector total, const E* w, const X* x) {
    for (int i = 0; i < size; i += kLanes) total += load(w + i) * load(x + i);
    return total;
  }
};

#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
  using X = bf16;
  static constexpr int size = kLine / sizeof(bf16);
  static Vector mac(Vector total, const bf16* w, const bf16* x) {
    return (Vector)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_loadu_si512(x));
  }
};
#endif

// Weight rows are fetched into the cache while the rows before them are used: the hardware cannot guess which neurons
// are active, it stops at the end of a page, and rows read side by side look to it like short streams.
constexpr int64_t kAhead = 16384;  // bytes, of rows side by side
constexpr int64_t kAheadAlone = 4096;  // bytes, of rows one after the other

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Dot products of R weight rows with the x of T tokens [T, size]. Meanwhile the rows at `next` are fetched.
template <int R, int T, class E, class X>
inline void dots(const E* const* rows, const E* const* next, const X* x, int64_t size, float (&out)[R][T]) {
  if constexpr (R * T > kSums) {
    constexpr int part = kSums / R;
    float sums[R][part];
    for (int begin = 0; begin < T; begin += part) {
      dots<R, part>(rows, begin ? rows : next, x + begin * size, size, sums);
      for (int r = 0; r < R; ++r) std::copy(sums[r], sums[r] + part, out[r] + begin);
    }
    return;
  }
  Vector total[R][T] = {};
  int64_t k = 0;
  for (; k + Step<E>::size <= size; k += Step<E>::size)
    for (int r = 0; r < R; ++r) {
      prefetch(next[r] + k);
      for (int t = 0; t < T; ++t) total[r][t] = Step<E>::mac(total[r][t], rows[r] + k, x + t * size + k);
    }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      out[r][t] = sum(total[r][t]);
      for (int64_t i = k; i < size; ++i) out[r][t] += to_float(rows[r][i]) * to_float(x[t * size + i]);
    }
}

// acc[t][begin:end] += sum over G rows of hidden[g][t] * rows[g][begin:end]; meanwhile fetches the rows at `next`.
template <int G, int T, class E>
inline void add_rows(const E* const* rows, const E* const* next, const float* hidden, float* acc, int64_t size,
                     int64_t begin, int64_t end) {
  constexpr int64_t line = kLine / sizeof(E);
  int64_t c = begin;
  for (; c + line <= end; c += line) {
    for (int g = 0; g < G; ++g) prefetch(next[g] + c);
    for (int64_t k = c; k < c + line; k += kLanes) {
      Vector total[T];
#pragma GCC unroll 8  // or the sums would be kept in memory
      for (int t = 0; t < T; ++t) total[t] = load(acc + t * size + k);
      for (int g = 0; g < G; ++g) {
        const Vector row = load(rows[g] + k);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) total[t] += hidden[g * T + t] * row;
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) store(total[t], acc + t * size + k);
    }
  }
  for (; c < end; ++c)
    for (int t = 0; t < T; ++t)
      for (int g = 0; g < G; ++g) acc[t * size + c] += hidden[g * T + t] * to_float(rows[g][c]);
}

// A thread's part of `count` items, in whole multiples of `unit`.
struct Part {
  int64_t begin, end;
  Part(int64_t count, int64_t unit, Team team) {
    const int64_t units = (count + unit - 1) / unit;
    begin = std::min(units * team.thread / team.threads * unit, count);
    end = std::min(units * (team.thread + 1) / team.threads * unit, count);
  }
};

// x as the dot products want it: type X, T rows, those beyond `tokens` zero.
template <int T, class E, class X = typename Step<E>::X>
const X* prepared(const E* x, int64_t tokens, int64_t size, std::vector<X>& buffer) {
  if constexpr (std::is_same_v<E, X>)
    if (tokens == T) return x;
  buffer.assign(T * size, X{});
  for (int64_t i = 0; i < tokens * size; ++i) {
    if constexpr (std::is_same_v<E, X>)
      buffer[i] = x[i];
    else
      buffer[i] = to_float(x[i]);
  }
  return buffer.data();
}

constexpr int kRows = 4;  // weight rows side by side, which share a load of x

// Rows of a whole matrix: one or two tokens leave the memory as the only limit, and it is read fastest straight on.
template <int T>
constexpr int kStreams = T <= 2 ? 1 : kRows;
template <int T>
constexpr int64_t kStreamAhead = T <= 2 ? kAheadAlone : kAhead;

// y = W x (+ bias), handed to `keep(output, token, value)`; this thread's part of the outputs.
template <class E, int T, class X, class Keep>
void linear(const E* weight, const E* bias, const X* x, int64_t tokens, int64_t inputs, Part mine, Keep keep) {
  constexpr int R = kStreams<T>;
  for (int64_t n = mine.begin; n < mine.end; n += R) {
    const int here = static_cast<int>(std::min<int64_t>(R, mine.end - n));
    const E *rows[R], *next[R];
    float values[R][T];
    for (int r = 0; r < R; ++r) {
      rows[r] = weight + (n + std::min(r, here - 1)) * inputs;
      next[r] = rows[r] + kStreamAhead<T> / sizeof(E);
    }
    dots<R, T>(rows, next, x, inputs, values);
    for (int r = 0; r < here; ++r)
      for (int64_t t = 0; t < tokens; ++t)
        keep(n + r, t, rounded<E>(values[r][t] + (bias ? to_float(bias[n + r]) : 0)));
  }
}

// RMSNorm as transformers computes it: the normalised row is rounded before it is scaled.
template <class E>
void rms_norm(const E* x, const E* weight, float epsilon, int64_t size, E* out) {
  Vector squares = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < size; ++i) total += to_float(x[i]) * to_float(x[i]);
  const float scale = 1 / std::sqrt(total / size + epsilon);
  for (i = 0; i + kLanes <= size; i += kLanes) {
    store(load(x + i) * scale, out + i);
    store(load(weight + i) * load(out + i), out + i);
  }
  for (; i < size; ++i) store(to_float(weight[i]) * rounded<E>(to_float(x[i]) * scale), out + i);
}

template <class E>
void rms_norm_rows(const E* x, const void* weight, float epsilon, int64_t rows, int64_t size, std::vector<E>& out) {
  out.resize(rows * size);
  for (int64_t r = 0; r < rows; ++r)
    rms_norm(x + r * size, static_cast<const E*>(weight), epsilon, size, out.data() + r * size);
}

template <class E>
bool all_finite(const E* x, int64_t size) {
  Vector zeros = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) zeros += load(x + i) * 0.0f;
  float total = sum(zeros);
  for (; i < size; ++i) total += to_float(x[i]) * 0.0f;
  return total == 0;
}

enum Activation { kRelu, kFatRelu, kRelu2, kDRelu, kShiftedRelu };
constexpr int kGroup = 8;  // rows of down added at a time

struct Ffn {
  const void *gate, *up, *down;  // [width, size] each, down transposed
  int64_t tokens, size, width;
  int activation;
  float threshold;
  const int8_t* coarse;  // gate in 8 bits [width, size], or null
  const float* coarse_scales;  // [width]: gate is about scale * coarse
  float margin;  // standard deviations of the rounding error; 0: its bound, which makes results exact
};

struct Scratch {  // shared by a team
  std::vector<float> hidden, acc;
  std::vector<int64_t> active, counts;
  void reserve(const Ffn& f, int rows, int threads) {
    hidden.resize(f.width * rows);
    acc.resize(f.size * rows);
    active.resize(f.width);
    counts.assign(threads, 0);
  }
};

// The gate's factor of a hidden entry. NaN passes, as it does through PyTorch's ReLU.
template <class E>
inline float activated(float gate, const Ffn& f) {
  if (gate <= f.threshold) return 0;
  if (f.activation == kRelu2) return rounded<E>(gate * gate);
  if (f.activation == kShiftedRelu) return rounded<E>(gate - f.threshold);
  return gate;
}

constexpr int kCoarseTokens = 2;  // with more, judging all rows takes longer than it saves below 95% zeros

// Which of this thread's gate rows may be above the threshold for some token, judged by the coarse gate: an entry of it
// is off by at most half its scale, so a product by at most half the scale times |x|_1; with errors that are
// independent and uniform, by scale times |x|_2 / sqrt(12) as a standard deviation. Returns the end of the list.
template <class E, int T>
int64_t candidates_of(const Ffn& f, const E* given, Part mine, int64_t* active) {
  constexpr int R = kRows;
  static thread_local std::vector<float> x;
  x.assign(T * f.size, 0.0f);
  float slack[T] = {};
  for (int64_t t = 0; t < f.tokens; ++t) {
    float sum_1 = 0, sum_2 = 0;
    for (int64_t k = 0; k < f.size; ++k) {
      const float value = x[t * f.size + k] = to_float(given[t * f.size + k]);
      sum_1 += std::abs(value);
      sum_2 += value * value;
    }
    slack[t] = f.margin > 0 ? f.margin * std::sqrt(sum_2 / 12) : 0.5f * sum_1;
  }
  // the exact gate is rounded to E before it is compared, and sums differ in their last bits
  const float least = f.threshold - std::abs(f.threshold) / 128;
  int64_t end = mine.begin;
  for (int64_t m = mine.begin; m < mine.end; m += R) {
    const int here = static_cast<int>(std::min<int64_t>(R, mine.end - m));
    const int8_t *rows[R], *next[R];
    float values[R][T];
    for (int r = 0; r < R; ++r) {
      rows[r] = f.coarse + (m + std::min(r, here - 1)) * f.size;
      next[r] = rows[r] + kAhead;
    }
    dots<R, T>(rows, next, x.data(), f.size, values);
    for (int r = 0; r < here; ++r) {
      bool any = false;
      for (int64_t t = 0; t < f.tokens; ++t)
        any |= f.coarse_scales[m + r] * (values[r][t] * (values[r][t] > 0 ? 1.0001f : 0.9999f) + slack[t]) > least;
      active[end] = m + r;
      end += any;
    }
  }
  return end;
}

// A thread's part of a gated FFN; ends with the outputs of its columns handed to `keep(column, token, value)`.
template <class E, int T, class Keep>
void ffn(const Ffn& f, const E* given, Scratch& scratch, Team team, Keep keep) {
  constexpr int R = kRows;
  static thread_local std::vector<typename Step<E>::X> x_buffer;
  const auto* gate = static_cast<const E*>(f.gate);
  const auto* up = static_cast<const E*>(f.up);
  const auto* down = static_cast<const E*>(f.down);
  const int64_t size = f.size;
  float *hidden = scratch.hidden.data(), *acc = scratch.acc.data();
  int64_t* active = scratch.active.data();
  const auto* x = prepared<T>(given, f.tokens, size, x_buffer);
  // 0 * inf is NaN in the dense path: where x is not finite, no neuron may be skipped
  const bool finite = all_finite(given, f.tokens * size);
  const Part mine(f.width, R, team);
  float values[R][T];
  const E *rows[kGroup], *next[kGroup];

  // 1. The gate rows of this thread, all or those that the coarse gate leaves; candidates are those with an activation
  // that is not zero.
  constexpr int S = kStreams<T>;
  const int64_t row_bytes = size * static_cast<int64_t>(sizeof(E));
  const bool coarse = f.coarse && finite && f.tokens <= kCoarseTokens;
  const int64_t gate_ahead = std::max<int64_t>((coarse ? kAhead : kStreamAhead<T>) / row_bytes, S);  // rows
  const int64_t possible = coarse ? candidates_of<E, T>(f, given, mine, active) : mine.end;
  int64_t candidates = mine.begin;
  for (int64_t m = mine.begin; m < possible; m += S) {
    const int here = static_cast<int>(std::min<int64_t>(S, possible - m));
    int64_t neurons[S];
    float found[S][T];
    for (int r = 0; r < S; ++r) {
      const int64_t now = m + std::min(r, here - 1), later = std::min(now + gate_ahead, possible - 1);
      neurons[r] = coarse ? active[now] : now;
      rows[r] = gate + neurons[r] * size;
      next[r] = gate + (coarse ? active[later] : later) * size;
    }
    dots<S, T>(rows, next, x, size, found);
    for (int r = 0; r < here; ++r) {
      bool any = !finite;
      for (int t = 0; t < T; ++t) {
        const float factor = activated<E>(rounded<E>(found[r][t]), f);
        hidden[candidates * T + t] = factor;
        any |= factor != 0;
      }
      active[candidates] = neurons[r];
      candidates += any;
    }
  }

  // 2. Their up rows.
  const int64_t ahead = std::max<int64_t>(kAhead / row_bytes, R);
  int64_t kept = mine.begin;
  for (int64_t c = mine.begin; c < candidates; c += R) {
    const int here = static_cast<int>(std::min<int64_t>(R, candidates - c));
    for (int r = 0; r < R; ++r) {
      rows[r] = up + active[c + std::min(r, here - 1)] * size;
      next[r] = up + active[std::min(c + ahead + r, candidates - 1)] * size;
    }
    dots<R, T>(rows, next, x, size, values);
    for (int r = 0; r < here; ++r) {
      bool any = false;
      for (int t = 0; t < T; ++t) {
        float value = rounded<E>(values[r][t]);
        if (f.activation == kDRelu && value <= 0) value = 0;
        hidden[kept * T + t] = rounded<E>(hidden[(c + r) * T + t] * value);
        any |= hidden[kept * T + t] != 0;
      }
      active[kept] = active[c + r];
      kept += any;
    }
  }
  scratch.counts[team.thread] = kept - mine.begin;
#pragma omp barrier

  // 3. All active rows of down, in this thread's columns.
  const Part columns(size, kLine / sizeof(E), team);
  for (int t = 0; t < T; ++t) std::fill(acc + t * size + columns.begin, acc + t * size + columns.end, 0.0f);
  for (int other = 0; other < team.threads; ++other) {
    const int64_t begin = Part(f.width, R, {other, team.threads}).begin, end = begin + scratch.counts[other];
    int64_t a = begin;
    for (; a + kGroup <= end; a += kGroup) {
      for (int g = 0; g < kGroup; ++g) {
        rows[g] = down + active[a + g] * size;
        next[g] = down + active[std::min(a + kGroup + g, end - 1)] * size;
      }
      add_rows<kGroup, T>(rows, next, hidden + a * T, acc, size, columns.begin, columns.end);
    }
    for (; a < end; ++a) {
      rows[0] = down + active[a] * size;
      add_rows<1, T>(rows, rows, hidden + a * T, acc, size, columns.begin, columns.end);
    }
  }
  for (int64_t t = 0; t < f.tokens; ++t)
    for (int64_t c = columns.begin; c < columns.end; ++c) keep(c, t, rounded<E>(acc[t * size + c]));
}

struct FfnCall : Ffn {
  const void* x;
  void* out;
  int threads;

  template <class E, int T>
  int64_t run() const {
    static thread_local Scratch own;
    Scratch& scratch = own;  // the team's, where `own` would be each thread's
    scratch.reserve(*this, T, threads);
    auto* y = static_cast<E*>(out);
#pragma omp parallel num_threads(threads)
    ffn<E, T>(*this, static_cast<const E*>(x), scratch, Team::here(),
              [&](int64_t c, int64_t t, float value) { store(value, y + t * size + c); });
    int64_t total = 0;
    for (int64_t count : scratch.counts) total += count;
    return total;
  }
};

struct LinearCall {
  const void *x, *weight, *bias;
  void* out;
  int64_t tokens, inputs, outputs;
  int threads;

  template <class E, int T>
  int64_t run() const {
    static thread_local std::vector<typename Step<E>::X> x_buffer;
    const auto* prepared_x = prepared<T>(static_cast<const E*>(x), tokens, inputs, x_buffer);
    auto* y = static_cast<E*>(out);
#pragma omp parallel num_threads(threads)
    linear<E, T>(static_cast<const E*>(weight), static_cast<const E*>(bias), prepared_x, tokens, inputs,
                 Part(outputs, kRows, Team::here()),
                 [&](int64_t n, int64_t t, float value) { store(value, y + t * outputs + n); });
    return 0;
  }
};

// The first half of a decoder layer, for one new token of each of `tokens` sequences: norm, q, k and v projections,
// RMSNorm of each head's q and k where the model has it, rotary embedding.
struct QkvCall {
  const void *x, *norm, *weights[3], *biases[3], *head_norms[2], *cosine, *sine;
  void* outs[3];  // [tokens, heads, 1, head size]
  int64_t tokens, size, heads[3], head_size;
  float epsilon;
  int threads;

  template <class E, int T>
  int64_t run() const {
#pragma omp parallel num_threads(threads)
    {
      static thread_local std::vector<E> normed;
      static thread_local std::vector<typename Step<E>::X> x_buffer;
      const Team team = Team::here();
      rms_norm_rows(static_cast<const E*>(x), norm, epsilon, tokens, size, normed);
      const auto* input = prepared<T>(normed.data(), tokens, size, x_buffer);
      for (int i = 0; i < 3; ++i) {
        const int64_t outputs = heads[i] * head_size;
        auto* out = static_cast<E*>(outs[i]);
        linear<E, T>(static_cast<const E*>(weights[i]), static_cast<const E*>(biases[i]), input, tokens, size,
                     Part(outputs, kRows, team),
                     [&](int64_t n, int64_t t, float value) { store(value, out + t * outputs + n); });
      }
#pragma omp barrier
      for (int i = 0; i < 2; ++i) {
        const Part mine(tokens * heads[i], 1, team);
        for (int64_t row = mine.begin; row < mine.end; ++row) {
          auto* head = static_cast<E*>(outs[i]) + row * head_size;
          const int64_t token = row / heads[i];
          if (head_norms[i])
            rms_norm(head, static_cast<const E*>(head_norms[i]), epsilon, head_size, head);
          rotate(head, static_cast<const E*>(cosine) + token * head_size, static_cast<const E*>(sine) + token * head_size);
        }
      }
    }
    return 0;
  }

  template <class E>
  void rotate(E* head, const E* cosines, const E* sines) const {
    const int64_t half = head_size / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float a = to_float(head[i]), b = to_float(head[i + half]);
      store(rounded<E>(a * to_float(cosines[i])) + rounded<E>(-b * to_float(sines[i])), head + i);
      store(rounded<E>(b * to_float(cosines[i + half])) + rounded<E>(a * to_float(sines[i + half])), head + i + half);
    }
  }
};

// The second half: attention of each sequence's token to all its cached ones, output projection, residual, norm, FFN,
// residual.
struct LayerCall : Ffn {
  const void *query, *keys, *values;  // [tokens, heads, 1, head size], [tokens, key heads, length, head size]
  const void *o_weight, *o_bias, *norm, *residual;
  void* out;
  int64_t heads, key_heads, length, head_size, key_strides[2], value_strides[2];  // of a sequence, of a head
  float scale, epsilon;
  int threads;

  template <class E, int T>
  int64_t run() const {
    static thread_local Scratch own;
    static thread_local std::vector<E> attended_buffer, stream_buffer;
    Scratch& scratch = own;
    scratch.reserve(*this, T, threads);
    attended_buffer.resize(tokens * heads * head_size);
    stream_buffer.resize(tokens * size);
    E *attended = attended_buffer.data(), *stream = stream_buffer.data(), *y = static_cast<E*>(out);
    const auto* before = static_cast<const E*>(residual);
#pragma omp parallel num_threads(threads)
    {
      static thread_local std::vector<E> normed;
      static thread_local std::vector<typename Step<E>::X> x_buffer;
      const Team team = Team::here();
      const Part mine(tokens * heads, 1, team);
      for (int64_t row = mine.begin; row < mine.end; ++row) attend<E>(row, attended + row * head_size);
#pragma omp barrier
      const int64_t inputs = heads * head_size;
      linear<E, T>(static_cast<const E*>(o_weight), static_cast<const E*>(o_bias),
                   prepared<T>(attended, tokens, inputs, x_buffer), tokens, inputs, Part(size, kRows, team),
                   [&](int64_t n, int64_t t, float value) {
                     store(to_float(before[t * size + n]) + value, stream + t * size + n);
                   });
#pragma omp barrier
      rms_norm_rows(stream, norm, epsilon, tokens, size, normed);
      ffn<E, T>(*this, normed.data(), scratch, team, [&](int64_t c, int64_t t, float value) {
        store(to_float(stream[t * size + c]) + value, y + t * size + c);
      });
    }
    return 0;
  }

  template <class E>
  void attend(int64_t row, E* attended) const {
    static thread_local std::vector<typename Step<E>::X> x_buffer;
    static thread_local std::vector<float> scores, sums;
    const int64_t sequence = row / heads, key_head = row % heads / (heads / key_heads);
    const E* key = static_cast<const E*>(keys) + sequence * key_strides[0] + key_head * key_strides[1];
    const E* value = static_cast<const E*>(values) + sequence * value_strides[0] + key_head * value_strides[1];
    const auto* q = prepared<1>(static_cast<const E*>(query) + row * head_size, 1, head_size, x_buffer);
    scores.resize(length);
    float largest = -INFINITY, total = 0;
    for (int64_t s = 0; s < length; s += 4) {
      const int here = static_cast<int>(std::min<int64_t>(4, length - s));
      const E* rows[4];
      float found[4][1];
      for (int r = 0; r < 4; ++r) rows[r] = key + (s + std::min(r, here - 1)) * head_size;
      dots<4, 1>(rows, rows, q, head_size, found);
      for (int r = 0; r < here; ++r) largest = std::max(largest, scores[s + r] = found[r][0] * scale);
    }
    for (float& score : scores) total += score = std::exp(score - largest);
    for (float& score : scores) score /= total;
    sums.assign(head_size, 0.0f);
    int64_t s = 0;
    const E* rows[kGroup];
    for (; s + kGroup <= length; s += kGroup) {
      for (int g = 0; g < kGroup; ++g) rows[g] = value + (s + g) * head_size;
      add_rows<kGroup, 1>(rows, rows, &scores[s], sums.data(), head_size, 0, head_size);
    }
    for (; s < length; ++s) {
      rows[0] = value + s * head_size;
      add_rows<1, 1>(rows, rows, &scores[s], sums.data(), head_size, 0, head_size);
    }
    for (int64_t i = 0; i < head_size; ++i) store(sums[i], attended + i);
  }
};

template <class E, class Call>
int64_t run_with(const Call& call) {
  if (call.tokens == 1) return call.template run<E, 1>();
  if (call.tokens == 2) return call.template run<E, 2>();
  return call.tokens <= 4 ? call.template run<E, 4>() : call.template run<E, 8>();
}

// The instance for an element type (0 bfloat16, 1 float16, 2 float32) and a number of tokens, 1 to 8.
template <class Call>
int64_t run(int dtype, const Call& call) {
  if (dtype == 0) return run_with<bf16>(call);
  return dtype == 1 ? run_with<fp16>(call) : run_with<float>(call);
}

}  // namespace

// All tensors are contiguous but for the strides named. stocha_ffn returns the number of active neurons, those that
// are not zero for every token.

extern "C" int64_t stocha_ffn(int dtype, const void* x, const void* gate, const void* up, const void* down, void* out,
                              const int8_t* coarse, const float* coarse_scales, int64_t tokens, int64_t size,
                              int64_t width, int activation, float threshold, float margin, int threads) {
  return run(dtype, FfnCall{{gate, up, down, tokens, size, width, activation, threshold, coarse, coarse_scales, margin},
                            x, out, threads});
}

extern "C" void stocha_linear(int dtype, const void* x, const void* weight, const void* bias, void* out,
                              int64_t tokens, int64_t inputs, int64_t outputs, int threads) {
  run(dtype, LinearCall{x, weight, bias, out, tokens, inputs, outputs, threads});
}

extern "C" void stocha_qkv(int dtype, const void* x, const void* norm, const void* q, const void* k, const void* v,
                           const void* q_bias, const void* k_bias, const void* v_bias, const void* q_norm,
                           const void* k_norm, const void* cosine, const void* sine, void* q_out, void* k_out,
                           void* v_out, int64_t tokens, int64_t size, int64_t heads, int64_t key_heads,
                           int64_t head_size, float epsilon, int threads) {
  run(dtype, QkvCall{x, norm, {q, k, v}, {q_bias, k_bias, v_bias}, {q_norm, k_norm}, cosine, sine,
                     {q_out, k_out, v_out}, tokens, size, {heads, key_heads, key_heads}, head_size, epsilon, threads});
}

extern "C" void stocha_layer(int dtype, const void* query, const void* keys, const void* values, const void* o_weight,
                             const void* o_bias, const void* norm, const void* residual, const void* gate,
                             const void* up, const void* down, void* out, const int8_t* coarse,
                             const float* coarse_scales, int64_t tokens, int64_t size, int64_t width,
                             int64_t heads, int64_t key_heads, int64_t length, int64_t head_size,
                             int64_t key_stride_0, int64_t key_stride_1, int64_t value_stride_0,
                             int64_t value_stride_1, int activation, float threshold, float margin, float scale,
                             float epsilon, int threads) {
  run(dtype, LayerCall{{gate, up, down, tokens, size, width, activation, threshold, coarse, coarse_scales, margin},
                       query, keys, values, o_weight,
                       o_bias, norm, residual, out, heads, key_heads, length, head_size,
                       {key_stride_0, key_stride_1}, {value_stride_0, value_stride_1}, scale, epsilon, threads});
}

// Whether sampled entries of a matrix [rows, columns] are those of its transposed copy, byte for byte. They lie near each
// other in one row: the matrix's pages may have been given back, and each one touched comes back with its neighbours.
extern "C" int stocha_same(const void* matrix, const void* transposed, int64_t rows, int64_t columns, int64_t size) {
  constexpr int64_t kSamples = 16, kSpan = 1024;
  const auto* a = static_cast<const char*>(matrix);
  const auto* b = static_cast<const char*>(transposed);
  const int64_t row = rows / 2, step = std::max<int64_t>(std::min(columns, kSpan) / kSamples, 1);
  for (int64_t column = 0; column < std::min(columns, kSpan); column += step)
    if (std::memcmp(a + (row * columns + column) * size, b + (column * rows + row) * size, size) != 0) return 0;
  return 1;
}

// Reads `bytes` and returns something that depends on all of them: what the machine's memory can give.
extern "C" int64_t stocha_read(const void* data, int64_t bytes, int threads) {
  const auto* p = static_cast<const float*>(data);
  std::vector<Vector> totals(threads);
#pragma omp parallel num_threads(threads)
  {
    const Team team = Team::here();
    const Part mine(bytes / 4, 4 * kLanes, team);
    Vector total[4] = {};
    for (int64_t i = mine.begin; i + 4 * kLanes <= mine.end; i += 4 * kLanes)
      for (int j = 0; j < 4; ++j) total[j] += load(p + i + j * kLanes);
    totals[team.thread] = total[0] + total[1] + total[2] + total[3];
  }
  float found = 0;
  for (const Vector& total : totals) found += sum(total);
  return found != 0;
}
