// Sums of a matrix's rows, which are neurons or inputs: only those are read that some token needs.
#pragma once

#include "matrix.h"
#include "quantized_sums.h"

constexpr int kGroup = 8;  // rows added at a time where each is exact

// Columns begin to end - 1 as whole cache lines or vectors of codes, in which threads divide them.
constexpr int64_t kUnit = kPer * kGroupSize;

inline void set_block(const Matrix& m, const int64_t* list, const float* hidden, int64_t first, int64_t count, int padded,
                      int tokens, BlockOf4& to) {
  const int rows = static_cast<int>(std::min<int64_t>(kBlock, count - first));
  to.pairs = (rows + 1) / 2;
  to.readable = (m.rows - 1 - list[first + rows - 1]) * m.groups() >= kLanes;
  for (int r = 0; r < kBlock; ++r) {  // all, since other blocks fetch them
    const int64_t at = first + std::min(r, rows - 1), row = list[at];
    to.rows[r] = m.row(row);
    to.words[r] = m.row_words(row);
    for (int t = 0; t < tokens; ++t) to.shares[t][r] = r < rows ? hidden[at * padded + t] : 0.0f;
  }
  for (int t = 0; t < tokens; ++t) {
    Vector most = {};
    for (int r = 0; r < kBlock; r += kLanes) most = maximum(most, magnitude(load(to.shares[t] + r)));
    to.largest[t] = largest(most);
    const float inverse = to.largest[t] > 1e-30f ? 1 / to.largest[t] : 0;
    for (int r = 0; r < kBlock; r += kLanes) store(load(to.shares[t] + r) * inverse, to.shares[t] + r);
  }
}

// acc[t * stride + columns] = sum over i of hidden[i * T + t] * row list[i], `count` rows, for `tokens` <= T. stride is at
// least the columns rounded up to whole groups, which acc has room for.
template <int T>
void sum_rows_of(const Matrix& m, const int64_t* list, const float* hidden, int64_t count, int tokens, Part columns,
                 float* acc, int64_t stride) {
  if (columns.begin >= columns.end) return;
  for (int t = 0; t < T; ++t) std::fill(acc + t * stride + columns.begin, acc + t * stride + columns.end, 0.0f);
  const int64_t first = columns.begin / kGroupSize, last = (columns.end + kGroupSize - 1) / kGroupSize;
  if (m.format == kFormat4) {
    float not_finite[kTokens] = {};  // or NaN, where a token's hidden entries are not finite
    for (int t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < count; ++i) not_finite[t] += hidden[i * T + t] * 0.0f;
    BlockOf4 blocks[2];
    if (count) set_block(m, list, hidden, 0, count, T, tokens, blocks[0]);
    for (int64_t i = 0; i < count; i += kBlock) {
      const BlockOf4& block = blocks[i / kBlock % 2];
      BlockOf4& next = blocks[1 - i / kBlock % 2];
      set_block(m, list, hidden, i + kBlock < count ? i + kBlock : i, count, T, tokens, next);
      const uint8_t* later[kBlock];
      for (int r = 0; r < kBlock; ++r) later[r] = next.rows[r] + first * 16;
      Fetch fetch{nullptr, nullptr, later, kBlock, (last - first) * 16};
      for (int64_t g = first; g < last; g += kLanes)
        add_block_4(block, next, fetch, not_finite, tokens, g, std::min<int64_t>(kLanes, last - g), acc + g * kGroupSize,
                    stride);
    }
  } else if (m.format == kFormat8) {
    const int8_t* rows[kGroup];
    const fp16* scales[kGroup];
    const auto set = [&](int64_t i, int g) {
      rows[g] = reinterpret_cast<const int8_t*>(m.row(list[i]));
      scales[g] = m.row_scales(list[i]);
    };
    int64_t i = 0;
    for (; i + kGroup <= count; i += kGroup) {
      for (int64_t next = i + kGroup; next < std::min(i + 2 * kGroup, count); ++next)
        for (int64_t byte = first * kGroupSize; byte < last * kGroupSize; byte += kLine) prefetch(m.row(list[next]) + byte);
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
          rows[g] = weights + list[i + g] * m.columns;
          next[g] = weights + list[std::min(i + kGroup + g, count - 1)] * m.columns;
        }
        add_rows<kGroup, T>(rows, next, hidden + i * T, acc, stride, columns.begin, columns.end);
      }
      for (; i < count; ++i) {
        rows[0] = weights + list[i] * m.columns;
        add_rows<1, T>(rows, rows, hidden + i * T, acc, stride, columns.begin, columns.end);
      }
    });
  }
}

inline void sum_rows(const Matrix& m, const int64_t* list, const float* hidden, int64_t count, int64_t padded,
                     int64_t tokens, Part columns, float* acc, int64_t stride) {
  with_tokens(padded, [&](auto T) {
    sum_rows_of<decltype(T)::value>(m, list, hidden, count, static_cast<int>(tokens), columns, acc, stride);
  });
}

// A team's sums of both halves of a list, [2][padded, stride] in `halves`, stride as in sum_rows. Every other thread has the
// second half, since rows are read much faster whole than by two threads side by side; one half's threads divide columns.
inline void sum_halves(const Matrix& m, const int64_t* list, const float* hidden, int64_t count, int64_t padded,
                       int64_t tokens, Team team, float* halves) {
  const int64_t stride = m.groups() * kGroupSize;
  const int64_t middle = std::min((count / 2 + kBlock - 1) / kBlock * kBlock, count);
  for (int half = 0; half < 2; ++half) {
    const bool alone = team.threads == 1;
    if (!alone && team.thread % 2 != half) continue;
    const Team own{alone ? 0 : team.thread / 2, alone ? 1 : (team.threads + 1 - half) / 2, nullptr};
    const int64_t first = half ? middle : 0, last = half ? count : middle;
    sum_rows(m, list + first, hidden + first * padded, last - first, padded, tokens, Part(m.columns, kUnit, own),
             halves + half * padded * stride, stride);
  }
}
