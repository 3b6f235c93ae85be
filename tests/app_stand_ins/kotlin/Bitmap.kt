// Stands in for Android's Bitmap: what Classifier.kt uses of it.

package android.graphics

class Bitmap(val width: Int, val height: Int, private val argb: IntArray) {
    fun getPixels(pixels: IntArray, offset: Int, stride: Int, x: Int, y: Int, width: Int, height: Int) {
        require(x == 0 && y == 0 && stride == width && width == this.width && height == this.height)
        argb.copyInto(pixels, offset)
    }
}
