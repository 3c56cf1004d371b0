// Decode kernels for the CPU, for 1 to 8 tokens: Linear layers, gated FFNs that read only active neurons, and a whole
// step of a model.
//
// At decode every weight is read once per step, so time is bytes over memory bandwidth: skip rows, hold weights in few
// bits, and let no thread wait long.
//
//   vectors.h    vectors of float32, types in and out of them
//   team.h       threads, and what they wait with
//   floats.h     rows of bfloat16, float16, float32
//   codes.h      codes of 8 and 4 bits; quantized.h  rows of them; planes.h  in two planes; quantized_sums.h  sums of rows
//   matrix.h     a matrix in any of these formats; sums.h  sums of its rows
//   linear.h     its products with x, in either layout
//   prediction.h which of an FFN's gates may be active; ffn.h  a gated FFN
//   attention.h  attention to a cache
//   head.h       logits
//   step.h       all of a model; turn.h  a matrix in its other layout
//
// Built, cached and loaded by build.py; the functions below are called through ctypes by ops.py and step.py. OpenMP
// comes from the libgomp that torch has loaded, so that both share one pool of threads.

#include "step.h"
#include "turn.h"

// All else is hidden: the loader makes one of the inline functions' thread-local buffers of all libraries in a process,
// and another build's may be laid out otherwise.
#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

int64_t ffn_call(const Ffn& f, int type, const void* x, void* out, int64_t tokens, int threads) {
  static thread_local Scratch own;
  static thread_local std::vector<float> x_own, y_own;
  Scratch& scratch = own;  // the team's, where `own` would be each thread's
  std::vector<float>&given = x_own, &y = y_own;
  const int64_t size = f.gate.inputs();
  given.resize(tokens * size);
  y.resize(tokens * size);
  widen(type, x, tokens * size, given.data());
  int64_t active = 0;
  scratch.reserve(f, 8, threads);
  with_team(threads, [&](Team team) {
    static thread_local Inputs inputs;
    inputs.type = type;
    inputs.cuts = true;
    inputs.set(given.data(), tokens, size);
    const auto keep = [&](int64_t c, int64_t t, float value) { y[t * size + c] = value; };
    const int64_t found = ffn(f, inputs, scratch, team, keep);
    if (team.thread == 0) active = found;
  });
  narrow(type, y.data(), tokens * size, out);
  return active;
}

void linear_call(const Matrix& m, int type, const void* x, void* out, int64_t tokens, int threads) {
  static thread_local std::vector<float> x_own, y_own;
  static thread_local Scratch own;
  Scratch& scratch = own;  // the team's, where `own` would be each thread's
  std::vector<float>&given = x_own, &y = y_own;
  const int64_t size = m.inputs(), outputs = m.outputs();
  scratch.reserve({&m}, kTokens);
  given.resize(tokens * size);
  y.resize(tokens * outputs);
  widen(type, x, tokens * size, given.data());
  with_team(threads, [&](Team team) {
    static thread_local Inputs inputs;
    inputs.type = type;
    inputs.cuts = true;
    inputs.set(given.data(), tokens, size);
    float* room = scratch.sums.data();
    const Product product(m, inputs.padded, room);
    begin({&product}, inputs, team);
    finish(product, inputs, team, [&](int64_t o, int64_t t, float value) { y[t * outputs + o] = value; });
  });
  narrow(type, y.data(), tokens * outputs, out);
}

}  // namespace

// x, out and biases are of the element type `type`; all tensors are contiguous.

// Returns the number of active neurons, those that are not zero for every token.
EXPORTED int64_t stocha_ffn(const Ffn* f, int type, const void* x, void* out, int64_t tokens, int threads) {
  return ffn_call(*f, type, x, out, tokens, threads);
}

EXPORTED void stocha_linear(const Matrix* m, int type, const void* x, void* out, int64_t tokens, int threads) {
  linear_call(*m, type, x, out, tokens, threads);
}

EXPORTED void stocha_step(const Model* model, const Call* call, int threads) { step(*model, *call, threads); }

// Rows of a matrix, `size` of their columns, as `type`.
EXPORTED void stocha_dequantize(const Matrix* m, int64_t first, int64_t last, int64_t size, int type, void* out,
                                int threads) {
  const int64_t width = size * (type == kFloat ? 4 : 2);
  with_team(threads, [&](Team team) {
    static thread_local std::vector<float> row;
    row.resize(size);
    const Part mine(last - first, 1, team);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      char* to = static_cast<char*>(out) + r * width;
      dequantize(*m, first + r, size, type == kFloat ? reinterpret_cast<float*>(to) : row.data());
      if (type != kFloat) narrow(type, row.data(), size, to);
    }
  });
}

// Fills `to` [columns, rows], of 4 bits, with the weights of a matrix [rows, columns].
EXPORTED void stocha_turn(const Matrix* m, const Matrix* to, int threads) {
  with_team(threads, [&](Team team) { turn(*m, *to, team); });
}

// Whether sampled entries of a matrix [rows, columns] are those of its transposed copy, byte for byte. They lie near each
// other in one row: the matrix's pages may have been given back, and each one touched comes back with its neighbours.
EXPORTED int stocha_same(const void* matrix, const void* transposed, int64_t rows, int64_t columns, int64_t size) {
  constexpr int64_t kSamples = 16, kSpan = 1024;
  const auto* a = static_cast<const char*>(matrix);
  const auto* b = static_cast<const char*>(transposed);
  const int64_t row = rows / 2, step = std::max<int64_t>(std::min(columns, kSpan) / kSamples, 1);
  for (int64_t column = 0; column < std::min(columns, kSpan); column += step)
    if (std::memcmp(a + (row * columns + column) * size, b + (column * rows + row) * size, size) != 0) return 0;
  return 1;
}

// Reads `bytes` and returns something that depends on all of them: what the machine's memory can give.
EXPORTED int64_t stocha_read(const void* data, int64_t bytes, int threads) {
  const auto* p = static_cast<const float*>(data);
  std::vector<Vector> totals(threads);
  with_team(threads, [&](Team team) {
    const Part mine(bytes / 4, 4 * kLanes, team);
    Vector total[4] = {};
    for (int64_t i = mine.begin; i + 4 * kLanes <= mine.end; i += 4 * kLanes)
      for (int j = 0; j < 4; ++j) total[j] += load(p + i + j * kLanes);
    totals[team.thread] = total[0] + total[1] + total[2] + total[3];
  });
  float found = 0;
  for (const Vector& total : totals) found += sum(total);
  return found != 0;
}
