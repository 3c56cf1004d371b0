// Products of a matrix with x, which it may cut, in either layout: rows' products with x, or a sum of the rows whose
// inputs are left. A team begins products of one x together, and waits once before it finishes them.
//
// Where rows are outputs, what is cut becomes the centre and all is read. Where they are inputs, those that are 0 for
// every token are not read. Without cuts all are, in the same blocks whatever the number of tokens, so that the same
// token gives the same numbers beside others.
#pragma once

#include "sums.h"

constexpr int64_t kAtOnce = 64;  // outputs that are looked at together

inline bool cuts(const Matrix& m, const Inputs& x) { return x.cuts && m.threshold > 0; }

// Whether two matrices that cut leave the same of an x.
inline bool cut_alike(const Matrix& a, const Matrix& b) {
  return a.threshold == b.threshold && a.centre == b.centre && a.factors == b.factors;
}

// An entry of x as a matrix that cuts takes it, given its token's threshold; NaN stays.
inline float kept(const Matrix& m, int type, float limit, float value) {
  const float centred = m.centre == 0 ? value : rounded(type, value - m.centre);
  return std::abs(centred) <= limit ? m.centre : value;
}

// The same of some, in place.
inline void cut_in_place(const Matrix& m, int type, float limit, float* values, int64_t count) {
  if (m.centre != 0) {
    for (int64_t i = 0; i < count; ++i) values[i] = kept(m, type, limit, values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = std::abs(values[i]) <= limit ? 0.0f : values[i];
  }
}

// The same of kTokens of them, each with a threshold of its own.
inline void cut_in_place(const Matrix& m, int type, const float* limits, float* values) {
  if (m.centre != 0) {
    for (int i = 0; i < kTokens; ++i) values[i] = kept(m, type, limits[i], values[i]);
  } else {
    for (int i = 0; i < kTokens; ++i) values[i] = std::abs(values[i]) <= limits[i] ? 0.0f : values[i];
  }
}

// x as a matrix takes it whose rows are outputs. Matrices of one x often cut the same of it: q, k and v do.
inline Inputs& taken(const Matrix& m, Inputs& x) {
  if (!cuts(m, x)) return x;
  static thread_local Inputs cut;
  static thread_local int64_t of = 0;  // x, by its number
  static thread_local Matrix by;
  if (of == x.number && cut_alike(by, m)) return cut;
  static thread_local std::vector<float> values;
  values.assign(x.values.begin(), x.values.begin() + x.tokens * x.size);
  for (int64_t t = 0; t < x.tokens; ++t) cut_in_place(m, x.type, x.limit(m, t), &values[t * x.size], x.size);
  cut.set(values.data(), x.tokens, x.size);
  of = x.number, by = m;
  return cut;
}

// The inputs that are left, with each token's entry of them.
struct Left {
  std::vector<int64_t> list;
  std::vector<float> factors;  // [count, x.padded]
  int64_t count = 0;

  void choose(const Matrix& m, Inputs& x) {
    const int64_t T = x.padded;
    const bool is_cut = cuts(m, x);
    list.resize(x.size);
    factors.resize(x.size * T);
    count = 0;
    if (T == 1 && m.centre == 0) {
      const float threshold = is_cut ? x.limit(m, 0) : -1;
      const float* values = x.values.data();
      float* to = factors.data();
      int64_t *places = list.data(), chosen = 0;  // which may stay in registers
      for (int64_t i = 0; i < x.size; ++i) {      // without jumps, which nobody could guess
        places[chosen] = i;
        to[chosen] = values[i];
        chosen += !(std::abs(values[i]) <= threshold);
      }
      count = chosen;
      return;
    }
    float limits[kTokens];
    for (int64_t t = 0; is_cut && t < x.tokens; ++t) limits[t] = x.limit(m, t);
    for (int64_t i = 0; i < x.size; ++i) {
      bool any = !is_cut;
      for (int64_t t = 0; t < T; ++t) {
        const float value = x.values[t * x.size + i];
        factors[count * T + t] = is_cut && t < x.tokens ? kept(m, x.type, limits[t], value) : value;
        any |= factors[count * T + t] != 0;
      }
      list[count] = i;
      count += any;
    }
  }
};

// A product that a team computes in two steps: each thread's part of the sums, where rows are inputs, then, when all
// threads are there, outputs.
struct Product {
  const Matrix* m;
  float* halves;  // of parts_of_halves, [2][padded, stride]
  int64_t padded, stride;

  // Takes room for its sums from `room` on.
  Product(const Matrix& matrix, int64_t padded_tokens, float*& room)
      : m(&matrix), halves(room), padded(padded_tokens), stride(matrix.groups() * kGroupSize) {
    room += room_of(matrix, padded);
  }
  static int64_t room_of(const Matrix& m, int64_t padded_tokens) {
    return m.rows_are_inputs ? 2 * padded_tokens * m.groups() * kGroupSize : 0;
  }

  // values [last - first, padded] of outputs, or of those of a list.
  void sums(const int64_t* list, int64_t first, int64_t last, float* values) const {
    if (padded == 1 && !list) {
      for (int64_t i = first; i < last; ++i) values[i - first] = halves[i] + halves[stride + i];
      return;
    }
    for (int64_t t = 0; t < padded; ++t) {
      const float *a = halves + t * stride, *b = a + padded * stride;
      for (int64_t i = first; i < last; ++i) {
        const int64_t output = list ? list[i] : i;
        values[(i - first) * padded + t] = a[output] + b[output];
      }
    }
  }
};

constexpr int kTogether = 3;  // products of one x, at most

// Begins products of one x, and waits for the team where that is needed.
inline void begin(std::initializer_list<const Product*> all, Inputs& x, Team team) {
  static thread_local Left left[kTogether];
  RowSum parts[2 * kTogether];
  int count = 0, chosen = 0;
  const Matrix* before = nullptr;
  for (const Product* product : all) {
    const Matrix& m = *product->m;
    if (!m.rows_are_inputs) continue;
    if (!before || !cut_alike(*before, m)) left[chosen++].choose(m, x);
    before = &m;
    const Left& own = left[chosen - 1];
    count += parts_of_halves(m, own.list.data(), own.factors.data(), own.count, product->padded, x.tokens, team,
                             product->halves, parts + count);
  }
  sum_all(parts, count);
  if (before) team.wait();
}

// The outputs that are a thread's.
inline Part part_of(const Matrix& m, Team team) { return Part(m.outputs(), m.rows_are_inputs ? kUnit : kRows, team); }

// f(first, last, values [last - first, x.padded]) for outputs `begin` to `end` - 1, or those of a rising list, some at a
// time.
template <class F>
void in_turn(const Product& product, Inputs& given, const int64_t* list, int64_t begin, int64_t end, bool side_by_side, F f) {
  if (begin >= end) return;
  const Matrix& m = *product.m;
  float values[kAtOnce * kTokens];
  Inputs& x = m.rows_are_inputs ? given : taken(m, given);
  for (int64_t i = begin; i < end; i += kAtOnce) {
    const int64_t last = std::min(i + kAtOnce, end);
    if (m.rows_are_inputs)
      product.sums(list, i, last, values);
    else
      products(m, x, {list, i, last, end, side_by_side}, values);
    f(i, last, values);
  }
}

// y = W x + bias of a product that has begun, each output rounded to the model's type and handed to keep(output, token,
// value); this thread's.
template <class Keep>
void finish(const Product& product, Inputs& x, Team team, Keep keep) {
  const Matrix& m = *product.m;
  const Part mine = part_of(m, team);
  in_turn(product, x, nullptr, mine.begin, mine.end, false, [&](int64_t first, int64_t last, float* values) {
    float biases[kAtOnce] = {};
    if (m.bias) widen(x.type, static_cast<const char*>(m.bias) + first * (x.type == kFloat ? 4 : 2), last - first, biases);
    for (int64_t row = first; row < last; ++row, values += x.padded)
      for (int64_t t = 0; t < x.tokens; ++t) keep(row, t, rounded(x.type, values[t] + biases[row - first]));
  });
}
