// Sums of a matrix's rows, which are neurons or inputs: only those are read that some token needs.
//
// Threads divide rows in two halves, for memory gives whole rows faster than halves of them; each half has sums of its own.
#pragma once

#include "matrix.h"
#include "quantized_sums.h"

constexpr int kGroup = 8;  // rows added at a time where each is exact

// Columns begin to end - 1 as whole cache lines or vectors of codes, in which threads divide them.
constexpr int64_t kUnit = kPer * kGroupSize;

// A thread's sum of rows: acc[t * stride + columns] = sum over i of hidden[i * padded + t] * row list[i], `count` rows, for
// `tokens` <= padded. stride is at least the columns rounded up to whole groups, which acc has room for.
struct RowSum {
  const Matrix* m;
  const int64_t* list;
  const float* hidden;
  int64_t count, padded, tokens;
  Part columns;
  float* acc;
  int64_t stride;

  bool is_empty() const { return count == 0 || columns.begin >= columns.end; }
  int64_t first() const { return columns.begin / kGroupSize; }
  int64_t groups() const { return (columns.end + kGroupSize - 1) / kGroupSize - first(); }

  void set_block(int64_t begin, BlockOf4& to) const {
    const int rows = static_cast<int>(std::min<int64_t>(kBlock, count - begin));
    to.pairs = (rows + 1) / 2;
    to.readable = (m->rows - 1 - list[begin + rows - 1]) * m->groups() >= kLanes;
    for (int r = 0; r < kBlock; ++r) {  // all, since other blocks fetch them
      const int64_t at = begin + std::min(r, rows - 1), row = list[at];
      to.rows[r] = m->row(row) + first() * 16;
      to.words[r] = m->row_words(row) + first();
      for (int64_t g = 0; g < groups(); g += kLine / 2) prefetch(to.words[r] + g);
      prefetch(to.words[r] + groups() - 1);
      for (int t = 0; t < padded; ++t) to.hidden[t][r] = r < rows ? hidden[at * padded + t] : 0.0f;
    }
    for (int t = 0; t < padded; ++t) {
      Vector zeros = {};
      for (int r = 0; r < kBlock; r += kLanes) zeros += load(to.hidden[t] + r) * 0.0f;
      to.not_finite[t] = sum(zeros);
    }
  }
};

// Of 4 bits. Each block's rows are fetched while the block before is summed, the first one's of `after` during the last.
inline void sum_rows_4(const RowSum& own, const RowSum* after, bool fetched) {
  BlockOf4 blocks[2];
  const int64_t groups = own.groups();
  own.set_block(0, blocks[0]);
  if (!fetched)
    for (int r = 0; r < 2 * blocks[0].pairs; ++r)
      for (int64_t byte = 0; byte < groups * 16; byte += kLine) prefetch(blocks[0].rows[r] + byte);
  for (int64_t i = 0; i < own.count; i += kBlock) {
    const BlockOf4& block = blocks[i / kBlock % 2];
    BlockOf4& next = blocks[1 - i / kBlock % 2];
    const RowSum* of_next = i + kBlock < own.count ? &own : after;
    if (of_next) of_next->set_block(of_next == &own ? i + kBlock : 0, next);
    Fetch fetch{nullptr, nullptr, next.rows, of_next ? kBlock : 0, of_next ? of_next->groups() * 16 : 0};
    float* acc = own.acc + own.first() * kGroupSize;
    with_tokens(own.padded, [&](auto T) {
      add_block_4<decltype(T)::value>(block, fetch, groups, acc, own.stride);
    });
  }
}

// acc[t * stride + columns], of other formats, T tokens.
template <int T>
void sum_rows_of(const Matrix& m, const int64_t* list, const float* hidden, int64_t count, Part columns, float* acc,
                 int64_t stride) {
  if (m.format == kFormat8) {
    const int64_t first = columns.begin / kGroupSize, last = (columns.end + kGroupSize - 1) / kGroupSize;
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

// `after`: what this thread sums next, or null; `fetched`: whether it was named so by what came before.
inline void sum_rows(const RowSum& own, const RowSum* after, bool fetched) {
  if (own.columns.begin < own.columns.end)
    for (int64_t t = 0; t < own.padded; ++t)
      std::fill(own.acc + t * own.stride + own.columns.begin, own.acc + t * own.stride + own.columns.end, 0.0f);
  if (own.is_empty()) return;
  if (own.m->format == kFormat4) {
    const bool follows = after && !after->is_empty() && after->m->format == kFormat4;
    return sum_rows_4(own, follows ? after : nullptr, fetched);
  }
  with_tokens(own.padded, [&](auto T) {
    sum_rows_of<decltype(T)::value>(*own.m, own.list, own.hidden, own.count, own.columns, own.acc, own.stride);
  });
}

// A thread's parts of the sums of both halves of a list, [2][padded, stride] in `halves`; returns how many. Every other
// thread has the second half, since rows are read much faster whole than by two threads side by side; one half's threads
// divide columns.
inline int parts_of_halves(const Matrix& m, const int64_t* list, const float* hidden, int64_t count, int64_t padded,
                           int64_t tokens, Team team, float* halves, RowSum* parts) {
  const int64_t stride = m.groups() * kGroupSize, middle = std::min((count / 2 + 1) / 2 * 2, count);
  int found = 0;
  for (int half = 0; half < 2; ++half) {
    const bool alone = team.threads == 1;
    if (!alone && team.thread % 2 != half) continue;
    const Team own{alone ? 0 : team.thread / 2, alone ? 1 : (team.threads + 1 - half) / 2, nullptr};
    const int64_t first = half ? middle : 0, last = half ? count : middle;
    parts[found++] = {&m, list + first, hidden + first * padded, last - first, padded, tokens, Part(m.columns, kUnit, own),
                      halves + half * padded * stride, stride};
  }
  return found;
}

inline void sum_all(const RowSum* parts, int count) {
  for (int i = 0; i < count; ++i) sum_rows(parts[i], i + 1 < count ? parts + i + 1 : nullptr, i > 0);
}
