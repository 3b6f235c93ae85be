"""Precision in the ONNX graph: half precision, INT8, what opset 17 needs, and the proof of what an engine executes."""
