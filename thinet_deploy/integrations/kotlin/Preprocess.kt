// From decoded pixels to the network's input, as thinet_deploy/data/preprocess.py does it in training and calibration.
//
// The same as preprocess.h, which has the reasons: Pillow's resizing to the last bit, in fixed point.
// Plain Kotlin without Android, so that it runs in unit tests too.

package thinet

import java.io.File
import kotlin.math.abs
import kotlin.math.max
import kotlin.math.min

/** A decoded image: rows from top to bottom, pixels as 0xAARRGGBB, as Bitmap.getPixels() gives them. */
class Picture(val width: Int, val height: Int, val argb: IntArray) {
    init {
        require(width > 0 && height > 0 && argb.size == width * height) { "an image has to have width × height pixels" }
    }

    /** The middle part that begins at (left, top) and leaves out as much on the other sides. */
    fun middle(left: Int, top: Int): Picture {
        val columns = width - 2 * left
        val rows = height - 2 * top
        return Picture(columns, rows, IntArray(columns * rows) { argb[(top + it / columns) * width + left + it % columns] })
    }
}

/** app/model.properties: lines of `name = value`. */
class Properties(text: String) {
    private val values = text.lines().filter { !it.startsWith("#") && " = " in it }
        .associate { it.substringBefore(" = ") to it.substringAfter(" = ") }

    val names get() = values.keys

    fun text(name: String) = values[name] ?: throw IllegalArgumentException("app/model.properties has no $name")

    fun numbers(name: String) = text(name).split(" ").map { it.toDouble() }

    companion object {
        fun of(bundle: File) = Properties(File(bundle, "app/model.properties").readText())
    }
}

/** Preprocessing as a bundle says. */
class Preprocess(from: Properties) {
    private val colour = from.text("colour")
    private val divide = from.numbers("divide")[0].toFloat()
    private val mean = from.numbers("mean").map { it.toFloat() }
    private val std = from.numbers("std").map { it.toFloat() }
    private val shorterSide = from.text("resize") == "shorter side"
    private val bicubic = from.text("interpolation") == "bicubic"
    private val canvasHeight = from.numbers("canvas")[0].toInt()
    private val canvasWidth = from.numbers("canvas")[1].toInt()
    val height = from.numbers("crop")[0].toInt()
    val width = from.numbers("crop")[1].toInt()
    val channels = if (colour == "GRAY") 1 else 3

    /** The network's input: channel by channel (CHW), in the order of `colour`. */
    fun input(decoded: Picture): FloatArray {
        val planes = crop(decoded)
        val order = if (colour == "BGR") planes.reversed() else planes
        val area = width * height
        val input = FloatArray(area * channels)
        order.forEachIndexed { c, plane ->
            for (i in 0 until area) input[c * area + i] = (plane.pixels[i].toFloat() / divide - mean[c]) / std[c]
        }
        return input
    }

    private fun crop(decoded: Picture): List<Plane> {
        val picture = if (shorterSide) lessLong(decoded) else decoded
        val (wide, high) = resizedSize(picture)
        val columns = taps((wide - canvasWidth) / 2 + (canvasWidth - width) / 2, width, picture.width, wide)
        val rows = taps((high - canvasHeight) / 2 + (canvasHeight - height) / 2, height, picture.height, high)
        val tall = picture.height > high && picture.height - high > 2 * (picture.width - wide)
        return planes(picture).map {
            if (tall) it.alongColumns(rows).alongRows(columns) else it.alongRows(columns).alongColumns(rows)
        }
    }

    private fun lessLong(picture: Picture): Picture {
        val limit = 8 * min(picture.width, picture.height)
        val left = max(0, picture.width - limit) / 2
        val top = max(0, picture.height - limit) / 2
        return if (left == 0 && top == 0) picture else picture.middle(left, top)
    }

    private fun resizedSize(picture: Picture): Pair<Int, Int> {
        if (!shorterSide) return Pair(canvasWidth, canvasHeight)
        val scale = canvasHeight.toDouble() / min(picture.width, picture.height)
        val scaled = { size: Int -> Math.rint(size * scale).toInt() }
        return Pair(max(canvasWidth, scaled(picture.width)), max(canvasHeight, scaled(picture.height)))
    }

    private fun planes(picture: Picture): List<Plane> {
        val shifts = listOf(16, 8, 0)
        fun of(value: (Int) -> Int) =
            Plane(picture.width, picture.height, IntArray(picture.argb.size) { value(picture.argb[it]) })
        if (colour != "GRAY") return shifts.map { shift -> of { it shr shift and 255 } }
        return listOf(of { ((it shr 16 and 255) * 19595 + (it shr 8 and 255) * 38470 + (it and 255) * 7471 + 0x8000) shr 16 })
    }

    private fun taps(begin: Int, count: Int, from: Int, to: Int) = List(count) { tap(begin + it, from.toDouble() / to, from) }

    private fun tap(out: Int, scale: Double, size: Int): Tap {
        val stretch = max(scale, 1.0)
        val support = (if (bicubic) 2.0 else 1.0) * stretch
        val centre = (out + 0.5) * scale
        val first = max(0, (centre - support + 0.5).toInt())
        val end = min(size, (centre + support + 0.5).toInt())
        val weights = (first until end).map { weight((it - centre + 0.5) * (1.0 / stretch)) }
        val sum = weights.sum()
        return Tap(first, IntArray(weights.size) {
            val fixed = (if (sum != 0.0) weights[it] / sum else weights[it]) * (1 shl BITS)
            (if (fixed < 0) fixed - 0.5 else fixed + 0.5).toInt()
        })
    }

    private fun weight(signed: Double): Double {
        val x = abs(signed)
        if (!bicubic) return if (x < 1.0) 1.0 - x else 0.0
        val a = -0.5
        if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
        return if (x < 2.0) (((x - 5.0) * x + 8.0) * x - 4.0) * a else 0.0
    }
}

private const val BITS = 22

/** The pixels of the input that one of the output is a sum of. */
private class Tap(val first: Int, val weights: IntArray) {
    fun sum(pixels: IntArray, at: Int, step: Int): Int {
        var sum = 1 shl (BITS - 1)
        for (i in weights.indices) sum += weights[i] * pixels[at + i * step]
        return (sum shr BITS).coerceIn(0, 255)
    }
}

/** One channel of an image, in eight bits. */
private class Plane(val width: Int, val height: Int, val pixels: IntArray) {
    fun alongRows(taps: List<Tap>) = Plane(taps.size, height, IntArray(taps.size * height) {
        val tap = taps[it % taps.size]
        tap.sum(pixels, it / taps.size * width + tap.first, 1)
    })

    fun alongColumns(taps: List<Tap>) = Plane(width, taps.size, IntArray(width * taps.size) {
        val tap = taps[it / width]
        tap.sum(pixels, tap.first * width + it % width, width)
    })
}
