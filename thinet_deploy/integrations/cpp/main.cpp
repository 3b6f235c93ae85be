// A small program around the engine: an example of its use, the bundle's own test, and what --device adb: runs.
//
//     thinet-RUNTIME classify BUNDLE IMAGE.ppm [PRECISION]            the three likeliest classes
//     thinet-RUNTIME check BUNDLE [PRECISION]                         golden picture, golden inputs and outputs
//     thinet-RUNTIME outputs BUNDLE PRECISION THREADS FILE            golden inputs through the engine, into a file
//     thinet-RUNTIME time BUNDLE PRECISION THREADS SECONDS FPS        raw milliseconds of each run; FPS 0: back to back
//
// Without PRECISION: of the engines that are there, the first by name.
// Exit codes: 0 done, 1 a check failed, 2 anything else. The last two print one line of JSON.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <numeric>
#include <sstream>
#include <thread>

#include "engine.h"

using namespace thinet;

namespace {

using Clock = std::chrono::steady_clock;
constexpr int kProtocol = 1;  // of the JSON lines
constexpr double kWarmUpShare = 0.2;

double ms_since(Clock::time_point start) {
    return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

/// A binary .ppm or .pgm, as the bundle has one; an app has its own decoder for other formats.
Image read_ppm(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    std::string kind;
    int width = 0, height = 0, most = 0;
    stream >> kind >> width >> height >> most;
    stream.get();
    if (!stream || (kind != "P6" && kind != "P5") || most != 255)
        throw std::runtime_error(path + " is no binary .ppm or .pgm with 8 bits (ffmpeg -i photo.jpg photo.ppm makes one)");
    return {width, height, kind == "P6" ? 3 : 1, {std::istreambuf_iterator<char>(stream), {}}};
}

int cores() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

/// The golden inputs, one by one.
std::vector<std::vector<float>> golden_inputs(const Model& model) {
    const std::vector<float> all = model.floats("app/golden/input.f32");
    const Preprocess& how = model.preprocess();
    const size_t size = static_cast<size_t>(how.channels()) * how.height * how.width;
    std::vector<std::vector<float>> rows;
    for (size_t at = 0; at + size <= all.size(); at += size) rows.emplace_back(all.begin() + at, all.begin() + at + size);
    if (rows.empty()) throw std::runtime_error("app/golden/input.f32 holds no input: copy the whole bundle");
    return rows;
}

std::vector<float> outputs_of(Engine& engine, const std::vector<std::vector<float>>& inputs) {
    std::vector<float> all;
    for (const auto& input : inputs) {
        const std::vector<float> output = engine.run(input);
        all.insert(all.end(), output.begin(), output.end());
    }
    return all;
}

int classify(const Model& model, const std::string& path, const std::string& precision) {
    const auto engine = open_engine(model, model.engine(kRuntime, precision), cores());
    const std::vector<float> scores = engine->run(preprocess(read_ppm(path), model.preprocess()));
    const float highest = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (float score : scores) sum += std::exp(score - highest);
    std::vector<size_t> order(scores.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });
    for (size_t rank = 0; rank < std::min<size_t>(3, order.size()); ++rank) {
        const size_t which = order[rank];
        const std::string label = which < model.labels().size() ? model.labels()[which] : std::to_string(which);
        std::printf("%6.2f %%  %s\n", 100 * std::exp(scores[which] - highest) / sum, label.c_str());
    }
    return 0;
}

/// How preprocessing here compares with that of training.
struct Comparison {
    size_t values = 0, differ = 0;
    bool passed = false;
};

/// The golden picture has to become the golden input. A compiler that fuses multiplications may turn a rare pixel by one
/// level; anything else is another preprocessing.
Comparison compare_picture(const Model& model) {
    const std::vector<float> expected = model.floats("app/golden/picture.f32");
    const std::vector<float> got = preprocess(read_ppm(model.path("app/golden/picture.ppm")), model.preprocess());
    const Preprocess& how = model.preprocess();
    size_t differ = 0, far = 0;
    for (size_t i = 0; i < got.size() && got.size() == expected.size(); ++i) {
        const float level = 1.001f / how.divide / how.std[i / (got.size() / how.channels())];
        differ += got[i] != expected[i];
        far += !(std::abs(got[i] - expected[i]) <= level);
    }
    return {got.size(), differ, got.size() == expected.size() && far == 0 && differ * 1000 <= got.size()};
}

bool check_picture(const Model& model) {
    const Comparison found = compare_picture(model);
    const char* verdict = found.passed ? "passed" : "FAILED";
    std::printf("%s  preprocessing: %zu of %zu values differ\n", verdict, found.differ, found.values);
    return found.passed;
}

bool check_engine(const Model& model, const std::string& precision) {
    const EngineFile file = model.engine(kRuntime, precision);
    const auto engine = open_engine(model, file, cores());
    const std::vector<float> expected = model.floats("app/golden/output.f32");
    const std::vector<float> got = outputs_of(*engine, golden_inputs(model));
    double error = 0, scale = 0;
    bool comparable = got.size() == expected.size();
    for (size_t i = 0; i < expected.size() && comparable; ++i) {
        comparable = std::isfinite(got[i]);
        error = std::max(error, std::abs(static_cast<double>(got[i]) - expected[i]));
        scale = std::max(scale, std::abs(static_cast<double>(expected[i])));
    }
    const double relative = error / (scale > 0 ? scale : 1);
    const bool passed = comparable && relative <= file.tolerance;
    std::printf("%s  %s %s: error %.1e of scale, allowed %g\n", passed ? "passed" : "FAILED", kRuntime,
                file.precision.c_str(), relative, file.tolerance);
    return passed;
}

int outputs(const Model& model, const std::string& precision, int threads, const std::string& target) {
    const auto engine = open_engine(model, model.engine(kRuntime, precision), threads);
    const std::vector<float> got = outputs_of(*engine, golden_inputs(model));
    std::ofstream stream(target, std::ios::binary);
    stream.write(reinterpret_cast<const char*>(got.data()), static_cast<std::streamsize>(got.size() * sizeof(float)));
    stream.close();
    if (!stream) throw std::runtime_error(target + " cannot be written: is the storage full?");
    std::printf("{\"protocol\": %d, \"version\": \"%s\", \"same_preprocessing\": %s}\n", kProtocol,
                runtime_version().c_str(), compare_picture(model).passed ? "true" : "false");
    return 0;
}

/// Run for some seconds; the milliseconds of each run, none left out. With `fps`, runs begin that often a second.
std::vector<double> timed(Engine& engine, const std::vector<float>& input, double seconds, double fps) {
    std::vector<double> samples_ms;
    const auto start = Clock::now();
    auto due = start;
    do {
        if (fps > 0) {
            const auto pause = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(1 / fps));
            std::this_thread::sleep_until(due);
            due = std::max(due, Clock::now() - pause) + pause;  // late frames are not made up for
        }
        const auto begin = Clock::now();
        engine.run(input);
        samples_ms.push_back(ms_since(begin));
    } while (ms_since(start) < 1000 * seconds);
    return samples_ms;
}

/// The highest memory of this process in bytes, 0 where the system does not tell.
long long peak_bytes() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
        if (line.compare(0, 6, "VmHWM:") == 0) return 1024 * std::atoll(line.c_str() + 6);
    return 0;
}

int time_runs(const Model& model, const std::string& precision, int threads, double seconds, double fps) {
    const EngineFile file = model.engine(kRuntime, precision);
    const std::vector<float> input = golden_inputs(model).front();
    auto start = Clock::now();
    const auto engine = open_engine(model, file, threads);
    const double load_ms = ms_since(start);
    start = Clock::now();
    const std::vector<float> output = engine->run(input);
    const double first_ms = ms_since(start);
    const bool finite = std::all_of(output.begin(), output.end(), [](float value) { return std::isfinite(value); });
    timed(*engine, input, kWarmUpShare * seconds, fps);
    const std::vector<double> samples_ms = timed(*engine, input, (1 - kWarmUpShare) * seconds, fps);
    std::printf("{\"protocol\": %d, \"version\": \"%s\", \"load_ms\": %.6f, \"first_ms\": %.6f, \"finite\": %s, ",
                kProtocol, runtime_version().c_str(), load_ms, first_ms, finite ? "true" : "false");
    std::printf("\"peak_bytes\": %lld, \"samples_ms\": [", peak_bytes());
    for (size_t i = 0; i < samples_ms.size(); ++i) std::printf("%s%.6f", i ? ", " : "", samples_ms[i]);
    std::printf("]}\n");
    return 0;
}

int run(const std::vector<std::string>& words) {
    const std::string command = words.empty() ? "" : words[0];
    const size_t count = words.size();
    if (command == "classify" && (count == 3 || count == 4))
        return classify(Model(words[1]), words[2], count == 4 ? words[3] : "");
    if (command == "check" && (count == 2 || count == 3)) {
        const Model model(words[1]);
        const bool same_input = check_picture(model);
        return check_engine(model, count == 3 ? words[2] : "") && same_input ? 0 : 1;
    }
    if (command == "outputs" && count == 5) return outputs(Model(words[1]), words[2], std::stoi(words[3]), words[4]);
    if (command == "time" && count == 6)
        return time_runs(Model(words[1]), words[2], std::stoi(words[3]), std::stod(words[4]), std::stod(words[5]));
    std::cerr << "usage: thinet-" << kRuntime << " classify BUNDLE IMAGE.ppm [PRECISION] | check BUNDLE [PRECISION] | "
              << "outputs BUNDLE PRECISION THREADS FILE | time BUNDLE PRECISION THREADS SECONDS FPS\n";
    return 2;
}

}  // namespace

int main(int count, char** words) {
    try {
        return run({words + 1, words + count});
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 2;
    }
}
