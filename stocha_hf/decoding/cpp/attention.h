// Attention of a few new tokens to a cache of keys and values, and what is done to queries and keys before.
//
// Rounding follows transformers: norms and rotary embedding round to the model's type after each operation, scores and
// their softmax are float32.
#pragma once

#include "sums.h"

struct Norm {
  const void* weight;  // [size], of the model's type; null for none
  float epsilon;
  bool from_one;  // Gemma's: x * (1 + weight), rounded once
};

// RMSNorm of x [size], in place; x holds values of the type.
inline void rms_norm(const Norm& norm, int type, const float* x, int64_t size, float* out) {
  Vector squares = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < size; ++i) total += x[i] * x[i];
  const float scale = 1 / std::sqrt(total / size + norm.epsilon);
  static thread_local std::vector<float> weights;
  weights.resize(size);
  widen(type, norm.weight, size, weights.data());
  for (i = 0; i < size; ++i) out[i] = x[i] * scale;
  if (!norm.from_one) round_row(type, out, size);
  for (i = 0; i < size; ++i) out[i] *= norm.from_one ? 1 + weights[i] : weights[i];
  round_row(type, out, size);
}

// The rotary embedding of one head; angles [2][head_size / 2] are cosines and sines of the position.
inline void rotate(float* head, int type, const float* angles, int64_t head_size) {
  const int64_t half = head_size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half], cosine = angles[i], sine = angles[half + i];
    head[i] = rounded(type, rounded(type, a * cosine) + rounded(type, -b * sine));
    head[i + half] = rounded(type, rounded(type, b * cosine) + rounded(type, a * sine));
  }
}

struct Cached {  // keys or values of one layer: [sequences, heads, length, head_size]
  void* data;
  int64_t sequence_stride, head_stride;  // in elements; a token's is head_size

  template <class E>
  E* head(int64_t sequence, int64_t head) const {
    return static_cast<E*>(data) + sequence * sequence_stride + head * head_stride;
  }
};

struct Attention {
  int64_t head_size;
  float scale, soft_cap;  // soft_cap: 0 for none
};

// out [head_size] = softmax(query keys) values over the tokens first to last - 1.
template <class E>
void attend(const Attention& a, const float* query, const E* keys, const E* values, int64_t first, int64_t last, float* out) {
  static thread_local std::vector<typename Step<E>::X> x_buffer;
  static thread_local std::vector<float> scores;
  const int64_t size = a.head_size, length = last - first;
  keys += first * size;
  values += first * size;
  x_buffer.resize(size);
  for (int64_t i = 0; i < size; ++i) {
    if constexpr (std::is_same_v<typename Step<E>::X, float>)
      x_buffer[i] = query[i];
    else
      store(query[i], &x_buffer[i]);
  }
  scores.resize((length + kLanes - 1) / kLanes * kLanes);
  float most = -INFINITY;
  for (int64_t s = 0; s < length; s += 4) {
    const int here = static_cast<int>(std::min<int64_t>(4, length - s));
    const E* rows[4];
    float found[4][1];
    for (int r = 0; r < 4; ++r) rows[r] = keys + (s + std::min(r, here - 1)) * size;
    dots<4, 1>(rows, rows, x_buffer.data(), size, found);
    for (int r = 0; r < here; ++r) {
      float score = found[r][0] * a.scale;
      if (a.soft_cap > 0) score = std::tanh(score / a.soft_cap) * a.soft_cap;
      most = std::max(most, scores[s + r] = score);
    }
  }
  for (int64_t s = length; s < static_cast<int64_t>(scores.size()); ++s) scores[s] = -INFINITY;
  Vector totals = {};
  for (int64_t s = 0; s < length; s += kLanes) {
    const Vector weight = exponential(load(&scores[s]) - most);
    totals += weight;
    store(weight, &scores[s]);
  }
  const float inverse = 1 / sum(totals);
  std::fill(out, out + size, 0.0f);
  int64_t s = 0;
  const E* rows[kGroup];
  for (; s + kGroup <= length; s += kGroup) {
    for (int g = 0; g < kGroup; ++g) rows[g] = values + (s + g) * size;
    add_rows<kGroup, 1>(rows, rows, &scores[s], out, size, 0, size);
  }
  for (; s < length; ++s) {
    rows[0] = values + s * size;
    add_rows<1, 1>(rows, rows, &scores[s], out, size, 0, size);
  }
  for (int64_t i = 0; i < size; ++i) out[i] = rounded<E>(out[i] * inverse);
}
