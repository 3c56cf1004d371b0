// The logits of a step: products of lm_head's rows with what the last norm gives.
//
// Of a head in two planes, a step that wants no more than the greatest logit reads the high plane of all rows, and the
// low plane of those that may have it. The high plane gives a product about, and the variance of what it leaves out, if
// low halves are uniform and independent of x. Sums of such numbers are sub-Gaussian: one is beyond m standard deviations
// with a probability of e^(-m^2 / 2) at most. So a row whose product, and m deviations, stays below some row's exact
// logit is left out; the others get exact logits. The greatest is missed if its own error is beyond that, whatever the
// others' are: once in 4e10 tokens at m = 7.
//
// A step whose doubt is judged asks too whether the greatest logit's probability is below a limit. One over that is the
// sum of all e^(logit - greatest). There rows that may come near the greatest have exact logits as well, and the others
// add at most what m deviations make of them. Where the sum with that and the sum without lie on one side of the limit,
// so does the whole head's; elsewhere the whole head is read. The sum of the others is beyond its bound only where a
// weighted mean of their e^(error - m deviations) is above 1. By Markov's inequality, of a high power of it, that is as
// rare as one row's error beyond m deviations where deviations are alike: of any number of rows, whatever the errors
// have to do with each other. That is of logits before they are rounded and capped, which keeps their order.
#pragma once

#include "linear.h"

enum Wanted { kAll, kGreatest, kAbout };  // kAbout: by the high plane alone

constexpr float kMargin = 7;     // standard deviations
constexpr float kNear = 4;       // of the greatest logit: what is below adds e^-4 of it at most
constexpr float kSlack = 1e-5f;  // of a sum, which float32 rounds

// What a thread knows of a token's logits: the greatest of those that are exact, and sums of e^(logit - `from`): of
// these, and of the others at most.
struct Known {
  float greatest = -INFINITY, from = -INFINITY;
  double exact = 0, others = 0;
};

struct Head {
  const Matrix& m;
  int type;
  float soft_cap;         // 0: none
  const int64_t* listed;  // rows that are computed, rising; null: all
  int64_t width;          // their number
  float* logits;          // [tokens, width]
  float* sums;            // [tokens], of e^(logit - greatest); null: none are wanted
  float limit;            // where the greatest logits are wanted, sums may be others on the same side of it

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

  // A thread's part; `least` and `known` are the team's, [threads, kTokens].
  void run(Inputs& x, Team team, Wanted wanted, float* room, float* least, Known* known) const {
    const Part mine(width, kRows, team);
    if (m.format != kFormatPlanes || wanted == kAll) {
      all(x, team, mine, room);
      if (sums) tell(x, mine, team, known);
      return;
    }
    int64_t best[kTokens];
    about(x, mine, wanted == kGreatest ? kMargin : 0, best);
    if (wanted == kAbout) return;
    reach(x, mine, best, least + team.thread * kTokens);
    team.wait();
    float greatest[kTokens];
    std::copy(least, least + kTokens, greatest);
    for (int other = 1; other < team.threads; ++other)
      for (int t = 0; t < kTokens; ++t) greatest[t] = std::max(greatest[t], least[other * kTokens + t]);
    settle(x, mine, greatest, sums ? known + team.thread * kTokens : nullptr);
    if (!sums) return;
    team.wait();
    bool certain = true;
    for (int64_t t = 0; t < x.tokens; ++t) {
      const float sum = certain_sum(known + t, team);
      certain &= sum > 0;
      if (team.thread == 0) sums[t] = sum;
    }
    if (certain) return;
    team.wait();
    all(x, team, mine, room);
    tell(x, mine, team, known);
  }

 private:
  // Of what each thread knows of a token: what all do, from the greatest logit on.
  static Known together(const Known* known, Team team) {
    Known all;
    for (int i = 0; i < team.threads; ++i) all.greatest = std::max(all.greatest, known[i * kTokens].greatest);
    all.from = all.greatest;
    for (int i = 0; i < team.threads; ++i) {
      const Known& own = known[i * kTokens];
      if (own.exact == 0 && own.others == 0) continue;
      const double factor = std::exp(static_cast<double>(own.from) - all.from);
      all.exact += own.exact * factor;
      all.others += own.others * factor;
    }
    return all;
  }

  // A sum that lies on the side of the limit where the sum of all logits is; 0 where that is not certain.
  float certain_sum(const Known* known, Team team) const {
    const Known all = together(known, team);
    if (all.exact + all.others <= limit * (1.0 - kSlack)) return static_cast<float>(all.exact + all.others);
    return all.exact >= limit * (1.0 + kSlack) ? static_cast<float>(all.exact) : 0.0f;
  }

  // Sums of a thread's part, of all logits; the first thread's of all parts.
  void tell(const Inputs& x, Part mine, Team team, Known* known) const {
    for (int64_t t = 0; t < x.tokens; ++t) {
      const float* own = logits + t * width;
      Known& found = known[team.thread * kTokens + t] = Known();
      Vector most = Vector{} - INFINITY;
      int64_t i = mine.begin;
      for (; i + kLanes <= mine.end; i += kLanes) most = maximum(load(own + i), most);
      found.greatest = largest(most);
      for (; i < mine.end; ++i) found.greatest = std::max(found.greatest, own[i]);
      found.from = std::max(found.greatest, -3e38f);  // e^(-inf + inf) would be NaN
      for (i = mine.begin; i < mine.end; i += kAtOnce)
        found.exact += sum_of_powers(own + i, std::min(kAtOnce, mine.end - i), found.from);
    }
    team.wait();
    for (int64_t t = 0; team.thread == 0 && t < x.tokens; ++t)
      sums[t] = static_cast<float>(together(known + t, team).exact);
  }

  // The sum of e^(value - from) of kAtOnce values at most.
  static float sum_of_powers(const float* values, int64_t count, float from) {
    float part[kAtOnce];
    if (count < kAtOnce) {
      std::fill(std::copy(values, values + count, part), part + kAtOnce, -INFINITY);
      values = part;
    }
    Vector total = {};
    for (int64_t i = 0; i < kAtOnce; i += kLanes) total += exponential(load(values + i) - from);
    return sum(total);
  }

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

  // Exact logits of rows that may reach these ones, for each token; minus infinity for the others. With `known`, of rows
  // that may come near these ones.
  void settle(Inputs& x, Part mine, const float* least, Known* known) const {
    static thread_local std::vector<int64_t> places, rows;
    places.clear();
    rows.clear();
    for (int64_t t = 0; known && t < x.tokens; ++t) {
      known[t] = Known();
      known[t].from = least[t];
    }
    for (int64_t begin = mine.begin; begin < mine.end; begin += kAtOnce) {
      const int64_t end = std::min(begin + kAtOnce, mine.end);
      uint8_t may[kAtOnce] = {};
      for (int64_t t = 0; t < x.tokens; ++t) {
        const float from = known ? least[t] - kNear : least[t];
        for (int64_t i = begin; i < end; ++i) may[i - begin] |= !(logits[t * width + i] < from);  // NaN may, too
      }
      for (int64_t i = begin; i < end; ++i) {
        if (!may[i - begin]) continue;
        places.push_back(i);
        rows.push_back(row(i));
        for (int64_t t = 0; known && t < x.tokens; ++t) logits[t * width + i] = -INFINITY;
      }
      for (int64_t t = 0; known && t < x.tokens; ++t)
        known[t].others += sum_of_powers(logits + t * width + begin, end - begin, least[t]);
    }
    for (int64_t t = 0; t < x.tokens; ++t)
      std::fill(logits + t * width + mine.begin, logits + t * width + mine.end, -INFINITY);
    const auto count = static_cast<int64_t>(rows.size());
    float values[kAtOnce * kTokens];
    for (int64_t begin = 0; begin < count; begin += kAtOnce) {
      const int64_t end = std::min(begin + kAtOnce, count);
      products(m, x, {rows.data(), begin, end, count, false}, values);
      to_logits(values, end - begin, x.padded, [&](int64_t i) { return rows[begin + i]; });
      for (int64_t i = begin; i < end; ++i) {
        const float* own = values + (i - begin) * x.padded;
        put(places[i], own, x.tokens);
        for (int64_t t = 0; known && t < x.tokens; ++t) {
          known[t].greatest = std::max(known[t].greatest, own[t]);
          known[t].exact += std::exp(static_cast<double>(own[t]) - known[t].from);
        }
      }
    }
  }
};
