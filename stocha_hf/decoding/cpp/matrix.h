// A matrix of weights in any format, and its rows' products with x.
#pragma once

#include <type_traits>

#include "planes.h"
#include "team.h"

enum Format { kFormatBf16 = kBf16, kFormatFp16 = kFp16, kFormatFloat = kFloat, kFormat8, kFormat4, kFormatPlanes };

struct Matrix {  // as structs.py has it
  const void* weights;  // [rows, columns], or their codes, also in planes [2, rows]; columns of codes are filled to 32
  const void* scales;  // [rows, columns / 32], of codes: float16, or words of 4 bits
  const void* bias;  // [outputs] or null, of the model's type
  int64_t rows, columns, format;
  int64_t rows_are_inputs;  // or outputs: y is a sum of rows, or rows' products with x
  float threshold, centre;  // x's entries within the threshold of the centre are cut to it; 0: none
  const void* factors;  // w and b, [inputs + 1] of the model's type: a token's threshold is times e^tanh(w x + b); or null

  int64_t inputs() const { return rows_are_inputs ? rows : columns; }
  int64_t outputs() const { return rows_are_inputs ? columns : rows; }
  int64_t groups() const { return (columns + kGroupSize - 1) / kGroupSize; }
  int64_t row_bytes() const {
    if (format == kFormat4 || format == kFormatPlanes) return groups() * 16;
    if (format == kFormat8) return groups() * kGroupSize;
    return columns * (format == kFormatFloat ? 4 : 2);
  }
  const uint8_t* row(int64_t r) const { return static_cast<const uint8_t*>(weights) + r * row_bytes(); }
  const uint8_t* low(int64_t r) const { return row(rows + r); }
  const fp16* row_scales(int64_t r) const { return static_cast<const fp16*>(scales) + r * groups(); }
  const uint16_t* row_words(int64_t r) const { return static_cast<const uint16_t*>(scales) + r * groups(); }
};

// A dot product with some w of the model's type.
inline float dot_with(int type, const void* w, const float* x, int64_t size) {
  float found = 0;
  with_type(type, [&](auto* element) {
    const auto* of_w = static_cast<decltype(element)>(w);
    constexpr int kChains = 4;  // of sums, since each waits for its last one
    Vector totals[kChains] = {};
    int64_t i = 0;
    for (; i + kChains * kLanes <= size; i += kChains * kLanes)
#pragma GCC unroll 4
      for (int j = 0; j < kChains; ++j)
        totals[j] = fused(load(x + i + j * kLanes), load(of_w + i + j * kLanes), totals[j]);
    for (; i + kLanes <= size; i += kLanes) totals[0] = fused(load(x + i), load(of_w + i), totals[0]);
    found = sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
    for (; i < size; ++i) found = fused(x[i], to_float(of_w[i]), found);
  });
  return found;
}

// What a threshold is multiplied with, given w x.
inline float factor_of(const Matrix& m, int type, float dot) {
  const int64_t at = m.inputs() * (type == kFloat ? 4 : 2);
  float b;
  widen(type, static_cast<const char*>(m.factors) + at, 1, &b);
  return std::exp(std::tanh(dot + b));
}

// x [tokens, size] of a product, as the formats want it: made once, used with several matrices.
struct Inputs {
  int64_t tokens = 0, padded = 0, size = 0;  // padded: 1, 2, 4 or 8 tokens, those beyond `tokens` zero
  std::vector<float> values;
#if defined(STOCHA_BF16_X)
  std::vector<bf16> halves;
#endif
  QuantizedX of_4, of_8;
  const QuantizedX* shared = nullptr;  // what a team made of x in 4 bits together, in the place of `of_4`
  bool has_4 = false, has_8 = false;
  int type = kFloat;  // of the model
  bool cuts = false;  // whether matrices with a threshold cut it
  int64_t number = 0;  // one for each x of a thread
  const void* factors_of = nullptr;  // what `factors` were computed with, of this x
  float factors[kTokens];

  void set(const float* x, int64_t count, int64_t width) {
    static thread_local int64_t numbers = 0;
    number = ++numbers;
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
    shared = nullptr;
    factors_of = nullptr;
  }

  // A token's threshold of a matrix.
  float limit(const Matrix& m, int64_t token) {
    if (!m.factors) return m.threshold;
    if (factors_of != m.factors)
      for (int64_t t = 0; t < tokens; ++t)
        factors[t] = factor_of(m, type, dot_with(type, m.factors, &values[t * size], size));
    factors_of = m.factors;
    return m.threshold * factors[token];
  }

  // x that a team made: there are no values.
  void share(const QuantizedX& x, int64_t count, int64_t padded_count, int64_t width) {
    tokens = count, padded = padded_count, size = width;
    shared = &x;
  }

  const QuantizedX& quantized(int bits) {
    if (shared) return *shared;
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

// f(row, i, whole) for each of these rows in 4 bits or planes; see load_chunk for `whole`, a constant. As rows that lie
// together are read straight on, what is fetched meanwhile lies so many bytes ahead.
template <class F>
STOCHA_INLINED inline void for_rows(const Matrix& m, Rows chosen, F f) {
  const int64_t groups = m.groups(), bytes = groups * 16, ahead = std::max<int64_t>(kAheadListed / bytes, kRows);
  const auto* codes = static_cast<const uint8_t*>(m.weights);
  const int64_t last_whole = m.rows - 1 - (kLanes + groups - 1) / groups;
  for (int64_t i = chosen.begin; i < chosen.end; ++i) {
    const int64_t row = chosen[i];
    Row own{codes + row * bytes, codes + row * bytes + kAheadAlone, groups};
    if (chosen.list) {
      const int64_t then = chosen[std::min(i + ahead, chosen.limit - 1)];
      own.later = codes + then * bytes;
      for (int64_t g = 0; g < groups; g += kLine / 2) prefetch(m.row_words(then) + g);
    }
    row <= last_whole ? f(own, row, std::true_type()) : f(own, row, std::false_type());
  }
}

// f(two rows, the first one's number) where that is faster, and rows lie together: takes those off `chosen`.
template <int T, class F>
STOCHA_INLINED inline void for_twos(const Matrix& m, Rows& chosen, F f) {
  if (T != 4 || !kSharesX || chosen.list) return;
  const int64_t groups = m.groups(), bytes = groups * 16, last_whole = m.rows - 1 - (kLanes + groups - 1) / groups;
  const auto* codes = static_cast<const uint8_t*>(m.weights);
  for (; chosen.begin + 1 < std::min(chosen.end, last_whole + 1); chosen.begin += 2) {
    const uint8_t *a = codes + chosen.begin * bytes, *b = a + bytes;
    f({{a, a + kAheadAlone, groups}, {b, b + kAheadAlone, groups}}, chosen.begin);
  }
}

// values [rows, T] of the products of these rows with T tokens.
template <int T>
void products_4(const Matrix& m, const QuantizedX& of_x, Rows chosen, float* values) {
  const TokensOfX<T> x(of_x);
  const auto* words = static_cast<const uint16_t*>(m.scales);
  for_twos<T>(m, chosen, [&](const Row(&own)[2], int64_t row) STOCHA_INLINED {
    dots_of_two<T, true>(own, x, values, [&](int r, int64_t chunk, int64_t left) STOCHA_INLINED {
      const Levels levels = load_levels<true>(words + (row + r) * own[0].groups, chunk, left);
      return Scaled{levels.scale, levels.scale * levels.eighths};
    });
    values += 2 * T;
  });
  for_rows(m, chosen, [&](const Row& own, int64_t row, auto whole) STOCHA_INLINED {
    dots<T, decltype(whole)::value>(own, words + row * own.groups, x, values);
    values += T;
  });
}

template <int T>
void products_of_planes(const Matrix& m, const QuantizedX& of_x, Rows chosen, float* values) {
  const TokensOfX<T> x(of_x);
  const int64_t plane = m.rows * m.row_bytes();
  for_rows(m, chosen, [&](const Row& own, int64_t row, auto whole) STOCHA_INLINED {
    for (int64_t byte = 0; byte < own.groups * 16; byte += kLine) prefetch(own.later + plane + byte);
    dots<T, decltype(whole)::value>(own, own.codes + plane, m.row_scales(row), x, values);
    values += T;
  });
}

// Of the high plane alone, with rows' variances, given the squares of x.
template <int T>
void products_about(const Matrix& m, const QuantizedX& of_x, Rows chosen, const float* squares, float* values,
                    float* variances) {
  const TokensOfX<T> x(of_x);
  const auto* scales = static_cast<const fp16*>(m.scales);
  for_twos<T>(m, chosen, [&](const Row(&own)[2], int64_t row) STOCHA_INLINED {
    dots_about<T>(own, scales + row * own[0].groups, x, squares, values, variances);
    values += 2 * T;
    variances += 2;
  });
  for_rows(m, chosen, [&](const Row& own, int64_t row, auto whole) STOCHA_INLINED {
    dots_about<T, decltype(whole)::value>(own, scales + row * own.groups, x, squares, values, variances++);
    values += T;
  });
}

// Of 8 bits, kRows rows at a time, for as many tokens as the registers hold: T tokens from the first one on, of kRows rows
// from i on, of which there are `here`.
template <int T>
void products_8(const Matrix& m, const QuantizedX& x, Rows chosen, int64_t i, int64_t here, int64_t first, float* values,
                int64_t stride) {
  constexpr int R = kRows / T;
  const int64_t ahead = std::max<int64_t>((chosen.list ? kAheadListed : kAheadAlone) / m.row_bytes(), kRows);
  const uint8_t* later[R];
  for (int64_t from = 0; from < here; from += R) {
    RowsOf8<R> rows;
    rows.groups = m.groups();
    rows.readable = true;
    for (int r = 0; r < R; ++r) {
      const int64_t at = i + std::min(from + r, here - 1), row = chosen[at];
      rows.codes[r] = reinterpret_cast<const int8_t*>(m.row(row));
      rows.scales[r] = m.row_scales(row);
      const int64_t then = chosen[std::min(at + ahead, chosen.limit - 1)];
      later[r] = m.row(then);
      if (chosen.list && !first)
        for (int64_t g = 0; g < m.groups(); g += kLine / 2) prefetch(m.row_words(then) + g);
      rows.readable &= (m.rows - 1 - row) * m.groups() >= kLanes;
    }
    Fetch fetch{nullptr, nullptr, later, first ? 0 : R, m.row_bytes()};
    if (!chosen.list && !first) fetch = {later[0], later[R - 1] + m.row_bytes()};
    float found[R][T];
    dots<R, T>(rows, fetch, x, first, found);
    for (int64_t r = 0; r < std::min<int64_t>(R, here - from); ++r)
      std::copy(found[r], found[r] + T, values + (from + r) * stride + first);
  }
}

inline void products_8(const Matrix& m, Inputs& x, Rows chosen, float* values) {
  const QuantizedX& of_x = x.quantized(8);
  for (int64_t i = chosen.begin; i < chosen.end; i += kRows) {
    const int64_t here = std::min<int64_t>(kRows, chosen.end - i);
    int64_t t = 0;
    for (; t + 4 <= x.tokens; t += 4) products_8<4>(m, of_x, chosen, i, here, t, values, x.padded);
    for (; t + 2 <= x.tokens; t += 2) products_8<2>(m, of_x, chosen, i, here, t, values, x.padded);
    for (; t < x.tokens; ++t) products_8<1>(m, of_x, chosen, i, here, t, values, x.padded);
    for (int64_t r = 0; r < here; ++r, values += x.padded) std::fill(values + x.tokens, values + x.padded, 0.0f);
  }
}

template <int T>
void products(const Matrix& m, Inputs& x, Rows chosen, float* values) {
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
  if (m.format == kFormat8) return products_8(m, x, chosen, values);
  with_tokens(x.padded, [&](auto T) {
    constexpr int tokens = decltype(T)::value;
    if (m.format == kFormat4) return products_4<tokens>(m, x.quantized(4), chosen, values);
    if (m.format == kFormatPlanes) return products_of_planes<tokens>(m, x.quantized(4), chosen, values);
    products<tokens>(m, x, chosen, values);
  });
}

inline void dequantize(const Matrix& m, int64_t row, int64_t size, float* out) {
  if (m.format < kFormat8) return widen(static_cast<int>(m.format), m.row(row), size, out);
  if (m.format == kFormat4) return dequantize_row_4(m.row(row), m.row_words(row), size, out);
  if (m.format == kFormatPlanes) return dequantize_planes(m.row(row), m.low(row), m.row_scales(row), size, out);
  dequantize_row_8(reinterpret_cast<const int8_t*>(m.row(row)), m.row_scales(row), size, out);
}
