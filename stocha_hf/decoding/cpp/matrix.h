// A matrix of weights in any format, its products with x, and sums of its rows.
#pragma once

#include <type_traits>

#include "quantized.h"
#include "team.h"

enum Format { kFormatBf16 = kBf16, kFormatFp16 = kFp16, kFormatFloat = kFloat, kFormat8, kFormat4 };

struct Matrix {  // as structs.py has it
  const void* weights;  // [rows, columns], or their codes; columns are a multiple of 32 where they are codes
  const void* scales;  // [rows, columns / 32], of codes: float16, or words of 4 bits
  const void* bias;  // [rows] or null, of the model's type
  int64_t rows, columns, format;

  int64_t groups() const { return (columns + kGroupSize - 1) / kGroupSize; }
  int64_t row_bytes() const {
    if (format == kFormat4) return groups() * 16;
    if (format == kFormat8) return groups() * kGroupSize;
    return columns * (format == kFormatFloat ? 4 : 2);
  }
  const uint8_t* row(int64_t r) const { return static_cast<const uint8_t*>(weights) + r * row_bytes(); }
  const fp16* row_scales(int64_t r) const { return static_cast<const fp16*>(scales) + r * groups(); }
  const uint16_t* row_words(int64_t r) const { return static_cast<const uint16_t*>(scales) + r * groups(); }
};

// x [tokens, size] of a product, as the formats want it: made once, used with several matrices.
struct Inputs {
  int64_t tokens = 0, padded = 0, size = 0;  // padded: 1, 2, 4 or 8 tokens, those beyond `tokens` zero
  std::vector<float> values;
#if defined(STOCHA_BF16_X)
  std::vector<bf16> halves;
#endif
  QuantizedX of_4, of_8;
  bool has_4 = false, has_8 = false;

  void set(const float* x, int64_t count, int64_t width) {
    tokens = count;
    padded = count <= 2 ? count : count <= 4 ? 4 : 8;
    size = width;
    values.assign(padded * size, 0.0f);
    std::copy(x, x + tokens * size, values.begin());
#if defined(STOCHA_BF16_X)
    halves.resize(padded * size);
    narrow(kBf16, values.data(), padded * size, halves.data());
#endif
    has_4 = has_8 = false;
  }

  const QuantizedX& quantized(int bits) {
    bool& has = bits == 4 ? has_4 : has_8;
    QuantizedX& x = bits == 4 ? of_4 : of_8;
    if (!has) x.prepare(values.data(), tokens, padded, size, bits);
    has = true;
    return x;
  }

  template <class E>
  const typename Step<E>::X* of() const {
#if defined(STOCHA_BF16_X)
    if constexpr (std::is_same_v<E, bf16>) return halves.data();
#endif
    if constexpr (std::is_same_v<typename Step<E>::X, float>) return values.data();
  }
};

constexpr int kRows = 4;  // weight rows side by side, which share a load of x

// What to multiply: rows begin to end - 1 of a list, or of the matrix where the list is null. The next rows up to
// `limit` are fetched meanwhile. One after the other, since with one or two tokens the memory is the only limit and is
// read fastest straight on; or kRows side by side.
struct Rows {
  const int64_t* list;
  int64_t begin, end, limit;
  bool side_by_side;
  int64_t operator[](int64_t i) const { return list ? list[i] : i; }
};

template <class E, int R, int T>
void float_products(const Matrix& m, const Inputs& x, Rows chosen, float* values) {
  const E* weights = static_cast<const E*>(m.weights);
  const auto* of_x = x.of<E>();
  const int64_t ahead = std::max<int64_t>((R == 1 ? kAheadAlone : kAhead) / m.row_bytes(), R);
  for (int64_t i = chosen.begin; i < chosen.end; i += R) {
    const int here = static_cast<int>(std::min<int64_t>(R, chosen.end - i));
    const E *rows[R], *next[R];
    float found[R][T];
    for (int r = 0; r < R; ++r) {
      rows[r] = weights + chosen[i + std::min(r, here - 1)] * m.columns;
      next[r] = weights + chosen[std::min(i + r + ahead, chosen.limit - 1)] * m.columns;
    }
    dots<R, T>(rows, next, of_x, m.columns, found);
    for (int r = 0; r < here; ++r, values += T) std::copy(found[r], found[r] + T, values);
  }
}

template <int T>
void products(const Matrix& m, Inputs& x, Rows chosen, float* values) {
  if (m.format >= kFormat8) {
    const QuantizedX& of_x = x.quantized(m.format == kFormat4 ? 4 : 8);
    const int64_t ahead = std::max<int64_t>(kAheadAlone / m.row_bytes(), 1);
    for (int64_t i = chosen.begin; i < chosen.end; ++i, values += T) {
      float(&out)[T] = *reinterpret_cast<float(*)[T]>(values);
      const int64_t r = chosen[i];
      const uint8_t* next = m.row(chosen[std::min(i + ahead, chosen.limit - 1)]);
      const bool readable = (m.rows - 1 - r) * m.groups() >= kLanes;
      if (m.format == kFormat4)
        dots_4<T>(m.row(r), m.row_words(r), m.groups(), of_x, readable, next, out);
      else
        dots_8<T>(reinterpret_cast<const int8_t*>(m.row(r)), m.row_scales(r), m.groups(), of_x, readable,
                  reinterpret_cast<const int8_t*>(next), out);
    }
    return;
  }
  with_type(static_cast<int>(m.format), [&](auto* element) {
    using E = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
    if (T <= 2 && !chosen.side_by_side)
      float_products<E, 1, T>(m, x, chosen, values);
    else
      float_products<E, kRows, T>(m, x, chosen, values);
  });
}

// f(std::integral_constant<int, T>) for the number of tokens that the kernels are made for.
template <class F>
void with_tokens(int64_t padded, F f) {
  if (padded == 1) return f(std::integral_constant<int, 1>());
  if (padded == 2) return f(std::integral_constant<int, 2>());
  padded == 4 ? f(std::integral_constant<int, 4>()) : f(std::integral_constant<int, 8>());
}

// values [rows, x.padded] of the products of these rows.
inline void products(const Matrix& m, Inputs& x, Rows chosen, float* values) {
  with_tokens(x.padded, [&](auto T) { products<decltype(T)::value>(m, x, chosen, values); });
}

constexpr int64_t kAtOnce = 64;  // rows, whose products are then looked at

// f(first, last, values) for the rows of a list, some at a time.
template <class F>
void in_turn(const Matrix& m, Inputs& x, const int64_t* list, int64_t begin, int64_t end, bool side_by_side, F f) {
  float values[kAtOnce * 8];
  for (int64_t i = begin; i < end; i += kAtOnce) {
    const int64_t last = std::min(i + kAtOnce, end);
    products(m, x, {list, i, last, end, side_by_side}, values);
    f(i, last, values);
  }
}

// y = W x + bias, each output rounded to `type` and handed to keep(row, token, value); this thread's rows.
template <class Keep>
void linear(const Matrix& m, int type, Inputs& x, Part mine, Keep keep) {
  in_turn(m, x, nullptr, mine.begin, mine.end, false, [&](int64_t first, int64_t last, float* values) {
    float biases[kAtOnce] = {};
    if (m.bias) widen(type, static_cast<const char*>(m.bias) + first * (type == kFloat ? 4 : 2), last - first, biases);
    for (int64_t row = first; row < last; ++row, values += x.padded)
      for (int64_t t = 0; t < x.tokens; ++t) keep(row, t, rounded(type, values[t] + biases[row - first]));
  });
}

constexpr int kGroup = 8;  // rows added at a time where each is exact

// A part of the columns, whole cache lines or vectors of codes.
inline Part columns_of(const Matrix& m, Team team) {
  if (m.format < kFormat8) return Part(m.columns, kLine / (m.format == kFormatFloat ? 4 : 2), team);
  Part groups(m.groups(), kPer, team);
  groups.begin *= kGroupSize;
  groups.end *= kGroupSize;
  return groups;
}

// acc[t * stride + columns] = sum over i of hidden[i * T + t] * row neurons[i], `count` rows. stride is at least the
// columns, for codes rounded up to whole groups.
template <int T>
void sum_rows_of(const Matrix& m, const int64_t* neurons, const float* hidden, int64_t count, Part columns, float* acc,
              int64_t stride) {
  if (columns.begin >= columns.end) return;
  for (int t = 0; t < T; ++t) std::fill(acc + t * stride + columns.begin, acc + t * stride + columns.end, 0.0f);
  const auto fetch = [&](int64_t from, int64_t rows, int64_t begin_byte, int64_t end_byte) {
    for (int64_t i = from; i < std::min(from + rows, count); ++i)
      for (int64_t byte = begin_byte; byte < end_byte; byte += kLine) prefetch(m.row(neurons[i]) + byte);
  };
  const int64_t first = columns.begin / kGroupSize, last = columns.end / kGroupSize;
  if (m.format == kFormat4) {
    BlockOf4 block[T];
    for (int64_t i = 0; i < count; i += kBlock) {
      fetch(i + kBlock, kBlock, first * 16, last * 16);
      for (int t = 0; t < T; ++t)
        for (int64_t r = 0; r < kBlock; ++r) {
          const int64_t from = std::min(i + r, count - 1), neuron = neurons[from];
          block[t].rows[r] = m.row(neuron);
          block[t].words[r] = m.row_words(neuron);
          block[t].hidden[r] = i + r < count ? hidden[from * T + t] : 0.0f;
        }
      for (int64_t g = first; g < last; g += kLanes)
        for (int t = 0; t < T; ++t)
          add_block_4(block[t], g, std::min<int64_t>(kLanes, last - g), acc + t * stride + g * kGroupSize);
    }
  } else if (m.format == kFormat8) {
    const int8_t* rows[kGroup];
    const fp16* scales[kGroup];
    const auto set = [&](int64_t i, int g) {
      rows[g] = reinterpret_cast<const int8_t*>(m.row(neurons[i]));
      scales[g] = m.row_scales(neurons[i]);
    };
    int64_t i = 0;
    for (; i + kGroup <= count; i += kGroup) {
      fetch(i + kGroup, kGroup, first * kGroupSize, last * kGroupSize);
      for (int g = 0; g < kGroup; ++g) set(i + g, g);
      for (int64_t g = first; g < last; g += kLanes)
        add_block_8<kGroup, T>(rows, scales, hidden + i * T, g, std::min<int64_t>(kLanes, last - g),
                               acc + g * kGroupSize, stride);
    }
    for (; i < count; ++i) {
      set(i, 0);
      for (int64_t g = first; g < last; g += kLanes)
        add_block_8<1, T>(rows, scales, hidden + i * T, g, std::min<int64_t>(kLanes, last - g),
                          acc + g * kGroupSize, stride);
    }
  } else {
    with_type(static_cast<int>(m.format), [&](auto* element) {
      using E = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
      const E *weights = static_cast<const E*>(m.weights), *rows[kGroup], *next[kGroup];
      int64_t i = 0;
      for (; i + kGroup <= count; i += kGroup) {
        for (int g = 0; g < kGroup; ++g) {
          rows[g] = weights + neurons[i + g] * m.columns;
          next[g] = weights + neurons[std::min(i + kGroup + g, count - 1)] * m.columns;
        }
        add_rows<kGroup, T>(rows, next, hidden + i * T, acc, stride, columns.begin, columns.end);
      }
      for (; i < count; ++i) {
        rows[0] = weights + neurons[i] * m.columns;
        add_rows<1, T>(rows, rows, hidden + i * T, acc, stride, columns.begin, columns.end);
      }
    });
  }
}

inline void sum_rows(const Matrix& m, const int64_t* neurons, const float* hidden, int64_t count, int64_t tokens,
                     Part columns, float* acc, int64_t stride) {
  with_tokens(tokens, [&](auto T) { sum_rows_of<decltype(T)::value>(m, neurons, hidden, count, columns, acc, stride); });
}

inline void dequantize(const Matrix& m, int64_t row, int64_t size, float* out) {
  if (m.format < kFormat8) return widen(static_cast<int>(m.format), m.row(row), size, out);
  if (m.format == kFormat4) return dequantize_row_4(m.row(row), m.row_words(row), size, out);
  dequantize_row_8(reinterpret_cast<const int8_t*>(m.row(row)), m.row_scales(row), size, out);
}
