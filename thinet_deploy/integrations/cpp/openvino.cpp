// OpenVINO on the CPU: an .xml beside its .bin.

#include <openvino/openvino.hpp>

#include "engine.h"

namespace thinet {
namespace {

// Left alone, a CPU with AVX512_BF16 or AMX computes in bf16. What is quantised in INT8 stays so.
ov::element::Type computed_in(const std::string& precision) {
    if (precision == "fp16") return ov::element::f16;
    return precision == "bf16" ? ov::element::bf16 : ov::element::f32;
}

class OpenVino final : public Engine {
public:
    OpenVino(const Model& model, const EngineFile& file, int threads)
        : shape_{1, static_cast<size_t>(model.preprocess().channels()), static_cast<size_t>(model.preprocess().height),
                 static_cast<size_t>(model.preprocess().width)},
          input_(model.input()), output_(model.output()) {
        ov::Core core;
        request_ = core.compile_model(file.path, "CPU", ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                                      ov::hint::inference_precision(computed_in(file.precision)),
                                      ov::inference_num_threads(threads))
                       .create_infer_request();
    }

    std::vector<float> run(const std::vector<float>& input) override {
        request_.set_tensor(input_, ov::Tensor(ov::element::f32, shape_, const_cast<float*>(input.data())));
        request_.infer();
        const ov::Tensor result = request_.get_tensor(output_);
        const float* values = result.data<float>();
        return {values, values + result.get_size()};
    }

private:
    ov::Shape shape_;
    std::string input_, output_;
    ov::InferRequest request_;
};

}  // namespace

const char* const kRuntime = "openvino";

std::string runtime_version() { return ov::get_openvino_version().buildNumber; }

std::unique_ptr<Engine> open_engine(const Model& model, const EngineFile& file, int threads) {
    return std::make_unique<OpenVino>(model, file, threads);
}

}  // namespace thinet
