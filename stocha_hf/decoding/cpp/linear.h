// Products of a matrix with x, which it may cut, in either layout: rows' products with x, or a sum of the rows whose
// inputs are left.
//
// Where rows are outputs, what is cut becomes the centre and all is read. Where they are inputs, those that are 0 for
// every token are not read. Without cuts all are, in the same blocks whatever the number of tokens, so that the same
// token gives the same numbers beside others.
#pragma once

#include "sums.h"

constexpr int64_t kAtOnce = 64;  // outputs that are looked at together

inline bool cuts(const Matrix& m, const Inputs& x) { return x.cuts && m.threshold > 0; }

// An entry of x as a matrix that cuts takes it; NaN stays.
inline float kept(const Matrix& m, int type, float value) {
  const float centred = m.centre == 0 ? value : rounded(type, value - m.centre);
  return std::abs(centred) <= m.threshold ? m.centre : value;
}

// x as a matrix takes it whose rows are outputs.
inline Inputs& taken(const Matrix& m, Inputs& x) {
  if (!cuts(m, x)) return x;
  static thread_local Inputs cut;
  static thread_local std::vector<float> values;
  values.resize(x.tokens * x.size);
  for (size_t i = 0; i < values.size(); ++i) values[i] = kept(m, x.type, x.values[i]);
  cut.set(values.data(), x.tokens, x.size);
  return cut;
}

// This thread's sums of outputs `begin` to `end` - 1 of a matrix whose rows are inputs.
inline Sums outputs(const Matrix& m, const Inputs& x, int64_t begin, int64_t end) {
  static thread_local std::vector<int64_t> list;
  static thread_local std::vector<float> factors;
  const int64_t T = x.padded;
  const bool is_cut = cuts(m, x);
  list.resize(x.size);
  factors.resize(x.size * T);
  int64_t count = 0;
  for (int64_t i = 0; i < x.size; ++i) {
    bool any = !is_cut;
    for (int64_t t = 0; t < T; ++t) {
      const float value = x.values[t * x.size + i];
      factors[count * T + t] = is_cut && t < x.tokens ? kept(m, x.type, value) : value;
      any |= factors[count * T + t] != 0;
    }
    list[count] = i;
    count += any;
  }
  Part columns{begin / kUnit * kUnit, end};
  return sums_of(m, list.data(), factors.data(), count, T, x.tokens, columns);
}

// The outputs that are a thread's.
inline Part part_of(const Matrix& m, Team team) { return Part(m.outputs(), m.rows_are_inputs ? kUnit : kRows, team); }

// f(first, last, values [last - first, x.padded]) for outputs `begin` to `end` - 1, or those of a rising list, some at a
// time.
template <class F>
void in_turn(const Matrix& m, Inputs& given, const int64_t* list, int64_t begin, int64_t end, bool side_by_side, F f) {
  if (begin >= end) return;
  float values[kAtOnce * kTokens];
  const int64_t T = given.padded;
  Sums sums{};
  if (m.rows_are_inputs) sums = list ? outputs(m, given, list[begin], list[end - 1] + 1) : outputs(m, given, begin, end);
  Inputs& x = m.rows_are_inputs ? given : taken(m, given);
  for (int64_t i = begin; i < end; i += kAtOnce) {
    const int64_t last = std::min(i + kAtOnce, end);
    if (m.rows_are_inputs)
      for (int64_t o = i; o < last; ++o)
        for (int64_t t = 0; t < T; ++t) values[(o - i) * T + t] = sums(list ? list[o] : o, t);
    else
      products(m, x, {list, i, last, end, side_by_side}, values);
    f(i, last, values);
  }
}

// y = W x + bias, each output rounded to the model's type and handed to keep(output, token, value); this thread's.
template <class Keep>
void linear(const Matrix& m, Inputs& x, Team team, Keep keep) {
  const Part mine = part_of(m, team);
  in_turn(m, x, nullptr, mine.begin, mine.end, false, [&](int64_t first, int64_t last, float* values) {
    float biases[kAtOnce] = {};
    if (m.bias) widen(x.type, static_cast<const char*>(m.bias) + first * (x.type == kFloat ? 4 : 2), last - first, biases);
    for (int64_t row = first; row < last; ++row, values += x.padded)
      for (int64_t t = 0; t < x.tokens; ++t) keep(row, t, rounded(x.type, values[t] + biases[row - first]));
  });
}
