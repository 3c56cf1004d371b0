// A whole decode step, from token ids to logits, by one team of threads.
//
// Each thread keeps the residual stream for itself and computes norms and sums of it again: that takes less time than
// waiting for another thread. What a matrix gives is divided among threads by rows, attention by heads; both are
// shared, so six waits a layer, three more where rows are inputs, and one where tokens' own factors cut down's. Where
// transformers rounds to the model's type, this rounds too.
#pragma once

#include "attention.h"
#include "ffn.h"
#include "head.h"

struct Layer {  // as structs.py has it
  Matrix q, k, v, o;
  Ffn ffn;
  const void *input_norm, *attention_norm, *ffn_input_norm, *ffn_norm, *q_norm, *k_norm;  // null where there is none
  const float* frequencies;  // [head_size / 2]
  float rotary_scale, attention_scale, soft_cap;
  int64_t window;  // tokens that one sees, itself included; 0: all
  Cached keys, values;
  int64_t length;  // tokens in the cache; the new ones go behind them
};

struct Model {
  Layer* layers;
  int64_t count;
  Matrix embedding, head;
  const void* norm;
  int64_t type, size, heads, key_heads, head_size, norms_from_one;
  float epsilon, embedding_factor, soft_cap;
};

struct Call {
  const int64_t *ids, *positions, *starts;  // [sequences, tokens] each; [sequences], the first token that is no padding
  int64_t sequences, tokens, kept;          // logits of the last `kept` tokens of each sequence
  float* logits;                            // [sequences, kept, rows of the head], or of those that are listed
  int64_t cuts;                             // whether matrices with a threshold cut their inputs
  const int64_t* listed;                    // rows of the head that are computed, rising; null: all
  int64_t listed_count;
  int64_t wanted;                           // of logits; see Wanted
  float* sums;                              // [sequences, kept], of e^(logit - greatest); null: none are wanted
  float limit;                              // of sums; see Head
};

// Seconds that the first thread spent in each part of all steps so far, where STOCHA_CLOCKS is defined: for benchmarks.
enum Phase { kRest, kProjections, kAttention, kOutput, kFfn, kLogits, kPhases };
#if defined(STOCHA_CLOCKS)
#include <chrono>
extern "C" __attribute__((visibility("default"))) double stocha_clocks[kPhases];
double stocha_clocks[kPhases];
#endif

struct Shared {  // what threads tell each other
  Scratch scratch;
  std::vector<float> q, k, v, attended, projected, least;
  std::vector<Known> known;
};

struct Pass {  // a thread's part of a step
  const Model& model;
  const Call& call;
  Shared& shared;
  Team team;
  int type = static_cast<int>(model.type);
  int64_t count = call.sequences * call.tokens, size = model.size, head_size = model.head_size;
  std::vector<float>& stream = buffer<0>();
  std::vector<float>& normed = buffer<1>();
  std::vector<float>& angles = buffer<2>();  // [tokens][2][head_size / 2]
  Inputs& inputs = input_buffer();

  template <int>
  static std::vector<float>& buffer() {
    static thread_local std::vector<float> own;
    return own;
  }
  static Inputs& input_buffer() {
    static thread_local Inputs own;
    return own;
  }

  static auto keep_in(float* out, int64_t width) {
    return [out, width](int64_t row, int64_t token, float value) { out[token * width + row] = value; };
  }

  // Says that a part ends here.
  void end([[maybe_unused]] Phase phase) const {
#if defined(STOCHA_CLOCKS)
    static double last = 0;
    if (team.thread != 0) return;
    const double now = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    if (phase != kPhases) stocha_clocks[phase] += now - last;
    last = now;
#endif
  }

  void run() {
    end(kPhases);
    inputs.type = type;
    inputs.cuts = call.cuts != 0;
    stream.resize(count * size);
    normed.resize(count * size);
    for (int64_t i = 0; i < count; ++i) embed(call.ids[i], &stream[i * size]);
    const float* frequencies = nullptr;
    for (int64_t l = 0; l < model.count; ++l) {
      const Layer& layer = model.layers[l];
      end(kRest);
      if (layer.frequencies != frequencies) set_angles(layer);
      frequencies = layer.frequencies;
      attention(layer);
      add(layer.attention_norm);
      norm_stream(layer.ffn_input_norm);
      ffn(layer.ffn, inputs, shared.scratch, team, keep_in(shared.projected.data(), size));
      team.wait();
      end(kFfn);
      add(layer.ffn_norm);
    }
    end(kRest);
    logits();
    end(kLogits);
  }

  void embed(int64_t id, float* row) const {
    dequantize(model.embedding, id, size, row);
    round_row(type, row, size);
    if (model.embedding_factor == 1) return;
    for (int64_t i = 0; i < size; ++i) row[i] *= model.embedding_factor;
    round_row(type, row, size);
  }

  void set_angles(const Layer& layer) {
    const int64_t half = head_size / 2;
    angles.resize(count * head_size);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(call.positions[t]) * layer.frequencies[i];
        angles[t * head_size + i] = rounded(type, std::cos(angle) * layer.rotary_scale);
        angles[t * head_size + half + i] = rounded(type, std::sin(angle) * layer.rotary_scale);
      }
  }

  Norm norm(const void* weight) const { return {weight, model.epsilon, model.norms_from_one != 0}; }

  void norm_stream(const void* weight) {
    for (int64_t t = 0; t < count; ++t)
      rms_norm(norm(weight), type, &stream[t * size], size, &normed[t * size]);
    inputs.set(normed.data(), count, size);
  }

  // Adds what the threads projected, of a norm where the model has one, to the stream.
  void add(const void* weight) {
    for (int64_t t = 0; t < count; ++t) {
      const float* row = &shared.projected[t * size];
      if (weight) {
        rms_norm(norm(weight), type, row, size, &normed[t * size]);
        row = &normed[t * size];
      }
      float* to = &stream[t * size];
      for (int64_t i = 0; i < size; ++i) to[i] += row[i];
      round_row(type, to, size);
    }
  }

  void multiply(const Matrix& m, float* out) {
    float* room = shared.scratch.sums.data();
    const Product product(m, inputs.padded, room);
    begin({&product}, inputs, team);
    finish(product, inputs, team, keep_in(out, m.outputs()));
  }

  void attention(const Layer& layer) {
    norm_stream(layer.input_norm);
    float* room = shared.scratch.sums.data();
    const int64_t T = inputs.padded;
    const Product q(layer.q, T, room), k(layer.k, T, room), v(layer.v, T, room);
    begin({&q, &k, &v}, inputs, team);
    finish(q, inputs, team, keep_in(shared.q.data(), layer.q.outputs()));
    finish(k, inputs, team, keep_in(shared.k.data(), layer.k.outputs()));
    finish(v, inputs, team, keep_in(shared.v.data(), layer.v.outputs()));
    team.wait();
    end(kProjections);
    with_type(type, [&](auto* element) {
      using E = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
      remember<E>(layer);
      team.wait();
      attend_all<E>(layer);
    });
    team.wait();
    end(kAttention);
    inputs.set(shared.attended.data(), count, model.heads * head_size);
    multiply(layer.o, shared.projected.data());
    team.wait();
    end(kOutput);
  }

  void place(float* head, int64_t token, const void* weight) const {
    if (weight) rms_norm(norm(weight), type, head, head_size, head);
    rotate(head, type, &angles[token * head_size], head_size);
  }

  template <class E>
  void remember(const Layer& layer) const {
    const Part mine(count * model.key_heads, 1, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t token = i / model.key_heads, head = i % model.key_heads;
      const int64_t sequence = token / call.tokens, at = (layer.length + token % call.tokens) * head_size;
      float* key = &shared.k[i * head_size];
      place(key, token, layer.k_norm);
      narrow(type, key, head_size, layer.keys.head<E>(sequence, head) + at);
      narrow(type, &shared.v[i * head_size], head_size, layer.values.head<E>(sequence, head) + at);
    }
  }

  template <class E>
  void attend_all(const Layer& layer) const {
    const Attention rule{head_size, layer.attention_scale, layer.soft_cap};
    const Part mine(count * model.heads, 1, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      // by heads first: so a thread reads the keys and values of a part of the heads only
      const int64_t token = i % count, head = i / count, sequence = token / call.tokens;
      const int64_t key_head = head / (model.heads / model.key_heads), at = (token * model.heads + head) * head_size;
      const int64_t last = layer.length + token % call.tokens + 1;
      const int64_t seen = std::max(call.starts[sequence], layer.window ? last - layer.window : 0);
      const int64_t first = std::min(seen, last - 1);  // padding sees itself, not nothing: no number is NaN
      float* query = &shared.q[at];
      place(query, token, layer.q_norm);
      attend<E>(rule, query, layer.keys.head<E>(sequence, key_head), layer.values.head<E>(sequence, key_head), first,
                last, &shared.attended[at]);
    }
  }

  void logits() {
    if (call.kept == 0) return;
    for (int64_t s = 0; s < call.sequences; ++s)
      for (int64_t i = 0; i < call.kept; ++i)
        rms_norm(norm(model.norm), type, &stream[((s + 1) * call.tokens - call.kept + i) * size], size,
                 &normed[(s * call.kept + i) * size]);
    inputs.set(normed.data(), call.sequences * call.kept, size);
    const int64_t width = call.listed ? call.listed_count : model.head.outputs();
    const Head head{model.head, type, model.soft_cap, call.listed, width, call.logits, call.sums, call.limit};
    float* room = shared.scratch.sums.data();
    head.run(inputs, team, static_cast<Wanted>(call.wanted), room, shared.least.data(), shared.known.data());
  }
};

inline void step(const Model& model, const Call& call, int threads) {
  static thread_local Shared shared_buffer;
  Shared& shared = shared_buffer;  // the team's, where `shared_buffer` would be each thread's
  const int64_t count = call.sequences * call.tokens;
  for (int64_t l = 0; l < model.count; ++l) {
    const Layer& layer = model.layers[l];
    shared.scratch.reserve(layer.ffn, kTokens, threads);
    shared.scratch.reserve({&layer.q, &layer.k, &layer.v}, kTokens);
    shared.scratch.reserve({&layer.o}, kTokens);
  }
  shared.scratch.reserve({&model.head}, kTokens);
  shared.q.resize(count * model.heads * model.head_size);
  shared.attended.resize(count * model.heads * model.head_size);
  shared.k.resize(count * model.key_heads * model.head_size);
  shared.v.resize(count * model.key_heads * model.head_size);
  shared.projected.resize(count * model.size);
  shared.least.resize(threads * kTokens);
  shared.known.resize(threads * kTokens);
  with_team(threads, [&](Team team) { Pass{model, call, shared, team}.run(); });
}
