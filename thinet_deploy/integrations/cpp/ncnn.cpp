// ncnn on the CPU: a .param beside its .bin.

#include <net.h>

#include <algorithm>

#include "engine.h"

namespace thinet {
namespace {

class Ncnn final : public Engine {
public:
    Ncnn(const Model& model, const EngineFile& file, int threads)
        : how_(model.preprocess()), input_(model.input()), output_(model.output()) {
        const bool half = file.precision == "fp16", brain = file.precision == "bf16";
        net_.opt.num_threads = threads;
        // Left alone, it would store and compute in fp16 wherever the CPU can.
        net_.opt.use_fp16_packed = net_.opt.use_fp16_storage = net_.opt.use_fp16_arithmetic = half;
        net_.opt.use_bf16_storage = brain;
        const std::string weights = file.path.substr(0, file.path.rfind('.')) + ".bin";
        if (net_.load_param(file.path.c_str()) != 0 || net_.load_model(weights.c_str()) != 0)
            throw std::runtime_error("ncnn refuses " + file.path + " or the .bin beside it");
    }

    std::vector<float> run(const std::vector<float>& input) override {
        ncnn::Mat image(how_.width, how_.height, how_.channels());
        const size_t area = static_cast<size_t>(how_.width) * how_.height;
        for (int c = 0; c < how_.channels(); ++c)  // channels do not follow each other: each begins on a round address
            std::copy_n(input.data() + c * area, area, static_cast<float*>(image.channel(c)));
        ncnn::Extractor extractor = net_.create_extractor();
        ncnn::Mat result;
        if (extractor.input(input_.c_str(), image) != 0 || extractor.extract(output_.c_str(), result) != 0)
            throw std::runtime_error("ncnn cannot run from " + input_ + " to " + output_);
        result = result.reshape(result.w * result.h * result.d * result.c);
        const float* values = result;
        return {values, values + result.w};
    }

private:
    Preprocess how_;
    std::string input_, output_;
    ncnn::Net net_;
};

}  // namespace

const char* const kRuntime = "ncnn";

std::string runtime_version() { return NCNN_VERSION_STRING; }

std::unique_ptr<Engine> open_engine(const Model& model, const EngineFile& file, int threads) {
    return std::make_unique<Ncnn>(model, file, threads);
}

}  // namespace thinet
