// From decoded pixels to the network's input, as thinet_deploy/data/preprocess.py does it in training and calibration.
//
// The same as preprocess.h, which has the reasons: Pillow's resizing to the last bit, in fixed point.
// Plain Swift without Apple's frameworks but Foundation, so that it runs in unit tests anywhere.

import Foundation

/// What a bundle lacks, in words.
public struct BundleError: Error, CustomStringConvertible {
    public let description: String
}

/// A decoded image: rows from top to bottom, 1 (grey), 3 (RGB) or 4 (RGBA) bytes a pixel.
public struct Picture {
    public let width: Int, height: Int, channels: Int
    public let bytes: [UInt8]

    public init(width: Int, height: Int, channels: Int, bytes: [UInt8]) {
        precondition(width > 0 && height > 0 && bytes.count == width * height * channels, "width × height × channels bytes")
        (self.width, self.height, self.channels, self.bytes) = (width, height, channels, bytes)
    }
}

/// app/model.properties: lines of `name = value`.
public struct Properties {
    public let values: [String: String]

    public init(bundle: URL) throws {
        let text = try String(contentsOf: bundle.appendingPathComponent("app/model.properties"), encoding: .utf8)
        var values: [String: String] = [:]
        for line in text.components(separatedBy: "\n") where !line.hasPrefix("#") {
            guard let sign = line.range(of: " = ") else { continue }
            values[String(line[..<sign.lowerBound])] = String(line[sign.upperBound...])
        }
        self.values = values
    }

    public func text(_ name: String) throws -> String {
        guard let value = values[name] else { throw BundleError(description: "app/model.properties has no \(name)") }
        return value
    }

    public func numbers(_ name: String) throws -> [Double] {
        try text(name).split(separator: " ").compactMap { Double($0) }
    }
}

/// Preprocessing as a bundle says.
public struct Preprocess {
    public let height: Int, width: Int, channels: Int
    let colour: String, divide: Float, mean: [Float], std: [Float]
    let shorterSide: Bool, bicubic: Bool, canvasHeight: Int, canvasWidth: Int

    public init(_ from: Properties) throws {
        colour = try from.text("colour")
        divide = Float(try from.numbers("divide")[0])
        mean = try from.numbers("mean").map { Float($0) }
        std = try from.numbers("std").map { Float($0) }
        shorterSide = try from.text("resize") == "shorter side"
        bicubic = try from.text("interpolation") == "bicubic"
        let canvas = try from.numbers("canvas"), crop = try from.numbers("crop")
        (canvasHeight, canvasWidth) = (Int(canvas[0]), Int(canvas[1]))
        (height, width) = (Int(crop[0]), Int(crop[1]))
        channels = colour == "GRAY" ? 1 : 3
    }

    /// The network's input: channel by channel (CHW), in the order of `colour`.
    public func input(_ decoded: Picture) -> [Float] {
        let planes = crop(decoded)
        var input: [Float] = []
        for (c, plane) in (colour == "BGR" ? planes.reversed() : planes).enumerated() {
            input += plane.pixels.map { (Float($0) / divide - mean[c]) / std[c] }
        }
        return input
    }

    func crop(_ decoded: Picture) -> [Plane] {
        let long = shorterSide ? 8 * min(decoded.width, decoded.height) : Int.max
        let left = max(0, decoded.width - min(decoded.width, long)) / 2
        let top = max(0, decoded.height - min(decoded.height, long)) / 2
        let (wide, high) = (decoded.width - 2 * left, decoded.height - 2 * top)
        let (toWidth, toHeight) = resizedSize(wide, high)
        let columns = taps((toWidth - canvasWidth) / 2 + (canvasWidth - width) / 2, width, wide, toWidth)
        let rows = taps((toHeight - canvasHeight) / 2 + (canvasHeight - height) / 2, height, high, toHeight)
        let tall = high > toHeight && high - toHeight > 2 * (wide - toWidth)
        return planes(decoded, left, top, wide, high).map {
            tall ? $0.alongColumns(rows).alongRows(columns) : $0.alongRows(columns).alongColumns(rows)
        }
    }

    func resizedSize(_ wide: Int, _ high: Int) -> (Int, Int) {
        guard shorterSide else { return (canvasWidth, canvasHeight) }
        let scale = Double(canvasHeight) / Double(min(wide, high))
        let scaled = { (size: Int) in Int((Double(size) * scale).rounded(.toNearestOrEven)) }
        return (max(canvasWidth, scaled(wide)), max(canvasHeight, scaled(high)))
    }

    /// The colours of the part that begins at (left, top).
    func planes(_ from: Picture, _ left: Int, _ top: Int, _ wide: Int, _ high: Int) -> [Plane] {
        func plane(_ value: (Int) -> Int32) -> Plane {
            var pixels: [Int32] = []
            pixels.reserveCapacity(wide * high)
            for y in top..<(top + high) {
                for x in left..<(left + wide) { pixels.append(value((y * from.width + x) * from.channels)) }
            }
            return Plane(width: wide, height: high, pixels: pixels)
        }
        func byte(_ at: Int, _ c: Int) -> Int32 { Int32(from.bytes[from.channels < 3 ? at : at + c]) }
        if channels == 3 { return (0..<3).map { c in plane { byte($0, c) } } }
        if from.channels < 3 { return [plane { byte($0, 0) }] }
        func grey(_ at: Int) -> Int32 {
            let red: Int32 = byte(at, 0) * 19595, green: Int32 = byte(at, 1) * 38470, blue: Int32 = byte(at, 2) * 7471
            let sum: Int32 = red + green + blue + 0x8000
            return sum >> 16
        }
        return [plane(grey)]
    }

    func taps(_ begin: Int, _ count: Int, _ from: Int, _ to: Int) -> [Tap] {
        (begin..<(begin + count)).map { tap($0, Double(from) / Double(to), from) }
    }

    func tap(_ out: Int, _ scale: Double, _ size: Int) -> Tap {
        let stretch: Double = max(scale, 1.0)
        let support: Double = bicubic ? 2.0 * stretch : stretch
        let centre: Double = (Double(out) + 0.5) * scale
        let first: Int = max(0, Int(centre - support + 0.5))
        let end: Int = min(size, Int(centre + support + 0.5))
        var weights: [Double] = []
        for x in first..<end {
            let offset: Double = Double(x) - centre + 0.5
            weights.append(weight(offset * (1.0 / stretch)))
        }
        let sum: Double = weights.reduce(0.0, +)
        return Tap(first: first, weights: weights.map { fixed(sum != 0.0 ? $0 / sum : $0) })
    }

    func fixed(_ weight: Double) -> Int32 {
        let scaled: Double = weight * Double(one)
        return Int32(scaled < 0.0 ? scaled - 0.5 : scaled + 0.5)
    }

    // In steps: long expressions of literals take Swift's type checker minutes.
    func weight(_ signed: Double) -> Double {
        let x: Double = abs(signed), a: Double = -0.5
        if !bicubic { return x < 1.0 ? 1.0 - x : 0.0 }
        if x < 1.0 {
            let inner: Double = (a + 2.0) * x - (a + 3.0)
            return inner * x * x + 1.0
        }
        if x >= 2.0 { return 0.0 }
        let inner: Double = (x - 5.0) * x + 8.0
        return (inner * x - 4.0) * a
    }
}

let bits: Int32 = 22
let one: Int32 = 1 << bits

/// The pixels of the input that one of the output is a sum of.
struct Tap {
    let first: Int, weights: [Int32]

    func sum(_ pixels: [Int32], _ at: Int, _ step: Int) -> Int32 {
        var sum: Int32 = one / 2
        for i in weights.indices { sum += weights[i] * pixels[at + i * step] }
        let rounded: Int32 = sum >> bits
        return min(max(rounded, 0), 255)
    }
}

/// One channel of an image, in eight bits.
struct Plane {
    let width: Int, height: Int, pixels: [Int32]

    func alongRows(_ taps: [Tap]) -> Plane {
        var all: [Int32] = []
        for y in 0..<height { all += taps.map { tap -> Int32 in tap.sum(pixels, y * width + tap.first, 1) } }
        return Plane(width: taps.count, height: height, pixels: all)
    }

    func alongColumns(_ taps: [Tap]) -> Plane {
        var all: [Int32] = []
        for tap in taps { all += (0..<width).map { x -> Int32 in tap.sum(pixels, tap.first * width + x, width) } }
        return Plane(width: width, height: taps.count, pixels: all)
    }
}
