"""The TVM backend: kernels, the native `main`, and the runtime that launches its threads."""
