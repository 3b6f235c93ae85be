"""Images with what is known of them: the user's folders, Pascal VOC, the embedded digits."""
