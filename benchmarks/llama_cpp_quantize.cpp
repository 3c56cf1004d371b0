// llama.cpp's own quantizer as a program, for a libllama that was built without its tools.
//
//   g++ -O2 -std=c++17 llama_cpp_quantize.cpp -I LLAMA/include -I LLAMA/ggml/include -L LIB -Wl,-rpath,LIB -lllama
//   -lggml -lggml-base -o llama-quantize; llama-quantize MODEL OUT TYPE THREADS
//
// Takes the arguments that stocha-export gives to llama-quantize. benchmarks/export_gguf.py puts it on PATH.
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

int main(int count, char ** args) {
    const std::map<std::string, llama_ftype> types = {
        {"Q8_0", LLAMA_FTYPE_MOSTLY_Q8_0},     {"Q6_K", LLAMA_FTYPE_MOSTLY_Q6_K}, {"Q5_K_M", LLAMA_FTYPE_MOSTLY_Q5_K_M},
        {"Q4_K_M", LLAMA_FTYPE_MOSTLY_Q4_K_M}, {"Q4_0", LLAMA_FTYPE_MOSTLY_Q4_0},
    };
    if (count != 5 || types.count(args[3]) == 0) {
        std::fputs("expected MODEL OUT TYPE THREADS, TYPE one of Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0\n", stderr);
        return 2;
    }
    llama_log_set([](ggml_log_level level, const char * line, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(line, stderr);
    }, nullptr);
    llama_backend_init();
    auto parameters = llama_model_quantize_default_params();
    parameters.ftype = types.at(args[3]);
    parameters.nthread = std::atoi(args[4]);
    return (int) llama_model_quantize(args[1], args[2], &parameters);
}
