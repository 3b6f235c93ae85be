// From decoded pixels to the network's input, as thinet_deploy/preprocess.py does it in training and calibration.
//
// Resizing is that of Pillow, to the last bit: a triangle or cubic filter as wide as the image is scaled down
// (antialiasing), weights in fixed point with 22 bits, along rows and along columns, eight bits in between. Which comes
// first is that of Pillow 13; in earlier ones rows always did, which turns some pixels of tall images by one level.
// Other libraries' bilinear resizing gives other pixels, and a network trained on these sees another image.
//
// Only C++17. Build with -ffp-contract=off where a compiler would fuse multiplications (see CMakeLists.txt).

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace thinet {

/// A decoded image: rows from top to bottom, pixels from left to right, 1 (grey), 3 (RGB) or 4 (RGBA) bytes each.
struct Image {
    int width = 0, height = 0, channels = 0;
    std::vector<uint8_t> pixels;

    uint8_t at(int x, int y, int channel) const {
        return pixels[(static_cast<size_t>(y) * width + x) * channels + channel];
    }
};

enum class Colour { kRgb, kBgr, kGrey };
enum class Filter { kBilinear, kBicubic };

/// What the fields mean is said in preprocess.py; read_model() of model.h fills them.
struct Preprocess {
    Colour colour = Colour::kRgb;
    float divide = 255.0f;            // 255 for values in 0..1, 1 for 0..255
    std::vector<float> mean, std;     // per channel
    int canvas_height = 0, canvas_width = 0;
    bool keep_aspect = false;         // the shorter side becomes the canvas's, else both do
    int height = 0, width = 0;        // of the network's input
    Filter filter = Filter::kBilinear;

    int channels() const { return colour == Colour::kGrey ? 1 : 3; }
};

/// The pixels of the input that one of the output is a sum of.
struct Taps {
    int first = 0;
    std::vector<int32_t> weights;  // in units of 2^-kBits
};

/// A range of one axis: where it begins, and how many pixels it has.
struct Range {
    int begin = 0, count = 0;
};

constexpr int kBits = 22;

inline double filter_weight(Filter filter, double x) {
    x = std::abs(x);
    if (filter == Filter::kBilinear) return x < 1.0 ? 1.0 - x : 0.0;
    constexpr double a = -0.5;
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

/// The taps of output pixel `out`, where `scale` input pixels fall on one of the output.
inline Taps taps_of(int out, double scale, int in_size, Filter filter) {
    const double stretch = std::max(scale, 1.0);
    const double support = (filter == Filter::kBilinear ? 1.0 : 2.0) * stretch;
    const double centre = (out + 0.5) * scale;
    const int first = std::max(0, static_cast<int>(centre - support + 0.5));
    const int end = std::min(in_size, static_cast<int>(centre + support + 0.5));
    std::vector<double> weights;
    double sum = 0.0;
    for (int x = first; x < end; ++x) {
        weights.push_back(filter_weight(filter, (x - centre + 0.5) * (1.0 / stretch)));
        sum += weights.back();
    }
    Taps taps{first, {}};
    for (double weight : weights) {
        const double fixed = (sum != 0.0 ? weight / sum : weight) * (1 << kBits);
        taps.weights.push_back(static_cast<int32_t>(fixed < 0 ? fixed - 0.5 : fixed + 0.5));
    }
    return taps;
}

inline std::vector<Taps> taps_of(Range wanted, int in_size, int out_size, Filter filter) {
    std::vector<Taps> all;
    const double scale = static_cast<double>(in_size) / out_size;
    for (int i = 0; i < wanted.count; ++i) all.push_back(taps_of(wanted.begin + i, scale, in_size, filter));
    return all;
}

inline uint8_t rounded(int32_t sum) {
    return static_cast<uint8_t>(std::clamp(sum >> kBits, 0, 255));
}

/// Resize along rows: each row of the result has one pixel per element of `taps`.
inline Image along_rows(const Image& image, const std::vector<Taps>& taps) {
    Image result{static_cast<int>(taps.size()), image.height, image.channels, {}};
    result.pixels.reserve(taps.size() * image.height * image.channels);
    for (int y = 0; y < image.height; ++y) {
        for (const Taps& tap : taps) {
            for (int c = 0; c < image.channels; ++c) {
                int32_t sum = 1 << (kBits - 1);
                for (size_t i = 0; i < tap.weights.size(); ++i)
                    sum += image.at(tap.first + static_cast<int>(i), y, c) * tap.weights[i];
                result.pixels.push_back(rounded(sum));
            }
        }
    }
    return result;
}

/// Resize along columns: the result has one row per element of `taps`.
inline Image along_columns(const Image& image, const std::vector<Taps>& taps) {
    Image result{image.width, static_cast<int>(taps.size()), image.channels, {}};
    const size_t row = static_cast<size_t>(image.width) * image.channels;
    result.pixels.reserve(row * taps.size());
    std::vector<int32_t> sums(row);
    for (const Taps& tap : taps) {
        std::fill(sums.begin(), sums.end(), 1 << (kBits - 1));
        for (size_t i = 0; i < tap.weights.size(); ++i) {
            const uint8_t* source = image.pixels.data() + (tap.first + i) * row;
            for (size_t x = 0; x < row; ++x) sums[x] += source[x] * tap.weights[i];
        }
        for (int32_t sum : sums) result.pixels.push_back(rounded(sum));
    }
    return result;
}

/// Cut out the rows and columns that are wanted.
inline Image cut(const Image& image, Range columns, Range rows) {
    Image result{columns.count, rows.count, image.channels, {}};
    for (int y = 0; y < rows.count; ++y) {
        const size_t from = (static_cast<size_t>(rows.begin + y) * image.width + columns.begin) * image.channels;
        const uint8_t* source = image.pixels.data() + from;
        result.pixels.insert(result.pixels.end(), source, source + static_cast<size_t>(columns.count) * image.channels);
    }
    return result;
}

/// Grey or RGB, as the network was trained; grey by ITU-R 601 in fixed point, as Pillow has it.
inline Image in_colour(const Image& image, Colour colour) {
    const bool grey = colour == Colour::kGrey;
    Image result{image.width, image.height, grey ? 1 : 3, {}};
    for (size_t i = 0; i < image.pixels.size(); i += image.channels) {
        const uint8_t* from = image.pixels.data() + i;
        const uint8_t r = from[0], g = image.channels < 3 ? r : from[1], b = image.channels < 3 ? r : from[2];
        if (!grey)
            result.pixels.insert(result.pixels.end(), {r, g, b});
        else
            result.pixels.push_back(
                image.channels < 3 ? r : static_cast<uint8_t>((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16));
    }
    return result;
}

/// The middle of a very long image, of which no more than a square is used.
inline Image less_long(const Image& image) {
    const int limit = 8 * std::min(image.width, image.height);
    const int left = std::max(0, image.width - limit) / 2, top = std::max(0, image.height - limit) / 2;
    if (left == 0 && top == 0) return image;
    return cut(image, {left, image.width - 2 * left}, {top, image.height - 2 * top});
}

/// Width and height of the whole image after resizing.
inline std::pair<int, int> resized_size(const Image& image, const Preprocess& how) {
    if (!how.keep_aspect) return {how.canvas_width, how.canvas_height};
    const double scale = static_cast<double>(how.canvas_height) / std::min(image.width, image.height);
    const auto scaled = [scale](int size) { return static_cast<int>(std::nearbyint(size * scale)); };
    return {std::max(how.canvas_width, scaled(image.width)), std::max(how.canvas_height, scaled(image.height))};
}

/// Where the network's input lies along one axis: the middle of the canvas, which is the middle of the image.
inline Range middle(int whole, int canvas, int crop) {
    return {(whole - canvas) / 2 + (canvas - crop) / 2, crop};
}

/// Whether Pillow resizes along columns first: where the height shrinks by more than twice as many pixels as the width.
inline bool columns_first(const Image& image, int width, int height) {
    return image.height > height && image.height - height > 2 * (image.width - width);
}

/// The network's input in eight bits: converted, resized, cropped; only pixels that are used are computed.
inline Image crop_of(const Image& decoded, const Preprocess& how) {
    if (decoded.width < 1 || decoded.height < 1 ||
        decoded.pixels.size() != static_cast<size_t>(decoded.width) * decoded.height * decoded.channels)
        throw std::runtime_error("an image has to have width × height × channels pixels");
    if (decoded.channels != 1 && decoded.channels != 3 && decoded.channels != 4)
        throw std::runtime_error("an image has 1, 3 or 4 channels: grey, RGB or RGBA");
    const Image image = how.keep_aspect ? less_long(decoded) : decoded;
    const auto [width, height] = resized_size(image, how);
    const auto columns = taps_of(middle(width, how.canvas_width, how.width), image.width, width, how.filter);
    auto rows = taps_of(middle(height, how.canvas_height, how.height), image.height, height, how.filter);
    const int top = rows.front().first;
    const int bottom = rows.back().first + static_cast<int>(rows.back().weights.size());
    for (Taps& tap : rows) tap.first -= top;
    const Image used = in_colour(cut(image, {0, image.width}, {top, bottom - top}), how.colour);
    if (columns_first(image, width, height)) return along_rows(along_columns(used, rows), columns);
    return along_columns(along_rows(used, columns), rows);
}

/// The network's input: float32, channel by channel (CHW), in the order of `colour`.
inline std::vector<float> preprocess(const Image& decoded, const Preprocess& how) {
    const Image crop = crop_of(decoded, how);
    const size_t area = static_cast<size_t>(crop.width) * crop.height;
    std::vector<float> input(area * crop.channels);
    for (int c = 0; c < crop.channels; ++c) {
        std::array<float, 256> value;
        for (int level = 0; level < 256; ++level)
            value[level] = (static_cast<float>(level) / how.divide - how.mean[c]) / how.std[c];
        const int source = how.colour == Colour::kBgr ? crop.channels - 1 - c : c;
        for (size_t i = 0; i < area; ++i) input[c * area + i] = value[crop.pixels[i * crop.channels + source]];
    }
    return input;
}

}  // namespace thinet
