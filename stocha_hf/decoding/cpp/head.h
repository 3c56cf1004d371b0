// The logits of a step: products of lm_head's rows with what the last norm gives.
//
// Of a head in two planes, a step that wants no more than the greatest logit reads the high plane of all rows, and the
// low plane of those that may have it. The high plane gives a product about, and the variance of what it leaves out, if
// low halves are uniform and independent of x. Sums of such numbers are sub-Gaussian: one is beyond m standard deviations
// with a probability of e^(-m^2 / 2) at most. So a row whose product, and m deviations, stays below some row's exact
// logit is left out; the others get exact logits. The greatest is missed if its own error is beyond that, whatever the
// others' are: once in 4e10 tokens at m = 7.
#pragma once

#include "linear.h"

enum Wanted { kAll, kGreatest, kAbout };  // kAbout: by the high plane alone

constexpr float kMargin = 7;  // standard deviations

struct Head {
  const Matrix& m;
  int type;
  float soft_cap;         // 0: none
  const int64_t* listed;  // rows that are computed, rising; null: all
  int64_t width;          // their number
  float* logits;          // [tokens, width]

  int64_t row(int64_t place) const { return listed ? listed[place] : place; }

  // What transformers makes of the products [count, padded] of rows, in place; it does not fall where a product rises.
  template <class RowOf>
  void to_logits(float* values, int64_t count, int64_t padded, RowOf row_of) const {
    for (int64_t i = 0; m.bias && i < count; ++i) {
      float bias;
      widen(type, static_cast<const char*>(m.bias) + row_of(i) * (type == kFloat ? 4 : 2), 1, &bias);
      for (int64_t t = 0; t < padded; ++t) values[i * padded + t] += bias;
    }
    round_row(type, values, count * padded);
    for (int64_t i = 0; soft_cap > 0 && i < count * padded; ++i)
      values[i] = rounded(type, rounded(type, std::tanh(rounded(type, values[i] / soft_cap))) * soft_cap);
  }

  void put(int64_t place, const float* values, int64_t tokens) const {
    for (int64_t t = 0; t < tokens; ++t) logits[t * width + place] = values[t];
  }

  // A thread's part; `least` is the team's, [threads, kTokens].
  void run(Inputs& x, Team team, Wanted wanted, float* room, float* least) const {
    const Part mine(width, kRows, team);
    if (m.format != kFormatPlanes || wanted == kAll) return all(x, team, mine, room);
    int64_t best[kTokens];
    about(x, mine, wanted == kGreatest ? kMargin : 0, best);
    if (wanted == kAbout) return;
    reach(x, mine, best, least + team.thread * kTokens);
    team.wait();
    float greatest[kTokens];
    std::copy(least, least + kTokens, greatest);
    for (int other = 1; other < team.threads; ++other)
      for (int t = 0; t < kTokens; ++t) greatest[t] = std::max(greatest[t], least[other * kTokens + t]);
    settle(x, mine, greatest);
  }

 private:
  void all(Inputs& x, Team team, Part mine, float* room) const {
    const Product product(m, x.padded, room);
    begin({&product}, x, team);
    in_turn(product, x, listed, mine.begin, mine.end, false, [&](int64_t first, int64_t last, float* values) {
      to_logits(values, last - first, x.padded, [&](int64_t i) { return row(first + i); });
      for (int64_t i = first; i < last; ++i, values += x.padded) put(i, values, x.tokens);
    });
  }

  // Logits by the high plane, or with a margin what they can be at most; and each token's row with the greatest product.
  void about(Inputs& x, Part mine, float margin, int64_t* best) const {
    static thread_local std::vector<float> squares;
    sum_squares(x.values.data(), x.tokens, x.size, x.quantized(4).chunks, squares);
    float values[kAtOnce * kTokens], variances[kAtOnce] = {}, most[kTokens];
    std::fill(most, most + kTokens, -INFINITY);
    for (int64_t t = 0; t < x.tokens; ++t) best[t] = row(mine.begin);
    for (int64_t begin = mine.begin; begin < mine.end; begin += kAtOnce) {
      const int64_t end = std::min(begin + kAtOnce, mine.end);
      with_tokens(x.padded, [&](auto T) {
        const Rows rows{listed, begin, end, mine.end, false};
        products_about<decltype(T)::value>(m, x.quantized(4), rows, squares.data(), values, variances);
      });
      for (int64_t i = begin; i < end; ++i)
        for (int64_t t = 0; t < x.tokens; ++t) {
          const float value = values[(i - begin) * x.padded + t];
          if (!(value > most[t])) continue;
          most[t] = value;
          best[t] = row(i);
        }
      for (int64_t k = 0; k < kAtOnce; k += kLanes) store(margin * root(load(variances + k)), variances + k);
      for (int64_t i = 0; i < end - begin; ++i)
        for (int64_t t = 0; t < x.padded; ++t) values[i * x.padded + t] += variances[i];
      to_logits(values, end - begin, x.padded, [&](int64_t i) { return row(begin + i); });
      for (int64_t i = begin; i < end; ++i) put(i, values + (i - begin) * x.padded, x.tokens);
    }
  }

  // What each token's greatest logit reaches in any case: the greatest exact one of some rows.
  void reach(Inputs& x, Part mine, const int64_t* rows, float* least) const {
    std::fill(least, least + kTokens, -INFINITY);
    if (mine.begin >= mine.end) return;
    float values[kTokens * kTokens];
    products(m, x, {rows, 0, x.tokens, x.tokens, false}, values);
    to_logits(values, x.tokens, x.padded, [&](int64_t i) { return rows[i]; });
    for (int64_t r = 0; r < x.tokens; ++r)
      for (int64_t t = 0; t < x.tokens; ++t) least[t] = std::max(least[t], values[r * x.padded + t]);
  }

  // Exact logits of rows that may reach these ones, for each token; minus infinity for the others.
  void settle(Inputs& x, Part mine, const float* least) const {
    static thread_local std::vector<int64_t> places, rows;
    places.clear();
    rows.clear();
    for (int64_t begin = mine.begin; begin < mine.end; begin += kAtOnce) {
      const int64_t end = std::min(begin + kAtOnce, mine.end);
      uint8_t may[kAtOnce] = {};
      for (int64_t t = 0; t < x.tokens; ++t)
        for (int64_t i = begin; i < end; ++i) may[i - begin] |= !(logits[t * width + i] < least[t]);  // NaN may, too
      for (int64_t i = begin; i < end; ++i) {
        if (!may[i - begin]) continue;
        places.push_back(i);
        rows.push_back(row(i));
      }
    }
    for (int64_t t = 0; t < x.tokens; ++t)
      std::fill(logits + t * width + mine.begin, logits + t * width + mine.end, -INFINITY);
    const auto count = static_cast<int64_t>(rows.size());
    float values[kAtOnce * kTokens];
    for (int64_t begin = 0; begin < count; begin += kAtOnce) {
      const int64_t end = std::min(begin + kAtOnce, count);
      products(m, x, {rows.data(), begin, end, count, false}, values);
      to_logits(values, end - begin, x.padded, [&](int64_t i) { return rows[begin + i]; });
      for (int64_t i = begin; i < end; ++i) put(places[i], values + (i - begin) * x.padded, x.tokens);
    }
  }
};
