// A gated FFN: all gate rows, then the up rows and down rows of active neurons only.
//
// down is transposed, a row a neuron, or as the parameter has it where no neuron is skipped. Rounding follows PyTorch's
// dense path: gate, up, activation and hidden are rounded to the model's type, sums are float32. Results do not depend
// on the number of threads: a sum of down's rows has two halves for any number, other sums are never split.
#pragma once

#include <numeric>

#include "prediction.h"

enum Activation { kRelu, kFatRelu, kRelu2, kDRelu, kShiftedRelu, kSilu, kGelu };

struct Ffn {  // as structs.py has it
  Matrix gate, up, down;
  GateCopy copy;  // that says which rows of gate to read
  int64_t activation;
  float threshold;

  bool skips() const { return activation < kSilu; }
  int64_t groups() const { return (gate.outputs() + kGroupSize - 1) / kGroupSize; }
  // A thread's neurons, whole groups where down's rows run along them, or its tokens' factors are summed of them.
  Part neurons(Team team) const {
    const bool any = gate.rows_are_inputs || (down.rows_are_inputs && !down.factors);
    return any ? part_of(gate, team) : Part(gate.outputs(), kGroupSize, team);
  }
};

struct Scratch {  // shared by a team
  std::vector<float> hidden, sums, dots;
  std::vector<int64_t> active, counts;
  QuantizedX for_down;
  void reserve(const Ffn& f, int64_t padded_tokens, int threads) {
    hidden.resize(std::max<size_t>(hidden.size(), f.gate.outputs() * padded_tokens));
    active.resize(std::max<size_t>(active.size(), f.gate.outputs()));
    counts.assign(threads, 0);
    if (!f.down.rows_are_inputs) for_down.reserve(padded_tokens, f.gate.outputs());
    if (f.down.factors) dots.resize(std::max<size_t>(dots.size(), f.groups() * padded_tokens));
    reserve({&f.gate, &f.up}, padded_tokens);
    reserve({&f.down}, padded_tokens);
  }
  void reserve(std::initializer_list<const Matrix*> together, int64_t padded_tokens) {
    size_t room = 0;
    for (const Matrix* m : together) room += Product::room_of(*m, padded_tokens);
    sums.resize(std::max(sums.size(), room));
  }
};

inline bool all_finite(const float* x, int64_t size) {
  Vector zeros = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) zeros += load(x + i) * 0.0f;
  float total = sum(zeros);
  for (; i < size; ++i) total += x[i] * 0.0f;
  return total == 0;
}

// The gates' factors of hidden entries, in place; gates hold values of the type. NaN passes, as through PyTorch's ReLU.
inline void activate(float* gates, int64_t count, const Ffn& f, int type) {
  if (f.skips()) {
    for (int64_t i = 0; i < count; ++i) {
      const float gate = gates[i];
      const float factor = f.activation == kRelu2 ? gate * gate : f.activation == kShiftedRelu ? gate - f.threshold : gate;
      gates[i] = gate <= f.threshold ? 0 : factor;
    }
  } else {
    for (int64_t i = 0; i < count; i += kLanes) {  // `gates` has room for whole vectors
      const Vector gate = load(gates + i);
      Vector inner = gate;  // the factor is gate / (1 + e^-inner): tanh's form of GELU is one of these as well
      if (f.activation == kGelu) inner = 1.5957691216f * (gate + 0.044715f * gate * gate * gate);
      store(gate / (1.0f + exponential(-inner)), gates + i);
    }
  }
  round_row(type, gates, count);
}

// The part of neurons `begin` to `end` - 1 of a list in the products w x of down's factors, in groups of neurons, so that
// sums do not depend on the number of threads: dots [T][groups], of hidden [T] a neuron.
template <int T>
void dots_of_hidden(const Ffn& f, int type, const float* hidden, const int64_t* list, int64_t begin, int64_t end, Part mine,
                    float* dots) {
  const int64_t groups = f.groups(), size = type == kFloat ? 4 : 2;
  const auto* w = static_cast<const char*>(f.down.factors);
  const bool all = T == 1 && end == mine.end;
  int64_t i = begin;
  for (int64_t first = mine.begin; first < mine.end; first += kGroupSize) {
    const int64_t last = std::min(first + kGroupSize, mine.end), group = first / kGroupSize;
    if (all) {
      dots[group] = dot_with(type, w + first * size, hidden + first, last - first);
      continue;
    }
    float own[T][kGroupSize] = {};
    for (; i < end && list[i] < last; ++i)
      for (int t = 0; t < T; ++t) own[t][list[i] - first] = hidden[i * T + t];
    for (int t = 0; t < T; ++t) dots[t * groups + group] = dot_with(type, w + first * size, own[t], last - first);
  }
}

// A thread's part of a gated FFN of x; ends with the outputs of its columns or rows handed to keep(output, token,
// value). Returns the number of neurons that were active for some token.
template <class Keep>
int64_t ffn(const Ffn& f, Inputs& x, Scratch& scratch, Team team, Keep keep) {
  const int type = x.type;
  const int64_t width = f.gate.outputs(), T = x.padded;
  float* hidden = scratch.hidden.data();  // [T] a neuron; of a thread's neurons, those that are active come first
  int64_t* active = scratch.active.data();
  // 0 * inf is NaN in the dense path: where x is not finite, no neuron may be skipped
  const bool all = !f.skips() || !all_finite(x.values.data(), x.tokens * x.size);
  const Part mine = f.neurons(team);
  float* room = scratch.sums.data();
  const Product gate(f.gate, T, room), up(f.up, T, room);
  begin({&gate, &up}, x, team);

  // Where all of down's rows are read, the first ones are fetched while gates and hidden entries are computed.
  const Part of_down = f.down.rows_are_inputs ? Part() : part_of(f.down, team);
  Fetch down_rows{f.down.row(of_down.begin), f.down.row(of_down.end)};

  // 1. Gate rows, all or those that its copy leaves: `found` are those with an activation that is not zero.
  const bool predicted = f.copy.codes && !all && x.tokens <= kCoarseTokens;
  const int64_t possible = predicted ? candidates_of(f.copy, f.threshold, x, mine, active) : mine.end;
  int64_t found = mine.begin;
  in_turn(gate, x, predicted ? active : nullptr, mine.begin, possible, false, [&](int64_t first, int64_t last, float* gates) {
    round_row(type, gates, (last - first) * T);
    activate(gates, (last - first) * T, f, type);
    if (all) {  // of all neurons, none of which was left out before
      std::copy(gates, gates + (last - first) * T, hidden + first * T);
      for (int64_t i = first; i < last; ++i, ++found) {
        active[i] = i;
        down_rows.line();
      }
      return;
    }
    for (int64_t i = first; i < last; ++i, gates += T) {
      down_rows.line();
      const int64_t neuron = predicted ? active[i] : i;
      bool any = false;
      for (int64_t t = 0; t < T; ++t) {
        hidden[found * T + t] = gates[t];
        any |= gates[t] != 0;
      }
      active[found] = neuron;
      found += any;
    }
  });

  // 2. Their up rows, and what of hidden down takes.
  const bool cut = cuts(f.down, x), skips = f.down.rows_are_inputs && (f.skips() || cut);
  const bool by_token = cut && f.down.factors;  // which take all of hidden
  int64_t kept_end = mine.begin;
  const auto keep_for_down = [&](int64_t first, int64_t last, const float* values) {
    if (!skips) {
      std::copy(values, values + (last - first) * T, hidden + kept_end * T);
      for (int64_t i = first; i < last; ++i, ++kept_end) {
        active[kept_end] = active[i];
        down_rows.line();
      }
      return;
    }
    for (int64_t i = first; i < last; ++i, values += T) {
      down_rows.line();
      bool any = false;
      for (int64_t t = 0; t < T; ++t) {
        hidden[kept_end * T + t] = values[t];
        any |= t < x.tokens && values[t] != 0;
      }
      active[kept_end] = active[i];
      kept_end += any;
    }
  };
  in_turn(up, x, all ? nullptr : active, mine.begin, found, !all, [&](int64_t first, int64_t last, float* values) {
    const int64_t count = (last - first) * T;
    round_row(type, values, count);
    if (f.activation == kDRelu)
      for (int64_t k = 0; k < count; ++k) values[k] = values[k] <= 0 ? 0 : values[k];
    for (int64_t k = 0; k < count; ++k) values[k] *= hidden[first * T + k];
    round_row(type, values, count);
    if (by_token) {
      std::copy(values, values + count, hidden + first * T);
      return;
    }
    if (cut) cut_in_place(f.down, type, f.down.threshold, values, count);
    keep_for_down(first, last, values);
  });
  if (by_token) {
    with_tokens(T, [&](auto tokens) {
      dots_of_hidden<decltype(tokens)::value>(f, type, hidden, active, mine.begin, found, mine, scratch.dots.data());
    });
    team.wait();
    float limits[kTokens] = {}, values[kAtOnce * kTokens] = {};
    for (int64_t t = 0; t < x.tokens; ++t) {
      const float* own = scratch.dots.data() + t * f.groups();
      limits[t] = f.down.threshold * factor_of(f.down, type, std::accumulate(own, own + f.groups(), 0.0f));
    }
    for (int64_t i = T; i < kTokens; ++i) limits[i] = limits[i - T];  // as the values of some neurons lie
    for (int64_t first = mine.begin; first < found; first += kAtOnce) {
      const int64_t last = std::min(first + kAtOnce, found);
      std::copy(hidden + first * T, hidden + last * T, values);
      for (int64_t k = 0; k < (last - first) * T; k += kTokens) cut_in_place(f.down, type, limits, values + k);
      keep_for_down(first, last, values);
    }
  }
  // Each thread makes of its neurons what all read.
  const bool shares = all && !f.down.rows_are_inputs && f.down.format == kFormat4;
  if (shares) scratch.for_down.prepare_part(hidden, mine.begin, mine.end, width, T);
  scratch.counts[team.thread] = kept_end - mine.begin;
  team.wait();

  // 3. All active rows of down.
  static thread_local std::vector<int64_t> neurons;
  static thread_local std::vector<float> factors;
  static thread_local Inputs hidden_x;
  int64_t count = 0;
  const auto for_active = [&](auto keep_part) {  // those of each thread
    for (int other = 0; other < team.threads; ++other) {
      const int64_t begin = f.neurons({other, team.threads, nullptr}).begin, end = begin + scratch.counts[other];
      count += end - begin;
      keep_part(begin, end);
    }
  };
  room = scratch.sums.data();
  factors.clear();
  if (f.down.rows_are_inputs) {
    neurons.clear();
    for_active([&](int64_t begin, int64_t end) {
      neurons.insert(neurons.end(), active + begin, active + end);
      factors.insert(factors.end(), hidden + begin * T, hidden + end * T);
    });
    const Product down(f.down, T, room);
    RowSum parts[2];
    sum_all(parts, parts_of_halves(f.down, neurons.data(), factors.data(), count, T, x.tokens, team, down.halves, parts));
    team.wait();
    finish(down, x, team, keep);
  } else if (shares) {
    hidden_x.type = type;
    hidden_x.share(scratch.for_down, x.tokens, T, width);
    count = width;
    finish(Product(f.down, T, room), hidden_x, team, keep);
  } else {
    factors.resize(x.tokens * width);
    for_active([&](int64_t begin, int64_t end) {
      if (all && T == 1) return static_cast<void>(std::copy(hidden + begin, hidden + end, factors.begin() + begin));
      for (int64_t i = begin; i < end; ++i)
        for (int64_t t = 0; t < x.tokens; ++t) factors[t * width + active[i]] = hidden[i * T + t];
    });
    hidden_x.type = type;
    hidden_x.set(factors.data(), x.tokens, width);
    finish(Product(f.down, T, room), hidden_x, team, keep);
  }
  return count;
}
