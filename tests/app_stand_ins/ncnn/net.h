// Stands in for ncnn's net.h: the names that ncnn.cpp uses, with nothing behind them.

#pragma once

#include <vector>

#ifdef ASKED_FOR
#define NCNN_VERSION_STRING "asks"
#else
#define NCNN_VERSION_STRING "asks for nothing"
#endif

namespace ncnn {

struct Mat {
    int w = 0, h = 0, d = 1, c = 1;
    Mat() = default;
    Mat(int width, int height, int channels) : w(width), h(height), c(channels) {}
    Mat channel(int) const { return *this; }
    Mat reshape(int) const { return *this; }
    operator float*() { return values.data(); }
    operator const float*() const { return values.data(); }

private:
    std::vector<float> values{0.0f};
};

struct Option {
    int num_threads = 1;
    bool use_fp16_packed = true, use_fp16_storage = true, use_fp16_arithmetic = true, use_bf16_storage = false;
};

struct Extractor {
    int input(const char*, const Mat&) { return 0; }
    int extract(const char*, Mat&) { return 0; }
};

struct Net {
    Option opt;
    int load_param(const char*) { return 0; }
    int load_model(const char*) { return 0; }
    Extractor create_extractor() { return {}; }
};

}  // namespace ncnn
