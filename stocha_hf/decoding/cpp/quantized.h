// Rows of 8- and 4-bit weights: their dot products with an x in 8 bits.
//
// x is rounded to 255 steps in groups of 32, as weights are, so that products are of bytes; everything after that is
// float32.
#pragma once

#include "codes.h"

constexpr int kTokens = 8;  // of a step, at most

// x [tokens, size] in 8 bits: chunk after chunk, in the order in which codes of `bits` bits are loaded.
struct QuantizedX {
  int64_t chunks = 0, padded = 0;
  AlignedVector<int8_t> codes;          // [chunks, padded, kChunk]
  AlignedVector<float> scales, totals;  // [chunks, padded, kLanes]; totals are what an eighth of zero adds at scale 1

  void prepare(const float* x, int64_t tokens, int64_t padded_tokens, int64_t size, int bits) {
    chunks = (size + kChunk - 1) / kChunk;
    padded = padded_tokens;
    codes.assign(padded * chunks * kChunk, 0);
    scales.assign(padded * chunks * kLanes, 0.0f);
    totals.assign(padded * chunks * kLanes, 0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* row = x + t * size;
      Vector zeros = {};
      int64_t i = 0;
      for (; i + kLanes <= size; i += kLanes) zeros += load(row + i) * 0.0f;
      float not_finite = sum(zeros);  // NaN where x is not finite: so are all products then
      for (; i < size; ++i) not_finite += row[i] * 0.0f;
      for (int64_t begin = 0; begin < chunks * kChunk; begin += kGroupSize) {
        float filled[kGroupSize] = {};
        const float* group = row + begin;
        if (begin + kGroupSize > size) {
          if (begin < size) std::copy(group, row + size, filled);
          group = filled;
        }
        prepare_group(group, not_finite, begin / kChunk * padded + t, begin % kChunk / kGroupSize, bits);
      }
    }
  }

  // For a team that shares this, of 4 bits: room for so many tokens of an x, and entries `begin` to `end` - 1 of x
  // [size, padded], which are whole groups but at the end. There the chunk's rest is filled as well.
  void reserve(int64_t tokens, int64_t size) {
    const size_t lanes = (size + kChunk - 1) / kChunk * tokens * kLanes;
    codes.resize(std::max(codes.size(), lanes * kGroupSize));
    scales.resize(std::max(scales.size(), lanes));
    totals.resize(std::max(totals.size(), lanes));
  }
  void prepare_part(const float* x, int64_t begin, int64_t end, int64_t size, int64_t padded_tokens) {
    const int64_t last = end < size ? end : (size + kChunk - 1) / kChunk * kChunk;
    for (int64_t group = begin; group < last; group += kGroupSize)
      for (int64_t t = 0; t < padded_tokens; ++t) {
        float filled[kGroupSize] = {};
        for (int64_t i = group; i < std::min(group + kGroupSize, end); ++i) filled[i - group] = x[i * padded_tokens + t];
        Vector zeros = {};
        for (int i = 0; i < kGroupSize; i += kLanes) zeros += load(filled + i) * 0.0f;
        prepare_group(filled, sum(zeros), group / kChunk * padded_tokens + t, group % kChunk / kGroupSize, 4);
      }
  }

 private:
  void prepare_group(const float* x, float not_finite, int64_t chunk, int64_t group, int bits) {
    Vector most = {};
    for (int i = 0; i < kGroupSize; i += kLanes) most = maximum(most, magnitude(load(x + i)));
    const float bound = largest(most) + not_finite, inverse = bound > 1e-30f ? 127 / bound : 0;
    int8_t rounded[kGroupSize];
    Integers total = {};
    for (int i = 0; i < kGroupSize; i += kLanes) {
      const Integers near = nearest(load(x + i) * inverse);
      total += near;
      store_bytes(near, rounded + i);
    }
    const int64_t lane = bits == 4 ? lane_of_4(group) : group;
    int8_t* to = codes.data() + chunk * kChunk;
    if (bits == 4) {
      for (int i = 0; i < kGroupSize / 4; ++i)
        std::memcpy(to + (2 * (i % 4) + i / 4) * kBytes + lane * 4, rounded + 4 * i, 4);
    } else {
      std::memcpy(to + group * kGroupSize, rounded, kGroupSize);
    }
    scales[chunk * kLanes + lane] = bound / 127;
    totals[chunk * kLanes + lane] = bound / -(127 * 8) * sum(__builtin_convertvector(total, Vector));
  }
};

// Rows that come later, fetched line by line in the order in which they lie in memory. Rows are read side by side, which
// alone would look to the hardware like several short streams: from memory that takes 1.7 times as long.
struct Fetch {
  const uint8_t *at, *end;         // of the row at hand, or of rows that lie together
  const uint8_t* const* rows = {};  // further ones
  int count = 0;
  int64_t bytes = 0;
  void line() {
    if (at >= end) {
      if (count == 0) return;
      at = *rows++;
      end = at + bytes;
      --count;
    }
    prefetch(at);
    at += kLine;
  }
  void lines(int64_t size) {
    if (end - at < size) {
      for (int64_t i = 0; i < size; i += kLine) line();
    } else {
#pragma GCC unroll 8
      for (int64_t i = 0; i < size; i += kLine) prefetch(at + i);
      at += size;
    }
  }
};

// A row of codes, and what is fetched while it is multiplied: one that comes later, of as many bytes.
struct Row {
  const uint8_t *codes, *later;
  int64_t groups;
};

// f(chunk, groups from this chunk's first on) for a row's chunks; meanwhile fetches the later one.
template <class F>
STOCHA_INLINED inline void for_chunks(const Row& row, F f) {
  const uint8_t* later = row.later;
  for (int64_t chunk = 0, left = row.groups; left > 0; ++chunk, left -= kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kChunk / 2; i += kLine) prefetch(later + i);
    later += kChunk / 2;
    f(chunk, left);
  }
}

// The chunk of a row's codes. Behind a row that is `whole` are at least kLanes more groups; codes read from there meet
// zeros of x, as those do that are not read.
template <bool whole>
STOCHA_INLINED inline ChunkOf4 load_chunk(const uint8_t* row, int64_t chunk, int64_t left) {
  const uint8_t* p = row + chunk * (kChunk / 2);
  uint8_t part[kChunk / 2];
  if (!whole && left < kLanes) {
    std::memset(part, 0, sizeof part);
    std::memcpy(part, p, left * 16);
    p = part;
  }
  Unsigned codes[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) codes[i] = load_codes(p + i * kBytes);
  return ChunkOf4(codes);
}

// Its words or scales, in ChunkOf4's order.
template <bool whole>
STOCHA_INLINED inline Levels load_levels(const uint16_t* words, int64_t chunk, int64_t left) {
  words += chunk * kLanes;
  uint16_t part[kLanes] = {};
  if (!whole && left < kLanes) {
    std::memcpy(part, words, left * sizeof *words);
    words = part;
  }
  return Levels(arranged(load_words(words)));
}

// x of a product, by token and chunk.
template <int T>
struct TokensOfX {
  const int8_t* all_codes;
  const float *all_scales, *all_totals;
  explicit TokensOfX(const QuantizedX& x) : all_codes(x.codes.data()), all_scales(x.scales.data()), all_totals(x.totals.data()) {}
  const int8_t* codes(int64_t chunk, int t) const { return all_codes + (chunk * T + t) * kChunk; }
  Vector scales(int64_t chunk, int t) const { return load(all_scales + (chunk * T + t) * kLanes); }
  Vector totals(int64_t chunk, int t) const { return load(all_totals + (chunk * T + t) * kLanes); }
};

// Dot products of a row of 4 bits with T tokens of x. Sums are independent of T, so that a row gives a token the same
// number in any company.
template <int T, bool whole>
STOCHA_INLINED inline void dots(const Row& row, const uint16_t* words, const TokensOfX<T>& x, float* out) {
  Vector total[T] = {};
  for_chunks(row, [&](int64_t chunk, int64_t left) STOCHA_INLINED {
    const Levels levels = load_levels<whole>(words, chunk, left);
    const ChunkOf4 codes = load_chunk<whole>(row.codes, chunk, left);
    const Vector scale = levels.scale, offset = scale * levels.eighths;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Vector products = __builtin_convertvector(codes.dot(x.codes(chunk, t)), Vector);
      total[t] = fused(products, scale * x.scales(chunk, t), fused(offset, x.totals(chunk, t), total[t]));
    }
  });
  sums(total, out);
}

// The same of two rows side by side, out [2, T], which share what is loaded of x. levels_of(row 0 or 1, chunk, groups from
// this chunk's first on) gives what a chunk's sums are multiplied with, and what an eighth of zero counts.
struct Scaled {
  Vector scale, offset;
};
template <int T, bool whole, class LevelsOf>
STOCHA_INLINED inline void dots_of_two(const Row (&rows)[2], const TokensOfX<T>& x, float* out, LevelsOf levels_of) {
  Vector total[2][T] = {};
  const uint8_t* later[2] = {rows[0].later, rows[1].later};
  for (int64_t chunk = 0, left = rows[0].groups; left > 0; ++chunk, left -= kLanes) {
    for (const uint8_t*& at : later) {
#pragma GCC unroll 4
      for (int i = 0; i < kChunk / 2; i += kLine) prefetch(at + i);
      at += kChunk / 2;
    }
    const Scaled levels[2] = {levels_of(0, chunk, left), levels_of(1, chunk, left)};
    const ChunkOf4 codes[2] = {load_chunk<whole>(rows[0].codes, chunk, left), load_chunk<whole>(rows[1].codes, chunk, left)};
    Integers products[2][T];
    dots_of_two<T>(codes, x.codes(chunk, 0), products);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r)
        total[r][t] = fused(__builtin_convertvector(products[r][t], Vector), levels[r].scale * x.scales(chunk, t),
                            fused(levels[r].offset, x.totals(chunk, t), total[r][t]));
  }
  for (int r = 0; r < 2; ++r) sums(total[r], out + r * T);
}

// R rows of 8-bit codes.
template <int R>
struct RowsOf8 {
  const int8_t* codes[R];
  const fp16* scales[R];
  int64_t groups;
  bool readable;
};

// Dot products of R of them with T tokens of x from the first one on; meanwhile fetches others. Sums are independent of R
// and T; R * T of them keep the processor busy.
template <int R, int T>
inline void dots(const RowsOf8<R>& rows, Fetch fetch, const QuantizedX& x, int64_t first, float (&out)[R][T]) {
  Vector total[R][T] = {};
  for (int64_t chunk = 0, g = 0; g < rows.groups; ++chunk, g += kLanes) {
    const int64_t here = rows.groups - g, at = chunk * x.padded + first;
    Vector factor[R][T];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vector scale = load_part(rows.scales[r] + g, here, rows.readable);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) factor[r][t] = scale * load(&x.scales[(at + t) * kLanes]);
    }
    fetch.lines(R * kChunk);
    const auto step = [&](auto i, bool whole) STOCHA_INLINED {
      const int8_t* part = &x.codes[at * kChunk + i * kBytes];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int8_t* p = rows.codes[r] + g * kGroupSize + i * kBytes;
        const Signed codes = load_codes_part(p, here * kGroupSize - i * kBytes, whole);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const Integers products = dot(codes, load_codes(part + t * kChunk));
          total[r][t] += __builtin_convertvector(products, Vector) * spread_8<i>(factor[r][t]);
        }
      }
    };
    if (here >= kLanes)
      repeated<0, 8>([&](auto i) STOCHA_INLINED { step(i, true); });
    else
      repeated<0, 8>([&](auto i) STOCHA_INLINED {
        if (i * kBytes < here * kGroupSize) step(i, rows.readable);
      });
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) out[r][t] = sum(total[r][t]);
}

// A row as float32, for embeddings and prefill.
inline void dequantize_row_8(const int8_t* codes, const fp16* scales, int64_t size, float* out) {
  int64_t begin = 0;
  for (; begin + kGroupSize <= size; begin += kGroupSize) {
    const float scale = to_float(*scales++);
    for (int64_t i = begin; i < begin + kGroupSize; i += kLanes) store(load(codes + i) * scale, out + i);
  }
  for (int64_t i = begin; i < size; ++i) out[i] = codes[i] * to_float(*scales);
}

inline void dequantize_row_4(const uint8_t* codes, const uint16_t* words, int64_t size, float* out) {
  for (int64_t begin = 0; begin < size; begin += kGroupSize, codes += kGroupSize / 2, ++words) {
    const float scale = Levels(Integers{*words}).scale[0], offset = (*words & 127) * -0.125f;
    float last[kGroupSize], *group = begin + kGroupSize <= size ? out + begin : last;
    for (int i = 0; i < kGroupSize / 2; i += kLanes) {
      const Integers both = load_integers(codes + i);
      store((__builtin_convertvector(both & 15, Vector) + offset) * scale, group + i);
      store((__builtin_convertvector(both >> 4, Vector) + offset) * scale, group + i + kGroupSize / 2);
    }
    if (group == last) std::copy(last, last + (size - begin), out + begin);
  }
}
