// A matrix of 4 bits in its other layout: rounded once more, in groups along its other side.
#pragma once

#include "matrix.h"

// What a group of 4 bits can be, in each lane: scale, zero, and the bits that stand for both.
struct LevelsOfGroups {
  Vector scale, zero;
  Integers words;

  // Those whose codes begin at `start`, in steps of `step`, or nearly so.
  LevelsOfGroups(Vector start, Vector step) {
    Integers size = (((Integers)step + (1 << 18)) >> 19) - (103 << 4);
    size = size < 0 ? Integers{} : size > 511 ? Integers{} + 511 : size;
    scale = (Vector)((size + (103 << 4)) << 19);
    Integers eighths = nearest(start / scale * -8.0f);
    eighths = eighths < 0 ? Integers{} : eighths > 127 ? Integers{} + 127 : eighths;
    zero = __builtin_convertvector(eighths, Vector) * 0.125f;
    words = size << 7 | eighths;
  }

  Integers code(Vector value) const {
    const Integers found = nearest(value / scale + zero);
    return found < 0 ? Integers{} : found > 15 ? Integers{} + 15 : found;
  }

  Vector error(const Vector* values) const {
    Vector total = {};
    for (int r = 0; r < kGroupSize; ++r) {
      const Vector off = (__builtin_convertvector(code(values[r]), Vector) - zero) * scale - values[r];
      total += off * off;
    }
    return total;
  }
};

// The levels of kLanes groups with the least error, of those that cover the whole range and less of it.
inline LevelsOfGroups fitted(const Vector* values) {
  Vector low = {}, high = {};  // which 0 is always between
  for (int r = 0; r < kGroupSize; ++r) {
    high = maximum(high, values[r]);
    low = -maximum(-low, -values[r]);
  }
  LevelsOfGroups best(low, (high - low) / 15.0f);
  Vector least = best.error(values);
  for (const float share : {0.92f, 0.84f}) {
    const LevelsOfGroups other(low + (high - low) * ((1 - share) / 2), (high - low) * (share / 15));
    const Vector error = other.error(values);
    best.scale = error < least ? other.scale : best.scale;
    best.zero = error < least ? other.zero : best.zero;
    best.words = error < least ? other.words : best.words;
    least = error < least ? error : least;
  }
  return best;
}

// A thread's part of `to` [columns of m, rows of m], whose codes and words nobody else writes.
inline void turn(const Matrix& m, const Matrix& to, Team team) {
  const int64_t columns = (m.columns + kLanes - 1) / kLanes * kLanes;
  std::vector<float> rows(kGroupSize * columns);
  auto* codes = static_cast<uint8_t*>(const_cast<void*>(to.weights));
  auto* words = static_cast<uint16_t*>(const_cast<void*>(to.scales));
  const Part mine(to.groups(), 1, team);
  for (int64_t g = mine.begin; g < mine.end; ++g) {
    std::fill(rows.begin(), rows.end(), 0.0f);
    for (int64_t r = 0; r < std::min<int64_t>(kGroupSize, m.rows - g * kGroupSize); ++r)
      dequantize(m, g * kGroupSize + r, m.columns, &rows[r * columns]);
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vector values[kGroupSize];
      for (int r = 0; r < kGroupSize; ++r) values[r] = load(&rows[r * columns + c]);
      const LevelsOfGroups levels = fitted(values);
      Integers found[kGroupSize];
      for (int r = 0; r < kGroupSize; ++r) found[r] = levels.code(values[r]);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, m.columns - c); ++i) {
        words[(c + i) * to.groups() + g] = static_cast<uint16_t>(levels.words[i]);
        uint8_t* own = codes + ((c + i) * to.groups() + g) * (kGroupSize / 2);
        for (int j = 0; j < kGroupSize / 2; ++j) own[j] = found[j][i] | found[j + kGroupSize / 2][i] << 4;
      }
    }
  }
}
