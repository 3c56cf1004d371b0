// What llama.cpp computes with a GGUF file: losses of given tokens, a greedy continuation, its own tokens of a text.
//
//   g++ -O2 -std=c++17 llama_cpp_scores.cpp -I LLAMA/include -I LLAMA/ggml/include -L LIB -Wl,-rpath,LIB -lllama -lggml
//   -lggml-base -o llama_cpp_scores; llama_cpp_scores MODEL IDS LENGTH NEW THREADS TEXT
//
// IDS is a file of int32: windows of LENGTH tokens, each scored on its own; the first LENGTH of them are also the
// prompt of NEW greedy tokens. Keys and values are kept in float32. Prints JSON. benchmarks/export_gguf.py runs it.
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

static std::vector<char> read_file(const char * path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

static void print(const char * name, const std::vector<double> & values, const char * end) {
    std::printf("\"%s\": [", name);
    for (size_t i = 0; i < values.size(); i++) std::printf(i ? ", %.10g" : "%.10g", values[i]);
    std::printf("]%s", end);
}

int main(int count, char ** args) {
    if (count != 7) return 2;
    const auto bytes = read_file(args[2]), text = read_file(args[6]);
    const auto * ids = reinterpret_cast<const llama_token *>(bytes.data());
    const int total = (int) (bytes.size() / sizeof(llama_token)), length = std::atoi(args[3]), more = std::atoi(args[4]);
    llama_log_set([](ggml_log_level level, const char * line, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(line, stderr);
    }, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(args[1], llama_model_default_params());
    if (model == nullptr) return 1;
    auto parameters = llama_context_default_params();
    parameters.n_ctx = length + more;
    parameters.n_batch = parameters.n_ubatch = length;
    parameters.n_threads = parameters.n_threads_batch = std::atoi(args[5]);
    parameters.type_k = parameters.type_v = GGML_TYPE_F32;
    parameters.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, parameters);
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const int words = llama_vocab_n_tokens(vocab);

    std::vector<double> losses, greedy, tokens;
    llama_batch batch = llama_batch_init(length, 0, 1);
    for (int start = 0; start + length <= total; start += length) {
        llama_memory_clear(llama_get_memory(context), true);
        batch.n_tokens = length;
        for (int i = 0; i < length; i++) {
            batch.token[i] = ids[start + i];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;
        }
        if (llama_decode(context, batch) != 0) return 1;
        double sum = 0;
        for (int i = 0; i + 1 < length; i++) {
            const float * logits = llama_get_logits_ith(context, i);
            const double top = *std::max_element(logits, logits + words);
            double mass = 0;
            for (int word = 0; word < words; word++) mass += std::exp(logits[word] - top);
            sum += top + std::log(mass) - logits[ids[start + i + 1]];
        }
        losses.push_back(sum / (length - 1));
    }

    llama_memory_clear(llama_get_memory(context), true);
    std::vector<llama_token> prompt(ids, ids + length);
    if (llama_decode(context, llama_batch_get_one(prompt.data(), length)) != 0) return 1;
    const auto began = std::chrono::steady_clock::now();
    for (int i = 0; i < more; i++) {
        const float * logits = llama_get_logits_ith(context, -1);
        llama_token best = (llama_token) (std::max_element(logits, logits + words) - logits);
        greedy.push_back(best);
        if (llama_decode(context, llama_batch_get_one(&best, 1)) != 0) return 1;
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();

    std::vector<llama_token> found(text.size() + 8);
    found.resize(llama_tokenize(vocab, text.data(), (int) text.size(), found.data(), (int) found.size(), true, true));
    tokens.assign(found.begin(), found.end());
    std::printf("{\"ms_per_token\": %.4g, ", 1e3 * seconds / std::max(more, 1));
    print("losses", losses, ", ");
    print("greedy", greedy, ", ");
    print("tokens", tokens, "}\n");
}
