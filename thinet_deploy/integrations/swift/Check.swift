// Whether preprocessing here is that of training; for a unit test of the app:
//
//     XCTAssertEqual(try valuesThatDiffer(bundle: url), 0)

import Foundation

/// How many values of the golden picture's input are not what training makes of it.
public func valuesThatDiffer(bundle: URL) throws -> Int {
    let golden = bundle.appendingPathComponent("app/golden")
    let picture = try readPpm([UInt8](Data(contentsOf: golden.appendingPathComponent("picture.ppm"))))
    let got = try Preprocess(Properties(bundle: bundle)).input(picture)
    let expected = readFloats([UInt8](try Data(contentsOf: golden.appendingPathComponent("picture.f32"))))
    guard got.count == expected.count else { return expected.count }
    return zip(got, expected).filter { $0 != $1 }.count
}

/// float32 numbers in little-endian order.
public func readFloats(_ bytes: [UInt8]) -> [Float] {
    stride(from: 0, to: bytes.count - 3, by: 4).map { at -> Float in
        var word: UInt32 = 0
        for byte in bytes[at..<(at + 4)].reversed() { word = word * 256 + UInt32(byte) }
        return Float(bitPattern: word)
    }
}

/// A binary .ppm or .pgm as the bundle has one: kind, width and height, 255, each on a line, then the pixels.
public func readPpm(_ bytes: [UInt8]) throws -> Picture {
    var ends: [Int] = []
    for at in 0..<min(64, bytes.count) where bytes[at] == 10 && ends.count < 3 { ends.append(at) }
    guard ends.count == 3 else { throw BundleError(description: "app/golden/picture.ppm is damaged") }
    let head = String(decoding: bytes[..<ends[2]], as: UTF8.self).split(separator: "\n")
    let size = head[1].split(separator: " ").compactMap { Int($0) }
    return Picture(width: size[0], height: size[1], channels: head[0] == "P6" ? 3 : 1, bytes: Array(bytes[(ends[2] + 1)...]))
}
