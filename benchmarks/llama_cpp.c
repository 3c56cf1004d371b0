// What decode_llama_cpp.py asks of llama.cpp, as four functions without structures.

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "llama.h"

struct handle {
  struct llama_model *model;
  struct llama_context *context;
  int vocabulary;
};

static void quiet(enum ggml_log_level level, const char *text, void *data) {}

static double now(int of_process) {
  struct timespec t;
  clock_gettime(of_process ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

void *open_model(const char *path, int threads) {
  llama_log_set(quiet, NULL);
  llama_backend_init();
  struct handle *h = calloc(1, sizeof *h);
  h->model = llama_model_load_from_file(path, llama_model_default_params());
  if (!h->model) return NULL;
  struct llama_context_params params = llama_context_default_params();
  params.n_ctx = 512;
  params.n_threads = params.n_threads_batch = threads;
  h->context = llama_init_from_model(h->model, params);
  h->vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(h->model));
  return h->context ? h : NULL;
}

void close_model(void *handle) {
  struct handle *h = handle;
  llama_free(h->context);
  llama_model_free(h->model);
  free(h);
}

static llama_token best(struct handle *h) {
  const float *logits = llama_get_logits_ith(h->context, -1);
  int found = 0;
  for (int i = 1; i < h->vocabulary; ++i)
    if (logits[i] > logits[found]) found = i;
  return found;
}

// Seconds of a step of `together` tokens, greedily after a prompt, by the wall clock or the process's; the tokens chosen
// go to `chosen` [steps].
double decode(void *handle, const llama_token *prompt, int length, int steps, int together, llama_token *chosen,
              int of_process) {
  struct handle *h = handle;
  llama_memory_clear(llama_get_memory(h->context), true);
  llama_token tokens[512];
  memcpy(tokens, prompt, length * sizeof *tokens);
  if (llama_decode(h->context, llama_batch_get_one(tokens, length))) return -1;
  const double start = now(of_process);
  for (int i = 0; i < steps; ++i) {
    chosen[i] = best(h);
    struct llama_batch batch = llama_batch_init(together, 0, 1);
    batch.n_tokens = together;
    for (int t = 0; t < together; ++t) {
      batch.token[t] = chosen[i];
      batch.pos[t] = length + i * together + t;
      batch.n_seq_id[t] = 1;
      batch.seq_id[t][0] = 0;
      batch.logits[t] = 1;
    }
    const int failed = llama_decode(h->context, batch);
    llama_batch_free(batch);
    if (failed) return -1;
  }
  return (now(of_process) - start) / steps;
}

int quantize(const char *source, const char *target, int type) {
  llama_log_set(quiet, NULL);
  struct llama_model_quantize_params params = llama_model_quantize_default_params();
  params.ftype = type;
  params.nthread = 1;
  params.allow_requantize = true;
  return llama_model_quantize(source, target, &params);
}
