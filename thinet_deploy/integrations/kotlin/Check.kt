// Whether preprocessing here is that of training. Plain Kotlin, so that it runs in a unit test of the app:
//
//     assertEquals(0, valuesThatDiffer(File("path/of/the/bundle")))

package thinet

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** How many values of the golden picture's input are not what training makes of it. */
fun valuesThatDiffer(bundle: File): Int {
    val golden = File(bundle, "app/golden")
    val got = Preprocess(Properties.of(bundle)).input(readPpm(File(golden, "picture.ppm")))
    val expected = readFloats(File(golden, "picture.f32"))
    if (got.size != expected.size) return expected.size
    return got.indices.count { got[it] != expected[it] }
}

/** A file of float32 numbers in little-endian order. */
fun readFloats(file: File): FloatArray {
    val numbers = ByteBuffer.wrap(file.readBytes()).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
    return FloatArray(numbers.remaining()).also { numbers.get(it) }
}

/** A binary .ppm or .pgm as the bundle has one: kind, width and height, 255, each on a line, then the pixels. */
fun readPpm(file: File): Picture {
    val bytes = file.readBytes()
    val head = String(bytes, 0, minOf(64, bytes.size), Charsets.ISO_8859_1).lines()
    val (width, height) = head[1].split(" ").map { it.toInt() }
    val start = head.take(3).sumOf { it.length + 1 }
    val channels = if (head[0] == "P6") 3 else 1
    return Picture(width, height, IntArray(width * height) {
        val at = start + it * channels
        (0 until 3).fold(0) { argb, c -> argb shl 8 or (bytes[at + c % channels].toInt() and 255) }
    })
}
