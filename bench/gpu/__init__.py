"""One GPU and the cores beside it: what ONNX Runtime can do there, and how much of it reaches a client."""
